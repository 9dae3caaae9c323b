//! `anyformer data`: `list`, `get NAME`, `draw TASK`.

use std::path::{Path, PathBuf};

use anyformer_data::fetch::{self, FetchError};
use anyformer_data::{Split, sheet};
use anyformer_lab::units::bytes;
use serde_json::{Value, json};

use crate::exit::{Failure, Kind, bad_input};
use crate::format::table;
use crate::overrides;
use crate::progress::{quoted, spinner};
use crate::say::Say;

/// Flags.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to do
    #[command(subcommand)]
    pub verb: Verb,
}

/// The verbs of `data`.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// List the data sets: those that ship with the program and those that can be fetched
    List,
    /// Fetch a data set, check it, and lay it where tasks find it; goes on where a fetch was cut off
    Get {
        /// The name in `anyformer data list`
        name: String,
        /// A file or folder on this machine, or an address, instead of the canonical address; checked all the same
        #[arg(long, value_name = "PATH | URL")]
        from: Option<String>,
        /// The folder to lay it in
        #[arg(long, value_name = "DIR", default_value = "data")]
        dest: PathBuf,
    },
    /// Draw the first pictures of a task into a PNG
    Draw {
        /// A task of pictures or of sequences of pixels, as pathfinder
        task: String,
        /// Pictures down and across
        #[arg(long, value_name = "R,C", value_delimiter = ',', default_value = "2,6")]
        grid: Vec<usize>,
        /// The file
        #[arg(long, short, value_name = "FILE", default_value = "pictures.png")]
        out: PathBuf,
        /// Options of the task, as contour_length=9
        #[arg(value_name = "KEY=VALUE")]
        options: Vec<String>,
    },
}

/// Lists, fetches or draws.
pub fn run(args: &Args, say: &Say) -> Result<(), Failure> {
    match &args.verb {
        Verb::List => list(say),
        Verb::Get { name, from, dest } => get(name, from.as_deref(), dest, say),
        Verb::Draw {
            task,
            grid,
            out,
            options,
        } => draw(task, grid, out, options, say),
    }
}

fn list(say: &Say) -> Result<(), Failure> {
    let sets = fetch::datasets();
    let value: Vec<Value> = sets
        .iter()
        .map(|set| {
            let addresses: Vec<String> = set.files.iter().map(|file| file.address()).collect();
            json!({
                "name": set.name, "about": set.doc, "licence": set.licence, "usage": set.usage,
                "shipped": set.shipped, "bytes": set.bytes(), "files": addresses,
            })
        })
        .collect();
    say.result(&value, || {
        let rows = sets.iter().map(|set| {
            let size = match (set.shipped, set.bytes()) {
                (true, _) => "shipped".to_string(),
                (false, Some(size)) => bytes(size as f64),
                (false, None) => "?".to_string(),
            };
            vec![
                set.name.to_string(),
                size,
                set.doc.to_string(),
                set.usage.to_string(),
            ]
        });
        let rows: Vec<Vec<String>> = rows.collect();
        table(&["name", "size", "what it is", "use"], &[1], &rows)
    });
    Ok(())
}

fn get(name: &str, from: Option<&str>, dest: &Path, say: &Say) -> Result<(), Failure> {
    let bar = spinner(say, name);
    let mut progress = |done: u64, total: Option<u64>| {
        if let Some(bar) = &bar {
            let of = total.map_or(String::new(), |total| {
                format!(" of {}", bytes(total as f64))
            });
            bar.set_message(format!("{name}: {}{of}", bytes(done as f64)));
        }
    };
    let outcome = fetch::get(name, dest, from, &mut progress);
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let fetched = outcome.map_err(|error| match error {
        FetchError::Unknown { .. } | FetchError::Shipped { .. } | FetchError::Missing { .. } => {
            Failure::Input(error.into())
        }
        other => Failure::Broken(other.into()),
    })?;
    if !fetched.unverified.is_empty() {
        say.note(format!(
            "no published checksum, taken as it came: {}",
            fetched.unverified.join(", ")
        ));
    }
    let usage = fetch::dataset(name)
        .input()?
        .usage
        .replace("DIR", &quoted(&fetched.folder));
    let value = json!({
        "folder": fetched.folder, "present": fetched.present, "unverified": fetched.unverified, "usage": usage,
    });
    say.result(&value, || {
        let how = if fetched.present {
            "was there already"
        } else {
            "is there"
        };
        format!("{name} {how}: {}\nuse: {usage}", fetched.folder.display())
    });
    Ok(())
}

fn draw(
    task: &str,
    grid: &[usize],
    out: &Path,
    options: &[String],
    say: &Say,
) -> Result<(), Failure> {
    let mut table = serde_json::Map::new();
    for text in options {
        overrides::apply(&mut table, &overrides::parse(text)?)?;
    }
    let task = anyformer_data::task(task, &Value::Object(table)).input()?;
    let grid = match grid {
        [rows, columns] if rows * columns > 0 => [*rows, *columns],
        _ => {
            return Err(bad_input(
                "read the grid: expected two numbers above 0, as 2,6",
            ));
        }
    };
    let classes = sheet::draw(&*task, Split::Test, grid, out).input()?;
    let value = json!({"file": out, "classes": classes});
    say.result(&value, || {
        let rows = classes.chunks(grid[1]).map(|row| {
            let words: Vec<String> = row.iter().map(ToString::to_string).collect();
            words.join(" ")
        });
        let rows: Vec<String> = rows.collect();
        format!(
            "{}; classes, row by row:\n{}",
            out.display(),
            rows.join("\n")
        )
    });
    Ok(())
}
