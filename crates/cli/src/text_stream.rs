//! Bytes that come one token at a time, written as text: a character whose bytes have not all come is held back.

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

#[cfg(test)]
mod tests {
    use super::*;

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
