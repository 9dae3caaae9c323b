//! The report in a real browser. Needs `chromium` in the path: `cargo test -p anyformer-lab -- --ignored browser`.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use anyformer_lab::report::write;

use crate::report::data;

fn chromium(profile: &Path, arguments: &[&str], page: &Path) -> Output {
    let profile = format!("--user-data-dir={}", profile.display());
    Command::new("chromium")
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
        ])
        .args([
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--hide-scrollbars",
        ])
        .arg(profile)
        .args(arguments)
        .arg(format!("file://{}", page.display()))
        .output()
        .expect("chromium runs")
}

#[test]
#[ignore = "needs chromium"]
fn a_browser_shows_the_report() {
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("report.html");
    write(&page, &data()).unwrap();
    let profile = folder.path().join("profile");
    // The document as the browser understood it: every plot is there, inside its figure, and nothing was repaired away.
    let dom = chromium(&profile, &["--dump-dom"], &page);
    let dom = String::from_utf8(dom.stdout).unwrap();
    let written = fs::read_to_string(&page).unwrap();
    for part in [
        "<svg class=\"plot\"",
        "<figure>",
        "<polygon",
        "<circle",
        "<td",
        "<tr",
        "href=\"#",
    ] {
        assert_eq!(
            dom.matches(part).count(),
            written.matches(part).count(),
            "{part}"
        );
    }
    for (name, size) in [("wide.png", "1280,4000"), ("phone.png", "500,4000")] {
        let picture = folder.path().join(name);
        let screenshot = format!("--screenshot={}", picture.display());
        chromium(
            &profile,
            &[&screenshot, &format!("--window-size={size}")],
            &page,
        );
        let bytes = fs::read(&picture).unwrap();
        assert!(bytes.starts_with(b"\x89PNG"), "{name}");
        // An empty page of this size compresses to a few kilobytes.
        assert!(bytes.len() > 150_000, "{name}: {} bytes", bytes.len());
    }
}
