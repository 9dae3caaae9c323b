//! Checkpoints: a model folder with the optimiser's moments and the place in the run.
//!
//! `checkpoints/STEP/` appears when it is whole. What a kill leaves has a temporary name and is never read.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyformer_data::Position;
use anyformer_hub::folder::MANIFEST_FILE;
use anyformer_hub::model::fill;
use anyformer_hub::tensors::write_tensors;
use anyformer_hub::{Extra, FolderWriter, HubError, MODEL_FILE, ModelFolder, write_model};
use anyformer_models::Model;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::config::MAY_CHANGE;
use crate::error::TrainError;
use crate::events::Best;
use crate::optimizer::AdamW;

/// The moments of the optimiser.
const OPTIMIZER_FILE: &str = "optimizer.safetensors";
/// The place in the run.
const TRAINER_FILE: &str = "trainer.json";

/// The place in a run, as it stands in `trainer.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    /// Updates done.
    pub step: u64,
    /// Input positions read.
    pub tokens: u64,
    /// Seconds of training.
    pub seconds: f64,
    /// The best evaluation so far.
    pub best: Option<Best>,
    /// Worker threads of the process that wrote it: with as many, going on gives the same bits.
    pub threads: usize,
    /// Where the loader of the training data stands.
    pub position: Position,
    /// The resolved options: `model`, `task`, `train`.
    pub options: Value,
}

/// Complete checkpoints by step, oldest first. A folder that lacks one of its files is none.
pub fn list(folder: &Path) -> Result<Vec<(u64, PathBuf)>, TrainError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(TrainError::io("read", folder))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(TrainError::io("read", folder))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let step = name.and_then(|name| name.parse::<u64>().ok());
        let files = [MODEL_FILE, OPTIMIZER_FILE, TRAINER_FILE, MANIFEST_FILE];
        if let Some(step) = step
            && files.iter().all(|file| path.join(file).is_file())
        {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Writes a checkpoint into `folder` and returns its path.
pub(crate) fn save(
    folder: &Path,
    model: &Model,
    optimizer: &AdamW,
    extra: &Extra,
    saved: &Saved,
) -> Result<PathBuf, TrainError> {
    let path = folder.join(format!("{:08}", saved.step));
    let mut writer = FolderWriter::create(&path)?;
    write_model(&mut writer, &path, model, extra)?;
    let moments = optimizer.tensors();
    writer.file(OPTIMIZER_FILE, |file| {
        write_tensors(file, &moments, &BTreeMap::new())
    })?;
    let text =
        serde_json::to_string_pretty(saved).map_err(|error| wrong(&path, error.to_string()))?;
    writer.file(TRAINER_FILE, |file| file.write_all(text.as_bytes()))?;
    writer.commit()?;
    Ok(path)
}

/// Removes all but the newest `keep` checkpoints. Each first gets a temporary name, so that a kill leaves no part of
/// one under its own.
pub(crate) fn prune(folder: &Path, keep: usize) -> Result<(), TrainError> {
    let found = list(folder)?;
    for (_, path) in &found[..found.len().saturating_sub(keep)] {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let hidden = path.with_file_name(format!(".{name}.old.tmp"));
        let removed = match fs::remove_dir_all(&hidden) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => fs::rename(path, &hidden).and_then(|()| fs::remove_dir_all(&hidden)),
        };
        removed.map_err(TrainError::io("remove", path))?;
    }
    Ok(())
}

/// The place in the run at which the checkpoint in `path` was written, and the options of that run.
pub fn read(path: &Path) -> Result<Saved, TrainError> {
    read_from(&ModelFolder::open(path).map_err(unreadable(path))?)
}

fn read_from(folder: &ModelFolder) -> Result<Saved, TrainError> {
    let text = folder.manifest.read_text(TRAINER_FILE);
    let text = text.map_err(unreadable(&folder.path))?;
    serde_json::from_str(&text)
        .map_err(|error| wrong(&folder.path, format!("{TRAINER_FILE}: {error}")))
}

/// Reads a checkpoint into a model and optimiser built from `options`, refusing another run's.
pub(crate) fn load(
    path: &Path,
    options: &Value,
    model: &Model,
    optimizer: &mut AdamW,
) -> Result<Saved, TrainError> {
    let folder = ModelFolder::open(path).map_err(unreadable(path))?;
    let saved = read_from(&folder)?;
    let differences = differences(&saved.options, options);
    if !differences.is_empty() {
        return Err(TrainError::OtherConfig {
            checkpoint: path.to_path_buf(),
            differences,
        });
    }
    let moments = folder.tensors(OPTIMIZER_FILE).map_err(unreadable(path))?;
    let weights = folder.tensors(MODEL_FILE).map_err(unreadable(path))?;
    let restored = optimizer.restore(saved.step, moments);
    restored.map_err(|message| wrong(path, message))?;
    fill(&path.join(MODEL_FILE), model.params(), weights).map_err(unreadable(path))?;
    Ok(saved)
}

fn wrong(path: &Path, message: String) -> TrainError {
    TrainError::Checkpoint {
        checkpoint: path.to_path_buf(),
        message,
    }
}

fn unreadable(path: &Path) -> impl Fn(HubError) -> TrainError {
    let checkpoint = path.to_path_buf();
    move |source| TrainError::Unreadable {
        checkpoint: checkpoint.clone(),
        source,
    }
}

/// The keys in which two sets of options differ, but for those that may change.
fn differences(was: &Value, now: &Value) -> Vec<String> {
    let (was, now) = (flat(was), flat(now));
    let mut keys: Vec<&String> = was.keys().chain(now.keys()).collect();
    keys.sort();
    keys.dedup();
    let free = |key: &str| {
        key.strip_prefix("train.")
            .is_some_and(|key| MAY_CHANGE.contains(&key))
    };
    let show = |value: Option<&Value>| value.map_or("absent".to_string(), Value::to_string);
    keys.into_iter()
        .filter(|key| !free(key) && was.get(*key) != now.get(*key))
        .map(|key| {
            format!(
                "{key} was {}, is {}",
                show(was.get(key)),
                show(now.get(key))
            )
        })
        .collect()
}

/// Dotted keys and their values; null and an absent key are the same.
fn flat(value: &Value) -> HashMap<String, Value> {
    fn walk(prefix: &str, value: &Value, out: &mut HashMap<String, Value>) {
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    let dot = if prefix.is_empty() { "" } else { "." };
                    walk(&format!("{prefix}{dot}{key}"), value, out);
                }
            }
            Value::Null => {}
            other => {
                out.insert(prefix.to_string(), other.clone());
            }
        }
    }
    let mut out = HashMap::new();
    walk("", value, &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn differing_keys_are_named_and_free_ones_are_not() {
        let was =
            json!({"train": {"lr": 0.1, "keep": 2, "betas": [0.9, 0.95]}, "model": {"a": null}});
        let now = json!({"train": {"lr": 0.2, "keep": 5, "betas": [0.9, 0.99]}, "model": {}});
        let found = differences(&was, &now);
        let want = [
            "train.betas was [0.9,0.95], is [0.9,0.99]",
            "train.lr was 0.1, is 0.2",
        ];
        assert_eq!(found, want);
    }
}
