//! The forms in which Long Range Arena is in use, and how each turns a document into tokens.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Whose form of the benchmark. A number belongs to one of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Dialect {
    /// Tay et al. (2021), arXiv 2011.04006, the released code: bytes, cut at 4,000.
    #[default]
    Official,
    /// The port in the Nystromformer repository: the same tokens, another model and another training.
    Nystrom,
    /// The port in the S4 repository: characters seen at least 15 times in training, an end token, 4,096.
    S4,
}

/// Characters rarer than this are one unknown token in the S4 form.
const LEAST: usize = 15;
/// Tokens before the first character in the S4 form: padding, unknown, end.
const SPECIAL: u32 = 3;

impl Dialect {
    /// Longest document in tokens.
    pub(crate) fn time(self) -> usize {
        match self {
            Dialect::Official | Dialect::Nystrom => 4000,
            Dialect::S4 => 4096,
        }
    }
}

/// What the tokens of a document are; 0 is padding.
pub(crate) enum Alphabet {
    /// A byte is its value plus one.
    Bytes,
    /// Known characters with their ids.
    Characters(BTreeMap<char, u32>),
}

impl Alphabet {
    /// The alphabet of a dialect; `training` is read for the characters of the S4 form only.
    pub(crate) fn of<E>(
        dialect: Dialect,
        training: impl Iterator<Item = Result<Vec<u8>, E>>,
    ) -> Result<Self, E> {
        if dialect != Dialect::S4 {
            return Ok(Alphabet::Bytes);
        }
        let mut counts: BTreeMap<char, usize> = BTreeMap::new();
        for document in training {
            for character in String::from_utf8_lossy(&document?).chars() {
                *counts.entry(character).or_default() += 1;
            }
        }
        let kept = counts.into_iter().filter(|(_, count)| *count >= LEAST);
        let ids = kept.zip(SPECIAL..);
        Ok(Alphabet::Characters(
            ids.map(|((character, _), id)| (character, id)).collect(),
        ))
    }

    /// Token ids are below this.
    pub(crate) fn vocab(&self) -> usize {
        match self {
            Alphabet::Bytes => 257,
            Alphabet::Characters(ids) => SPECIAL as usize + ids.len(),
        }
    }

    /// At most `time` tokens of a document, at least one.
    pub(crate) fn encode(&self, document: &[u8], time: usize) -> Vec<u32> {
        let mut tokens: Vec<u32> = match self {
            Alphabet::Bytes => document
                .iter()
                .take(time)
                .map(|byte| u32::from(*byte) + 1)
                .collect(),
            Alphabet::Characters(ids) => {
                let text = String::from_utf8_lossy(document);
                let known = text.chars().map(|c| ids.get(&c).copied().unwrap_or(1));
                known.take(time - 1).chain([2]).collect()
            }
        };
        if tokens.is_empty() {
            tokens.push(0);
        }
        tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_and_characters_are_as_published() {
        let none = || std::iter::empty::<Result<Vec<u8>, ()>>();
        let bytes = Alphabet::of(Dialect::Official, none()).expect("bytes");
        assert_eq!(bytes.encode(b"ab\xff", 9), [98, 99, 256]);
        assert_eq!(bytes.encode(b"abc", 2), [98, 99]);
        assert_eq!((bytes.vocab(), Dialect::Official.time()), (257, 4000));
        let text = "é".repeat(15) + &"b".repeat(14) + &"a".repeat(20);
        let training = [Ok::<_, ()>(text.into_bytes())].into_iter();
        let known = Alphabet::of(Dialect::S4, training).expect("characters");
        // a, é are known; b is one short of it.
        assert_eq!(known.vocab(), 5);
        assert_eq!(known.encode("aéb".as_bytes(), 9), [3, 4, 1, 2]);
        assert_eq!(known.encode("aéb".as_bytes(), 3), [3, 4, 2]);
    }
}
