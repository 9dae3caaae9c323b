//! Keys or values of one sequence in pages: grows in place, shares pages with its copies.
//!
//! A page holds [`PAGE`] tokens as `[heads, PAGE, dim]`, so that a head's rows lie end to end. A table is a value: adding
//! tokens gives a longer table and leaves the old one as it was. Both share their pages; the room behind the last token
//! of a page belongs to whoever claims it first, and a table that comes second (a fork) copies that one page. So a token
//! costs its own bytes, a common prefix is held once, and taking tokens back is free (paged as in Kwon et al., vLLM,
//! arXiv 2309.06180, shared as persistent vectors are).
#![allow(unsafe_code)]

use std::cell::UnsafeCell;
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::bf16::{self, Held};

/// Tokens of a page: one block of keys.
pub const PAGE: usize = super::KEYS;

/// How a table holds its values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Element {
    /// As they are.
    #[default]
    F32,
    /// Rounded to the nearest bf16: half the memory, three significant digits.
    Bf16,
}

impl Element {
    /// Bytes of a value.
    pub fn bytes(self) -> usize {
        match self {
            Element::F32 => 4,
            Element::Bf16 => 2,
        }
    }
}

type Cells<T> = Box<[UnsafeCell<MaybeUninit<T>>]>;

enum Values {
    F32(Cells<f32>),
    Bf16(Cells<u16>),
}

struct Page {
    values: Values,
    /// Tokens claimed; each of them was or is being written by the table that claimed it.
    claimed: AtomicUsize,
}

// SAFETY: rows below `claimed` are written once, by the table that claimed them, before a table that counts them exists;
// nobody reads a row that no table of his counts.
unsafe impl Sync for Page {}

fn cells<T>(count: usize) -> Cells<T> {
    let empty = || UnsafeCell::new(MaybeUninit::uninit());
    (0..count).map(|_| empty()).collect()
}

impl Page {
    fn new(element: Element, width: usize) -> Self {
        let count = PAGE * width;
        Page {
            values: match element {
                Element::F32 => Values::F32(cells(count)),
                Element::Bf16 => Values::Bf16(cells(count)),
            },
            claimed: AtomicUsize::new(0),
        }
    }

    /// True when tokens `from..to` are the caller's to write.
    fn claim(&self, from: usize, to: usize) -> bool {
        let order = (Ordering::AcqRel, Ordering::Relaxed);
        let claimed = &self.claimed;
        claimed.compare_exchange(from, to, order.0, order.1).is_ok()
    }

    /// Writes values `at..` of the page.
    ///
    /// # Safety
    /// The caller has claimed the rows that they are in, and no table counts those yet.
    unsafe fn write(&self, at: usize, row: &[f32]) {
        match &self.values {
            Values::F32(cells) => {
                for (cell, value) in cells[at..at + row.len()].iter().zip(row) {
                    // SAFETY: nobody else reads or writes the cell, by the caller's promise.
                    unsafe { (*cell.get()).write(*value) };
                }
            }
            Values::Bf16(cells) => {
                for (cell, value) in cells[at..at + row.len()].iter().zip(row) {
                    // SAFETY: as above.
                    unsafe { (*cell.get()).write(bf16::round(*value)) };
                }
            }
        }
    }
}

/// Keys or values of one sequence, `[len, heads, dim]`.
#[derive(Clone)]
pub struct Table {
    element: Element,
    heads: usize,
    dim: usize,
    len: usize,
    /// Tokens at the start that no longer count; less than a page.
    gone: usize,
    full: Arc<Vec<Arc<Page>>>,
    last: Option<Arc<Page>>,
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let shape = [self.len, self.heads, self.dim];
        write!(f, "Table({:?} {shape:?})", self.element)
    }
}

impl Table {
    /// A table without a token.
    pub fn new(element: Element, heads: usize, dim: usize) -> Self {
        Table {
            element,
            heads,
            dim,
            len: 0,
            gone: 0,
            full: Arc::default(),
            last: None,
        }
    }

    /// Tokens on its pages: those that count, and before them less than a page of those that no longer do.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Tokens that count: the last of [`Table::len`].
    pub fn live(&self) -> usize {
        self.len - self.gone
    }

    /// The table of the last `count` tokens of those that count; all, where it has fewer. Pages before them are let go.
    pub fn last(&self, count: usize) -> Self {
        if count >= self.live() {
            return self.clone();
        }
        let gone = self.len - count;
        let pages = gone / PAGE;
        let full = match pages {
            0 => self.full.clone(),
            _ => Arc::new(self.full[pages..].to_vec()),
        };
        Table {
            len: self.len - pages * PAGE,
            gone: gone % PAGE,
            full,
            last: self.last.clone(),
            ..*self
        }
    }

    /// True without a token.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// `[heads, dim]` of a token.
    pub fn shape(&self) -> [usize; 2] {
        [self.heads, self.dim]
    }

    /// How values are held.
    pub fn element(&self) -> Element {
        self.element
    }

    fn width(&self) -> usize {
        self.heads * self.dim
    }

    /// The table with `rows`, `[tokens, heads, dim]`, after its own.
    pub fn with_rows(&self, rows: &[f32]) -> Self {
        let width = self.width();
        assert!(rows.len().is_multiple_of(width), "rows of a table");
        let mut table = self.clone();
        for rows in Room::new(self.len, rows, width) {
            table.push(rows);
        }
        table
    }

    /// Adds rows that the last page has room for.
    fn push(&mut self, rows: &[f32]) {
        let width = self.width();
        let (used, count) = (self.len % PAGE, rows.len() / width);
        let page = match self.last.take() {
            Some(page) if page.claim(used, used + count) => page,
            held => {
                let page = Page::new(self.element, width);
                page.claimed.store(used + count, Ordering::Relaxed);
                if let Some(held) = held {
                    self.copy(&held, &page, used);
                }
                Arc::new(page)
            }
        };
        for (token, row) in rows.chunks_exact(width).enumerate() {
            for (head, row) in row.chunks_exact(self.dim).enumerate() {
                let at = (head * PAGE + used + token) * self.dim;
                // SAFETY: the tokens from `used` on were claimed above, and the table that counts them is not made yet.
                unsafe { page.write(at, row) };
            }
        }
        self.len += count;
        match used + count == PAGE {
            true => Arc::make_mut(&mut self.full).push(page),
            false => self.last = Some(page),
        }
    }

    /// Copies the first `tokens` of a page to a new one.
    fn copy(&self, from: &Page, to: &Page, tokens: usize) {
        let count = tokens * self.dim;
        for head in 0..self.heads {
            let at = head * PAGE * self.dim;
            match (held(from, at, count), &to.values) {
                (Held::F32(row), _) => {
                    // SAFETY: nobody else knows the new page yet.
                    unsafe { to.write(at, row) };
                }
                (Held::Bf16(row), Values::Bf16(cells)) => {
                    for (cell, value) in cells[at..at + count].iter().zip(row) {
                        // SAFETY: as above.
                        unsafe { (*cell.get()).write(*value) };
                    }
                }
                (Held::Bf16(_), Values::F32(_)) => unreachable!("pages of one table are alike"),
            }
        }
    }

    /// The table of the first `len` tokens of those that count; all, where it has fewer.
    pub fn truncated(&self, len: usize) -> Self {
        let len = len + self.gone;
        if len >= self.len {
            return self.clone();
        }
        let (pages, rest) = (len / PAGE, len % PAGE);
        let last = self.full.get(pages).or(self.last.as_ref());
        Table {
            len,
            full: Arc::new(self.full[..pages].to_vec()),
            last: (rest > 0).then(|| last.cloned()).flatten(),
            ..*self
        }
    }

    /// Rows of `head` from token `from` to the end of its page or of the table, `[tokens, dim]`.
    pub(super) fn page(&self, head: usize, from: usize) -> Held<'_> {
        assert!(from < self.len && head < self.heads, "row of a table");
        let (page, first) = (from / PAGE, from % PAGE);
        let count = (self.len - from).min(PAGE - first);
        let page = match self.full.get(page) {
            Some(page) => page,
            None => match &self.last {
                Some(page) => page,
                None => unreachable!("a table's tokens are on its pages"),
            },
        };
        held(page, (head * PAGE + first) * self.dim, count * self.dim)
    }

    /// Writes the rows that count to `out`, `[live, heads, dim]`.
    pub fn read(&self, out: &mut [f32]) {
        let (width, dim) = (self.width(), self.dim);
        assert_eq!(out.len(), self.live() * width, "values of a table");
        let (mut rest, mut at) = (out, self.gone);
        while !rest.is_empty() {
            let count = (PAGE - at % PAGE).min(rest.len() / width);
            let (out, later) = rest.split_at_mut(count * width);
            for head in 0..self.heads {
                let to = out.chunks_exact_mut(width);
                let to = to.map(|row| &mut row[head * dim..][..dim]);
                match self.page(head, at) {
                    Held::F32(rows) => {
                        for (to, row) in to.zip(rows.chunks_exact(dim)) {
                            to.copy_from_slice(row);
                        }
                    }
                    Held::Bf16(rows) => {
                        for (to, row) in to.zip(rows.chunks_exact(dim)) {
                            bf16::widen(row, to);
                        }
                    }
                }
            }
            (rest, at) = (later, at + count);
        }
    }
}

/// Values `at..at + count` of a page; the caller's table counts the rows that they are in.
fn held(page: &Page, at: usize, count: usize) -> Held<'_> {
    match &page.values {
        Values::F32(cells) => {
            let cells = &cells[at..at + count];
            // SAFETY: the rows were written before the caller's table came to be, and are not written again; a cell has
            // the layout of its value.
            Held::F32(unsafe { std::slice::from_raw_parts(cells.as_ptr().cast(), count) })
        }
        Values::Bf16(cells) => {
            let cells = &cells[at..at + count];
            // SAFETY: as above.
            Held::Bf16(unsafe { std::slice::from_raw_parts(cells.as_ptr().cast(), count) })
        }
    }
}

/// Rows in portions that end where pages end.
struct Room<'a> {
    at: usize,
    rows: &'a [f32],
    width: usize,
}

impl<'a> Room<'a> {
    fn new(at: usize, rows: &'a [f32], width: usize) -> Self {
        Room { at, rows, width }
    }
}

impl<'a> Iterator for Room<'a> {
    type Item = &'a [f32];

    fn next(&mut self) -> Option<&'a [f32]> {
        if self.rows.is_empty() {
            return None;
        }
        let count = (PAGE - self.at % PAGE).min(self.rows.len() / self.width);
        let (now, later) = self.rows.split_at(count * self.width);
        (self.at, self.rows) = (self.at + count, later);
        Some(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::rand_vec;

    fn values(table: &Table) -> Vec<f32> {
        let mut out = vec![f32::NAN; table.live() * table.width()];
        table.read(&mut out);
        out
    }

    #[test]
    fn rows_come_back_however_they_were_added() {
        let rows = rand_vec(1, 3 * 5 * 200);
        for cuts in [vec![200], vec![1; 200], vec![63, 1, 64, 65, 7]] {
            let mut table = Table::new(Element::F32, 3, 5);
            let mut at = 0;
            for count in cuts {
                let next = table.with_rows(&rows[at * 15..(at + count) * 15]);
                assert_eq!(values(&table), rows[..at * 15], "the shorter table changed");
                (table, at) = (next, at + count);
                assert_eq!(values(&table), rows[..at * 15]);
            }
            let short = table.truncated(70);
            assert_eq!(values(&short), rows[..70 * 15]);
            assert_eq!(short.truncated(0).with_rows(&rows[..15]).len(), 1);
        }
    }

    #[test]
    fn pages_that_left_the_window_are_let_go() {
        let rows = rand_vec(5, 2 * 400);
        for count in [1, 2, 63, 64, 65, 150] {
            let mut table = Table::new(Element::F32, 1, 2);
            for at in 0..300 {
                let next = table.with_rows(&rows[2 * at..2 * at + 2]).last(count);
                let from = (at + 1).saturating_sub(count);
                assert_eq!(values(&next), rows[2 * from..2 * at + 2]);
                assert!(next.len() < count + PAGE, "{} of {count}", next.len());
                let before = at.saturating_sub(count);
                assert_eq!(
                    values(&table),
                    rows[2 * before..2 * at],
                    "the older table changed"
                );
                table = next;
            }
            let fork = table.with_rows(&rows[600..640]);
            assert_eq!(fork.live(), count + 20);
            assert_eq!(values(&fork.truncated(count)), values(&table));
            assert_eq!(values(&table.last(0)), []);
        }
    }

    #[test]
    fn forks_share_what_is_common_and_differ_after_it() {
        let rows = rand_vec(2, 2 * 300);
        let trunk = Table::new(Element::F32, 1, 2).with_rows(&rows[..2 * 100]);
        let (one, two) = (
            trunk.with_rows(&rows[200..300]),
            trunk.with_rows(&rows[300..400]),
        );
        assert_eq!(values(&one), rows[..300]);
        assert_eq!(values(&two), [&rows[..200], &rows[300..400]].concat());
        assert!(
            Arc::ptr_eq(&one.full[0], &two.full[0]),
            "the full page is held once"
        );
        let back = one.truncated(120).with_rows(&rows[500..502]);
        assert_eq!(values(&back), [&rows[..240], &rows[500..502]].concat());
        assert_eq!(values(&one), rows[..300]);
    }

    #[test]
    fn many_threads_may_go_on_from_one_table() {
        let rows = rand_vec(3, 4 * 64);
        let trunk = Table::new(Element::F32, 1, 4).with_rows(&rows[..40]);
        let grown: Vec<Vec<f32>> = std::thread::scope(|scope| {
            let grow = |at: usize| {
                let (trunk, rows) = (&trunk, &rows);
                scope.spawn(move || values(&trunk.with_rows(&rows[4 * at..4 * at + 8])))
            };
            let threads: Vec<_> = (20..28).map(grow).collect();
            threads
                .into_iter()
                .map(|t| t.join().expect("no panic"))
                .collect()
        });
        for (index, grown) in grown.iter().enumerate() {
            let at = 4 * (20 + index);
            assert_eq!(*grown, [&rows[..40], &rows[at..at + 8]].concat());
        }
    }

    #[test]
    fn bf16_rounds_once() {
        let rows = rand_vec(4, 6 * 70);
        let table = Table::new(Element::Bf16, 2, 3).with_rows(&rows);
        let once = values(&table);
        for (got, want) in once.iter().zip(&rows) {
            assert!((got - want).abs() <= want.abs() / 256.0, "{got} {want}");
        }
        let fork = (
            table.truncated(66).with_rows(&rows[..6]),
            table.truncated(66).with_rows(&rows[6..12]),
        );
        assert_eq!(values(&fork.0)[..66 * 6], once[..66 * 6]);
        assert_eq!(values(&fork.1)[..66 * 6], once[..66 * 6]);
        assert_eq!(
            values(&Table::new(Element::Bf16, 2, 3).with_rows(&once)),
            once
        );
    }
}
