use anyformer_lab::stats;
use anyformer_lab::table::{Mark, Quantity, Table, TableOptions};

use crate::fixture::{MIXERS, TASKS, records};

#[test]
fn cells_are_the_statistics_of_their_trials() {
    let records = records();
    let table = Table::build(&records, &TableOptions::default());
    assert_eq!(
        table
            .rows
            .iter()
            .map(|row| row.mixer.as_str())
            .collect::<Vec<_>>(),
        MIXERS
    );
    assert_eq!(table.latency_length, Some(8192));
    assert_eq!(table.columns.len(), TASKS.len() + 8);
    let cell = table.rows[2].cells[0].as_ref().unwrap();
    let values: Vec<f64> = records
        .iter()
        .filter(|record| record.key.mixer == "gla" && record.key.task == "mqar")
        .map(|record| record.result.as_ref().unwrap().metric.value)
        .collect();
    assert_eq!(cell.summary.mean, stats::mean(&values).unwrap());
    assert_eq!(cell.summary.standard_error, stats::standard_error(&values));
    assert_eq!(cell.trials.len(), 3);
    // pool cannot stream: no state, no next token; its failed trial is counted out and named.
    let pool = &table.rows[5];
    let at = |wanted: Quantity| {
        table
            .columns
            .iter()
            .position(|column| column.quantity == wanted)
            .unwrap()
    };
    assert!(
        pool.cells[at(Quantity::StateBytes)].is_none()
            && pool.cells[at(Quantity::PerToken)].is_none()
    );
    assert_eq!(pool.cells[1].as_ref().unwrap().summary.count, 2);
    assert!(
        table.notes[0].contains("pool on list_ops, seed 2 failed: loss is NaN"),
        "{:?}",
        table.notes
    );
}

#[test]
fn best_follows_the_goal_and_a_budget_is_no_contest() {
    let table = Table::build(&records(), &TableOptions::default());
    for (task, maximize) in [(0, true), (1, true), (2, false)] {
        let means: Vec<f64> = table
            .rows
            .iter()
            .map(|row| row.cells[task].as_ref().unwrap().summary.mean)
            .collect();
        let pick = if maximize { f64::max } else { f64::min };
        let best = means.iter().copied().reduce(pick).unwrap();
        for row in &table.rows {
            let cell = row.cells[task].as_ref().unwrap();
            assert_eq!(cell.mark == Mark::Best, cell.summary.mean == best);
        }
    }
    let tied = table
        .rows
        .iter()
        .filter(|row| row.cells[0].as_ref().unwrap().mark == Mark::Tied)
        .count();
    assert_eq!(
        tied, 1,
        "attention and gated_delta_net are not told apart on mqar"
    );
    for quantity in [Quantity::Params, Quantity::Mismatch] {
        let at = table
            .columns
            .iter()
            .position(|column| column.quantity == quantity)
            .unwrap();
        assert!(
            table
                .rows
                .iter()
                .all(|row| row.cells[at].as_ref().unwrap().mark == Mark::Plain)
        );
    }
}

#[test]
fn text_is_aligned_and_fits() {
    let table = Table::build(&records(), &TableOptions::default());
    for columns in [80, 120, 400] {
        let text = table.to_text(columns);
        let body: Vec<&str> = text
            .lines()
            .take_while(|line| !line.contains("failed"))
            .collect();
        assert!(
            body.iter().all(|line| line.chars().count() <= columns),
            "{text}"
        );
        let parts = body.iter().filter(|line| line.starts_with("mixer")).count();
        assert_eq!(parts == 1, columns == 400, "{text}");
        assert_eq!(
            body.iter().filter(|line| line.starts_with("gla ")).count(),
            parts
        );
    }
    let text = table.to_text(400);
    let ends: Vec<usize> = MIXERS
        .iter()
        .map(|mixer| {
            text.lines()
                .find(|line| line.starts_with(&format!("{mixer} ")))
                .unwrap()
        })
        .map(|line| line.chars().position(|c| c == '±').unwrap())
        .collect();
    assert!(ends.windows(2).all(|pair| pair[0] == pair[1]), "{text}");
    let markdown = table.to_markdown();
    let pipes = |line: &str| line.matches('|').count();
    let lines: Vec<&str> = markdown.lines().take(MIXERS.len() + 2).collect();
    assert!(
        lines
            .iter()
            .all(|line| pipes(line) == table.columns.len() + 2),
        "{markdown}"
    );
    assert!(markdown.contains("**"), "{markdown}");
}

#[test]
fn nothing_finished_is_an_empty_table() {
    let table = Table::build(&[], &TableOptions::default());
    assert!(table.rows.is_empty());
    assert!(table.to_text(80).starts_with("mixer"));
    let asked = TableOptions {
        tasks: vec!["mqar".into()],
        mixers: vec!["gla".into()],
        latency_length: None,
    };
    let table = Table::build(&[], &asked);
    assert!(table.rows[0].cells.iter().all(Option::is_none));
    assert!(table.to_text(80).contains('–'));
}
