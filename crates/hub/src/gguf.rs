//! GGUF files: a header with keys and a table of tensors, then the values, aligned.
//!
//! The format is that of ggml (versions 2 and 3, little-endian). Everything is checked before it is used: a damaged file
//! is an error that says where, whatever its numbers claim.

mod config;
mod pieces;
mod tokenizer;

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;

use serde_json::{Map, Number, Value};

pub(crate) use config::{family, names, theirs};
pub(crate) use tokenizer::tokenizer_json;

use crate::encoding::Encoding;
use crate::error::{Damage, HubError, Problem};
use crate::weights::{Stored, Weights, unreadable};

/// The first bytes of every GGUF file.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
/// The largest number of keys or tensors that is believed.
const LARGEST_COUNT: u64 = 1 << 20;

/// What stands before the values.
#[derive(Clone, Debug, Default)]
pub(crate) struct Gguf {
    pub(crate) keys: Map<String, Value>,
    tensors: Vec<(String, Vec<usize>, u32, u64)>,
    /// First byte of the values.
    data: u64,
}

/// Reads the header of `path`.
pub(crate) fn read(path: &Path) -> Result<Gguf, HubError> {
    let file = File::open(path).map_err(unreadable(path))?;
    let length = file.metadata().map_err(unreadable(path))?.len();
    parse(BufReader::new(file), length)
        .map_err(|message| HubError::damaged(path, Damage::Gguf(message)))
}

/// Opens the values of a file whose header was read.
pub(crate) fn weights(path: &Path, gguf: &Gguf) -> Result<Weights, HubError> {
    let mut weights = Weights::default();
    let file = File::open(path).map_err(unreadable(path))?;
    let length = file.metadata().map_err(unreadable(path))?.len();
    let number = weights.add_file(path, file);
    let damaged = |message: String| HubError::damaged(path, Damage::Gguf(message));
    for (name, shape, kind, offset) in &gguf.tensors {
        let Some(encoding) = Encoding::of_gguf(*kind) else {
            let problem = Problem::Type {
                name: name.clone(),
                dtype: format!("of ggml type {kind}"),
            };
            weights.problems.push((name.clone(), problem));
            continue;
        };
        let values = shape
            .iter()
            .try_fold(1usize, |product, extent| product.checked_mul(*extent));
        let columns = shape.last().copied().unwrap_or(1);
        let whole = encoding.bytes(columns).is_some();
        let size = values.and_then(|values| encoding.bytes(values));
        let (Some(size), true) = (size, whole) else {
            return Err(damaged(format!(
                "{name} {shape:?} is no whole number of blocks of {encoding:?}"
            )));
        };
        let start = gguf.data.checked_add(*offset);
        let end = start.and_then(|start| start.checked_add(size as u64));
        match (start, end) {
            (Some(start), Some(end)) if end <= length => weights.add(Stored {
                name: name.clone(),
                shape: shape.clone(),
                encoding,
                file: number,
                offset: start,
            }),
            _ => {
                return Err(damaged(format!(
                    "the {size} bytes of {name} at {offset} go beyond the {length} bytes of the file; it is cut off, copy it again"
                )));
            }
        }
    }
    Ok(weights)
}

/// A reader that knows how much is left.
struct Source<R> {
    reader: R,
    read: u64,
    length: u64,
}

fn parse(reader: impl Read, length: u64) -> Result<Gguf, String> {
    let mut source = Source {
        reader,
        read: 0,
        length,
    };
    let magic: [u8; 4] = source.bytes("the magic")?;
    if &magic != MAGIC {
        return Err(format!(
            "it begins with {:?}, a GGUF file with \"GGUF\"",
            String::from_utf8_lossy(&magic)
        ));
    }
    let version = source.u32("the version")?;
    if !(2..=3).contains(&version) {
        return Err(format!(
            "it is of version {version}; versions 2 and 3 (little-endian) are read"
        ));
    }
    let tensors = source.count("tensors", 24)?;
    let keys = source.count("keys", 12)?;
    let mut gguf = Gguf::default();
    for number in 0..keys {
        let name = source.text(&format!("the name of key {number}"))?;
        let kind = source.u32(&name)?;
        let value = source.value(&name, kind, 0)?;
        gguf.keys.insert(name, value);
    }
    for number in 0..tensors {
        let name = source.text(&format!("the name of tensor {number}"))?;
        let rank = source.u32(&name)?;
        if rank == 0 || rank > 4 {
            return Err(format!("{name} has {rank} dimensions; 1 to 4 are read"));
        }
        let mut shape = Vec::new();
        for _ in 0..rank {
            let extent = source.u64(&name)?;
            shape.push(usize::try_from(extent).map_err(|_| format!("{name} is too large"))?);
        }
        // The innermost comes first in the file.
        shape.reverse();
        let kind = source.u32(&name)?;
        let offset = source.u64(&name)?;
        gguf.tensors.push((name, shape, kind, offset));
    }
    let alignment = match gguf.keys.get("general.alignment") {
        None => 32,
        Some(value) => value
            .as_u64()
            .filter(|alignment| alignment.is_power_of_two() && *alignment <= 1 << 20)
            .ok_or_else(|| format!("general.alignment should be a power of two, is {value}"))?,
    };
    gguf.data = source.read.next_multiple_of(alignment);
    Ok(gguf)
}

impl<R: Read> Source<R> {
    fn left(&self) -> u64 {
        self.length - self.read
    }

    fn bytes<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let mut bytes = [0; N];
        self.fill(&mut bytes, what)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8], what: &str) -> Result<(), String> {
        if bytes.len() as u64 > self.left() {
            return Err(format!(
                "it ends within {what} ({} bytes in all); it is cut off, copy it again",
                self.length
            ));
        }
        self.reader
            .read_exact(bytes)
            .map_err(|error| format!("{what}: {error}"))?;
        self.read += bytes.len() as u64;
        Ok(())
    }

    fn u32(&mut self, what: &str) -> Result<u32, String> {
        self.bytes(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, String> {
        self.bytes(what).map(u64::from_le_bytes)
    }

    /// A number of things that take at least `size` bytes each.
    fn count(&mut self, what: &str, size: u64) -> Result<u64, String> {
        let count = self.u64(what)?;
        match count <= LARGEST_COUNT && count * size <= self.left() {
            true => Ok(count),
            false => Err(format!(
                "it claims {count} {what}, which its {} bytes cannot hold",
                self.length
            )),
        }
    }

    fn text(&mut self, what: &str) -> Result<String, String> {
        let length = self.u64(what)?;
        if length > self.left() {
            return Err(format!(
                "{what} claims {length} bytes, {} are left",
                self.left()
            ));
        }
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes, what)?;
        String::from_utf8(bytes).map_err(|_| format!("{what} is no UTF-8"))
    }

    fn value(&mut self, key: &str, kind: u32, depth: u32) -> Result<Value, String> {
        Ok(match kind {
            0 => self.bytes::<1>(key)?[0].into(),
            1 => i8::from_le_bytes(self.bytes(key)?).into(),
            2 => u16::from_le_bytes(self.bytes(key)?).into(),
            3 => i16::from_le_bytes(self.bytes(key)?).into(),
            4 => self.u32(key)?.into(),
            5 => i32::from_le_bytes(self.bytes(key)?).into(),
            6 => real(f32::from_le_bytes(self.bytes(key)?).into()),
            7 => (self.bytes::<1>(key)?[0] != 0).into(),
            8 => self.text(key)?.into(),
            9 => {
                let kind = self.u32(key)?;
                let count = self.u64(key)?;
                if count > self.left() || depth > 2 {
                    return Err(format!(
                        "the list {key} claims {count} values, {} bytes are left",
                        self.left()
                    ));
                }
                let values = (0..count).map(|_| self.value(key, kind, depth + 1));
                Value::Array(values.collect::<Result<_, _>>()?)
            }
            10 => self.u64(key)?.into(),
            11 => i64::from_le_bytes(self.bytes(key)?).into(),
            12 => real(f64::from_le_bytes(self.bytes(key)?)),
            other => return Err(format!("{key} has the unknown type {other}")),
        })
    }
}

fn real(value: f64) -> Value {
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

#[cfg(test)]
mod tests;
