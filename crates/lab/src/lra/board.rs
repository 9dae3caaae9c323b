//! The two tables of the benchmark and the page that shows them.

use std::path::PathBuf;

use anyformer_data::task;
use serde_json::Value;

use super::define::{Column, Definition, Preset};
use super::speed::Point;
use crate::compare::{CompareError, Plan, Price, Where, label, write as write_file};
use crate::report::html::escape;
use crate::stats::{mean, standard_error};
use crate::trial::{TrialRecord, TrialResult};
use crate::units::{bytes, count, grouped};

/// A table of words, and what must be known beside it.
#[derive(Clone, Debug, PartialEq)]
pub struct Board {
    /// One per column.
    pub headings: Vec<String>,
    /// The model, then its cells.
    pub rows: Vec<Vec<String>>,
    /// Sentences.
    pub notes: Vec<String>,
}

/// Stands where nothing was measured.
const NOTHING: &str = "—";

impl Board {
    /// As Markdown.
    pub fn to_markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let mut out = line(&self.headings);
        let rule: Vec<String> = (0..self.headings.len())
            .map(|column| if column == 0 { "---" } else { "---:" }.to_string())
            .collect();
        out += &line(&rule);
        self.rows.iter().for_each(|row| out += &line(row));
        out.push('\n');
        self.notes
            .iter()
            .for_each(|note| out += &format!("- {note}\n"));
        out
    }

    fn to_html(&self) -> String {
        let cells = |tag: &str, cells: &[String]| {
            let cell = |text: &String| format!("<{tag}>{}</{tag}>", escape(text));
            format!("<tr>{}</tr>", cells.iter().map(cell).collect::<String>())
        };
        let rows: String = self.rows.iter().map(|row| cells("td", row)).collect();
        let note = |note: &String| format!("<li>{}</li>", escape(note));
        format!(
            "<div class=\"scroll\"><table>{}{rows}</table></div><ul class=\"notes\">{}</ul>",
            cells("th", &self.headings),
            self.notes.iter().map(note).collect::<String>()
        )
    }
}

/// The dialect's name.
fn form(definition: &Definition) -> String {
    format!("{:?}", definition.dialect).to_lowercase()
}

/// Mean accuracy in per cent with its standard error.
fn accuracy(values: &[f64]) -> Option<(f64, Option<f64>)> {
    let percent: Vec<f64> = values.iter().map(|value| 100.0 * value).collect();
    Some((mean(&percent)?, standard_error(&percent)))
}

fn show(cell: Option<(f64, Option<f64>)>) -> String {
    match cell {
        None => NOTHING.into(),
        Some((mean, None)) => format!("{mean:.2}"),
        Some((mean, Some(error))) => format!("{mean:.2} ± {error:.2}"),
    }
}

/// The mean of cells whose errors do not depend on each other; nothing where one is missing.
fn average(cells: &[Option<(f64, Option<f64>)>]) -> Option<(f64, Option<f64>)> {
    let cells: Vec<(f64, Option<f64>)> = cells.iter().copied().collect::<Option<_>>()?;
    let count = cells.len() as f64;
    let errors: Option<f64> = cells.iter().map(|(_, error)| error.map(|e| e * e)).sum();
    let sum: f64 = cells.iter().map(|(mean, _)| mean).sum();
    (count > 0.0).then(|| (sum / count, errors.map(|sum| sum.sqrt() / count)))
}

/// Accuracy of every contender on every task.
pub(super) fn quality(
    definition: &Definition,
    plan: &Plan,
    records: &[TrialRecord],
    left_out: &[String],
) -> Result<Board, CompareError> {
    let mut headings = vec!["model".to_string()];
    headings.extend(plan.tasks.iter().map(|task| task.name.clone()));
    let with_x = definition.columns.contains(&Column::PathX) && plan.tasks.len() > 1;
    headings.push("average".into());
    if with_x {
        headings.push("with the last".into());
    }
    headings.push("parameters".into());
    let floor =
        |name: &str, options: &Value| Ok::<_, CompareError>(task(name, options)?.spec().floor);
    let floors = plan
        .tasks
        .iter()
        .map(|task| floor(&task.name, &Value::Object(task.options.clone())))
        .collect::<Result<Vec<_>, _>>()?;
    let row = |name: String, cells: Vec<Option<(f64, Option<f64>)>>, params: String| {
        let mut row = vec![name];
        row.extend(cells.iter().map(|cell| show(*cell)));
        let solved: Vec<_> = definition
            .columns
            .iter()
            .zip(&cells)
            .filter(|(column, _)| !with_x || **column != Column::PathX)
            .map(|(_, cell)| *cell)
            .collect();
        row.push(show(average(&solved)));
        if with_x {
            row.push(show(average(&cells)));
        }
        row.push(params);
        row
    };
    let constant = floors
        .iter()
        .map(|floor| floor.and_then(|value| accuracy(&[value])));
    let mut rows = vec![row(
        "constant answer".into(),
        constant.collect(),
        NOTHING.into(),
    )];
    for mixer in plan.mixers.iter().map(label) {
        let of = |task: &str| -> Vec<&TrialResult> {
            let mine = records
                .iter()
                .filter(|record| record.key.mixer == mixer && record.key.task == task);
            mine.filter_map(|record| record.result.as_ref()).collect()
        };
        let cells = plan.tasks.iter().map(|task| {
            let values: Vec<f64> = of(&task.name)
                .iter()
                .map(|result| result.metric.value)
                .collect();
            accuracy(&values)
        });
        let params: Vec<u64> = plan
            .tasks
            .iter()
            .filter_map(|task| Some(of(&task.name).first()?.params))
            .collect();
        let params = match (params.iter().min(), params.iter().max()) {
            (Some(least), Some(most)) if least == most => grouped(*least),
            (Some(least), Some(most)) => format!("{} to {}", grouped(*least), grouped(*most)),
            _ => NOTHING.into(),
        };
        rows.push(row(mixer.clone(), cells.collect(), params));
    }
    let mut notes = vec![format!(
        "Accuracy in per cent on the test split, {} seed(s), the {} form; the average leaves out {}.",
        plan.seeds.len(),
        form(definition),
        if with_x {
            "the last task, as the published one leaves out Path-X"
        } else {
            "nothing"
        }
    )];
    if definition.preset == Preset::Smoke {
        notes.push("A smoke run makes a few updates: its accuracies are chance, and show only that everything runs.".into());
    }
    for (column, task) in definition.columns.iter().zip(&plan.tasks) {
        let published = match column {
            Column::ListOps => "list_ops",
            Column::Text => "text_classify",
            Column::Retrieval => "matching",
            Column::Image => "sequential_cifar10",
            Column::Pathfinder => "pathfinder",
            Column::PathX => "path_x",
        };
        if task.name != published {
            notes.push(format!(
                "{} stands in for {published}: its numbers are not to be compared with published ones.",
                task.name
            ));
        }
    }
    notes.extend(left_out.iter().cloned());
    Ok(Board {
        headings,
        rows,
        notes,
    })
}

/// What every contender costs on every task, without training.
pub(super) fn prices(plan: &Plan, prices: &[Price], left_out: &[String]) -> Board {
    let mut headings = vec!["model".to_string()];
    headings.extend(plan.tasks.iter().map(|task| task.name.clone()));
    let rows = plan.mixers.iter().map(label).map(|mixer| {
        let mut row = vec![mixer.clone()];
        row.extend(plan.tasks.iter().map(|task| {
            let found = prices
                .iter()
                .find(|price| price.task == task.name && price.mixer == mixer);
            found.map_or(NOTHING.into(), |price| {
                let operations = count(price.cost.flops as f64);
                format!("{} / {operations}", grouped(price.cost.params))
            })
        }));
        row
    });
    let mut notes = vec![
        "Parameters / operations of a forward pass over the longest sequence (a pair of them in the matching task).".to_string(),
    ];
    notes.extend(left_out.iter().cloned());
    Board {
        headings,
        rows: rows.collect(),
        notes,
    }
}

/// Speed and memory of every contender at every length, relative to the first.
pub(super) fn speed(points: &[Point]) -> Board {
    let reference = &points[0].mixer;
    let lengths: Vec<usize> = points
        .iter()
        .filter(|point| &point.mixer == reference)
        .map(|point| point.length)
        .collect();
    let find = |mixer: &str, length: usize| {
        points
            .iter()
            .find(|point| point.mixer == mixer && point.length == length)
    };
    let ratio = |of: fn(&Point) -> Option<f64>, mixer: &str, length: usize| {
        Some(of(find(mixer, length)?)? / of(find(reference, length)?)?)
    };
    let mut headings = vec!["model".to_string()];
    headings.extend(lengths.iter().map(|length| format!("steps/s at {length}")));
    headings.extend(lengths.iter().map(|length| format!("memory at {length}")));
    let mut mixers: Vec<&String> = Vec::new();
    for point in points {
        if !mixers.contains(&&point.mixer) {
            mixers.push(&point.mixer);
        }
    }
    let mut notes = vec![format!(
        "One sequence a step, forward and backward, of the text model; in brackets relative to {reference} at the same length."
    )];
    let rows = mixers.iter().map(|mixer| {
        let mut row = vec![mixer.to_string()];
        let cell = |value: Option<String>, ratio: Option<f64>| match (value, ratio) {
            (None, _) => NOTHING.to_string(),
            (Some(value), None) => value,
            (Some(value), Some(ratio)) => format!("{value} ({ratio:.2})"),
        };
        for length in &lengths {
            let rate = find(mixer, *length)
                .and_then(|point| point.seconds)
                .map(f64::recip);
            let value = rate.map(|rate| format!("{rate:.2}"));
            row.push(cell(
                value,
                ratio(|point| point.seconds.map(f64::recip), mixer, *length),
            ));
        }
        for length in &lengths {
            let held = find(mixer, *length).and_then(|point| point.bytes);
            let value = held.map(|held| bytes(held as f64));
            row.push(cell(
                value,
                ratio(|point| point.bytes.map(|b| b as f64), mixer, *length),
            ));
        }
        row
    });
    let rows = rows.collect();
    let skipped = points.iter().filter_map(|point| {
        let why = point.skipped.as_ref()?;
        Some(format!(
            "{} at {} was not run: {why}.",
            point.mixer, point.length
        ))
    });
    notes.extend(skipped);
    Board {
        headings,
        rows,
        notes,
    }
}

/// Accuracy against speed at the longest length that the reference ran, circles as large as the memory.
fn circles(quality: &Board, points: &[Point]) -> Option<String> {
    let reference = &points.first()?.mixer;
    let longest = points
        .iter()
        .filter(|point| &point.mixer == reference && point.seconds.is_some())
        .map(|point| point.length)
        .max()?;
    let column = quality
        .headings
        .iter()
        .position(|heading| heading == "average")?;
    let mut marks = Vec::new();
    for row in &quality.rows {
        let score = row[column].split(' ').next()?.parse::<f64>().ok();
        let point = points
            .iter()
            .find(|point| point.mixer == row[0] && point.length == longest);
        if let (Some(score), Some(point)) = (score, point)
            && let Some(seconds) = point.seconds
        {
            marks.push((
                &row[0],
                1.0 / seconds,
                score,
                point.bytes.unwrap_or(0) as f64,
            ));
        }
    }
    let range = |of: fn(&(&String, f64, f64, f64)) -> f64| {
        let values = marks.iter().map(of);
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
            (low.min(value), high.max(value))
        });
        (low, (high - low).max(1e-9))
    };
    if marks.is_empty() {
        return None;
    }
    let (slowest, spread) = range(|mark| mark.1.ln());
    let (worst, height) = range(|mark| mark.2);
    let most = marks.iter().map(|mark| mark.3).fold(1.0, f64::max);
    let mut svg = format!(
        "<h2>Accuracy, speed, memory</h2><p>Left to right: steps per second at {longest} tokens (logarithmic, {:.2} to {:.2}). \
         Bottom to top: average accuracy ({worst:.2} to {:.2}). Area of a circle: peak memory.</p>\
         <svg viewBox=\"0 0 900 460\" role=\"img\" aria-label=\"accuracy against speed\" \
         style=\"width:100%;border:1px solid var(--line)\">",
        slowest.exp(),
        (slowest + spread).exp(),
        worst + height
    );
    for (index, (name, rate, score, held)) in marks.iter().enumerate() {
        let x = 80.0 + 720.0 * (rate.ln() - slowest) / spread;
        let y = 410.0 - 360.0 * (score - worst) / height;
        let radius = 3.0 + 37.0 * (held / most).sqrt();
        svg += &format!(
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius:.1}\" fill=\"var(--s{})\" fill-opacity=\"0.45\"/>\
             <text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\" font-size=\"12\" fill=\"var(--ink)\">{}</text>",
            index % 8,
            escape(name)
        );
    }
    svg += "</svg>";
    Some(svg)
}

/// Writes `lra.md` and `lra.html`.
pub(super) fn write(
    definition: &Definition,
    place: &Where,
    quality: &Board,
    speed: Option<&Board>,
    points: &[Point],
) -> Result<[PathBuf; 2], CompareError> {
    let title = format!(
        "Long Range Arena, {}, the {} form",
        format!("{:?}", definition.preset).to_lowercase(),
        form(definition)
    );
    let made = format!(
        "`{}`, commit {}, {}",
        place.command, place.commit, place.machine
    );
    let mut markdown = format!("# {title}\n\n{made}\n\n{}", quality.to_markdown());
    let mut html = format!(
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{title}</title>\
         <link rel=\"icon\" href=\"data:,\"><style>{}</style></head><body><h1>{title}</h1><p>{}</p>\
         <p><a href=\"report.html\">All trials</a></p>{}",
        include_str!("../report/style.css"),
        escape(&made),
        quality.to_html()
    );
    html += &circles(quality, points).unwrap_or_default();
    if let Some(speed) = speed {
        markdown += &format!("\n## Speed and memory\n\n{}", speed.to_markdown());
        html += &format!("<h2>Speed and memory</h2>{}", speed.to_html());
    }
    html += "</body></html>\n";
    let files = ["lra.md", "lra.html"].map(|name| place.folder.join(name));
    write_file(&files[0], &markdown)?;
    write_file(&files[1], &html)?;
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn averages_carry_their_errors_and_miss_nothing() {
        let cells = [Some((40.0, Some(3.0))), Some((60.0, Some(4.0)))];
        assert_eq!(average(&cells), Some((50.0, Some(2.5))));
        assert_eq!(average(&[Some((40.0, None)), None]), None);
        assert_eq!(show(Some((50.0, Some(2.5)))), "50.00 ± 2.50");
        // A row of the published table: the mean of five.
        let published = [36.05, 64.02, 59.29, 40.83, 74.87].map(|value| Some((value, None)));
        assert_eq!(show(average(&published)), "55.01");
    }
}
