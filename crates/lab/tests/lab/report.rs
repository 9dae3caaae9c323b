use std::collections::HashSet;

use anyformer_lab::report::{Floor, ReportData, TaskInfo, render, write};
use anyformer_lab::trial::{Budget, BudgetKind};

use crate::fixture::{MIXERS, TASKS, records};

pub fn data() -> ReportData {
    let task = |(index, name): (usize, &&str)| {
        TaskInfo {
        name: name.to_string(),
        description: [
            "Multi-query associative recall: 16 key-value pairs, length 256, 1,000 held-out sequences.",
            "Nested list operations (min, max, median, sum modulo 10), length up to 256, 1,000 held-out expressions.",
            "Next byte of Shakespeare's plays, length 256, the last 5 % held out.",
        ][index]
            .into(),
        floor: match index {
            1 => Some(Floor { value: 0.169, label: "most frequent answer".into() }),
            0 => Some(Floor { value: 0.0156, label: "chance".into() }),
            _ => None,
        },
    }
    };
    ReportData {
        title: "Six token mixers with equal parameters".into(),
        command: "anyformer compare --task mqar,list_ops,shakespeare --match params --tolerance 2% --seeds 3".into(),
        commit: "0123abc".into(),
        machine: "AMD EPYC 7B13, 2 cores, 2 threads, 7.7 GiB".into(),
        seeds: vec![0, 1, 2],
        made: 1_750_001_000,
        budget: Budget { kind: BudgetKind::Params, target: 412_000.0, tolerance: 0.02 },
        tasks: TASKS.iter().enumerate().map(task).collect(),
        mixers: MIXERS.iter().map(|name| name.to_string()).collect(),
        latency_length: None,
        records: records(),
    }
}

fn quoted<'a>(html: &'a str, attribute: &str) -> Vec<&'a str> {
    let start = format!(" {attribute}=\"");
    html.split(start.as_str())
        .skip(1)
        .map(|rest| rest.split('"').next().unwrap())
        .collect()
}

#[test]
fn one_file_without_requests_and_every_link_arrives() {
    let html = render(&data()).unwrap();
    // A kept copy to look at: cargo test's own scratch folder, which no test reads.
    std::fs::write(
        std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("report.html"),
        &html,
    )
    .unwrap();
    for outside in [
        "http://", "https://", " src=", "@import", "url(", "<script", "NaN", "inf\"",
    ] {
        let at = html.find(outside).filter(|_| outside != "NaN");
        assert!(
            at.is_none(),
            "{outside}: …{}…",
            &html[at.unwrap().saturating_sub(80)..at.unwrap() + 40]
        );
    }
    let ids: Vec<&str> = quoted(&html, "id");
    let unique: HashSet<&str> = ids.iter().copied().collect();
    assert_eq!(unique.len(), ids.len(), "anchors are unique");
    let links: Vec<&str> = quoted(&html, "href")
        .into_iter()
        .filter_map(|link| link.strip_prefix('#'))
        .collect();
    assert!(links.len() > 150);
    for link in links {
        assert!(unique.contains(link), "#{link} leads nowhere");
    }
    for record in records() {
        assert!(unique.contains(format!("t-{}", record.id).as_str()));
    }
    let plots = html.matches("<svg class=\"plot\"").count();
    assert_eq!(plots, 3 * 2 + 3 + 4);
    assert_eq!(html.matches("<svg").count(), html.matches("</svg>").count());
    assert_eq!(html.matches("<figcaption>").count(), plots);
    assert!(html.contains("floor: most frequent answer (16.9)"));
    assert!(html.contains("largest residual"));
    assert!(html.len() < 1_500_000, "{} bytes", html.len());
}

#[test]
fn every_cell_of_the_table_is_in_the_page_with_its_link() {
    let data = data();
    let html = render(&data).unwrap();
    let table = data.table(None);
    for (m, row) in table.rows.iter().enumerate() {
        for (t, cell) in row.cells.iter().enumerate().take(TASKS.len()) {
            let cell = cell.as_ref().unwrap();
            let link = format!("<a href=\"#m{m}t{t}\">{}</a>", cell.text);
            assert!(html.contains(&link), "{link}");
        }
    }
}

#[test]
fn hostile_names_stay_text() {
    let mut data = data();
    let evil = "<script>alert(1)</script>\"'&";
    data.title = evil.into();
    data.command = evil.into();
    data.machine = evil.into();
    data.tasks[0].description = evil.into();
    data.tasks[1].floor.as_mut().unwrap().label = evil.into();
    data.tasks[2].name = evil.into();
    data.mixers[2] = evil.into();
    for record in &mut data.records {
        if record.key.mixer == "gla" {
            record.key.mixer = evil.into();
        }
        if record.key.task == "shakespeare" {
            record.key.task = evil.into();
        }
        if let Some(result) = &mut record.result {
            (result.commit, result.metric.name) = (evil.into(), evil.into());
        }
        record.error = record.error.as_ref().map(|_| evil.into());
        record.key.size = serde_json::json!({ evil: evil });
    }
    let html = render(&data).unwrap();
    assert!(
        !html.contains("<script"),
        "{}",
        &html[html.find("<script").unwrap() - 200..][..400]
    );
    assert!(html.contains("&lt;script&gt;alert(1)&lt;/script&gt;&quot;&#39;&amp;"));
}

#[test]
fn little_or_nothing_measured_is_still_a_page() {
    let mut data = data();
    data.records.clear();
    let html = render(&data).unwrap();
    assert!(html.contains("nothing measured") && html.contains("0 of 0 finished"));
    assert_eq!(html.matches("<svg class=\"plot\"").count(), 0);
    // One trial that diverged: no finite number anywhere.
    data.records = records()[..1].to_vec();
    let result = data.records[0].result.as_mut().unwrap();
    result.metric.value = f64::NAN;
    result.loss = f64::NAN;
    result.latency.clear();
    for point in &mut result.curve {
        point.train_loss = f64::NAN;
        point.metric = None;
    }
    let html = render(&data).unwrap();
    assert!(
        html.contains(&format!("href=\"#t-{}\"", data.records[0].id)),
        "one trial: the cell leads to it"
    );
}

#[test]
fn more_contenders_than_colours() {
    let mut data = data();
    let extra: Vec<_> = records()
        .into_iter()
        .map(|mut record| {
            record.key.mixer.push_str("_wide");
            record.id = record.key.id();
            record
        })
        .collect();
    data.records.extend(extra);
    data.mixers
        .extend(MIXERS.iter().map(|name| format!("{name}_wide")));
    let html = render(&data).unwrap();
    assert!(html.contains("stroke-dasharray=\"6 3\""));
}

#[test]
fn written_whole_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.html");
    write(&path, &data()).unwrap();
    assert!(
        std::fs::read_to_string(&path)
            .unwrap()
            .ends_with("</html>\n")
    );
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    let error = write(&folder.path().join("none/report.html"), &data()).unwrap_err();
    assert!(error.to_string().starts_with("write the report"), "{error}");
}
