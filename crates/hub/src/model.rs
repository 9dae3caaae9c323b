//! A model, its config and its tokenizer in one folder.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyformer_models::{Gives, Model, ModelConfig};
use anyformer_ops::{Device, ParamStore};
use serde_json::{Map, Value, json};

use crate::error::{Damage, HubError, Problem};
use crate::folder::{FolderWriter, Manifest, read};
use crate::tensors::{NamedTensor, not_finite, parse_safetensors, write_tensors};

/// The config of a model folder.
pub const CONFIG_FILE: &str = "config.json";
/// The weights of a model folder.
pub const MODEL_FILE: &str = "model.safetensors";
/// The tokenizer of a model folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// The version of the format that is written.
pub const FORMAT_VERSION: u64 = 1;

/// What goes into a model folder beside the model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Extra {
    /// The text of `tokenizer.json`.
    pub tokenizer: Option<String>,
    /// Facts for readers, under "info" in `config.json`: task, step, score.
    pub info: Map<String, Value>,
}

/// Writes a model folder; `dir` must not exist or be empty, and appears only when it is whole.
pub fn save(dir: &Path, model: &Model, extra: &Extra) -> Result<(), HubError> {
    let mut folder = FolderWriter::create(dir)?;
    write_model(&mut folder, dir, model, extra)?;
    folder.commit()
}

/// Writes the files of a model into a folder that has more files. Weights that are not finite are refused.
pub fn write_model(
    folder: &mut FolderWriter,
    dir: &Path,
    model: &Model,
    extra: &Extra,
) -> Result<(), HubError> {
    let tensors = NamedTensor::of(model.params());
    let bad = tensors
        .iter()
        .filter_map(|tensor| not_finite(&tensor.name, &tensor.values));
    let problems: Vec<Problem> = bad.collect();
    if !problems.is_empty() {
        let path = dir.join(MODEL_FILE);
        return Err(HubError::Mismatch { path, problems });
    }
    let config = config_text(model.config(), extra);
    folder.file(CONFIG_FILE, |file| file.write_all(config.as_bytes()))?;
    // One key only: the file must not depend on the order of a map.
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    folder.file(MODEL_FILE, |file| write_tensors(file, &tensors, &metadata))?;
    if let Some(text) = &extra.tokenizer {
        folder.file(TOKENIZER_FILE, |file| file.write_all(text.as_bytes()))?;
    }
    Ok(())
}

fn config_text(config: &ModelConfig, extra: &Extra) -> String {
    let architecture = match config.gives {
        Gives::NextToken { .. } => "AnyformerForCausalLM",
        Gives::Class { .. } => "AnyformerForClassification",
    };
    let value = json!({
        "model_type": "anyformer",
        "architectures": [architecture],
        "format_version": FORMAT_VERSION,
        "anyformer": config.to_json(),
        "info": extra.info,
    });
    format!("{value:#}\n")
}

/// An opened model folder: its config is read, its weights are not.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    /// The folder.
    pub path: PathBuf,
    /// The model's config.
    pub config: ModelConfig,
    /// Facts that were stored beside it.
    pub info: Map<String, Value>,
    /// The checksums of its files.
    pub manifest: Manifest,
}

impl ModelFolder {
    /// Reads and checks `config.json`.
    pub fn open(dir: &Path) -> Result<Self, HubError> {
        let path = dir.join(CONFIG_FILE);
        let not_a_model = |missing| HubError::NotAModel {
            folder: dir.to_path_buf(),
            missing,
        };
        let manifest = Manifest::open(dir)?;
        let text = match manifest.read_text(CONFIG_FILE) {
            Err(HubError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => {
                return Err(not_a_model(CONFIG_FILE));
            }
            other => other?,
        };
        let wrong = |message: String| HubError::damaged(&path, Damage::Text(message));
        let value: Value =
            serde_json::from_str(&text).map_err(|error| wrong(format!("not JSON: {error}")))?;
        let Some(config) = value.get("anyformer") else {
            return Err(wrong(
                "no key \"anyformer\"; it is the config of another program, convert its model first".into(),
            ));
        };
        let version = value["format_version"].as_u64();
        match version {
            None => return Err(wrong("format_version is missing or no number".into())),
            Some(got) if got > FORMAT_VERSION => {
                let known = FORMAT_VERSION;
                return Err(HubError::Version { path, got, known });
            }
            Some(_) => {}
        }
        let config = ModelConfig::from_json(config).map_err(|source| HubError::Model {
            path: path.clone(),
            source,
        })?;
        let info = value
            .get("info")
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default();
        if !manifest.has(MODEL_FILE) {
            return Err(not_a_model(MODEL_FILE));
        }
        Ok(ModelFolder {
            path: dir.to_path_buf(),
            config,
            info,
            manifest,
        })
    }

    /// The text of `tokenizer.json`, where there is one.
    pub fn tokenizer(&self) -> Result<Option<String>, HubError> {
        match self.manifest.has(TOKENIZER_FILE) {
            true => self.manifest.read_text(TOKENIZER_FILE).map(Some),
            false => Ok(None),
        }
    }

    /// Reads and checks the tensors of one safetensors file of the folder.
    pub fn tensors(&self, name: &str) -> Result<Vec<NamedTensor>, HubError> {
        let path = self.path.join(name);
        let bytes = read(&path)?;
        // The shape of the damage says more than a checksum, so it is looked at first.
        let parsed = parse_safetensors(&path, &bytes);
        if parsed.is_ok() || matches!(parsed, Err(HubError::Mismatch { .. })) {
            self.manifest.check(name, &bytes)?;
        }
        Ok(parsed?.tensors)
    }

    /// Builds the model on `device` (an autodiff device to train it further) and fills in its weights.
    pub fn load(&self, device: &Device) -> Result<Model, HubError> {
        let tensors = self.tensors(MODEL_FILE)?;
        let path = self.path.join(MODEL_FILE);
        let broken = |source| HubError::Model {
            path: self.path.join(CONFIG_FILE),
            source,
        };
        if self.config.layers > tensors.len() {
            let (layers, held) = (self.config.layers, tensors.len());
            let message =
                format!("{CONFIG_FILE} asks for {layers} layers, the file holds {held} tensors");
            return Err(HubError::damaged(&path, Damage::Layout(message)));
        }
        let shapes = Model::shapes(&self.config).map_err(broken)?;
        check(&path, shapes.params(), &tensors)?;
        let model = Model::new(&self.config, device, 0).map_err(broken)?;
        fill(&path, model.params(), tensors)?;
        Ok(model)
    }
}

/// Reads a model folder onto `device`.
pub fn load(dir: &Path, device: &Device) -> Result<Model, HubError> {
    ModelFolder::open(dir)?.load(device)
}

/// Compares names and shapes; everything that differs is in one error.
fn check(path: &Path, store: &ParamStore, tensors: &[NamedTensor]) -> Result<(), HubError> {
    let held: HashMap<&str, &NamedTensor> = tensors
        .iter()
        .map(|tensor| (tensor.name.as_str(), tensor))
        .collect();
    let mut problems = Vec::new();
    for param in store.params() {
        let (name, shape) = (param.name().to_string(), param.shape().to_vec());
        match held.get(param.name()) {
            None => problems.push(Problem::Missing { name, shape }),
            Some(tensor) if tensor.shape != shape => problems.push(Problem::Shape {
                name,
                expected: shape,
                got: tensor.shape.clone(),
            }),
            Some(_) => {}
        }
    }
    let known: std::collections::HashSet<&str> =
        store.params().iter().map(|param| param.name()).collect();
    let extra = tensors
        .iter()
        .filter(|tensor| !known.contains(tensor.name.as_str()));
    problems.extend(extra.map(|tensor| Problem::Extra {
        name: tensor.name.clone(),
        shape: tensor.shape.clone(),
    }));
    match problems.is_empty() {
        true => Ok(()),
        false => Err(HubError::Mismatch {
            path: path.to_path_buf(),
            problems,
        }),
    }
}

/// Fills a model's parameters with tensors of the same names and shapes.
pub fn fill(path: &Path, store: &ParamStore, tensors: Vec<NamedTensor>) -> Result<(), HubError> {
    check(path, store, &tensors)?;
    let params: HashMap<&str, _> = store
        .params()
        .iter()
        .map(|param| (param.name(), param))
        .collect();
    for tensor in tensors {
        let set = params[tensor.name.as_str()].set(tensor.values);
        set.map_err(|error| HubError::damaged(path, Damage::Layout(error.to_string())))?;
    }
    Ok(())
}
