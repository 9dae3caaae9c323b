//! ListOps, as the Long Range Arena generates it.
//!
//! Nangia and Bowman (2018), arXiv 1804.06028; Tay et al. (2021), arXiv 2011.04006. A random tree of MIN, MAX, MED (median,
//! truncated) and SM (sum modulo 10) over digits; the answer is its value. The root is at depth 1; a node above the
//! deepest level is an operator with probability 0.25, with 2 to `max_args` children. Expressions whose length (an operator
//! and its bracket count one each) is not strictly between the limits are drawn again.
//!
//! A hash of the expression says to which split it belongs, so that no expression is in two splits.

use std::path::{Path, PathBuf};

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::DataError;
use crate::task::{
    Numbered, Sample, SampleTarget, Samples, Split, Task, TaskKind, TaskSpec, below, read, rng_for,
};

const NAME: &str = "list_ops";
/// Fifteen symbols, 0 for padding, 16 for what is unknown.
const VOCAB: usize = 17;
/// Share of the most frequent answer at the published sizes, measured over 43,446 expressions.
const PUBLISHED_FLOOR: f64 = 0.169;
/// Symbols in order; the id is one more than the place.
const SYMBOLS: [&str; 15] = [
    "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "[MIN", "[MAX", "[MED", "[SM", "]",
];

/// Options; the defaults are the published sizes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ListOpsOptions {
    /// Deepest level; the root is level 1.
    pub max_depth: u32,
    /// Most children of an operator.
    pub max_args: u32,
    /// Expressions are longer than this.
    pub min_length: usize,
    /// Expressions are shorter than this.
    pub max_length: usize,
    /// Folder with basic_train.tsv, basic_val.tsv, basic_test.tsv instead of generated expressions.
    pub path: Option<PathBuf>,
    /// Training expressions; 0 for no end.
    pub train_rows: usize,
    /// Validation and test expressions, each.
    pub test_rows: usize,
}

impl Default for ListOpsOptions {
    fn default() -> Self {
        ListOpsOptions {
            max_depth: 10,
            max_args: 10,
            min_length: 500,
            max_length: 2000,
            path: None,
            train_rows: 96_000,
            test_rows: 2000,
        }
    }
}

/// An operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// Smallest.
    Min,
    /// Largest.
    Max,
    /// Median, the mean of the middle two truncated.
    Median,
    /// Sum modulo 10.
    Sum,
}

/// An expression.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expression {
    /// 0 to 9.
    Digit(u8),
    /// An operator with its arguments.
    Apply(Operator, Vec<Expression>),
}

impl Expression {
    /// Draws one; `None` once it is longer than `most`.
    fn draw(rng: &mut ChaCha8Rng, o: &ListOpsOptions, depth: u32, most: &mut usize) -> Option<Self> {
        if depth >= o.max_depth || rng.random::<f64>() > 0.25 {
            *most = most.checked_sub(1)?;
            return Some(Expression::Digit(below(rng, 10) as u8));
        }
        *most = most.checked_sub(2)?;
        let count = 2 + below(rng, o.max_args - 1);
        let children = (0..count)
            .map(|_| Self::draw(rng, o, depth + 1, most))
            .collect::<Option<Vec<_>>>()?;
        let operator = [Operator::Min, Operator::Max, Operator::Median, Operator::Sum];
        Some(Expression::Apply(operator[below(rng, 4) as usize], children))
    }

    /// Its value, 0 to 9.
    pub fn value(&self) -> u8 {
        match self {
            Expression::Digit(digit) => *digit,
            Expression::Apply(operator, children) => {
                let mut values: Vec<u8> = children.iter().map(Expression::value).collect();
                values.sort_unstable();
                let count = values.len();
                match operator {
                    Operator::Min => values[0],
                    Operator::Max => values[count - 1],
                    Operator::Median if count.is_multiple_of(2) => {
                        (values[count / 2 - 1] + values[count / 2]) / 2
                    }
                    Operator::Median => values[count / 2],
                    Operator::Sum => {
                        (values.iter().map(|value| u32::from(*value)).sum::<u32>() % 10) as u8
                    }
                }
            }
        }
    }

    /// Its symbols, as places in the list of symbols.
    fn symbols(&self, out: &mut Vec<u8>) {
        match self {
            Expression::Digit(digit) => out.push(*digit),
            Expression::Apply(operator, children) => {
                out.push(10 + *operator as u8);
                children.iter().for_each(|child| child.symbols(out));
                out.push(14);
            }
        }
    }

    /// Its token ids.
    pub fn tokens(&self) -> Vec<u32> {
        let mut symbols = Vec::new();
        self.symbols(&mut symbols);
        symbols.into_iter().map(|symbol| u32::from(symbol) + 1).collect()
    }

    /// The published notation: a left-nested tree of binary applications.
    pub fn source(&self) -> String {
        match self {
            Expression::Digit(digit) => digit.to_string(),
            Expression::Apply(operator, children) => {
                let mut text = SYMBOLS[10 + *operator as usize].to_string();
                for child in children {
                    text = format!("( {text} {} )", child.source());
                }
                format!("( {text} ] )")
            }
        }
    }
}

/// Token ids of the published notation; brackets of the binary tree are dropped.
fn tokens_of_source(source: &str) -> Vec<u32> {
    let symbol = |word: &str| {
        let place = SYMBOLS.iter().position(|symbol| *symbol == word);
        place.map_or(VOCAB as u32 - 1, |place| place as u32 + 1)
    };
    source
        .split_whitespace()
        .filter(|word| *word != "(" && *word != ")")
        .map(symbol)
        .collect()
}

/// Writes expressions in the published form: a header, then source and value.
pub fn write_tsv(expressions: &[Expression]) -> String {
    let rows = expressions
        .iter()
        .map(|expression| format!("{}\t{}\n", expression.source(), expression.value()));
    std::iter::once("Source\tTarget\n".to_string()).chain(rows).collect()
}

fn read_tsv(path: &Path) -> Result<Vec<(Vec<u32>, i64)>, DataError> {
    let text = std::fs::read_to_string(path).map_err(|error| DataError::Read {
        path: path.to_path_buf(),
        error,
    })?;
    let wrong = |line: usize, message: &str| DataError::Format {
        path: path.to_path_buf(),
        message: format!("line {line}: {message}"),
    };
    let mut lines = text.lines().enumerate();
    if lines.next().map(|(_, header)| header) != Some("Source\tTarget") {
        return Err(wrong(1, "expected the header Source, tab, Target"));
    }
    lines
        .map(|(index, line)| {
            let (source, target) = line
                .split_once('\t')
                .ok_or_else(|| wrong(index + 1, "expected a source, a tab and a target"))?;
            let target: i64 = target.trim().parse().unwrap_or(-1);
            match (0..10).contains(&target) {
                true => Ok((tokens_of_source(source), target)),
                false => Err(wrong(index + 1, "expected a target from 0 to 9")),
            }
        })
        .collect()
}

pub(crate) fn task(options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (ListOpsOptions, _) = read(NAME, options)?;
    let sane = o.max_args >= 2 && o.max_depth >= 2 && o.max_length > o.min_length + 1;
    if !sane || o.max_length > 1_000_000 || o.test_rows == 0 {
        return Err(DataError::Option {
            task: NAME,
            message: format!(
                "expected max_depth and max_args of at least 2, min_length {} below max_length {} - 1, and test_rows of at least 1",
                o.min_length, o.max_length
            ),
        });
    }
    let published = ListOpsOptions {
        train_rows: o.train_rows,
        test_rows: o.test_rows,
        ..ListOpsOptions::default()
    };
    let files = match &o.path {
        None => None,
        Some(folder) => Some([
            read_tsv(&folder.join("basic_train.tsv"))?,
            read_tsv(&folder.join("basic_val.tsv"))?,
            read_tsv(&folder.join("basic_test.tsv"))?,
        ]),
    };
    let samples = ListOps {
        options: o.clone(),
        files,
    };
    let floor = match o == published {
        true => PUBLISHED_FLOOR,
        false => samples.floor()?,
    };
    let description = format!(
        "ListOps: the value of nested MIN, MAX, MED and SM over digits, {} to {} symbols, depth up to {}, up to {} arguments. Always answering the most frequent digit scores {:.1} %.",
        o.min_length + 1,
        o.max_length - 1,
        o.max_depth,
        o.max_args,
        100.0 * floor
    );
    Ok(Box::new(Numbered {
        spec: TaskSpec {
            name: NAME.into(),
            description,
            source: "Tay et al.: Long Range Arena (ICLR 2021), arXiv 2011.04006; generated by the published grammar".into(),
            kind: TaskKind::Classify,
            time: o.max_length,
            vocab: VOCAB,
            classes: 10,
            floor: Some(floor),
            options: resolved,
        },
        samples,
        tokenizer: None,
    }))
}

struct ListOps {
    options: ListOpsOptions,
    files: Option<[Vec<(Vec<u32>, i64)>; 3]>,
}

/// How many draws may be thrown away before the limits are called impossible.
const PATIENCE: usize = 100_000;

impl ListOps {
    fn generate(&self, split: Split, rng: &mut ChaCha8Rng) -> Result<Expression, DataError> {
        let o = &self.options;
        for _ in 0..PATIENCE {
            let mut left = o.max_length - 1;
            let Some(expression) = Expression::draw(rng, o, 1, &mut left) else {
                continue;
            };
            let length = o.max_length - 1 - left;
            if length <= o.min_length {
                continue;
            }
            let mut symbols = Vec::with_capacity(length);
            expression.symbols(&mut symbols);
            let hash = symbols.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, symbol| {
                (hash ^ u64::from(*symbol)).wrapping_mul(0x0100_0000_01b3)
            });
            // One fiftieth each for validation and test, as 2,000 of 100,000.
            let belongs = match (hash >> 20) % 50 {
                0 => Split::Validation,
                1 => Split::Test,
                _ => Split::Train,
            };
            if belongs == split {
                return Ok(expression);
            }
        }
        Err(DataError::Option {
            task: NAME,
            message: format!(
                "no expression of {} to {} symbols came in {PATIENCE} draws; raise max_depth or max_args, or lower min_length",
                o.min_length + 1,
                o.max_length - 1
            ),
        })
    }

    /// The share of the most frequent answer.
    fn floor(&self) -> Result<f64, DataError> {
        let mut counts = [0usize; 10];
        match &self.files {
            Some(files) => files[2].iter().for_each(|(_, target)| counts[*target as usize] += 1),
            None => {
                for index in 0..1000 {
                    let mut rng = rng_for(&[7, index]);
                    counts[usize::from(self.generate(Split::Train, &mut rng)?.value())] += 1;
                }
            }
        }
        let total = counts.iter().sum::<usize>().max(1);
        Ok(counts.iter().copied().max().unwrap_or(0) as f64 / total as f64)
    }
}

impl Samples for ListOps {
    fn count(&self, split: Split) -> Option<usize> {
        match (&self.files, split) {
            (Some(files), _) => Some(files[split as usize].len()),
            (None, Split::Train) => {
                (self.options.train_rows > 0).then_some(self.options.train_rows)
            }
            (None, _) => Some(self.options.test_rows),
        }
    }

    fn sample(
        &self,
        split: Split,
        index: usize,
        _: u64,
        rng: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError> {
        let (mut tokens, class) = match &self.files {
            Some(files) => files[split as usize][index].clone(),
            None => {
                let expression = self.generate(split, rng)?;
                (expression.tokens(), i64::from(expression.value()))
            }
        };
        tokens.truncate(self.options.max_length);
        Ok(Sample {
            tokens,
            target: SampleTarget::Class(class),
            pixels: Vec::new(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_and_the_published_notation() {
        let d = Expression::Digit;
        let median = Expression::Apply(Operator::Median, vec![d(3), d(8), d(4), d(1)]);
        assert_eq!(median.value(), 3);
        let sum = Expression::Apply(Operator::Sum, vec![median.clone(), d(9)]);
        assert_eq!(sum.value(), 2);
        let max = Expression::Apply(Operator::Max, vec![d(3), d(4)]);
        assert_eq!(max.source(), "( ( ( [MAX 3 ) 4 ) ] )");
        assert_eq!(tokens_of_source(&sum.source()), sum.tokens());
        assert_eq!(tokens_of_source("( [FIRST 3 )"), [16, 4]);
    }

    /// Lengths and answers at the published sizes against an independent measurement: acceptance 8.2 %, mean length 1,035,
    /// median 954, answers 0 and 9 with 16.8 % and 16.9 %.
    #[test]
    fn published_sizes_have_the_published_distribution() {
        let options = ListOpsOptions::default();
        let (mut lengths, mut ends, mut draws) = (Vec::new(), 0, 0);
        let mut rng = rng_for(&[1]);
        while lengths.len() < 400 {
            draws += 1;
            let mut left = options.max_length - 1;
            let Some(expression) = Expression::draw(&mut rng, &options, 1, &mut left) else {
                continue;
            };
            let length = options.max_length - 1 - left;
            if length > options.min_length {
                assert_eq!(expression.tokens().len(), length);
                lengths.push(length);
                ends += usize::from([0, 9].contains(&expression.value()));
            }
        }
        lengths.sort_unstable();
        let mean = lengths.iter().sum::<usize>() as f64 / 400.0;
        assert!((mean - 1035.0).abs() < 80.0, "mean length {mean}");
        assert!((lengths[200] as f64 - 954.0).abs() < 120.0, "median {}", lengths[200]);
        assert!((lengths[40] as f64 - 578.0).abs() < 60.0, "first decile {}", lengths[40]);
        let acceptance = 400.0 / f64::from(draws);
        assert!((acceptance - 0.082).abs() < 0.02, "acceptance {acceptance}");
        assert!((f64::from(ends as u32) / 400.0 - 0.337).abs() < 0.09, "ends {ends}");
    }

    #[test]
    fn splits_share_no_expression_and_files_are_read() {
        let small = json!({"max_depth": 4, "max_args": 4, "min_length": 5, "max_length": 60});
        let made = task(&small).expect("options fit");
        let rows = |split| {
            let mut loader = made.loader(split, 200, 0).expect("a loader");
            let batch = loader.next_batch().expect("a batch");
            let time = batch.time;
            let lengths = batch.lengths.expect("ragged");
            let rows = batch.tokens.chunks(time).zip(lengths);
            rows.map(|(row, length)| row[..length].to_vec()).collect::<Vec<_>>()
        };
        let (train, test) = (rows(Split::Train), rows(Split::Test));
        assert!(train.iter().all(|row| !test.contains(row)));
        let folder = tempfile::tempdir().expect("a folder");
        let mut rng = rng_for(&[4]);
        let mut left = 100;
        let options = ListOpsOptions::default();
        let expression = Expression::draw(&mut rng, &options, 9, &mut left).expect("short");
        for name in ["train", "val", "test"] {
            let path = folder.path().join(format!("basic_{name}.tsv"));
            std::fs::write(path, write_tsv(std::slice::from_ref(&expression))).expect("written");
        }
        let read = task(&json!({"path": folder.path()})).expect("files fit");
        let batch = read.loader(Split::Test, 1, 0).and_then(|mut loader| loader.next_batch());
        assert_eq!(batch.expect("a batch").tokens, expression.tokens());
        std::fs::write(folder.path().join("basic_val.tsv"), "nothing").expect("written");
        assert!(task(&json!({"path": folder.path()})).is_err());
    }
}
