//! Matching of two documents on bytes: the pairs of the ACL Anthology Network, as Long Range Arena uses them.
//!
//! Radev et al. (2013); Tay et al. (2021), arXiv 2011.04006. `new_aan_pairs.{train,eval,test}.tsv` hold a pair a line: label
//! (0 or 1, written as 0.0 or 1.0), two ids, two texts, with tabs between them and no heading. Each text is cut to its
//! first 10,000 bytes, then to the length of the task. Published sizes: 147,086 + 18,090 + 17,437 pairs.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dialect::{Alphabet, Dialect};
use crate::error::DataError;
use crate::task::{Numbered, Sample, SampleTarget, Samples, Split, Task, TaskKind, TaskSpec, read};

const NAME: &str = "matching";
/// Bytes of a text that are looked at.
const LONGEST: usize = 10_000;

/// Options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MatchingOptions {
    /// The folder with the three files; there is no default, the texts cannot be shipped. Without it: task toy_citations.
    pub path: Option<PathBuf>,
    /// Longest document in tokens; 0 takes the dialect's, 4,000 or 4,096.
    pub time: usize,
    /// Whose form of the benchmark.
    pub dialect: Dialect,
}

/// Where a pair stands in its file.
struct Line {
    start: u64,
    bytes: usize,
    class: i64,
}

/// One file: where its pairs are. The texts stay on disk.
struct Pairs {
    path: PathBuf,
    lines: Vec<Line>,
}

fn fields(line: &[u8]) -> Vec<&[u8]> {
    line.split(|byte| *byte == b'\t').collect()
}

impl Pairs {
    fn open(path: PathBuf) -> Result<Self, DataError> {
        let fail = |error| DataError::Read {
            path: path.clone(),
            error,
        };
        let mut reader = BufReader::new(File::open(&path).map_err(fail)?);
        let (mut lines, mut start, mut buffer) = (Vec::new(), 0u64, Vec::new());
        loop {
            buffer.clear();
            let read = reader.read_until(b'\n', &mut buffer).map_err(fail)?;
            if read == 0 {
                break;
            }
            let line = buffer.trim_ascii_end();
            let wrong = |message: String| DataError::Format {
                path: path.clone(),
                message: format!("line {}: {message}", lines.len() + 1),
            };
            let fields = fields(line);
            if fields.len() != 5 {
                return Err(wrong(format!(
                    "expected label, two ids and two texts with tabs between them, got {} fields; the file is truncated or not of this set",
                    fields.len()
                )));
            }
            let label = String::from_utf8_lossy(fields[0]);
            let class = match label.trim().parse::<f64>() {
                Ok(0.0) => 0,
                Ok(1.0) => 1,
                _ => return Err(wrong(format!("expected the label 0 or 1, got {label:?}"))),
            };
            lines.push(Line {
                start,
                bytes: line.len(),
                class,
            });
            start += read as u64;
        }
        match lines.is_empty() {
            true => Err(DataError::Format {
                path,
                message: "the file holds no pair".into(),
            }),
            false => Ok(Pairs { path, lines }),
        }
    }

    /// Both texts of a pair.
    fn texts(&self, index: usize) -> Result<[Vec<u8>; 2], DataError> {
        let fail = |error| DataError::Read {
            path: self.path.clone(),
            error,
        };
        let line = &self.lines[index];
        let mut file = File::open(&self.path).map_err(fail)?;
        file.seek(SeekFrom::Start(line.start)).map_err(fail)?;
        let mut bytes = vec![0; line.bytes];
        file.read_exact(&mut bytes).map_err(fail)?;
        match fields(&bytes).as_slice() {
            [_, _, _, first, second] => {
                Ok([first, second].map(|text| text[..text.len().min(LONGEST)].to_vec()))
            }
            _ => Err(DataError::Format {
                path: self.path.clone(),
                message: "the file was changed while it was in use".into(),
            }),
        }
    }
}

pub(crate) fn task(options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (MatchingOptions, _) = read(NAME, options)?;
    let Some(folder) = &o.path else {
        return Err(DataError::Option {
            task: NAME,
            message: "give path = the folder of new_aan_pairs.train.tsv and its companions, or take the generated task toy_citations".into(),
        });
    };
    let open = |part: &str| Pairs::open(Path::join(folder, format!("new_aan_pairs.{part}.tsv")));
    let parts = [open("train")?, open("eval")?, open("test")?];
    let documents = (0..parts[0].lines.len()).flat_map(|index| match parts[0].texts(index) {
        Ok(texts) => texts.into_iter().map(Ok).collect(),
        Err(error) => vec![Err(error)],
    });
    let alphabet = Alphabet::of(o.dialect, documents)?;
    let time = if o.time == 0 {
        o.dialect.time()
    } else {
        o.time
    };
    let test = &parts[2].lines;
    let alike = test.iter().filter(|line| line.class == 1).count();
    let floor = alike.max(test.len() - alike) as f64 / test.len() as f64;
    Ok(Box::new(Numbered {
        spec: TaskSpec {
            name: NAME.into(),
            description: format!(
                "Does one paper cite the other? {} + {} + {} pairs, {time} tokens of each at most.",
                parts[0].lines.len(),
                parts[1].lines.len(),
                test.len()
            ),
            source:
                "Radev et al.: ACL Anthology Network (2013); Long Range Arena, arXiv 2011.04006"
                    .into(),
            kind: TaskKind::Match,
            time,
            vocab: alphabet.vocab(),
            classes: 2,
            floor: Some(floor),
            options: resolved,
        },
        samples: Matching {
            parts,
            alphabet,
            time,
        },
        tokenizer: None,
    }))
}

struct Matching {
    parts: [Pairs; 3],
    alphabet: Alphabet,
    time: usize,
}

impl Samples for Matching {
    fn count(&self, split: Split) -> Option<usize> {
        Some(self.parts[split as usize].lines.len())
    }

    fn sample(
        &self,
        split: Split,
        index: usize,
        _: u64,
        _: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError> {
        let part = &self.parts[split as usize];
        let [first, second] = part.texts(index)?;
        let mut tokens = self.alphabet.encode(&first, self.time);
        let first = tokens.len();
        tokens.extend(self.alphabet.encode(&second, self.time));
        Ok(Sample {
            tokens,
            target: SampleTarget::Pair {
                class: part.lines[index].class,
                first,
            },
            pixels: Vec::new(),
        })
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    /// Three files with `rows` pairs each.
    pub(crate) fn folder(root: &Path, rows: usize) {
        for part in ["train", "eval", "test"] {
            let line = |row: usize| {
                format!(
                    "{}.0\tA{row}\tB{row}\t{part} {row}\tother {part}\n",
                    row % 2
                )
            };
            let text: String = (0..rows).map(line).collect();
            std::fs::write(root.join(format!("new_aan_pairs.{part}.tsv")), text).expect("written");
        }
    }

    #[test]
    fn pairs_become_two_rows_and_damage_is_named() {
        let root = tempfile::tempdir().expect("a folder");
        folder(root.path(), 30);
        let made = task(&json!({"path": root.path(), "time": 7})).expect("whole");
        let batch = made
            .loader(Split::Test, 2, 0)
            .and_then(|mut loader| loader.next_batch());
        let batch = batch.expect("a batch");
        assert_eq!((batch.batch, batch.time), (4, 7));
        assert_eq!(batch.targets, crate::task::Targets::Classes(vec![0, 1]));
        let row = |text: &str| {
            text.bytes()
                .map(|byte| u32::from(byte) + 1)
                .collect::<Vec<_>>()
        };
        assert_eq!(batch.tokens[..6], row("test 0"));
        assert_eq!(batch.tokens[7..14], row("other t"));
        assert_eq!(batch.lengths, Some(vec![6, 7, 6, 7]));
        let path = root.path().join("new_aan_pairs.eval.tsv");
        std::fs::write(&path, "1.0\ta\tb\tone text\n").expect("written");
        let error = task(&json!({"path": root.path()}))
            .err()
            .expect("cut")
            .to_string();
        assert!(
            error.contains("eval.tsv") && error.contains("line 1") && error.contains("truncated"),
            "{error}"
        );
        std::fs::write(&path, "2\ta\tb\tc\td\n").expect("written");
        assert!(task(&json!({"path": root.path()})).is_err());
        std::fs::remove_file(&path).expect("gone");
        let error = task(&json!({"path": root.path()}))
            .err()
            .expect("missing")
            .to_string();
        assert!(error.contains("new_aan_pairs.eval.tsv"), "{error}");
    }
}
