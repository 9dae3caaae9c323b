//! Generated stand-ins for the two text tasks of Long Range Arena whose data cannot be shipped. They have names of their
//! own: a number on them is no number on IMDb or on the ACL Anthology.
//!
//! `toy_reviews`: sentences about the film of the review and about another one; the class is the verdict of most sentences
//! about the film itself, which is named in the first sentence only, and a sentence may be negated. Words of praise and
//! blame are equally frequent in both classes. With a smaller `distraction` there are fewer sentences about the other film, and
//! words tell more; at 0 there are none.
//!
//! `toy_citations`: two documents of invented words. Each has a topic, a set of words of its own that it mixes among
//! common ones; a pair is of one topic (class 1) or of two.

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::dialect::Alphabet;
use crate::error::DataError;
use crate::task::{
    MAX_TIME, Numbered, Sample, SampleTarget, Samples, Split, Task, TaskKind, TaskSpec, below,
    read, rng_for,
};

/// Options of `toy_reviews`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct ToyReviewsOptions {
    /// Bytes of a review, at least 64.
    pub time: usize,
    /// Training rows; 0 for no end.
    pub train_rows: usize,
    /// Validation and test rows, each.
    pub test_rows: usize,
    /// Chance that a sentence about the film is followed by one about another film that leans the other way, 0 to 1.
    /// At 1 words alone tell nothing; at 0 they tell most, as in published reviews.
    pub distraction: f64,
}

impl Default for ToyReviewsOptions {
    fn default() -> Self {
        ToyReviewsOptions {
            time: 4000,
            train_rows: 25_000,
            test_rows: 2500,
            distraction: 1.0,
        }
    }
}

/// Options of `toy_citations`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct ToyCitationsOptions {
    /// Bytes of a document, at least 64.
    pub time: usize,
    /// Training rows; 0 for no end.
    pub train_rows: usize,
    /// Validation and test rows, each.
    pub test_rows: usize,
    /// Topics that documents are of, at least 2.
    pub topics: u32,
}

impl Default for ToyCitationsOptions {
    fn default() -> Self {
        ToyCitationsOptions {
            time: 4000,
            train_rows: 25_000,
            test_rows: 2500,
            topics: 32,
        }
    }
}

/// Which of the two.
enum Toy {
    Reviews { distraction: f64 },
    Citations { topics: u32 },
}

/// The options that both have.
struct Size {
    time: usize,
    train_rows: usize,
    test_rows: usize,
}

pub(crate) fn reviews(options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (ToyReviewsOptions, _) = read("toy_reviews", options)?;
    if !(0.0..=1.0).contains(&o.distraction) {
        return Err(DataError::Option {
            task: "toy_reviews",
            message: format!("expected distraction from 0 to 1, got {}", o.distraction),
        });
    }
    let size = Size {
        time: o.time,
        train_rows: o.train_rows,
        test_rows: o.test_rows,
    };
    let toy = Toy::Reviews {
        distraction: o.distraction,
    };
    make("toy_reviews", toy, size, resolved)
}

pub(crate) fn citations(options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (ToyCitationsOptions, _) = read("toy_citations", options)?;
    if !(2..=MAX_TOPICS).contains(&o.topics) {
        return Err(DataError::Option {
            task: "toy_citations",
            message: format!("expected topics from 2 to {MAX_TOPICS}, got {}", o.topics),
        });
    }
    let size = Size {
        time: o.time,
        train_rows: o.train_rows,
        test_rows: o.test_rows,
    };
    let toy = Toy::Citations { topics: o.topics };
    make("toy_citations", toy, size, resolved)
}

fn make(
    name: &'static str,
    toy: Toy,
    size: Size,
    resolved: Map<String, Value>,
) -> Result<Box<dyn Task>, DataError> {
    let time = size.time;
    if !(64..=MAX_TIME).contains(&time) || size.test_rows == 0 {
        return Err(DataError::Option {
            task: name,
            message: format!(
                "expected time of at least 64 and test_rows of at least 1, got {time} and {}",
                size.test_rows
            ),
        });
    }
    let (description, kind) = match toy {
        Toy::Reviews { .. } => (
            "Is a generated review for or against its film?",
            TaskKind::Classify,
        ),
        Toy::Citations { .. } => ("Are two generated documents of one topic?", TaskKind::Match),
    };
    Ok(Box::new(Numbered {
        spec: TaskSpec {
            name: name.into(),
            description: format!("{description} {time} bytes each."),
            source: "generated here; stands in where the published texts are not at hand".into(),
            kind,
            time,
            vocab: Alphabet::Bytes.vocab(),
            classes: 2,
            floor: Some(0.5),
            options: resolved,
        },
        samples: ToyText { toy, size },
        tokenizer: None,
    }))
}

struct ToyText {
    toy: Toy,
    size: Size,
}

const FILMS: [&str; 8] = [
    "Harbour",
    "Lanterns",
    "The Orchard",
    "Nine Winters",
    "Saltwater",
    "Paper Kings",
    "Undertow",
    "The Ferry",
];
const PARTS: [&str; 8] = [
    "the acting",
    "the plot",
    "the music",
    "the camera work",
    "the ending",
    "the dialogue",
    "the pace",
    "the cast",
];
const PRAISE: [&str; 6] = [
    "wonderful",
    "superb",
    "moving",
    "clever",
    "gripping",
    "charming",
];
const BLAME: [&str; 6] = [
    "dreadful", "tedious", "clumsy", "hollow", "dull", "confused",
];

fn one_of<'a>(rng: &mut ChaCha8Rng, words: &[&'a str]) -> &'a str {
    words[below(rng, words.len() as u32) as usize]
}

/// A review of about `time` bytes with the verdict asked for.
fn review(rng: &mut ChaCha8Rng, good: bool, time: usize, distraction: f64) -> String {
    let film = one_of(rng, &FILMS);
    let other = loop {
        let other = one_of(rng, &FILMS);
        if other != film {
            break other;
        }
    };
    let mut text = format!("A review of {film}. ");
    // The film's sentences lean to the verdict, those of the other film lean away as much, so that words alone tell nothing.
    for index in 0.. {
        let about_film = index % 2 == 0;
        // A whole pair of sentences or none, so that a cut favours no side.
        if about_film && text.len() + 2 * 64 > time && index > 0 {
            break;
        }
        if !about_film && distraction < 1.0 && rng.random::<f64>() >= distraction {
            continue;
        }
        let leans = if about_film { good } else { !good };
        let positive = if rng.random::<f64>() < 0.8 {
            leans
        } else {
            !leans
        };
        let negated = rng.random::<f64>() < 0.3;
        let words = if positive == negated { &BLAME } else { &PRAISE };
        let (part, word) = (one_of(rng, &PARTS), one_of(rng, words));
        let title = if about_film { film } else { other };
        let verb = if negated { "was not" } else { "was" };
        text += &format!("In {title} {part} {verb} {word}. ");
    }
    text
}

/// An invented word, the same for the same number.
fn word(number: u64) -> String {
    let rng = &mut rng_for(&[0x776f_7264, number]);
    let syllables = 2 + below(rng, 2);
    (0..syllables)
        .map(|_| {
            let consonant = b"bdfghklmnprstvz"[below(rng, 15) as usize] as char;
            let vowel = b"aeiou"[below(rng, 5) as usize] as char;
            format!("{consonant}{vowel}")
        })
        .collect()
}

/// Most topics, and words that belong to one of them.
const MAX_TOPICS: u32 = 1000;
const TOPIC_WORDS: u32 = 6;
/// Words that belong to none.
const COMMON: u32 = 200;

fn document(rng: &mut ChaCha8Rng, topic: u32, time: usize) -> String {
    let mut text = String::new();
    while text.len() < time {
        let number = match rng.random::<f64>() < 0.25 {
            true => COMMON + topic * TOPIC_WORDS + below(rng, TOPIC_WORDS),
            false => below(rng, COMMON),
        };
        text += &word(u64::from(number));
        text.push(' ');
    }
    text
}

impl Samples for ToyText {
    fn count(&self, split: Split) -> Option<usize> {
        split.rows(self.size.train_rows, self.size.test_rows)
    }

    fn sample(
        &self,
        _: Split,
        _: usize,
        _: u64,
        rng: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError> {
        let time = self.size.time;
        let class = rng.random::<bool>();
        let encode = |text: String| Alphabet::Bytes.encode(text.as_bytes(), time);
        let (tokens, target) = match self.toy {
            Toy::Reviews { distraction } => {
                let tokens = encode(review(rng, class, time, distraction));
                (tokens, SampleTarget::Class(i64::from(class)))
            }
            Toy::Citations { topics } => {
                let topic = below(rng, topics);
                let other = match class {
                    true => topic,
                    false => (topic + 1 + below(rng, topics - 1)) % topics,
                };
                let mut tokens = encode(document(rng, topic, time));
                let first = tokens.len();
                tokens.extend(encode(document(rng, other, time)));
                let class = i64::from(class);
                (tokens, SampleTarget::Pair { class, first })
            }
        };
        Ok(Sample {
            tokens,
            target,
            pixels: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Words of praise among those of praise and blame, for each class.
    fn praise(distraction: f64) -> [f64; 2] {
        let (mut praise, mut counts) = ([0usize; 2], [0usize; 2]);
        for index in 0..300 {
            let good = index % 2 == 0;
            let text = review(&mut rng_for(&[1, index]), good, 1000, distraction);
            assert!(text.len() <= 1000, "{}", text.len());
            let found = |words: &[&str]| {
                words
                    .iter()
                    .map(|word| text.matches(word).count())
                    .sum::<usize>()
            };
            praise[usize::from(good)] += found(&PRAISE);
            counts[usize::from(good)] += found(&PRAISE) + found(&BLAME);
        }
        [0, 1].map(|class| praise[class] as f64 / counts[class] as f64)
    }

    #[test]
    fn words_alone_tell_the_verdict_only_without_distraction() {
        let [bad, good] = praise(1.0);
        assert!((bad - good).abs() < 0.05, "{bad} {good}");
        // 0.8 lean to the verdict and 0.3 are negated: 0.62 of the words of a good review praise.
        let [bad, good] = praise(0.0);
        assert!((good - 0.62).abs() < 0.04 && (bad - 0.38).abs() < 0.04);

        let made = reviews(&json!({"time": 100})).expect("fits");
        assert!(made.spec().kind == TaskKind::Classify);
        assert!(reviews(&json!({"time": 9})).is_err());
        assert!(reviews(&json!({"distraction": 1.5})).is_err());
        assert!(citations(&json!({"topics": 1})).is_err());
    }

    #[test]
    fn topics_share_their_words() {
        let text = |topic, index| document(&mut rng_for(&[index]), topic, 2000);
        let own: Vec<String> = (0..TOPIC_WORDS)
            .map(|i| word(u64::from(COMMON + i)))
            .collect();
        let hits = |text: String| {
            text.split(' ')
                .filter(|found| own.iter().any(|word| word == found))
                .count()
        };
        assert!(hits(text(0, 1)) > 50);
        assert!(hits(text(5, 1)) < 20);
    }
}
