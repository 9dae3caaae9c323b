//! Stories of the bAbI kind with a question at the end, alone or hidden in other text.
//!
//! Weston et al. (2015), arXiv 1502.05698: questions 1 to 3 (where is the person; where is the thing; where was it before), 15
//! (deduction) and 16 (induction), told by a simulator of our own after the published one: six rooms, four people, three things.
//! With `time`, BABILong's construction (Kuratov et al. (2024), arXiv 2406.10149): the sentences of the story stand in order at
//! random places of a longer text, here Shakespeare. Text is bytes; the bytes of the answer are scored. These are generated
//! stories, not the released files.

mod world;

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::world::{Story, deduction, induction, places};
use crate::error::DataError;
use crate::needle::scored;
use crate::task::{
    MAX_TIME, Numbered, Sample, Samples, Split, Task, TaskKind, TaskSpec, below, read,
};
use crate::text::SHAKESPEARE;
use crate::tokenizer::Tokenizer;

/// Questions that can be asked.
const QUESTIONS: [u32; 5] = [1, 2, 3, 15, 16];
/// Bytes of the longest story that is told.
const LONGEST: usize = 2048;

/// Options of `babi`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct BabiOptions {
    /// Number of the question: 1, 2, 3, 15 or 16.
    pub question: u32,
    /// Bytes of a row, the story being hidden in other text; 0: the story alone.
    pub time: usize,
    /// Training rows; 0 for no end.
    pub train_rows: usize,
    /// Validation and test rows, each.
    pub test_rows: usize,
}

impl Default for BabiOptions {
    fn default() -> Self {
        BabiOptions {
            question: 1,
            time: 0,
            train_rows: 0,
            test_rows: 500,
        }
    }
}

pub(crate) fn task(options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (options, resolved): (BabiOptions, _) = read("babi", options)?;
    let wrong = |message: String| {
        Err(DataError::Option {
            task: "babi",
            message,
        })
    };
    if !QUESTIONS.contains(&options.question) {
        return wrong(format!(
            "expected question to be one of {QUESTIONS:?}, got {}",
            options.question
        ));
    }
    let hidden = options.time > 0;
    if hidden && !(LONGEST..=MAX_TIME).contains(&options.time) || options.test_rows == 0 {
        return wrong(format!(
            "expected time of 0 or at least {LONGEST} and test_rows of at least 1, got {} and {}",
            options.time, options.test_rows
        ));
    }
    let time = if hidden { options.time } else { LONGEST };
    let question = options.question;
    Ok(Box::new(Numbered {
        spec: TaskSpec {
            name: "babi".into(),
            description: format!(
                "Stories with question {question} of bAbI{}, {time} bytes at most; the bytes of the answer are scored.",
                if hidden { ", hidden in Shakespeare" } else { "" }
            ),
            source: "arXiv 1502.05698; hidden: BABILong, arXiv 2406.10149; generated, not the released stories".into(),
            kind: TaskKind::NextToken,
            time,
            vocab: Tokenizer::Bytes.vocab(),
            classes: 0,
            floor: None,
            options: resolved,
        },
        samples: Stories(options),
        tokenizer: Some(Tokenizer::Bytes),
    }))
}

struct Stories(BabiOptions);

fn tell(question: u32, rng: &mut ChaCha8Rng) -> Story {
    loop {
        let story = match question {
            15 => deduction(rng),
            16 => induction(rng),
            place => places(place, rng),
        };
        if story.length() <= LONGEST {
            return story;
        }
    }
}

/// Sentences of the plays of ten words or more that fill `room` bytes, the last one cut.
fn filler(split: Split, room: usize, rng: &mut ChaCha8Rng) -> Vec<String> {
    let edge = SHAKESPEARE.len() / 10 * 9;
    let run = match split {
        Split::Train => &SHAKESPEARE.as_bytes()[..edge],
        Split::Validation | Split::Test => &SHAKESPEARE.as_bytes()[edge..],
    };
    let run = String::from_utf8_lossy(run);
    let sentences = run.split_inclusive(['.', '!', '?']);
    let long: Vec<String> = sentences
        .map(|sentence| sentence.split_whitespace().collect::<Vec<_>>())
        .filter(|words| words.len() >= 10)
        .map(|words| words.join(" "))
        .filter(|sentence| sentence.is_ascii())
        .collect();
    let start = below(rng, long.len() as u32) as usize;
    let (mut left, mut held) = (room, Vec::new());
    for sentence in long.iter().cycle().skip(start) {
        if left <= 1 {
            break;
        }
        let cut = sentence.len().min(left - 1);
        held.push(sentence[..cut].to_string());
        left -= cut + 1;
    }
    held
}

impl Stories {
    /// Question and answer.
    fn write(&self, split: Split, rng: &mut ChaCha8Rng) -> (String, String) {
        let story = tell(self.0.question, rng);
        let mut sentences = story.sentences;
        if self.0.time > 0 {
            let used: usize = sentences.iter().map(|sentence| sentence.len() + 1).sum();
            let room = self.0.time - used - story.question.len() - story.answer.len() - 1;
            let mut text = filler(split, room, rng);
            let gaps = text.len() as u32 + 1;
            let mut at: Vec<u32> = sentences.iter().map(|_| below(rng, gaps)).collect();
            at.sort_unstable();
            for (at, sentence) in at.iter().zip(sentences).rev() {
                text.insert(*at as usize, sentence);
            }
            sentences = text;
        }
        let mut text = sentences.join("\n");
        text += "\n";
        (text + &story.question, format!(" {}", story.answer))
    }
}

impl Samples for Stories {
    fn count(&self, split: Split) -> Option<usize> {
        split.rows(self.0.train_rows, self.0.test_rows)
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

#[cfg(test)]
mod tests {
    use super::world::ROOMS;
    use super::*;
    use crate::task::rng_for;
    use serde_json::json;
    use std::collections::HashMap;

    /// Reads the story as a person would, sentence by sentence: rooms of people, holders and the rooms of things.
    fn solve(text: &str, question: &str) -> String {
        let mut rooms: HashMap<String, String> = HashMap::new();
        let mut holder: HashMap<String, String> = HashMap::new();
        let mut seen: HashMap<String, Vec<String>> = HashMap::new();
        let note = |seen: &mut HashMap<String, Vec<String>>, thing: &str, room: &str| {
            let list = seen.entry(thing.to_string()).or_default();
            if list.last().map(String::as_str) != Some(room) {
                list.push(room.to_string());
            }
        };
        for sentence in text.lines() {
            let words: Vec<&str> = sentence.trim_end_matches('.').split(' ').collect();
            let (who, last) = (words[0].to_string(), words[words.len() - 1].to_string());
            if ROOMS.contains(&last.as_str()) {
                let held = holder.iter().filter(|(_, held)| **held == who);
                let held: Vec<String> = held.map(|(thing, _)| thing.clone()).collect();
                held.iter().for_each(|thing| note(&mut seen, thing, &last));
                rooms.insert(who, last);
            } else if ["grabbed", "took", "got", "picked"].contains(&words[1]) {
                if let Some(room) = rooms.get(&who) {
                    note(&mut seen, &last, room);
                }
                holder.insert(last, who);
            } else {
                holder.remove(&last);
            }
        }
        let asked: Vec<&str> = question.trim_end_matches('?').split(' ').collect();
        match asked[..] {
            ["Where", "is", "the", thing] => seen[thing].last().cloned().unwrap_or_default(),
            ["Where", "is", who] => rooms[who].clone(),
            ["Where", "was", "the", thing, "before", "the", room] => {
                let list = &seen[thing];
                let at = list
                    .iter()
                    .rposition(|held| held == room)
                    .expect("was there");
                list[at - 1].clone()
            }
            _ => panic!("{question}"),
        }
    }

    #[test]
    fn answers_agree_with_a_reader() {
        for question in [1, 2, 3] {
            let mut answers: HashMap<String, usize> = HashMap::new();
            for index in 0..2000 {
                let story = tell(question, &mut rng_for(&[9, u64::from(question), index]));
                let text = story.sentences.join("\n");
                assert_eq!(
                    solve(&text, &story.question),
                    story.answer,
                    "{text}\n{}",
                    story.question
                );
                *answers.entry(story.answer).or_default() += 1;
            }
            assert_eq!(answers.len(), 6);
            // 2,000 over six rooms; things, unlike people, begin in two of them.
            let even = answers.values().all(|count| (270..400).contains(count));
            assert!(question > 1 || even, "{answers:?}");
        }
    }

    #[test]
    fn deductions_follow_from_the_text() {
        for index in 0..200 {
            let story = tell(15, &mut rng_for(&[9, 15, index]));
            let who = story.question.split(' ').nth(2).expect("a name");
            let kind = story
                .sentences
                .iter()
                .find_map(|line| line.strip_prefix(&format!("{who} is a ")));
            let kind = kind.expect("said").trim_end_matches('.');
            let fear = format!("afraid of {}", world::plural(&story.answer));
            let many = world::plural(kind);
            let rule =
                |line: &&String| line.to_lowercase().starts_with(&many) && line.contains(&fear);
            assert_eq!(story.sentences.iter().filter(rule).count(), 1, "{story:?}");
            let story = tell(16, &mut rng_for(&[9, 16, index]));
            let who = story
                .question
                .trim_end_matches('?')
                .split(' ')
                .nth(3)
                .expect("a name");
            let said =
                |name: &str, what: &str| story.sentences.contains(&format!("{name} is {what}."));
            let kind = story
                .sentences
                .iter()
                .find_map(|line| line.strip_prefix(&format!("{who} is a ")));
            let kind = kind.expect("said").trim_end_matches('.');
            let same = |line: &&String| line.ends_with(&format!(" is a {kind}."));
            let names = story.sentences.iter().filter(same);
            let names = names
                .filter_map(|line| line.split(' ').next())
                .filter(|name| *name != who);
            assert!(
                names.into_iter().any(|name| said(name, &story.answer)),
                "{story:?}"
            );
        }
    }

    #[test]
    fn hidden_stories_fill_their_rows_and_keep_their_order() {
        let options = BabiOptions {
            question: 2,
            time: 3000,
            ..BabiOptions::default()
        };
        let stories = Stories(options);
        for index in 0..20 {
            let alone = tell(2, &mut rng_for(&[1, index]));
            let (text, answer) = stories.write(Split::Test, &mut rng_for(&[1, index]));
            assert_eq!(answer.trim(), alone.answer);
            assert!((2990..=3000).contains(&(text.len() + answer.len())));
            let mut from = 0;
            for sentence in &alone.sentences {
                let at = text[from..].find(&format!("{sentence}\n"));
                from += at.expect("in order") + sentence.len();
            }
        }
        for wrong in [
            json!({"question": 4}),
            json!({"time": 100}),
            json!({"test_rows": 0}),
        ] {
            assert!(task(&wrong).is_err(), "{wrong}");
        }
    }
}
