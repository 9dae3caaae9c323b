//! The table of all trials, grouped by contender and task, and the runs they came from.

use super::ReportData;
use super::html::escape;
use crate::trial::{MetricUnit, TrialRecord};
use crate::units;

/// Anchor of a trial.
pub(super) fn anchor(id: &crate::trial::TrialId) -> String {
    format!("t-{id}")
}

/// The distinct commits, machines and commands of the trials, in order of first use.
fn runs(data: &ReportData) -> Vec<[&str; 3]> {
    let mut runs: Vec<[&str; 3]> = Vec::new();
    for result in data
        .records
        .iter()
        .filter_map(|record| record.result.as_ref())
    {
        let run = [result.commit.as_str(), &result.machine, &result.command];
        if !runs.contains(&run) {
            runs.push(run);
        }
    }
    runs
}

const HEAD: [&str; 16] = [
    "trial",
    "seed",
    "status",
    "metric",
    "loss",
    "params",
    "mismatch",
    "FLOPs/token",
    "state",
    "training tokens/s",
    "peak memory",
    "time",
    "finished",
    "starts",
    "run",
    "size",
];

/// The section's body.
pub(super) fn section(data: &ReportData) -> String {
    let runs = runs(data);
    let mut out = String::from("<div class=\"scroll\"><table class=\"trials\"><thead><tr>");
    for title in HEAD {
        out.push_str(&format!("<th>{title}</th>"));
    }
    out.push_str("</tr></thead>");
    for (m, mixer) in data.mixers.iter().enumerate() {
        out.push_str(&format!(
            "<tbody id=\"m{m}\" class=\"mixer\"><tr><th colspan=\"{}\"><span>{}</span></th></tr></tbody>",
            HEAD.len(),
            escape(mixer)
        ));
        for (t, task) in data.tasks.iter().enumerate() {
            let wanted =
                |record: &&TrialRecord| &record.key.mixer == mixer && record.key.task == task.name;
            let mut rows: Vec<&TrialRecord> = data.records.iter().filter(wanted).collect();
            if rows.is_empty() {
                continue;
            }
            rows.sort_by_key(|record| record.key.seed);
            out.push_str(&format!(
                "<tbody id=\"m{m}t{t}\"><tr class=\"task\"><th colspan=\"{}\"><span>{} on {}</span></th></tr>",
                HEAD.len(),
                escape(mixer),
                escape(&task.name)
            ));
            for record in rows {
                out.push_str(&row(record, &runs));
            }
            out.push_str("</tbody>");
        }
    }
    out.push_str("</table></div><h3>Runs</h3><ol class=\"runs\">");
    for [commit, machine, command] in &runs {
        out.push_str(&format!(
            "<li>commit <code>{}</code>, {}<br><code>{}</code></li>",
            escape(commit),
            escape(machine),
            escape(command)
        ));
    }
    out.push_str("</ol>");
    out
}

fn row(record: &TrialRecord, runs: &[[&str; 3]]) -> String {
    let key = &record.key;
    let mut cells = vec![
        format!("<code>{}</code>", record.id),
        key.seed.to_string(),
        record.status.name().to_string(),
    ];
    let size = format!(
        "<code>{}</code>",
        escape(&crate::canonical::text(&key.size))
    );
    match &record.result {
        Some(result) => {
            let value = result.metric.unit.scale(result.metric.value);
            let unit = if result.metric.unit == MetricUnit::Fraction {
                " %"
            } else {
                ""
            };
            let run = [result.commit.as_str(), &result.machine, &result.command];
            cells.extend([
                format!("{value:.4}{unit}"),
                format!("{:.5}", result.loss),
                units::grouped(result.params),
                format!("{:+.3} %", result.mismatch(&key.budget) * 100.0),
                units::grouped(result.flops_per_token as u64),
                result
                    .state_bytes
                    .map_or("–".into(), |bytes| units::bytes(bytes as f64)),
                units::grouped(result.train_tokens_per_second as u64),
                result
                    .peak_memory_bytes
                    .map_or("–".into(), |bytes| units::bytes(bytes as f64)),
                units::seconds(result.wall_seconds),
                units::utc(result.finished),
                record.attempts.to_string(),
                runs.iter()
                    .position(|known| *known == run)
                    .map_or(String::new(), |index| (index + 1).to_string()),
                size,
            ]);
        }
        None => {
            let why = escape(record.error.as_deref().unwrap_or("not finished"));
            cells.push(format!("<span class=\"why\">{why}</span>"));
            cells.extend(std::iter::repeat_n(String::new(), HEAD.len() - 7));
            cells.extend([record.attempts.to_string(), String::new(), size]);
        }
    }
    let cells: String = cells
        .iter()
        .map(|cell| format!("<td>{cell}</td>"))
        .collect();
    format!(
        "<tr id=\"{}\" class=\"{}\">{cells}</tr>",
        anchor(&record.id),
        record.status.name()
    )
}
