//! The folder of a run: `run.toml`, `metrics.jsonl`, TensorBoard events, `checkpoints/STEP/`.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyformer_hub::atomic::{is_temporary, write_file};
use anyformer_hub::clean_temporaries;
use serde_json::Value;

use crate::checkpoint;
use crate::error::TrainError;

const CONFIG_FILE: &str = "run.toml";
const LOCK_FILE: &str = ".lock";

/// The folder of a run, held by this process until dropped: no other process can train in it meanwhile.
#[derive(Debug)]
pub struct RunFolder {
    path: PathBuf,
    _lock: File,
}

impl RunFolder {
    /// Makes the folder of a new run and writes its resolved options, a table of tables (`model`, `task`, `train`, and
    /// whatever else the caller needs to build the run again). A folder with anything in it is refused.
    pub fn create(path: &Path, options: &Value) -> Result<Self, TrainError> {
        fs::create_dir_all(path).map_err(TrainError::io("write", path))?;
        let empty = |path: &Path| -> Result<bool, TrainError> {
            let wrong = |error| TrainError::io("read", path)(error);
            for entry in fs::read_dir(path).map_err(wrong)? {
                let name = entry.map_err(wrong)?.file_name();
                let name = name.to_string_lossy();
                if name != LOCK_FILE && !is_temporary(&name) {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        if !empty(path)? {
            return Err(TrainError::FolderNotEmpty(path.to_path_buf()));
        }
        let folder = Self::lock(path)?;
        // Looked at again: another process may have begun here before the lock was had.
        if !empty(path)? {
            return Err(TrainError::FolderNotEmpty(path.to_path_buf()));
        }
        let config = path.join(CONFIG_FILE);
        let text = to_toml(options).map_err(|message| TrainError::Run {
            path: config.clone(),
            message,
        })?;
        write_file(&config, |file| file.write_all(text.as_bytes()))?;
        Ok(folder)
    }

    /// Opens the folder of a run that goes on, and returns the options that it was started with. What a killed
    /// process left half-written is removed.
    pub fn open(path: &Path) -> Result<(Self, Value), TrainError> {
        let config = path.join(CONFIG_FILE);
        if !config.is_file() {
            return Err(TrainError::NotARun(path.to_path_buf()));
        }
        let folder = Self::lock(path)?;
        clean_temporaries(path)?;
        let checkpoints = folder.checkpoints();
        if checkpoints.is_dir() {
            clean_temporaries(&checkpoints)?;
        }
        Ok((folder, read_options(path)?))
    }

    fn lock(path: &Path) -> Result<Self, TrainError> {
        let name = path.join(LOCK_FILE);
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&name);
        let file = file.map_err(TrainError::io("write", &name))?;
        match file.try_lock() {
            Ok(()) => Ok(RunFolder {
                path: path.to_path_buf(),
                _lock: file,
            }),
            Err(TryLockError::WouldBlock) => Err(TrainError::FolderInUse(path.to_path_buf())),
            Err(TryLockError::Error(error)) => Err(TrainError::io("lock", &name)(error)),
        }
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `metrics.jsonl`.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.jsonl")
    }

    /// The folder of the TensorBoard event files: the run folder itself.
    pub fn tensorboard(&self) -> &Path {
        &self.path
    }

    /// `checkpoints`.
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join("checkpoints")
    }

    /// The newest complete checkpoint, which is a model folder.
    pub fn latest(&self) -> Result<Option<PathBuf>, TrainError> {
        latest_checkpoint(&self.path)
    }
}

/// The options of the run in `path`, without holding the folder: to look at a run that may be going on.
pub fn read_options(path: &Path) -> Result<Value, TrainError> {
    let config = path.join(CONFIG_FILE);
    let text = match fs::read_to_string(&config) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(TrainError::NotARun(path.to_path_buf()));
        }
        other => other.map_err(TrainError::io("read", &config))?,
    };
    toml::from_str(&text).map_err(|error| TrainError::Run {
        path: config,
        message: error.to_string(),
    })
}

/// The newest complete checkpoint of the run in `path`, without holding the folder.
pub fn latest_checkpoint(path: &Path) -> Result<Option<PathBuf>, TrainError> {
    Ok(checkpoint::list(&path.join("checkpoints"))?
        .pop()
        .map(|(_, path)| path))
}

/// TOML has no null: a key without a value is left out.
fn to_toml(options: &Value) -> Result<String, String> {
    fn without_null(value: &Value) -> Value {
        match value {
            Value::Object(map) => {
                let kept = map.iter().filter(|(_, value)| !value.is_null());
                Value::Object(
                    kept.map(|(key, value)| (key.clone(), without_null(value)))
                        .collect(),
                )
            }
            Value::Array(values) => Value::Array(values.iter().map(without_null).collect()),
            other => other.clone(),
        }
    }
    toml::to_string_pretty(&without_null(options)).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn one_process_one_run_and_nothing_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs/one");
        let options =
            json!({"model": {"dim": 8, "deep": {"x": 0.1, "none": null}}, "list": [1, 2]});
        let held = RunFolder::create(&path, &options).unwrap();
        let again = RunFolder::open(&path).unwrap_err();
        assert!(matches!(again, TrainError::FolderInUse(_)), "{again}");
        drop(held);
        let again = RunFolder::create(&path, &options).unwrap_err();
        assert!(matches!(again, TrainError::FolderNotEmpty(_)), "{again}");
        fs::create_dir_all(path.join("checkpoints/.00000002.7.0.tmp")).unwrap();
        fs::write(path.join(".run.toml.7.1.tmp"), "half").unwrap();
        let (held, read) = RunFolder::open(&path).unwrap();
        assert_eq!(
            read,
            json!({"model": {"dim": 8, "deep": {"x": 0.1}}, "list": [1, 2]})
        );
        assert!(!path.join("checkpoints/.00000002.7.0.tmp").exists());
        assert!(!path.join(".run.toml.7.1.tmp").exists());
        assert_eq!(held.latest().unwrap(), None);
        let error = RunFolder::open(&folder.path().join("runs")).unwrap_err();
        assert!(error.to_string().contains("no run.toml"));
    }

    #[test]
    fn a_run_killed_before_its_options_were_written_can_start_again() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(".lock"), "").unwrap();
        fs::write(folder.path().join(".run.toml.1.0.tmp"), "half").unwrap();
        RunFolder::create(folder.path(), &json!({})).unwrap();
    }
}
