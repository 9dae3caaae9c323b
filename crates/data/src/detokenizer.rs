//! Tokens as text while they come: whole characters only.

use crate::tokenizer::Tokenizer;

const REPLACEMENT: &[u8] = "\u{FFFD}".as_bytes();
/// Tokens that one character may be spread over.
const LONGEST: usize = 8;

/// Tokens to text. Each token is decoded behind the ones before it, because some tokenizers write the first token of a
/// text differently.
#[derive(Debug, Default)]
pub struct Detokenizer {
    /// Tokens whose text has not been taken yet, after those that they are decoded behind.
    ids: Vec<u32>,
    /// How many of them have been taken.
    taken: usize,
    held: Vec<u8>,
}

impl Detokenizer {
    /// The text that can be shown after one more token.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        self.ids.push(id);
        let fresh = self.fresh(tokenizer);
        let waits = self.ids.len() - self.taken < LONGEST;
        // A tokenizer that gives whole characters only marks an unfinished one.
        if fresh.is_empty() || fresh.ends_with(REPLACEMENT) && waits && !tokenizer.is_byte_level() {
            return String::new();
        }
        self.held.extend_from_slice(&fresh);
        // What decoding no longer starts from is let go.
        self.ids.drain(..self.taken);
        self.taken = self.ids.len();
        self.whole()
    }

    /// What the tokens that were not taken yet add to the text.
    fn fresh(&self, tokenizer: &Tokenizer) -> Vec<u8> {
        let before = tokenizer.decode(&self.ids[..self.taken]).len();
        let now = tokenizer.decode(&self.ids);
        now.get(before..).unwrap_or_default().to_vec()
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
    pub fn finish(&mut self, tokenizer: &Tokenizer) -> String {
        let fresh = self.fresh(tokenizer);
        self.held.extend_from_slice(&fresh);
        self.taken = self.ids.len();
        let text = self.whole();
        let rest = String::from_utf8_lossy(&self.held).into_owned();
        self.held.clear();
        text + &rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The parts as the bytes come, and what is left.
    fn parts(bytes: &[u8]) -> Vec<String> {
        let mut stream = Detokenizer::default();
        let push = |byte: &u8| stream.push(&Tokenizer::Bytes, (*byte).into());
        let mut parts: Vec<String> = bytes.iter().map(push).collect();
        parts.push(stream.finish(&Tokenizer::Bytes));
        parts
    }

    #[test]
    fn characters_come_whole() {
        for text in ["aß€🦀z\u{FFFD}!", "aß€🦀\u{FFFD}z"] {
            let parts = parts(text.as_bytes());
            assert_eq!(parts.concat(), text);
            assert!(parts[1].is_empty() && parts[2] == "ß");
        }
    }

    #[test]
    fn bytes_that_are_no_text_are_marked_and_skipped() {
        let wrong = [0x61, 0xff, 0x62, 0xe2, 0x82, 0x63, 0xf0];
        assert_eq!(parts(&wrong).concat(), "a\u{FFFD}b\u{FFFD}c\u{FFFD}");
        assert_eq!(parts(b"a\xffb")[..3], ["a", "\u{FFFD}", "b"]);
        assert_eq!(parts(&[0xe2, 0x82, 0x63]), ["", "", "\u{FFFD}c", ""]);
        assert_eq!(parts(&[0xf0, 0x9f]), ["", "", "\u{FFFD}"]);
    }

    #[test]
    fn words_keep_the_spaces_between_them() {
        let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{"type":"Metaspace","replacement":"\u2581","prepend_scheme":"always","split":true},
            "post_processor":null,"decoder":{"type":"Sequence","decoders":[{"type":"ByteFallback"},
            {"type":"Metaspace","replacement":"\u2581","prepend_scheme":"always","split":true}]},
            "model":{"type":"BPE","byte_fallback":true,"fuse_unk":false,"unk_token":"<unk>","merges":[],
            "vocab":{"<unk>":0,"\u2581a":1,"\u2581b":2,"c":3,"<0xC3>":4,"<0x9F>":5}}}"#;
        let tokenizer = Tokenizer::from_json(json).expect("a tokenizer");
        let mut stream = Detokenizer::default();
        let parts = [1, 2, 3, 4, 5, 1].map(|id| stream.push(&tokenizer, id));
        assert_eq!(parts, ["a", " b", "c", "", "ß", " a"]);
    }
}
