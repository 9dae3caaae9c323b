//! Which cell is best, and the notes under the table.

use super::{Mark, TableRow};
use crate::trial::{Goal, Status, TrialRecord};

/// Marks the best mean of a column and those not told apart from it.
pub(super) fn mark(rows: &mut [TableRow], index: usize, goal: Option<Goal>) {
    let Some(goal) = goal else { return };
    let means = rows
        .iter()
        .filter_map(|row| row.cells[index].as_ref())
        .map(|cell| cell.summary);
    let best = means
        .filter(|summary| !summary.mean.is_nan())
        .reduce(|best, next| {
            if goal.better(next.mean, best.mean) {
                next
            } else {
                best
            }
        });
    let Some(best) = best else { return };
    let alone = rows.iter().filter(|row| row.cells[index].is_some()).count() < 2;
    for cell in rows
        .iter_mut()
        .filter_map(|row| row.cells[index].as_mut())
        .filter(|_| !alone)
    {
        if cell.summary.mean == best.mean {
            cell.mark = Mark::Best;
        } else if let (Some(a), Some(b)) = (cell.summary.standard_error, best.standard_error)
            && (cell.summary.mean - best.mean).abs() <= 2.0 * a.hypot(b)
        {
            cell.mark = Mark::Tied;
        }
    }
}

/// What the reader must know beside the numbers.
pub(super) fn notes(
    records: &[TrialRecord],
    tasks: &[String],
    mixers: &[String],
    rows: &[TableRow],
) -> Vec<String> {
    let mut notes = Vec::new();
    for record in records {
        let key = &record.key;
        if !tasks.contains(&key.task) || !mixers.contains(&key.mixer) {
            continue;
        }
        let name = format!("{} on {}, seed {}", key.mixer, key.task, key.seed);
        match record.status {
            Status::Failed => {
                notes.push(format!(
                    "{name} failed: {}",
                    record.error.as_deref().unwrap_or("no reason given")
                ));
            }
            Status::Claimed => notes.push(format!("{name} is not finished")),
            Status::Done => {}
        }
    }
    let any = |mark| {
        rows.iter()
            .flat_map(|row| row.cells.iter().flatten())
            .any(|cell| cell.mark == mark)
    };
    if any(Mark::Best) {
        notes.push("* best of its column".into());
    }
    if any(Mark::Tied) {
        notes.push(
            "~ not told apart from the best: within two standard errors of the difference".into(),
        );
    }
    let repeated = rows
        .iter()
        .flat_map(|row| row.cells.iter().flatten())
        .any(|cell| cell.summary.count > 1);
    if repeated {
        notes.push(
            "quality is mean ± standard error over seeds; times, rates and memory are means".into(),
        );
    }
    notes
}
