//! A model, its config and its tokenizer in one folder.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyformer_models::{Gives, Model, ModelConfig};
use anyformer_ops::{Device, ParamStore};
use serde_json::{Map, Value, json};

use crate::error::{Damage, HubError, Problem};
use crate::families::Family;
use crate::folder::{FolderWriter, Manifest, read};
use crate::tensors::{NamedTensor, not_finite, parse_safetensors, write_tensors};

/// The config of a model folder.
pub const CONFIG_FILE: &str = "config.json";
/// The weights of a model folder.
pub const MODEL_FILE: &str = "model.safetensors";
/// The list of weight files of a folder of another program, where there are several.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
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
    /// Whose names its tensors have; `None` for ours.
    pub family: Option<Family>,
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
        let (config, family) = match value.get("anyformer") {
            Some(config) => (own_config(&path, &value, config)?, None),
            None => {
                let family = Family::of(&value).map_err(wrong)?;
                (family.config(&value).map_err(wrong)?, Some(family))
            }
        };
        let info = value
            .get("info")
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default();
        let sharded = family.is_some() && manifest.has(INDEX_FILE);
        if !sharded && !manifest.has(MODEL_FILE) {
            return Err(not_a_model(MODEL_FILE));
        }
        Ok(ModelFolder {
            path: dir.to_path_buf(),
            config,
            info,
            manifest,
            family,
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

    /// Every tensor of the model under its name in the folder, from one file or from the files of an index.
    fn stored(&self) -> Result<Vec<NamedTensor>, HubError> {
        if self.family.is_none() {
            return self.tensors(MODEL_FILE);
        }
        let mut tensors = Vec::new();
        for file in self.files()? {
            tensors.extend(self.tensors(&file)?);
        }
        Ok(tensors)
    }

    /// The weight files of a foreign folder.
    fn files(&self) -> Result<Vec<String>, HubError> {
        if self.manifest.has(MODEL_FILE) {
            return Ok(vec![MODEL_FILE.to_string()]);
        }
        let path = self.path.join(INDEX_FILE);
        let wrong = |message: &str| HubError::damaged(&path, Damage::Text(message.into()));
        let index: Value = serde_json::from_str(&self.manifest.read_text(INDEX_FILE)?)
            .map_err(|error| wrong(&format!("not JSON: {error}")))?;
        let map = index["weight_map"]
            .as_object()
            .ok_or_else(|| wrong("weight_map should be a table of tensors and files"))?;
        let names: Option<BTreeSet<String>> = map
            .values()
            .map(|file| file.as_str().map(str::to_string))
            .collect();
        let names = names.ok_or_else(|| wrong("weight_map names a file that is no text"))?;
        let outside = |name: &String| Path::new(name).file_name() != Some(name.as_ref());
        if names.iter().any(outside) {
            return Err(wrong("weight_map names a file outside of the folder"));
        }
        Ok(names.into_iter().collect())
    }

    /// Builds the model on `device` (an autodiff device to train it further) and fills in its weights.
    pub fn load(&self, device: &Device) -> Result<Model, HubError> {
        let mut tensors = self.stored()?;
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
        if let Some(family) = self.family {
            family.rename(&mut tensors, shapes.params(), &self.config);
        }
        check(&path, shapes.params(), &tensors)?;
        let model = Model::new(&self.config, device, 0).map_err(broken)?;
        fill(&path, model.params(), tensors)?;
        Ok(model)
    }
}

/// The config of a folder that we have written.
fn own_config(path: &Path, value: &Value, config: &Value) -> Result<ModelConfig, HubError> {
    let wrong = |message: &str| HubError::damaged(path, Damage::Text(message.into()));
    match value["format_version"].as_u64() {
        None => return Err(wrong("format_version is missing or no number")),
        Some(got) if got > FORMAT_VERSION => {
            return Err(HubError::Version {
                path: path.to_path_buf(),
                got,
                known: FORMAT_VERSION,
            });
        }
        Some(_) => {}
    }
    ModelConfig::from_json(config).map_err(|source| HubError::Model {
        path: path.to_path_buf(),
        source,
    })
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
