//! TensorBoard event files: records of protobuf messages, each framed by its length and two checksums.
//!
//! A record is `length u64, masked crc32c(length) u32, bytes, masked crc32c(bytes) u32`, little-endian. The messages are
//! `Event {1: wall_time double, 2: step int64, 3: file_version string, 5: Summary {1: Value {1: tag, 2: simple_value}}}`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyformer_hub::atomic::write_file;

use crate::error::TrainError;
use crate::events::{Event, Events};
use crate::jsonl::now;

const MARK: &str = "events.out.tfevents.";

/// Writes the numbers of events as scalars: `train/loss`, `eval/accuracy`, and so on.
#[derive(Debug)]
pub struct TensorBoardSink {
    file: File,
}

impl TensorBoardSink {
    /// Opens a new event file in `folder` for a run that goes on after `step`; what earlier files hold beyond that step
    /// is dropped from them.
    pub fn open(folder: &Path, step: u64) -> Result<Self, TrainError> {
        fs::create_dir_all(folder).map_err(TrainError::io("write", folder))?;
        for path in event_files(folder).map_err(TrainError::io("read", folder))? {
            let bytes = fs::read(&path).map_err(TrainError::io("read", &path))?;
            let early =
                |record: &&[u8]| scalars(record).is_some_and(|event| event.step <= step as i64);
            let kept: Vec<u8> = records(&bytes).filter(early).flat_map(frame).collect();
            if kept != bytes {
                write_file(&path, |file| file.write_all(&kept))?;
            }
        }
        let path = new_name(folder);
        let file = OpenOptions::new().create_new(true).append(true).open(&path);
        let mut file = file.map_err(TrainError::io("write", &path))?;
        let mut first = wall_time();
        bytes_field(&mut first, 3, b"brain.Event:2");
        file.write_all(&frame(&first))
            .map_err(TrainError::io("write", &path))?;
        Ok(TensorBoardSink { file })
    }

    fn write(&mut self, step: u64, values: &[(&str, f64)]) -> io::Result<()> {
        let mut event = wall_time();
        varint(&mut event, 2 << 3);
        varint(&mut event, step);
        let mut summary = Vec::new();
        for (tag, value) in values {
            let mut scalar = Vec::new();
            bytes_field(&mut scalar, 1, tag.as_bytes());
            varint(&mut scalar, 2 << 3 | 5);
            scalar.extend((*value as f32).to_le_bytes());
            bytes_field(&mut summary, 1, &scalar);
        }
        bytes_field(&mut event, 5, &summary);
        self.file.write_all(&frame(&event))
    }
}

impl Events for TensorBoardSink {
    fn event(&mut self, event: &Event) -> io::Result<()> {
        match event {
            Event::Step {
                step,
                loss,
                extra,
                lr,
                grad_norm,
                tokens_per_second,
                ..
            } => {
                let mut values = vec![
                    ("train/loss", *loss),
                    ("train/lr", *lr),
                    ("train/grad_norm", *grad_norm),
                    ("train/tokens_per_second", *tokens_per_second),
                ];
                values.extend(extra.map(|value| ("train/extra_loss", value)));
                self.write(*step, &values)
            }
            Event::Evaluated {
                step,
                loss,
                accuracy,
                perplexity,
                ..
            } => {
                let mut values = vec![("eval/loss", *loss), ("eval/accuracy", *accuracy)];
                values.extend(perplexity.map(|value| ("eval/perplexity", value)));
                self.write(*step, &values)
            }
            _ => Ok(()),
        }
    }
}

fn event_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(MARK) {
            files.push(entry.path());
        }
    }
    files.sort();
    Ok(files)
}

/// The name begins with the time, which TensorBoard reads the files of a folder by.
fn new_name(folder: &Path) -> PathBuf {
    let (time, process) = (now() as u64, std::process::id());
    let name = |count: u32| folder.join(format!("{MARK}{time:010}.anyformer.{process}.{count:03}"));
    let mut count = 0;
    while name(count).exists() {
        count += 1;
    }
    name(count)
}

fn wall_time() -> Vec<u8> {
    let mut event = vec![1 << 3 | 1];
    event.extend(now().to_le_bytes());
    event
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn bytes_field(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    varint(out, field << 3 | 2);
    varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn masked(bytes: &[u8]) -> [u8; 4] {
    let sum = crc32c::crc32c(bytes);
    sum.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

fn frame(record: &[u8]) -> Vec<u8> {
    let length = (record.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), record, &masked(record)].concat()
}

/// The records of a file up to the first that is cut off or damaged.
fn records(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let (length, after) = rest.split_first_chunk::<8>()?;
        let (sum, after) = after.split_first_chunk::<4>()?;
        let size = usize::try_from(u64::from_le_bytes(*length)).ok()?;
        let (record, after) = after.split_at_checked(size)?;
        let (record_sum, after) = after.split_first_chunk::<4>()?;
        let whole = masked(length) == *sum && masked(record) == *record_sum;
        rest = after;
        whole.then_some(record)
    })
}

/// What is read back of a record.
#[derive(Debug, Default, PartialEq)]
struct Scalars {
    step: i64,
    values: Vec<(String, f32)>,
}

fn scalars(record: &[u8]) -> Option<Scalars> {
    let mut event = Scalars::default();
    for field in fields(record) {
        match field? {
            (2, Wire::Number(step)) => event.step = step as i64,
            (5, Wire::Bytes(summary)) => {
                for value in fields(summary) {
                    let (1, Wire::Bytes(value)) = value? else {
                        continue;
                    };
                    let (mut tag, mut number) = (String::new(), 0.0);
                    for part in fields(value) {
                        match part? {
                            (1, Wire::Bytes(bytes)) => {
                                tag = String::from_utf8_lossy(bytes).into_owned()
                            }
                            (2, Wire::Four(bytes)) => number = f32::from_le_bytes(bytes),
                            _ => {}
                        }
                    }
                    event.values.push((tag, number));
                }
            }
            _ => {}
        }
    }
    Some(event)
}

enum Wire<'a> {
    Number(u64),
    Eight,
    Four([u8; 4]),
    Bytes(&'a [u8]),
}

/// The fields of a message; the last is `None` when the message is damaged.
fn fields(mut rest: &[u8]) -> impl Iterator<Item = Option<(u64, Wire<'_>)>> {
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let field = read_field(&mut rest);
        if field.is_none() {
            rest = &[];
        }
        Some(field)
    })
}

fn read_field<'a>(rest: &mut &'a [u8]) -> Option<(u64, Wire<'a>)> {
    let key = read_varint(rest)?;
    let wire = match key & 7 {
        0 => Wire::Number(read_varint(rest)?),
        1 => {
            *rest = rest.get(8..)?;
            Wire::Eight
        }
        2 => {
            let size = usize::try_from(read_varint(rest)?).ok()?;
            let (bytes, after) = rest.split_at_checked(size)?;
            *rest = after;
            Wire::Bytes(bytes)
        }
        5 => {
            let (bytes, after) = rest.split_first_chunk::<4>()?;
            *rest = after;
            Wire::Four(*bytes)
        }
        _ => return None,
    };
    Some((key >> 3, wire))
}

fn read_varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_back(folder: &Path) -> Vec<Scalars> {
        let files = event_files(folder).unwrap();
        let bytes: Vec<u8> = files
            .iter()
            .flat_map(|path| fs::read(path).unwrap())
            .collect();
        let all: Vec<Scalars> = records(&bytes)
            .map(|record| scalars(record).unwrap())
            .collect();
        all.into_iter()
            .filter(|event| !event.values.is_empty())
            .collect()
    }

    fn evaluated(step: u64) -> Event {
        Event::Evaluated {
            step,
            loss: 0.5,
            accuracy: 0.25,
            perplexity: None,
            counted: 4,
        }
    }

    /// The published check value of CRC-32C, masked as in the TensorFlow record format.
    #[test]
    fn checksum_is_the_published_one() {
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(u32::from_le_bytes(masked(b"123456789")), 0xc78a_b0e5);
    }

    #[test]
    fn numbers_read_back_and_resuming_cuts() {
        let folder = tempfile::tempdir().unwrap();
        let mut sink = TensorBoardSink::open(folder.path(), 0).unwrap();
        for step in [1, 200, 300] {
            sink.event(&evaluated(step)).unwrap();
        }
        sink.file.write_all(&[9, 0, 0]).unwrap();
        let mut sink = TensorBoardSink::open(folder.path(), 200).unwrap();
        sink.event(&evaluated(201)).unwrap();
        let events = read_back(folder.path());
        let steps: Vec<i64> = events.iter().map(|event| event.step).collect();
        assert_eq!(steps, [1, 200, 201]);
        let values = [
            ("eval/loss".to_string(), 0.5),
            ("eval/accuracy".to_string(), 0.25),
        ];
        assert_eq!(events[0].values, values);
    }
}
