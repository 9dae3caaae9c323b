//! Tokens as text while they come: whole characters only, and nothing of a stop string.

use std::sync::Arc;

use anyformer_data::Tokenizer;
use tokio::sync::mpsc::UnboundedSender;

use crate::engine::job::{End, Go, JobError, Sink, Token};

const REPLACEMENT: &[u8] = "\u{FFFD}".as_bytes();
/// Tokens that one character may be spread over.
const LONGEST: usize = 8;

/// Tokens to text. Each token is decoded behind the ones before it, because some tokenizers write the first token of a
/// text differently.
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    ids: Vec<u32>,
    /// Where decoding starts, and up to where the text has been taken.
    from: usize,
    taken: usize,
    held: Vec<u8>,
}

impl Detokenizer {
    /// Nothing decoded yet.
    pub fn new(tokenizer: Arc<Tokenizer>) -> Self {
        Detokenizer {
            tokenizer,
            ids: Vec::new(),
            from: 0,
            taken: 0,
            held: Vec::new(),
        }
    }

    /// The text that can be shown after one more token.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        let before = self
            .tokenizer
            .decode(&self.ids[self.from..self.taken])
            .len();
        let now = self.tokenizer.decode(&self.ids[self.from..]);
        let fresh = now.get(before..).unwrap_or_default();
        let waits = self.ids.len() - self.taken < LONGEST;
        // A tokenizer that gives whole characters only marks an unfinished one.
        if fresh.is_empty() || fresh.ends_with(REPLACEMENT) && waits {
            return String::new();
        }
        self.held.extend_from_slice(fresh);
        self.from = self.taken;
        self.taken = self.ids.len();
        self.whole()
    }

    /// What has come whole; bytes that can never become a character come as U+FFFD.
    fn whole(&mut self) -> String {
        let mut text = String::new();
        loop {
            let error = match std::str::from_utf8(&self.held) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.held.clear();
                    return text;
                }
                Err(error) => error,
            };
            let valid = error.valid_up_to();
            text.push_str(&String::from_utf8_lossy(&self.held[..valid]));
            self.held.drain(..valid);
            let Some(wrong) = error.error_len() else {
                return text;
            };
            text.push(char::REPLACEMENT_CHARACTER);
            self.held.drain(..wrong);
        }
    }

    /// What is left when no more will come.
    pub fn finish(&mut self) -> String {
        let before = self
            .tokenizer
            .decode(&self.ids[self.from..self.taken])
            .len();
        let now = self.tokenizer.decode(&self.ids[self.from..]);
        self.held
            .extend_from_slice(now.get(before..).unwrap_or_default());
        self.taken = self.ids.len();
        let text = self.whole();
        let rest = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        text + &rest
    }
}

/// Texts that end an answer and are not part of it.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    strings: Vec<String>,
    held: String,
}

impl StopStrings {
    /// Empty strings are left out.
    pub fn new(strings: Vec<String>) -> Self {
        StopStrings {
            strings: strings
                .into_iter()
                .filter(|text| !text.is_empty())
                .collect(),
            held: String::new(),
        }
    }

    /// The text that is surely no beginning of a stop string, and whether one was found.
    pub fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let found = self
            .strings
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min();
        if let Some(at) = found {
            let mut shown = std::mem::take(&mut self.held);
            shown.truncate(at);
            return (shown, true);
        }
        // The longest end that begins a stop string waits.
        let begins = |at: &usize| {
            let tail = &self.held[*at..];
            self.strings.iter().any(|stop| stop.starts_with(tail))
        };
        let longest = self.strings.iter().map(String::len).max().unwrap_or(0);
        let first = self.held.len().saturating_sub(longest);
        let starts = (first..self.held.len()).filter(|at| self.held.is_char_boundary(*at));
        let cut = { starts }.find(begins).unwrap_or(self.held.len());
        let waits = self.held.split_off(cut);
        (std::mem::replace(&mut self.held, waits), false)
    }

    /// What was held back when no more will come.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// What comes out of a [`TextSink`].
#[derive(Debug)]
pub enum Part {
    /// Text that can be shown (it may be empty), and the token that brought it.
    Text(String, Token),
    /// The rest of the text, and the end.
    End(String, Result<End, JobError>),
}

/// A sink that sends text into a channel shared by several answers.
pub struct TextSink {
    index: usize,
    detokenizer: Detokenizer,
    stops: StopStrings,
    channel: UnboundedSender<(usize, Part)>,
    stopped: bool,
}

impl TextSink {
    /// `index` marks what comes from this answer.
    pub fn new(
        index: usize,
        tokenizer: Arc<Tokenizer>,
        stops: Vec<String>,
        channel: UnboundedSender<(usize, Part)>,
    ) -> Self {
        TextSink {
            index,
            detokenizer: Detokenizer::new(tokenizer),
            stops: StopStrings::new(stops),
            channel,
            stopped: false,
        }
    }
}

impl Sink for TextSink {
    fn token(&mut self, token: Token) -> Go {
        let text = self.detokenizer.push(token.id);
        let (text, found) = self.stops.push(&text);
        self.stopped = found;
        // Whether anyone listens is asked before the next step.
        let _ = self.channel.send((self.index, Part::Text(text, token)));
        match found {
            true => Go::Stop,
            false => Go::On,
        }
    }

    fn is_gone(&self) -> bool {
        self.channel.is_closed()
    }

    fn end(mut self: Box<Self>, mut end: Result<End, JobError>) {
        let mut rest = String::new();
        if !self.stopped {
            let text = self.detokenizer.finish();
            let (text, found) = self.stops.push(&text);
            rest = text;
            match (found, &mut end) {
                (true, Ok(end)) => end.finish = crate::engine::job::Finish::Stop,
                (true, Err(_)) => {}
                (false, _) => rest.push_str(&self.stops.finish()),
            }
        }
        // A receiver that went away wants no end.
        let _ = self.channel.send((self.index, Part::End(rest, end)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_come_whole_and_wrong_bytes_are_marked() {
        let text = "aß€🦀z\u{FFFD}!";
        let mut stream = Detokenizer::new(Arc::new(Tokenizer::Bytes));
        let mut parts: Vec<String> = text.bytes().map(|byte| stream.push(byte.into())).collect();
        parts.push(stream.finish());
        assert_eq!(parts.concat(), text);
        assert!(parts[1].is_empty() && parts[2] == "ß");
        let wrong = [0x61, 0xff, 0x62, 0xe2, 0x82, 0x63, 0xf0];
        let mut parts: Vec<String> = wrong.iter().map(|byte| stream.push(*byte)).collect();
        parts.push(stream.finish());
        assert_eq!(parts.concat(), "a\u{FFFD}b\u{FFFD}c\u{FFFD}");
    }

    #[test]
    fn nothing_of_a_stop_string_is_shown() {
        let run = |stops: &[&str], pieces: &[&str]| {
            let mut stop = StopStrings::new(stops.iter().map(|s| s.to_string()).collect());
            let mut shown = Vec::new();
            for piece in pieces {
                let (text, found) = stop.push(piece);
                shown.push(text);
                if found {
                    return (shown, true);
                }
            }
            shown.push(stop.finish());
            (shown, false)
        };
        let (shown, found) = run(
            &["END", "\n\n"],
            &["a", "bE", "N", "x\n", "y", "E", "ND", "z"],
        );
        assert!(found);
        assert_eq!(shown.concat(), "abENx\ny");
        assert_eq!(shown[1], "b");
        assert_eq!(
            run(&["END"], &["EN"]),
            (vec!["".into(), "EN".into()], false)
        );
        assert_eq!(run(&[], &["x"]).0, ["x", ""]);
        assert_eq!(run(&["é!"], &["aé", "b"]).0.concat(), "aéb");
    }
}
