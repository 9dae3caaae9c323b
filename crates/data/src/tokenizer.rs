//! Text to tokens and back: plain bytes, or byte-level BPE (Sennrich et al., 2016, on bytes as in GPT-2, 2019).

use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{DecoderWrapper, ModelWrapper, TokenizerImpl};

/// The key that marks a tokenizer file of this project that is not in the format of the `tokenizers` library.
const KEY: &str = "anyformer";

/// What stands for an id that no token has: U+FFFD in UTF-8.
const REPLACEMENT: &[u8] = "\u{FFFD}".as_bytes();

/// Why a tokenizer cannot be read, made or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file that cannot be read.
    #[error("read the tokenizer {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// A text that is no tokenizer.
    #[error("read a tokenizer: {message}")]
    Format {
        /// What is wrong with it.
        message: String,
    },
    /// A vocabulary that cannot hold every byte.
    #[error(
        "train a tokenizer: expected a vocabulary of at least 256, one token per byte, got {vocab}"
    )]
    Vocabulary {
        /// What was asked for.
        vocab: usize,
    },
    /// Training or encoding that the library refused.
    #[error("{action}: {message}")]
    Library {
        /// What was being done.
        action: &'static str,
        /// What the library said.
        message: String,
    },
}

impl TokenizerError {
    fn library(action: &'static str) -> impl FnOnce(tokenizers::Error) -> Self {
        move |error| Self::Library {
            action,
            message: error.to_string(),
        }
    }
}

/// Text to tokens and back.
#[derive(Clone, Debug)]
pub enum Tokenizer {
    /// A token per byte, vocabulary 256.
    Bytes,
    /// A `tokenizer.json` of the `tokenizers` library: a BPE trained here, or any other that was loaded.
    Bpe(Box<tokenizers::Tokenizer>),
}

impl Tokenizer {
    /// Trains byte-level BPE until the vocabulary, the 256 bytes included, has `vocab` tokens or no pair occurs twice.
    ///
    /// The same texts give the same tokenizer. [`Tokenizer::vocab`] of the result tells the size that was reached.
    pub fn train_bpe(texts: &[&str], vocab: usize) -> Result<Self, TokenizerError> {
        if vocab < 256 {
            return Err(TokenizerError::Vocabulary { vocab });
        }
        let mut trainer = BpeTrainer::builder()
            .vocab_size(vocab)
            .min_frequency(2)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let mut bpe = TokenizerImpl::<
            BPE,
            tokenizers::NormalizerWrapper,
            ByteLevel,
            ByteLevel,
            ByteLevel,
        >::new(BPE::default());
        bpe.with_pre_tokenizer(Some(ByteLevel::new(false, false, true)));
        bpe.with_decoder(Some(ByteLevel::new(false, false, true)));
        bpe.train(&mut trainer, texts.iter().flat_map(|text| pieces(text)))
            .map_err(TokenizerError::library("train a tokenizer"))?;

        let mut tokenizer = tokenizers::Tokenizer::new(ModelWrapper::BPE(bpe.get_model().clone()));
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, false, true)));
        tokenizer.with_decoder(Some(ByteLevel::new(false, false, true)));
        Ok(Self::Bpe(Box::new(tokenizer)))
    }

    /// Reads a tokenizer file, as [`Tokenizer::from_json`] does.
    pub fn load(path: &Path) -> Result<Self, TokenizerError> {
        let text = std::fs::read_to_string(path).map_err(|error| TokenizerError::Read {
            path: path.to_owned(),
            error,
        })?;
        Self::from_json(&text).map_err(|error| match error {
            TokenizerError::Format { message } => TokenizerError::Format {
                message: format!("{}: {message}", path.display()),
            },
            other => other,
        })
    }

    /// Reads what [`Tokenizer::to_json`] wrote, or a `tokenizer.json` of the `tokenizers` library.
    ///
    /// Truncation and padding that such a file asks for are left out: a text always gives all its tokens and no others.
    pub fn from_json(text: &str) -> Result<Self, TokenizerError> {
        let format = |message: String| TokenizerError::Format { message };
        let value: Value = serde_json::from_str(text).map_err(|error| format(error.to_string()))?;
        match value.get(KEY) {
            Some(Value::String(kind)) if kind == "bytes" => return Ok(Self::Bytes),
            Some(other) => {
                return Err(format(format!(
                    "expected {KEY:?} to be \"bytes\", got {other}"
                )));
            }
            None => {}
        }
        check_merges(&value["model"]).map_err(format)?;
        let mut tokenizer =
            tokenizers::Tokenizer::from_bytes(text).map_err(|error| format(error.to_string()))?;
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|error| format(error.to_string()))?;
        Ok(Self::Bpe(Box::new(tokenizer)))
    }

    /// The tokenizer as JSON, for a `tokenizer.json` beside a model.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        match self {
            Self::Bytes => Ok(format!("{{{KEY:?}:\"bytes\"}}")),
            Self::Bpe(tokenizer) => tokenizer
                .to_string(false)
                .map_err(TokenizerError::library("write a tokenizer")),
        }
    }

    /// The tokens of a text; no begin or end token is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        match self {
            Self::Bytes => Ok(text.bytes().map(u32::from).collect()),
            Self::Bpe(tokenizer) => Ok(tokenizer
                .encode_fast(text, false)
                .map_err(TokenizerError::library("encode a text"))?
                .get_ids()
                .to_vec()),
        }
    }

    /// As [`Tokenizer::encode`], with the begin and end tokens that the file asks for around a text.
    pub fn encode_whole(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        match self {
            Self::Bytes => self.encode(text),
            Self::Bpe(tokenizer) => Ok(tokenizer
                .encode_fast(text, true)
                .map_err(TokenizerError::library("encode a text"))?
                .get_ids()
                .to_vec()),
        }
    }

    /// Whether every token stands for the same bytes wherever it is.
    pub fn is_byte_level(&self) -> bool {
        match self {
            Self::Bytes => true,
            Self::Bpe(tokenizer) => {
                matches!(tokenizer.get_decoder(), Some(DecoderWrapper::ByteLevel(_)))
            }
        }
    }

    /// The bytes of the tokens. A character whose bytes are spread over tokens may start or end outside `ids`, which is
    /// why this is no text; an id that no token has gives U+FFFD.
    ///
    /// A loaded tokenizer that is not byte-level decodes as its own file says, whole characters only.
    pub fn decode(&self, ids: &[u32]) -> Vec<u8> {
        match self {
            Self::Bytes => {
                let mut bytes = Vec::with_capacity(ids.len());
                for &id in ids {
                    match u8::try_from(id) {
                        Ok(byte) => bytes.push(byte),
                        Err(_) => bytes.extend_from_slice(REPLACEMENT),
                    }
                }
                bytes
            }
            Self::Bpe(tokenizer) => match self.is_byte_level() {
                true => ids
                    .iter()
                    .flat_map(|&id| token_bytes(tokenizer, id))
                    .collect(),
                false => tokenizer
                    .decode(ids, false)
                    .map_or_else(|_| REPLACEMENT.to_vec(), String::into_bytes),
            },
        }
    }

    /// One more than the largest id.
    pub fn vocab(&self) -> usize {
        match self {
            Self::Bytes => 256,
            Self::Bpe(tokenizer) => tokenizer
                .get_vocab(true)
                .values()
                .max()
                .map_or(0, |&id| id as usize + 1),
        }
    }
}

/// Refuses merges whose token would be longer than every token of the vocabulary: the library has no room for it and panics.
fn check_merges(model: &Value) -> Result<(), String> {
    let (Some(vocab), Some(merges)) = (model["vocab"].as_object(), model["merges"].as_array())
    else {
        return Ok(());
    };
    let longest = vocab.keys().map(String::len).max().unwrap_or(0);
    let prefix = model["continuing_subword_prefix"]
        .as_str()
        .map_or(0, str::len);
    for merge in merges {
        let parts = match merge {
            Value::String(both) => both.split_once(' '),
            other => other[0].as_str().zip(other[1].as_str()),
        };
        let Some((first, second)) = parts else {
            continue;
        };
        let made = second
            .len()
            .checked_sub(prefix)
            .map(|rest| first.len() + rest);
        if made.is_none_or(|made| made > longest) {
            return Err(format!(
                "the merge of {first:?} and {second:?} makes no token of the vocabulary"
            ));
        }
    }
    Ok(())
}

/// The bytes that one byte-level token stands for.
fn token_bytes(tokenizer: &tokenizers::Tokenizer, id: u32) -> Vec<u8> {
    let Some(token) = tokenizer.id_to_token(id) else {
        return REPLACEMENT.to_vec();
    };
    if tokenizer
        .get_added_vocabulary()
        .get_vocab()
        .contains_key(&token)
    {
        return token.into_bytes();
    }
    let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
    bytes.unwrap_or_else(|| token.into_bytes())
}

/// The byte that a character of a byte-level vocabulary writes: printable Latin-1 writes itself, the other 68 bytes are
/// written, in order, by the characters from U+0100 on.
fn byte_of(character: char) -> Option<u8> {
    let code = character as u32;
    let byte = match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7F,
        0x143 => 0xAD,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// Cuts a text, for training, into pieces of 64 KiB or more that split into words just as the whole does: only after a
/// line feed with a visible character on each side.
fn pieces(text: &str) -> Vec<&str> {
    const AT_LEAST: usize = 1 << 16;
    let bytes = text.as_bytes();
    let mut pieces = Vec::new();
    let mut start = 0;
    let mut at = AT_LEAST;
    while at + 1 < bytes.len() {
        if bytes[at] == b'\n'
            && bytes[at - 1].is_ascii_graphic()
            && bytes[at + 1].is_ascii_graphic()
        {
            pieces.push(&text[start..=at]);
            start = at + 1;
            at = start + AT_LEAST;
        } else {
            at += 1;
        }
    }
    pieces.push(&text[start..]);
    pieces
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str =
        "Größe naïve 日本語 🙂🙂 don't\r\n\n  two  spaces\u{85}\u{A0}\u{AD}\0\u{7F}é";
    static PLAYS: &str = include_str!("../assets/shakespeare.txt");

    fn bpe() -> Tokenizer {
        Tokenizer::train_bpe(&[&PLAYS[..100_000]], 512).unwrap()
    }

    #[test]
    fn bytes_and_bpe_give_back_any_text() {
        for tokenizer in [Tokenizer::Bytes, bpe()] {
            for text in [TEXT, "", &PLAYS[100_000..110_000]] {
                let ids = tokenizer.encode(text).unwrap();
                assert_eq!(tokenizer.decode(&ids), text.as_bytes());
                let one_by_one: Vec<u8> =
                    ids.iter().flat_map(|&id| tokenizer.decode(&[id])).collect();
                assert_eq!(one_by_one, text.as_bytes());
            }
        }
    }

    #[test]
    fn merges_into_what_is_no_token_are_refused() {
        let file = |prefix: &str, merges: Value| {
            serde_json::json!({"model": {
                "type": "BPE", "vocab": {"a": 0, "b": 1, "##": 2}, "merges": merges,
                "continuing_subword_prefix": prefix,
            }})
        };
        for (prefix, merges) in [
            ("", serde_json::json!(["a b", "## a"])),
            ("", serde_json::json!([["a", "b"], ["##", "a"]])),
            ("##", serde_json::json!(["a b"])),
        ] {
            let read = Tokenizer::from_json(&file(prefix, merges.clone()).to_string());
            let message = read.unwrap_err().to_string();
            assert!(message.contains("merge of"), "{merges}: {message}");
        }
        // One that is short enough, and none all the same, is the library's to refuse.
        let read = Tokenizer::from_json(&file("", serde_json::json!(["a b"])).to_string());
        assert!(read.is_err());
    }

    #[test]
    fn part_of_a_character_keeps_its_bytes() {
        let tokenizer = bpe();
        let ids = tokenizer.encode("🙂").unwrap();
        assert_eq!(
            ids.len(),
            4,
            "no emoji in the training text, so a token per byte"
        );
        assert_eq!(tokenizer.decode(&ids[..3]), &"🙂".as_bytes()[..3]);
    }

    #[test]
    fn every_byte_has_one_character() {
        let mut bytes: Vec<u8> = ByteLevel::alphabet()
            .into_iter()
            .map(|c| byte_of(c).unwrap())
            .collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
        assert_eq!(
            (byte_of(' '), byte_of('Ġ'), byte_of('Ċ'), byte_of('日')),
            (None, Some(b' '), Some(b'\n'), None)
        );
    }

    #[test]
    fn training_reaches_the_vocabulary_and_repeats() {
        let first = bpe();
        assert_eq!(first.vocab(), 512);
        assert_eq!(first.to_json().unwrap(), bpe().to_json().unwrap());
        let text = &PLAYS[100_000..120_000];
        let ids = first.encode(text).unwrap();
        assert!(
            ids.len() * 3 < text.len() * 2,
            "{} tokens of {} bytes",
            ids.len(),
            text.len()
        );
        assert!(ids.iter().all(|&id| id < 512));
    }

    #[test]
    fn a_poor_text_gives_fewer_tokens_and_says_so() {
        let tokenizer = Tokenizer::train_bpe(&["abab abab"], 1000).unwrap();
        assert!(
            (257..300).contains(&tokenizer.vocab()),
            "{}",
            tokenizer.vocab()
        );
        assert_eq!(Tokenizer::train_bpe(&[""], 300).unwrap().vocab(), 256);
        let error = Tokenizer::train_bpe(&["a"], 255).unwrap_err();
        assert!(
            error.to_string().contains("at least 256") && error.to_string().contains("255"),
            "{error}"
        );
    }

    #[test]
    fn json_gives_the_same_ids() {
        for tokenizer in [Tokenizer::Bytes, bpe()] {
            let again = Tokenizer::from_json(&tokenizer.to_json().unwrap()).unwrap();
            assert_eq!(again.vocab(), tokenizer.vocab());
            for text in [TEXT, &PLAYS[200_000..201_000]] {
                assert_eq!(again.encode(text).unwrap(), tokenizer.encode(text).unwrap());
                assert_eq!(
                    again.decode(&tokenizer.encode(text).unwrap()),
                    text.as_bytes()
                );
            }
        }
        assert_eq!(
            Tokenizer::Bytes.to_json().unwrap(),
            r#"{"anyformer":"bytes"}"#
        );
    }

    #[test]
    fn pieces_split_into_the_same_words() {
        use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};
        let words = |text: &str| {
            let mut split = PreTokenizedString::from(text);
            ByteLevel::new(false, false, true)
                .pre_tokenize(&mut split)
                .unwrap();
            let splits = split.get_splits(OffsetReferential::Original, OffsetType::Byte);
            splits
                .into_iter()
                .map(|(word, _, _)| word.to_owned())
                .collect::<Vec<_>>()
        };
        let text = &PLAYS[..300_000];
        let pieces = pieces(text);
        assert!(pieces.len() > 3 && pieces.concat() == text);
        assert_eq!(
            pieces
                .iter()
                .flat_map(|piece| words(piece))
                .collect::<Vec<_>>(),
            words(text)
        );
    }

    #[test]
    fn truncation_and_padding_of_a_file_are_left_out() {
        let Tokenizer::Bpe(mut inner) = bpe() else {
            unreachable!()
        };
        inner
            .with_truncation(Some(tokenizers::TruncationParams {
                max_length: 4,
                ..Default::default()
            }))
            .unwrap();
        let cut = Tokenizer::Bpe(inner);
        assert_eq!(cut.encode(TEXT).unwrap().len(), 4);
        let read = Tokenizer::from_json(&cut.to_json().unwrap()).unwrap();
        assert_eq!(read.decode(&read.encode(TEXT).unwrap()), TEXT.as_bytes());
    }

    #[test]
    fn what_is_no_tokenizer_is_refused_with_its_path() {
        for text in ["", "[]", "{}", r#"{"anyformer":"words"}"#] {
            assert!(
                matches!(
                    Tokenizer::from_json(text),
                    Err(TokenizerError::Format { .. })
                ),
                "{text}"
            );
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        assert!(matches!(
            Tokenizer::load(&path),
            Err(TokenizerError::Read { .. })
        ));
        std::fs::write(&path, "{}").unwrap();
        let error = Tokenizer::load(&path).unwrap_err().to_string();
        assert!(error.contains("tokenizer.json"), "{error}");
        std::fs::write(&path, Tokenizer::Bytes.to_json().unwrap()).unwrap();
        assert!(matches!(Tokenizer::load(&path), Ok(Tokenizer::Bytes)));
    }

    #[test]
    fn an_id_without_a_token_is_marked() {
        assert_eq!(Tokenizer::Bytes.decode(&[104, 256]), "h\u{FFFD}".as_bytes());
        assert_eq!(bpe().decode(&[9999]), "\u{FFFD}".as_bytes());
    }
}
