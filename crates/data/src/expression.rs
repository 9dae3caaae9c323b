//! Expressions of ListOps: how they are drawn, what they are worth, how they are written.

use std::path::Path;

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::error::DataError;
use crate::list_ops::ListOpsOptions;
use crate::task::below;

/// Fifteen symbols, 0 for padding, 16 for what is unknown.
pub(crate) const VOCAB: usize = 17;
/// Symbols in order; the id is one more than the place.
const SYMBOLS: [&str; 15] = [
    "0", "1", "2", "3", "4", "5", "6", "7", "8", "9", "[MIN", "[MAX", "[MED", "[SM", "]",
];

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
    pub(crate) fn draw(
        rng: &mut ChaCha8Rng,
        o: &ListOpsOptions,
        depth: u32,
        most: &mut usize,
    ) -> Option<Self> {
        if depth >= o.max_depth || rng.random::<f64>() > 0.25 {
            *most = most.checked_sub(1)?;
            return Some(Expression::Digit(below(rng, 10) as u8));
        }
        *most = most.checked_sub(2)?;
        let count = 2 + below(rng, o.max_args - 1);
        let children = (0..count)
            .map(|_| Self::draw(rng, o, depth + 1, most))
            .collect::<Option<Vec<_>>>()?;
        let operator = [
            Operator::Min,
            Operator::Max,
            Operator::Median,
            Operator::Sum,
        ];
        Some(Expression::Apply(
            operator[below(rng, 4) as usize],
            children,
        ))
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
    pub(crate) fn symbols(&self, out: &mut Vec<u8>) {
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
        symbols
            .into_iter()
            .map(|symbol| u32::from(symbol) + 1)
            .collect()
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
    std::iter::once("Source\tTarget\n".to_string())
        .chain(rows)
        .collect()
}

pub(crate) fn read_tsv(path: &Path) -> Result<Vec<(Vec<u32>, i64)>, DataError> {
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
            let tokens = tokens_of_source(source);
            match (0..10).contains(&target) && !tokens.is_empty() {
                true => Ok((tokens, target)),
                false => Err(wrong(
                    index + 1,
                    "expected an expression and a target from 0 to 9",
                )),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
