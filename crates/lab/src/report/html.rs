//! The page: escaping, facts, the main table, sections.

use super::plot::Plot;
use super::{ReportData, ReportError, figures, trials};
use crate::table::{Cell, Mark, Quantity, Table};
use crate::trial::TrialResult;
use crate::units;

/// `text` safe inside an element and inside a quoted attribute.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            other => out.push(other),
        }
    }
    out
}

pub(super) fn page(data: &ReportData) -> Result<String, ReportError> {
    let title = escape(&data.title);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\"><link rel=\"icon\" href=\"data:,\">\
         <title>{title}</title>\n<style>\n{}</style></head>\n<body><header><h1>{title}</h1>\n",
        include_str!("style.css")
    );
    out.push_str(&facts(data));
    out.push_str(
        "</header>\n<nav><a href=\"#table\">Table</a> <a href=\"#learning\">Learning</a> <a href=\"#state\">Quality and \
         state</a> <a href=\"#length\">Time and memory</a> <a href=\"#trials\">Trials</a></nav>\n<main>\n",
    );
    let table = data.table(None);
    out.push_str("<section id=\"table\"><h2>Comparison</h2>\n");
    out.push_str(&main_table(data, &table));
    out.push_str("<ul class=\"notes\">");
    for note in table
        .notes
        .iter()
        .filter(|note| !note.starts_with("* ") && !note.starts_with("~ "))
    {
        out.push_str(&format!("<li>{}</li>", escape(note)));
    }
    out.push_str(
        "<li><b>Bold *</b> is the best of its column; ~ is not told apart from the best (within two standard errors of the \
         difference). Each number leads to its trials.</li></ul>\n",
    );
    if data.tasks.len() > 1 {
        out.push_str("<details><summary>One table per task</summary>");
        for task in &data.tasks {
            out.push_str(&format!("<h3>{}</h3>", escape(&task.name)));
            out.push_str(&main_table(data, &data.table(Some(&task.name))));
        }
        out.push_str("</details>\n");
    }
    out.push_str("<dl class=\"tasks\">");
    for task in &data.tasks {
        out.push_str(&format!(
            "<dt>{}</dt><dd>{}</dd>",
            escape(&task.name),
            escape(&task.description)
        ));
    }
    out.push_str("</dl></section>\n");
    let band = "Mean over seeds; the band is ± one standard error.";
    out.push_str(&plots(
        "learning",
        "Learning curves",
        band,
        &figures::learning(data),
    )?);
    let bars = "Mean over seeds; bars are ± one standard error. State is counted at the length of the task.";
    out.push_str(&plots(
        "state",
        "Quality against state size",
        bars,
        &figures::quality_against_state(data),
    )?);
    let middle = "Median over the trials of a contender.";
    out.push_str(&plots(
        "length",
        "Time and memory against length",
        middle,
        &figures::inference(data),
    )?);
    out.push_str("<section id=\"trials\"><h2>All trials</h2>\n");
    out.push_str(&trials::section(data));
    out.push_str("</section>\n</main></body></html>\n");
    Ok(out)
}

fn plots(id: &str, title: &str, text: &str, plots: &[Plot]) -> Result<String, ReportError> {
    let mut figures = String::new();
    for plot in plots {
        figures.push_str(&plot.figure()?.unwrap_or_default());
    }
    let body = if figures.is_empty() {
        "<p>Nothing was measured for these plots.</p>".to_string()
    } else {
        format!("<p>{text}</p><div class=\"figures\">{figures}</div>")
    };
    Ok(format!(
        "<section id=\"{id}\"><h2>{title}</h2>{body}</section>\n"
    ))
}

fn facts(data: &ReportData) -> String {
    let budget = &data.budget;
    let done = data
        .records
        .iter()
        .filter(|record| record.result.is_some())
        .count();
    let seeds: Vec<String> = data.seeds.iter().map(u64::to_string).collect();
    // Targets may differ between tasks; the header names each once.
    let mut targets: Vec<f64> = data
        .records
        .iter()
        .map(|record| record.key.budget.target)
        .collect();
    targets.sort_by(f64::total_cmp);
    targets.dedup();
    if targets.is_empty() {
        targets.push(budget.target);
    }
    let targets: Vec<String> = targets
        .iter()
        .map(|target| budget.kind.show(*target))
        .collect();
    let worst = data
        .records
        .iter()
        .filter_map(|record| {
            Some((
                record,
                TrialResult::mismatch(record.result.as_ref()?, &record.key.budget),
            ))
        })
        .max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()));
    let worst = worst.map_or("nothing measured".into(), |(record, mismatch)| {
        format!(
            "largest residual {:+.2} % ({} on {})",
            mismatch * 100.0,
            record.key.mixer,
            record.key.task
        )
    });
    let rows = [
        (
            "budget",
            escape(&format!(
                "equal {}: {}; tolerance ±{} %, {worst}",
                budget.kind.quantity(),
                targets.join(", "),
                super::axis::short(&units::three_digits(budget.tolerance * 100.0))
            )),
        ),
        ("seeds", escape(&seeds.join(", "))),
        (
            "trials",
            format!("{done} of {} finished", data.records.len()),
        ),
        ("machine", escape(&data.machine)),
        ("commit", format!("<code>{}</code>", escape(&data.commit))),
        ("command", format!("<code>{}</code>", escape(&data.command))),
        ("made", units::utc(data.made)),
    ];
    let rows: String = rows
        .iter()
        .map(|(name, value)| format!("<dt>{name}</dt><dd>{value}</dd>"))
        .collect();
    format!("<dl class=\"facts\">{rows}</dl>")
}

fn main_table(data: &ReportData, table: &Table) -> String {
    let mut out = String::from("<div class=\"scroll\"><table><thead><tr><th>mixer</th>");
    for column in &table.columns {
        out.push_str(&format!(
            "<th>{}<small>{}</small></th>",
            escape(&column.title),
            escape(&column.unit)
        ));
    }
    out.push_str("</tr></thead><tbody>");
    for row in &table.rows {
        out.push_str(&format!("<tr><th>{}</th>", escape(&row.mixer)));
        for (column, cell) in table.columns.iter().zip(&row.cells) {
            match cell {
                None => out.push_str("<td>–<i></i></td>"),
                Some(cell) => out.push_str(&linked(data, &row.mixer, &column.quantity, cell)),
            }
        }
        out.push_str("</tr>");
    }
    out.push_str("</tbody></table></div>\n");
    out
}

fn linked(data: &ReportData, mixer: &str, quantity: &Quantity, cell: &Cell) -> String {
    let m = data.mixer_index(mixer);
    let task = match quantity {
        Quantity::Quality { task, .. } => data.task_index(task),
        _ => None,
    };
    let link = match (cell.trials.as_slice(), m, task) {
        ([one], _, _) => trials::anchor(one),
        (_, Some(m), Some(t)) => format!("m{m}t{t}"),
        (_, Some(m), None) => format!("m{m}"),
        _ => "trials".into(),
    };
    let class = if cell.mark == Mark::Best {
        " class=\"best\""
    } else {
        ""
    };
    let mark = match cell.mark {
        Mark::Best => "*",
        Mark::Tied => "~",
        Mark::Plain => "",
    };
    format!(
        "<td{class}><a href=\"#{link}\">{}</a><i>{mark}</i></td>",
        escape(&cell.text)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_special_is_escaped() {
        assert_eq!(
            escape("<a href=\"x\">'&"),
            "&lt;a href=&quot;x&quot;&gt;&#39;&amp;"
        );
    }
}
