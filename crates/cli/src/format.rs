//! Text tables.

/// Columns aligned by spaces: words to the left, numbers (columns in `right`) to the right.
pub(crate) fn table(header: &[&str], right: &[usize], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = header.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &[String]| {
        let mut text = String::new();
        for (column, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            let pad = " ".repeat(width - cell.chars().count());
            match right.contains(&column) {
                true => text.push_str(&format!("{pad}{cell}  ")),
                false => text.push_str(&format!("{cell}{pad}  ")),
            }
        }
        format!("{}\n", text.trim_end())
    };
    let header: Vec<String> = header.iter().map(ToString::to_string).collect();
    let mut text = line(&header);
    for row in rows {
        text.push_str(&line(row));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["gla".to_string(), "7".to_string()],
            vec!["µ".into(), "1,234".into()],
        ];
        assert_eq!(
            table(&["name", "n"], &[1], &rows),
            "name      n\ngla       7\nµ     1,234\n"
        );
    }
}
