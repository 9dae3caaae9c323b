//! Where our parameters lie in the tensors of another program: a name, and which of its rows.

use std::ops::Range;

/// Which rows of their tensor are ours. `n` is the number of our rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    /// All, in order.
    All,
    /// All but so many at the beginning.
    After(usize),
    /// Part `part` of `of` equal parts, one after the other.
    Part { part: usize, of: usize },
    /// As `Part`, but within every head.
    HeadPart { part: usize, of: usize },
    /// Within every head the rows that turn together are neighbours in theirs, half a head apart in ours.
    Pairs { queries: bool },
}

/// One line of a map of names. `#` stands for the number of a layer, `*` for any ending.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Name {
    ours: &'static str,
    theirs: &'static str,
    rows: Rows,
    transposed: bool,
}

pub(crate) const fn same(ours: &'static str, theirs: &'static str) -> Name {
    rows(ours, theirs, Rows::All)
}

pub(crate) const fn rows(ours: &'static str, theirs: &'static str, rows: Rows) -> Name {
    Name {
        ours,
        theirs,
        rows,
        transposed: false,
    }
}

/// Their matrices are `[in, out]`.
pub(crate) const fn transposed(ours: &'static str, theirs: &'static str, rows: Rows) -> Name {
    Name {
        ours,
        theirs,
        rows,
        transposed: true,
    }
}

/// Where one of our parameters lies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Name of their tensor.
    pub(crate) name: String,
    rows: Rows,
    /// Their matrix is `[in, out]`.
    pub(crate) transposed: bool,
    heads: usize,
}

impl Place {
    /// A tensor of the same name and shape.
    pub(crate) fn own(name: &str) -> Self {
        Place {
            name: name.to_string(),
            rows: Rows::All,
            transposed: false,
            heads: 1,
        }
    }

    /// The place that a map gives to our parameter; `heads` are those of queries and of keys.
    pub(crate) fn find(map: &[Name], ours: &str, heads: [usize; 2]) -> Option<Self> {
        let (pattern, layer) = numberless(ours);
        map.iter().find_map(|line| {
            let rest = match line.ours.strip_suffix('*') {
                Some(front) => pattern.strip_prefix(front)?,
                None if line.ours == pattern => "",
                None => return None,
            };
            let [queries, keys] = heads;
            Some(Place {
                name: line.theirs.replace('#', layer).replace('*', rest),
                rows: line.rows,
                transposed: line.transposed,
                heads: match line.rows {
                    Rows::Pairs { queries: false } => keys,
                    _ => queries,
                },
            })
        })
    }

    /// Their row that is the first of `ours`, and how many lie one after the other in both; `n` is the number of our rows.
    pub(crate) fn run(&self, ours: Range<usize>, n: usize) -> (usize, usize) {
        let (start, first) = (ours.start, self.row(ours.start, n));
        let run = ours.take_while(|at| self.row(*at, n) == first + at - start);
        (first, run.count())
    }

    /// The row of theirs that holds our row `row` of `own`.
    pub(crate) fn row(&self, row: usize, own: usize) -> usize {
        let head_dim = (own / self.heads.max(1)).max(1);
        let (head, inner) = (row / head_dim, row % head_dim);
        match self.rows {
            Rows::All => row,
            Rows::After(before) => row + before,
            Rows::Part { part, .. } => part * own + row,
            Rows::HeadPart { part, of } => (head * of + part) * head_dim + inner,
            Rows::Pairs { .. } => {
                let half = (head_dim / 2).max(1);
                head * head_dim + 2 * (inner % half) + inner / half
            }
        }
    }

    /// The shape that their tensor should have for ours.
    pub(crate) fn shape(&self, ours: &[usize]) -> Vec<usize> {
        let mut shape = ours.to_vec();
        if let Some(first) = shape.first_mut() {
            *first = match self.rows {
                Rows::All | Rows::Pairs { .. } => *first,
                Rows::After(before) => *first + before,
                Rows::Part { of, .. } | Rows::HeadPart { of, .. } => of * *first,
            };
        }
        if self.transposed && shape.len() == 2 {
            shape.swap(0, 1);
        }
        shape
    }
}

/// `layers.7.mixer` as `layers.#.mixer` and `7`.
fn numberless(name: &str) -> (String, &str) {
    let Some((number, rest)) = name
        .strip_prefix("layers.")
        .and_then(|rest| rest.split_once('.'))
    else {
        return (name.to_string(), "");
    };
    (format!("layers.#.{rest}"), number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_a_choice_of_theirs() {
        let map = [
            rows(
                "layers.#.k.*",
                "h.#.qkv.*",
                Rows::HeadPart { part: 1, of: 3 },
            ),
            rows("p.weight", "pos", Rows::After(2)),
            rows("r.weight", "turned", Rows::Pairs { queries: false }),
        ];
        let place = |ours| Place::find(&map, ours, [2, 1]).expect(ours);
        let k = place("layers.12.k.bias");
        assert_eq!(k.name, "h.12.qkv.bias");
        assert_eq!(k.shape(&[4]), [12]);
        let of: Vec<usize> = (0..4).map(|row| k.row(row, 4)).collect();
        assert_eq!(of, [2, 3, 8, 9]);
        assert_eq!(place("p.weight").shape(&[3, 5]), [5, 5]);
        assert_eq!(place("p.weight").row(1, 3), 3);
        let turned: Vec<usize> = (0..4).map(|row| place("r.weight").row(row, 4)).collect();
        assert_eq!(turned, [0, 2, 1, 3]);
        assert_eq!(Place::find(&map, "q.weight", [2, 1]), None);
    }
}
