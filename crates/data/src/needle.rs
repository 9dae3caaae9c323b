//! Tests of long contexts: something said once in a long text is asked for at its end.
//!
//! - `passkey`: a number between lines of filler (Mohtashami and Jaggi (2023), arXiv 2305.16300, as YaRN measures it);
//! - `needle`: RULER's needles in a haystack (Hsieh et al. (2024), arXiv 2404.06654), single 1 to 3 and many keys 1 to 3;
//! - `variable_tracking`: RULER's chain of assignments, one chain of four hops.
//!
//! Text is bytes. The model reads question and answer as one row, and the bytes of the answer are scored: an accuracy is
//! per byte. RULER's essays cannot be shipped: the haystack of `text` is Shakespeare, so those numbers are ours alone.

mod words;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::words::{ADJECTIVES, NOUNS};
use crate::error::DataError;
use crate::task::{
    MAX_TIME, Numbered, Sample, SampleTarget, Samples, Split, Task, TaskKind, TaskSpec, below,
    distinct, read,
};
use crate::text::SHAKESPEARE;
use crate::tokenizer::Tokenizer;

/// The filler of both papers.
const NOISE: &str =
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.";
/// Shortest rows: the words of the question alone take most of it.
const LEAST: usize = 768;

/// Which of RULER's needles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Needle {
    /// A number for a pair of words, in filler.
    #[default]
    Single1,
    /// A number for a pair of words, in text.
    Single2,
    /// A UUID for a pair of words, in text.
    Single3,
    /// As single 2, with three other keys.
    Multikey1,
    /// The haystack is needles: numbers for words.
    Multikey2,
    /// The haystack is needles: UUIDs for UUIDs.
    Multikey3,
}

/// Options of `needle`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct NeedleOptions {
    /// Which.
    pub variant: Needle,
    /// Bytes of a row at most.
    pub time: usize,
    /// Training rows; 0 for no end.
    pub train_rows: usize,
    /// Validation and test rows, each.
    pub test_rows: usize,
}

impl Default for NeedleOptions {
    fn default() -> Self {
        NeedleOptions {
            variant: Needle::Single1,
            time: 4096,
            train_rows: 0,
            test_rows: 500,
        }
    }
}

/// Options of `passkey` and `variable_tracking`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct ContextOptions {
    /// Bytes of a row at most.
    pub time: usize,
    /// Training rows; 0 for no end.
    pub train_rows: usize,
    /// Validation and test rows, each.
    pub test_rows: usize,
}

impl Default for ContextOptions {
    fn default() -> Self {
        ContextOptions {
            time: 4096,
            train_rows: 0,
            test_rows: 500,
        }
    }
}

#[derive(Clone, Copy)]
enum Kind {
    Passkey,
    Needle(Needle),
    Variables,
}

pub(crate) fn passkey(options: &Value) -> Result<Box<dyn Task>, DataError> {
    context("passkey", Kind::Passkey, options)
}

pub(crate) fn variables(options: &Value) -> Result<Box<dyn Task>, DataError> {
    context("variable_tracking", Kind::Variables, options)
}

pub(crate) fn needle(options: &Value) -> Result<Box<dyn Task>, DataError> {
    make("needle", options, |o: &NeedleOptions| {
        let rows = [o.time, o.train_rows, o.test_rows];
        (Kind::Needle(o.variant), rows)
    })
}

fn context(name: &'static str, kind: Kind, options: &Value) -> Result<Box<dyn Task>, DataError> {
    make(name, options, |o: &ContextOptions| {
        (kind, [o.time, o.train_rows, o.test_rows])
    })
}

fn make<O: DeserializeOwned + Serialize + Default>(
    name: &'static str,
    options: &Value,
    parts: impl Fn(&O) -> (Kind, [usize; 3]),
) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (O, _) = read(name, options)?;
    let (kind, [time, train_rows, test_rows]) = parts(&o);
    if !(LEAST..=MAX_TIME).contains(&time) || test_rows == 0 {
        return Err(DataError::Option {
            task: name,
            message: format!(
                "expected time of at least {LEAST} and test_rows of at least 1, got {time} and {test_rows}"
            ),
        });
    }
    let (what, source) = match kind {
        Kind::Passkey => (
            "Passkey: a number between lines of filler",
            "arXiv 2305.16300, arXiv 2309.00071",
        ),
        Kind::Needle(_) => (
            "Needle in a haystack",
            "RULER, arXiv 2404.06654; the essays are replaced by Shakespeare",
        ),
        Kind::Variables => (
            "Variable tracking: the names that a chain of assignments gives one value",
            "RULER, arXiv 2404.06654",
        ),
    };
    Ok(Box::new(Numbered {
        spec: TaskSpec {
            name: name.into(),
            description: format!(
                "{what}, {time} bytes at most; the bytes of the answer are scored."
            ),
            source: source.into(),
            kind: TaskKind::NextToken,
            time,
            vocab: Tokenizer::Bytes.vocab(),
            classes: 0,
            floor: None,
            options: resolved,
        },
        samples: Haystack {
            kind,
            time,
            train_rows,
            test_rows,
        },
        tokenizer: Some(Tokenizer::Bytes),
    }))
}

struct Haystack {
    kind: Kind,
    time: usize,
    train_rows: usize,
    test_rows: usize,
}

fn number(rng: &mut ChaCha8Rng, low: u32, high: u32) -> String {
    (low + below(rng, high - low)).to_string()
}

fn pair(rng: &mut ChaCha8Rng) -> String {
    let pick = |rng: &mut ChaCha8Rng, words: &[&'static str]| {
        words[below(rng, words.len() as u32) as usize]
    };
    format!("{}-{}", pick(rng, ADJECTIVES), pick(rng, NOUNS))
}

/// A random UUID, version 4.
fn uuid(rng: &mut ChaCha8Rng) -> String {
    let mut bytes: [u8; 16] = rng.random();
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    [
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    ]
    .join("-")
}

/// Lines of filler of at most `room` bytes with the needles among them at random places, in order.
fn among(rng: &mut ChaCha8Rng, room: usize, needles: &[String]) -> String {
    let used: usize = needles.iter().map(|needle| needle.len() + 1).sum();
    let lines = (room.saturating_sub(used) / (NOISE.len() + 1)).max(needles.len());
    let mut places = distinct(rng, 0, lines as u32 + 1, needles.len());
    places.sort_unstable();
    let mut text: Vec<&str> = vec![NOISE; lines];
    for (place, needle) in places.iter().zip(needles).rev() {
        text.insert(*place as usize, needle);
    }
    text.join("\n")
}

/// Sentences of the shipped plays with the needles between them, at depths that are multiples of a fortieth.
fn in_text(rng: &mut ChaCha8Rng, split: Split, room: usize, needles: &[String]) -> String {
    let used: usize = needles.iter().map(|needle| needle.len() + 1).sum();
    let room = room.saturating_sub(used);
    let edge = SHAKESPEARE.len() / 10 * 9;
    let run = match split {
        Split::Train => 0..edge,
        Split::Validation | Split::Test => edge..SHAKESPEARE.len(),
    };
    let run = &SHAKESPEARE.as_bytes()[run];
    let start = below(rng, run.len() as u32) as usize;
    // The window goes round where the text ends, as the essays are repeated.
    let window: Vec<u8> = run.iter().cycle().skip(start).take(room).copied().collect();
    let window = String::from_utf8_lossy(&window).replace(char::REPLACEMENT_CHARACTER, " ");
    let mut sentences: Vec<String> = window
        .split_inclusive(['.', '!', '?'])
        .map(String::from)
        .collect();
    let mut depths = distinct(rng, 0, 41, needles.len());
    depths.sort_unstable();
    for (depth, needle) in depths.iter().zip(needles).rev() {
        let place = (sentences.len() * *depth as usize / 40).min(sentences.len());
        sentences.insert(place, format!(" {needle}"));
    }
    sentences.concat()
}

impl Haystack {
    /// Question and answer, together at most `time` bytes.
    fn write(&self, split: Split, rng: &mut ChaCha8Rng) -> (String, String) {
        match self.kind {
            Kind::Passkey => self.passkey(rng),
            Kind::Needle(needle) => self.needle(needle, split, rng),
            Kind::Variables => self.variables(rng),
        }
    }

    fn passkey(&self, rng: &mut ChaCha8Rng) -> (String, String) {
        const TASK: &str = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about the important information there.";
        let key = number(rng, 1, 50_001);
        let line = format!("The pass key is {key}. Remember it. {key} is the pass key.");
        let question = "What is the pass key? The pass key is";
        let used = TASK.len() + line.len() + question.len() + key.len() + 6;
        let room = self.time.saturating_sub(used);
        let garbage: String = format!("{NOISE} ").chars().cycle().take(room).collect();
        let before = below(rng, room as u32 + 1) as usize;
        let (prefix, suffix) = (&garbage[..before], &garbage[..room - before]);
        (
            format!("{TASK}\n{prefix}\n{line}\n{suffix}\n{question}"),
            format!(" {key}"),
        )
    }

    fn needle(&self, needle: Needle, split: Split, rng: &mut ChaCha8Rng) -> (String, String) {
        let uuids = matches!(needle, Needle::Single3 | Needle::Multikey3);
        let kind = if uuids { "uuid" } else { "number" };
        let value = |rng: &mut ChaCha8Rng| match uuids {
            true => uuid(rng),
            false => number(rng, 1_000_000, 10_000_000),
        };
        let key = |rng: &mut ChaCha8Rng| match needle {
            Needle::Multikey3 => uuid(rng),
            _ => pair(rng),
        };
        let say = |key: &str, value: &str| {
            format!("One of the special magic {kind}s for {key} is: {value}.")
        };
        let (asked, wanted) = (key(rng), value(rng));
        let head = format!(
            "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} afterwards.\n"
        );
        let tail = format!(
            "\nWhat is the special magic {kind} for {asked} mentioned in the provided text? The special magic {kind} for {asked} mentioned in the provided text is"
        );
        let room = self
            .time
            .saturating_sub(head.len() + tail.len() + wanted.len() + 1);
        let mut needles = vec![say(&asked, &wanted)];
        let other = |rng: &mut ChaCha8Rng| loop {
            let other = key(rng);
            if other != asked {
                break say(&other, &value(rng));
            }
        };
        let body = match needle {
            Needle::Single1 => among(rng, room, &needles),
            Needle::Single2 | Needle::Single3 => in_text(rng, split, room, &needles),
            Needle::Multikey1 => {
                needles.extend((0..3).map(|_| other(rng)));
                let at = below(rng, 4) as usize;
                needles.swap(0, at);
                in_text(rng, split, room, &needles)
            }
            Needle::Multikey2 | Needle::Multikey3 => {
                let mut left = room.saturating_sub(needles[0].len() + 1);
                loop {
                    let next = other(rng);
                    if next.len() + 1 > left {
                        break;
                    }
                    left -= next.len() + 1;
                    needles.push(next);
                }
                let at = below(rng, needles.len() as u32) as usize;
                needles.swap(0, at);
                needles.join("\n")
            }
        };
        (format!("{head}{body}{tail}"), format!(" {wanted}"))
    }

    fn variables(&self, rng: &mut ChaCha8Rng) -> (String, String) {
        const HOPS: usize = 4;
        let mut names: Vec<String> = Vec::new();
        while names.len() <= HOPS {
            let name: String = (0..5)
                .map(|_| (b'A' + below(rng, 26) as u8) as char)
                .collect();
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let value = number(rng, 10_000, 99_999);
        let mut chain = vec![format!("VAR {} = {value}", names[0])];
        chain.extend(
            names
                .windows(2)
                .map(|pair| format!("VAR {} = VAR {}", pair[1], pair[0])),
        );
        let head = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n";
        let tail = format!(
            "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain(s) of variable assignment in the text above, {} variables are assigned the value {value}, they are:",
            names.len()
        );
        let answer = format!(" {}", names.join(" "));
        let room = self
            .time
            .saturating_sub(head.len() + tail.len() + answer.len());
        (format!("{head}{}{tail}", among(rng, room, &chain)), answer)
    }
}

impl Samples for Haystack {
    fn count(&self, split: Split) -> Option<usize> {
        split.rows(self.train_rows, self.test_rows)
    }

    fn sample(
        &self,
        split: Split,
        _: usize,
        _: u64,
        rng: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError> {
        let (question, answer) = self.write(split, rng);
        scored(question, &answer)
    }
}

/// A row of bytes whose answer is scored.
pub(crate) fn scored(question: String, answer: &str) -> Result<Sample, DataError> {
    let asked = question.len();
    let ids = Tokenizer::Bytes.encode(&(question + answer))?;
    let targets = ids.iter().enumerate().skip(1);
    let targets = targets.map(|(at, id)| if at < asked { -100 } else { i64::from(*id) });
    Ok(Sample {
        tokens: ids[..ids.len() - 1].to_vec(),
        target: SampleTarget::Tokens(targets.collect()),
        pixels: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::rng_for;
    use serde_json::json;

    /// What is asked for stands in the text once, in a row that is no longer than it may be and not much shorter.
    #[test]
    fn the_answer_is_in_the_haystack() {
        let needles = [
            "single1",
            "single2",
            "single3",
            "multikey1",
            "multikey2",
            "multikey3",
        ];
        for variant in needles {
            let options = json!({"variant": variant, "time": 1500});
            needle(&options).expect("fits");
            let kind: Needle = serde_json::from_value(json!(variant)).expect("known");
            check(Kind::Needle(kind), |text, answer| {
                text.matches(answer.trim()).count() == 1
            });
        }
        check(Kind::Passkey, |text, answer| {
            text.contains(&format!("The pass key is{answer}. Remember it.{answer} is"))
        });
        check(Kind::Variables, |text, answer| {
            answer
                .split_whitespace()
                .all(|name| text.contains(&format!("VAR {name} = ")))
        });
        assert!(passkey(&json!({"time": 100})).is_err());
    }

    fn check(kind: Kind, holds: impl Fn(&str, &str) -> bool) {
        let haystack = Haystack {
            kind,
            time: 1500,
            train_rows: 0,
            test_rows: 1,
        };
        for index in 0..20 {
            let split = if index % 2 == 0 {
                Split::Train
            } else {
                Split::Test
            };
            let (text, answer) = haystack.write(split, &mut rng_for(&[5, index]));
            let length = text.len() + answer.len();
            assert!(length <= 1500 && length > 1300, "{length}: {text}");
            assert!(holds(&text, &answer), "{answer} in {text}");
            let sample = haystack
                .sample(split, 0, 0, &mut rng_for(&[5, index]))
                .expect("a row");
            let SampleTarget::Tokens(targets) = sample.target else {
                panic!("tokens")
            };
            assert_eq!(
                targets.iter().filter(|target| **target >= 0).count(),
                answer.len()
            );
        }
    }
}
