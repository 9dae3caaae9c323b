//! House-keeping. `cargo xtask tidy`, `cargo xtask docs [--check]`, `cargo xtask goldens [--check]`.

mod docs;
mod generated;
mod goldens;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The root of the checkout.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().map_or(here.to_path_buf(), Path::to_path_buf)
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["tidy"] => tidy::run(&root()),
        ["docs"] => generated::write(&root(), docs::pages(&root())),
        ["docs", "--check"] => generated::check(&root(), docs::pages(&root())),
        ["goldens"] => generated::write(&root(), goldens::pages(&root())),
        ["goldens", "--check"] => generated::check(&root(), goldens::pages(&root())),
        _ => Err("usage: cargo xtask tidy | docs [--check] | goldens [--check]".to_string()),
    };
    match result {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(what) => {
            eprintln!("{what}");
            ExitCode::FAILURE
        }
    }
}
