//! Bytes that come one token at a time, written as text: a character whose bytes have not all come is held back.

use anyformer_data::Tokenizer;

/// Holds the beginning of an unfinished character.
#[derive(Debug, Default)]
pub(crate) struct TextStream {
    held: Vec<u8>,
}

impl TextStream {
    /// Adds bytes and gives what can be shown now. Bytes that can never become a character come as `\u{FFFD}`.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> String {
        self.held.extend_from_slice(bytes);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.held) {
                Ok(whole) => {
                    text.push_str(whole);
                    self.held.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.held[..valid]));
                    match error.error_len() {
                        // Not finished yet.
                        None => {
                            self.held.drain(..valid);
                            return text;
                        }
                        Some(wrong) => {
                            text.push(char::REPLACEMENT_CHARACTER);
                            self.held.drain(..valid + wrong);
                        }
                    }
                }
            }
        }
    }

    /// What is left when no more will come.
    pub(crate) fn finish(self) -> String {
        String::from_utf8_lossy(&self.held).into_owned()
    }
}

/// The text of tokens that come one by one, whatever the tokenizer.
#[derive(Debug, Default)]
pub(crate) struct TokenText {
    bytes: TextStream,
    /// Tokens whose text may still change, and those before them that it depends on.
    ids: Vec<u32>,
    shown: usize,
}

impl TokenText {
    /// Adds a token and gives what can be shown now.
    pub(crate) fn push(&mut self, tokenizer: &Tokenizer, id: u32) -> String {
        if tokenizer.is_byte_level() {
            return self.bytes.push(&tokenizer.decode(&[id]));
        }
        // Such a tokenizer writes a token one way at the beginning and another way inside of a text.
        let text = |ids: &[u32]| String::from_utf8_lossy(&tokenizer.decode(ids)).into_owned();
        self.ids.push(id);
        let (before, after) = (text(&self.ids[..self.shown]), text(&self.ids));
        if after.ends_with(char::REPLACEMENT_CHARACTER) {
            return String::new();
        }
        let Some(new) = after.strip_prefix(&before) else {
            return String::new();
        };
        let new = new.to_string();
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        new
    }

    /// What is left when no more will come.
    pub(crate) fn finish(self) -> String {
        self.bytes.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_keep_the_spaces_between_them() {
        let json = r#"{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,
            "pre_tokenizer":{"type":"Metaspace","replacement":"\u2581","prepend_scheme":"always","split":true},
            "post_processor":null,"decoder":{"type":"Sequence","decoders":[{"type":"ByteFallback"},
            {"type":"Metaspace","replacement":"\u2581","prepend_scheme":"always","split":true}]},
            "model":{"type":"BPE","byte_fallback":true,"fuse_unk":false,"unk_token":"<unk>","merges":[],
            "vocab":{"<unk>":0,"\u2581a":1,"\u2581b":2,"c":3,"<0xC3>":4,"<0x9F>":5}}}"#;
        let tokenizer = Tokenizer::from_json(json).expect("a tokenizer");
        let mut stream = TokenText::default();
        let parts = [1, 2, 3, 4, 5, 1].map(|id| stream.push(&tokenizer, id));
        assert_eq!(parts, ["a", " b", "c", "", "ß", " a"]);
    }

    #[test]
    fn characters_come_whole() {
        let text = "aß€🦀\u{FFFD}z";
        let mut stream = TextStream::default();
        let mut got = String::new();
        for byte in text.bytes() {
            got.push_str(&stream.push(&[byte]));
        }
        assert_eq!(got + &stream.finish(), text);
    }

    #[test]
    fn bytes_that_are_no_text_are_marked_and_skipped() {
        let mut stream = TextStream::default();
        assert_eq!(stream.push(b"a\xffb"), "a\u{FFFD}b");
        assert_eq!(stream.push(&[0xe2, 0x82]), "");
        assert_eq!(stream.push(b"c"), "\u{FFFD}c");
        assert_eq!(stream.push(&[0xf0, 0x9f]), "");
        assert_eq!(stream.finish(), "\u{FFFD}");
    }
}
