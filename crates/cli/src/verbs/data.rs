//! `anyformer data list` and `anyformer data get NAME`.

use std::path::{Path, PathBuf};

use anyformer_data::fetch::{self, FetchError};
use anyformer_lab::units::bytes;
use serde_json::{Value, json};

use crate::exit::{Failure, Kind};
use crate::format::table;
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
}

/// Lists or fetches.
pub fn run(args: &Args, say: &Say) -> Result<(), Failure> {
    match &args.verb {
        Verb::List => list(say),
        Verb::Get { name, from, dest } => get(name, from.as_deref(), dest, say),
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
