//! `metrics.jsonl`: one event a line.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyformer_hub::atomic::write_file;
use serde::Serialize;
use serde_json::Value;

use crate::error::TrainError;
use crate::events::{Event, Events};

/// Appends events to a file, each with the `time` of its writing in seconds since 1970.
#[derive(Debug)]
pub struct JsonlSink {
    file: File,
}

#[derive(Serialize)]
struct Record<'a> {
    time: f64,
    #[serde(flatten)]
    event: &'a Event,
}

impl JsonlSink {
    /// Opens `path` for a run that goes on after `step`: what a killed run wrote beyond that step is dropped, with a
    /// line that was cut off, so that no step stands there twice. A file that is not there is made.
    pub fn open(path: &Path, step: u64) -> Result<Self, TrainError> {
        match std::fs::read(path) {
            Ok(bytes) => keep(path, &bytes, step)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(TrainError::io("read", path)(error)),
        }
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(JsonlSink {
            file: file.map_err(TrainError::io("write", path))?,
        })
    }
}

fn keep(path: &Path, bytes: &[u8], step: u64) -> Result<(), TrainError> {
    let early = |line: &[u8]| {
        let value: Option<Value> = serde_json::from_slice(line).ok();
        value
            .and_then(|value| value["step"].as_u64())
            .is_some_and(|at| at <= step)
    };
    let lines = bytes.split_inclusive(|byte| *byte == b'\n');
    let kept: Vec<&[u8]> = lines
        .filter(|line| line.ends_with(b"\n") && early(line))
        .collect();
    let kept = kept.concat();
    if kept.len() != bytes.len() {
        write_file(path, |file| file.write_all(&kept))?;
    }
    Ok(())
}

/// Seconds since 1970.
pub(crate) fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

impl Events for JsonlSink {
    fn event(&mut self, event: &Event) -> io::Result<()> {
        let mut line = serde_json::to_vec(&Record { time: now(), event })?;
        line.push(b'\n');
        // One write call a line: a kill leaves whole lines.
        self.file.write_all(&line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resuming_drops_later_and_cut_records_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut sink = JsonlSink::open(&path, 0).unwrap();
        for step in 1..=6 {
            sink.event(&Event::Stopped { step }).unwrap();
        }
        sink.file.write_all(b"{\"event\":\"stop").unwrap();
        let mut sink = JsonlSink::open(&path, 4).unwrap();
        sink.event(&Event::Stopped { step: 5 }).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let steps: Vec<u64> = text
            .lines()
            .map(|line| serde_json::from_str::<Event>(line).unwrap().step())
            .collect();
        assert_eq!(steps, [1, 2, 3, 4, 5]);
    }
}
