//! Notes the commit that the binary is built from; measurements carry it.

use std::process::Command;

fn main() {
    let log = "../../.git/logs/HEAD";
    if std::path::Path::new(log).is_file() {
        println!("cargo:rerun-if-changed={log}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    let asked = Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .output();
    let commit = asked.ok().filter(|said| said.status.success());
    let commit = commit.map(|said| String::from_utf8_lossy(&said.stdout).trim().to_string());
    let commit = commit.unwrap_or("unknown".to_string());
    println!("cargo:rustc-env=ANYFORMER_COMMIT={commit}");
}
