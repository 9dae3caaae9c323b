//! The table for a terminal and as Markdown.

use super::{Cell, Mark, Table};

impl Cell {
    /// The number with its mark: `*` best, `~` not told apart from the best.
    pub fn marked(&self) -> String {
        match self.mark {
            Mark::Best => format!("{} *", self.text),
            Mark::Tied => format!("{} ~", self.text),
            Mark::Plain => self.text.clone(),
        }
    }
}

fn shown(cell: &Option<Cell>) -> String {
    // Two columns are kept for the mark, so that the digits of marked and unmarked cells line up.
    match cell {
        None => "–  ".into(),
        Some(cell) if cell.mark == Mark::Plain => format!("{}  ", cell.text),
        Some(cell) => cell.marked(),
    }
}

fn width(text: &str) -> usize {
    text.chars().count()
}

fn right(text: &str, columns: usize) -> String {
    format!("{}{text}", " ".repeat(columns.saturating_sub(width(text))))
}

fn left(text: &str, columns: usize) -> String {
    format!("{text}{}", " ".repeat(columns.saturating_sub(width(text))))
}

impl Table {
    /// Aligned columns for a terminal of `columns` characters; a wider table is continued below, each part with the
    /// contenders again. Ends with the notes.
    pub fn to_text(&self, columns: usize) -> String {
        let widths: Vec<usize> = (0..self.columns.len())
            .map(|index| {
                let cells = self.rows.iter().map(|row| width(&shown(&row.cells[index])));
                let head = &self.columns[index];
                cells
                    .chain([width(&head.title) + 2, width(&head.unit) + 2])
                    .max()
                    .unwrap_or(0)
            })
            .collect();
        let names = self
            .rows
            .iter()
            .map(|row| width(&row.mixer))
            .chain([5])
            .max()
            .unwrap_or(5);
        let mut out = String::new();
        let mut start = 0;
        while start < widths.len() {
            let mut end = start;
            let mut total = names;
            while end < widths.len() && (end == start || total + 1 + widths[end] <= columns) {
                total += 1 + widths[end];
                end += 1;
            }
            if start > 0 {
                out.push('\n');
            }
            self.part(start..end, names, &widths, &mut out);
            start = end;
        }
        for note in &self.notes {
            out.push_str(note);
            out.push('\n');
        }
        out
    }

    fn part(
        &self,
        range: std::ops::Range<usize>,
        names: usize,
        widths: &[usize],
        out: &mut String,
    ) {
        let mut line = |first: &str, cell: &dyn Fn(usize) -> String| {
            let mut text = left(first, names);
            for index in range.clone() {
                text.push(' ');
                text.push_str(&right(&cell(index), widths[index]));
            }
            out.push_str(text.trim_end());
            out.push('\n');
        };
        line("mixer", &|index| format!("{}  ", self.columns[index].title));
        line("", &|index| format!("{}  ", self.columns[index].unit));
        line(&"─".repeat(names), &|index| "─".repeat(widths[index]));
        for row in &self.rows {
            line(&row.mixer, &|index| shown(&row.cells[index]));
        }
    }

    /// GitHub-flavoured Markdown, best values in bold, followed by the notes.
    pub fn to_markdown(&self) -> String {
        let escape = |text: &str| text.replace('|', "\\|").replace('\n', " ");
        let mut out = String::from("| mixer |");
        for column in &self.columns {
            let gap = if column.unit.is_empty() { "" } else { ", " };
            out.push_str(&format!(
                " {}{gap}{} |",
                escape(&column.title),
                escape(&column.unit)
            ));
        }
        out.push_str("\n|---|");
        out.push_str(&"---:|".repeat(self.columns.len()));
        out.push('\n');
        for row in &self.rows {
            out.push_str(&format!("| {} |", escape(&row.mixer)));
            for cell in &row.cells {
                let text = match cell {
                    None => "–".to_string(),
                    Some(cell) if cell.mark == Mark::Best => format!("**{}**", cell.text),
                    Some(cell) if cell.mark == Mark::Tied => format!("{} ~", cell.text),
                    Some(cell) => cell.text.clone(),
                };
                out.push_str(&format!(" {text} |"));
            }
            out.push('\n');
        }
        if !self.notes.is_empty() {
            out.push('\n');
        }
        for note in &self.notes {
            out.push_str(&format!(
                "- {}\n",
                escape(
                    &note
                        .replace("* best", "bold: best")
                        .replace("~ not", "`~` not")
                )
            ));
        }
        out
    }
}
