//! A model, its config and its tokenizer in one folder.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyformer_models::{Gives, Model, ModelConfig};
use anyformer_ops::{Device, Param, ParamStore, device_is_cpu};
use serde_json::{Map, Value, json};

use crate::error::{Damage, HubError, Problem};
use crate::extra::Extra;
use crate::families::Family;
use crate::families::names::Place;
use crate::folder::{FolderWriter, Manifest, read};
use crate::gguf::{self, Gguf};
use crate::quantised::{self, Quantisation};
use crate::tensors::{NamedTensor, Piece, not_finite, parse_safetensors, write_pieces};
use crate::weights::Weights;

/// The config of a model folder.
pub const CONFIG_FILE: &str = "config.json";
/// The weights of a model folder.
pub const MODEL_FILE: &str = "model.safetensors";
/// The list of weight files of a folder of another program, where there are several.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// The tokenizer of a model folder.
pub const TOKENIZER_FILE: &str = "tokenizer.json";
/// How another program's folder says that text is made.
pub(crate) const GENERATION_FILE: &str = "generation_config.json";
/// The version of the format that is written.
pub const FORMAT_VERSION: u64 = 1;

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
    let (mut tensors, mut packed) = (Vec::new(), Vec::new());
    for param in model.params().params() {
        let numbers = param.packed().filter(|_| extra.quantisation.is_some());
        match numbers.and_then(|packed| packed.quants()) {
            Some(values) => packed.extend(quantised::pieces(param.name(), &values)),
            None => tensors.push(NamedTensor::of_param(param)),
        }
    }
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
    let mut pieces: Vec<Piece> = tensors.iter().map(Piece::of).collect();
    pieces.extend(packed);
    folder.file(MODEL_FILE, |file| write_pieces(file, &pieces, &metadata))?;
    for (name, text) in &extra.texts {
        folder.file(name, |file| file.write_all(text.as_bytes()))?;
    }
    if let Some(text) = &extra.tokenizer {
        folder.file(TOKENIZER_FILE, |file| file.write_all(text.as_bytes()))?;
    }
    Ok(())
}

fn config_text(config: &ModelConfig, extra: &Extra) -> String {
    let architecture = match config.gives {
        Gives::NextToken { .. } => "AnyformerForCausalLM",
        Gives::Class { .. } => "AnyformerForClassification",
        Gives::MaskedToken => "AnyformerForMaskedLM",
        Gives::Hidden => "AnyformerModel",
    };
    let mut value = json!({
        "model_type": "anyformer",
        "architectures": [architecture],
        "format_version": FORMAT_VERSION,
        "anyformer": config.to_json(),
        "info": extra.info,
    });
    if let Some(how) = &extra.quantisation {
        value["quantisation"] = json!(how);
    }
    for (key, held) in &extra.keys {
        value[key] = held.clone();
    }
    format!("{value:#}\n")
}

/// An opened model folder or GGUF file: its config is read, its weights are not.
#[derive(Clone, Debug)]
pub struct ModelFolder {
    /// The folder or the GGUF file.
    pub path: PathBuf,
    /// The model's config.
    pub config: ModelConfig,
    /// Facts that were stored beside it.
    pub info: Map<String, Value>,
    /// The checksums of its files.
    pub manifest: Manifest,
    /// Whose names its tensors have; `None` for ours.
    pub family: Option<Family>,
    /// How its weights are quantised, in a folder of ours.
    pub quantisation: Option<Quantisation>,
    /// The config as it stands in the folder.
    pub(crate) raw: Value,
    pub(crate) gguf: Option<Arc<Gguf>>,
}

impl ModelFolder {
    /// Reads and checks `config.json`, or the keys of a GGUF file.
    pub fn open(dir: &Path) -> Result<Self, HubError> {
        if dir.is_file() {
            return Self::open_gguf(dir);
        }
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
        let raw: Value =
            serde_json::from_str(&text).map_err(|error| wrong(format!("not JSON: {error}")))?;
        let (config, family) = match raw.get("anyformer") {
            Some(config) => (own_config(&path, &raw, config)?, None),
            None => {
                let family = Family::of(&raw).map_err(wrong)?;
                (family.config(&raw).map_err(wrong)?, Some(family))
            }
        };
        let quantisation = match raw.get("quantisation") {
            Some(how) if family.is_none() => {
                let said = |what: String| wrong(format!("quantisation: {what}"));
                let how: Quantisation =
                    serde_json::from_value(how.clone()).map_err(|error| said(error.to_string()))?;
                how.scheme().map_err(said)?;
                Some(how)
            }
            _ => None,
        };
        let info = raw.get("info").and_then(Value::as_object).cloned();
        let sharded = family.is_some() && manifest.has(INDEX_FILE);
        if !sharded && !manifest.has(MODEL_FILE) {
            return Err(not_a_model(MODEL_FILE));
        }
        Ok(ModelFolder {
            path: dir.to_path_buf(),
            config,
            info: info.unwrap_or_default(),
            manifest,
            family,
            quantisation,
            raw,
            gguf: None,
        })
    }

    fn open_gguf(path: &Path) -> Result<Self, HubError> {
        let wrong = |message: String| HubError::damaged(path, Damage::Gguf(message));
        let gguf = gguf::read(path)?;
        let family = gguf::family(&gguf).map_err(wrong)?;
        let raw = gguf::theirs(&gguf, family.kind()).map_err(wrong)?;
        Ok(ModelFolder {
            path: path.to_path_buf(),
            config: family.config(&raw).map_err(wrong)?,
            info: Map::new(),
            manifest: Manifest::default(),
            family: Some(family),
            quantisation: None,
            raw,
            gguf: Some(Arc::new(gguf)),
        })
    }

    /// A text of the folder, where there is such a file.
    pub(crate) fn text(&self, name: &str) -> Result<Option<String>, HubError> {
        match self.gguf.is_none() && self.manifest.has(name) {
            true => self.manifest.read_text(name).map(Some),
            false => Ok(None),
        }
    }

    /// The text of `tokenizer.json`, where there is one; of a GGUF file, what it would be.
    pub fn tokenizer(&self) -> Result<Option<String>, HubError> {
        match &self.gguf {
            None => self.text(TOKENIZER_FILE),
            Some(gguf) => gguf::tokenizer_json(gguf)
                .map_err(|message| HubError::damaged(&self.path, Damage::Gguf(message))),
        }
    }

    /// The tokens after which a text is at its end: what `generation_config.json` says, else the config.
    pub fn end_tokens(&self) -> Result<Vec<u32>, HubError> {
        let generation = match self.text(GENERATION_FILE)? {
            None => Value::Null,
            Some(text) => serde_json::from_str(&text).map_err(|error| {
                let message = format!("not JSON: {error}");
                HubError::damaged(&self.path.join(GENERATION_FILE), Damage::Text(message))
            })?,
        };
        let key = "eos_token_id";
        let said = generation.get(key).filter(|value| !value.is_null());
        let said = said.unwrap_or(&self.raw[key]);
        let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        Ok(match said {
            Value::Array(ids) => ids.iter().filter_map(one).collect(),
            id => one(id).into_iter().collect(),
        })
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

    /// The weight files of the folder, and where an index says that each tensor is.
    fn files(&self) -> Result<(Vec<String>, Map<String, Value>), HubError> {
        if self.family.is_none() || self.manifest.has(MODEL_FILE) {
            return Ok((vec![MODEL_FILE.to_string()], Map::new()));
        }
        let path = self.path.join(INDEX_FILE);
        let wrong = |message: &str| HubError::damaged(&path, Damage::Text(message.into()));
        let mut index: Value = serde_json::from_str(&self.manifest.read_text(INDEX_FILE)?)
            .map_err(|error| wrong(&format!("not JSON: {error}")))?;
        let Some(Value::Object(map)) = index.get_mut("weight_map").map(Value::take) else {
            return Err(wrong("weight_map should be a table of tensors and files"));
        };
        let names: Option<BTreeSet<String>> = map
            .values()
            .map(|file| file.as_str().map(str::to_string))
            .collect();
        let names = names.ok_or_else(|| wrong("weight_map names a file that is no text"))?;
        let outside = |name: &String| Path::new(name).file_name() != Some(name.as_ref());
        if names.iter().any(outside) {
            return Err(wrong("weight_map names a file outside of the folder"));
        }
        Ok((names.into_iter().collect(), map))
    }

    /// Builds the model on `device` (an autodiff device to train it further) and fills in its weights, one tensor after
    /// the other: beside the model itself about a megabyte is in memory. Weights of 16, 8 or 4 bits,
    /// ours and the blocks of GGUF files, stay packed on the CPU.
    pub fn load(&self, device: &Device) -> Result<Model, HubError> {
        let mut weights = Weights::default();
        let mut index = Map::new();
        let mut path = self.path.clone();
        if let Some(gguf) = &self.gguf {
            weights = gguf::weights(&self.path, gguf)?;
        } else {
            let (files, map) = self.files()?;
            index = map;
            if let [only] = &files[..] {
                path = self.path.join(only);
            }
            for file in &files {
                weights.add_safetensors(&self.path.join(file))?;
                self.manifest.check_file(file)?;
            }
        }
        let broken = |source| HubError::Model {
            path: self.path.join(CONFIG_FILE),
            source,
        };
        if self.config.layers > weights.len() && self.config.share_layers == 0 {
            let (layers, held) = (self.config.layers, weights.len());
            let message =
                format!("{CONFIG_FILE} asks for {layers} layers, the file holds {held} tensors");
            return Err(HubError::damaged(&path, Damage::Layout(message)));
        }
        let shapes = Model::shapes(&self.config).map_err(broken)?;
        let places = self.places(shapes.params(), &weights)?;
        let mut problems = self.misfits(shapes.params(), &weights, &places, &index);
        if problems.is_empty() {
            let model = Model::unfilled(&self.config, device).map_err(broken)?;
            let packs = device_is_cpu(device);
            for param in model.params().params() {
                let place = &places[param.name()];
                problems.extend(match (weights.get(&place.name), &self.quantisation) {
                    (Some(stored), _) if packs => weights.fill_packed(param, stored, place)?,
                    (Some(stored), _) => weights.fill(param, stored, place)?,
                    (None, Some(how)) => quantised::fill(param, &weights, how)?,
                    (None, None) => None,
                });
                if !packs && let Some(packed) = param.packed() {
                    // Nothing to do but to hold the widened values.
                    drop(packed);
                    param.update(|_| ());
                }
            }
            if problems.is_empty() {
                return Ok(model);
            }
        }
        Err(HubError::Mismatch { path, problems })
    }

    /// Where each parameter lies.
    fn places(
        &self,
        store: &ParamStore,
        weights: &Weights,
    ) -> Result<BTreeMap<String, Place>, HubError> {
        let names = weights.tensors().iter().map(|stored| stored.name.as_str());
        match self.family {
            None => {
                let own = |param: &Param| (param.name().to_string(), Place::own(param.name()));
                Ok(store.params().iter().map(own).collect())
            }
            Some(family) => family
                .places(&self.config, store, names)
                .map_err(|message| HubError::damaged(&self.path, Damage::Text(message))),
        }
    }

    /// Every tensor that is missing, too many, or of another shape.
    fn misfits(
        &self,
        store: &ParamStore,
        weights: &Weights,
        places: &BTreeMap<String, Place>,
        index: &Map<String, Value>,
    ) -> Vec<Problem> {
        let family = self.family;
        let spare = |name: &str| family.is_some_and(|family| family.is_spare(name, &self.config));
        let unread = weights.problems.iter().filter(|(name, _)| !spare(name));
        let mut problems: Vec<Problem> = unread.map(|(_, problem)| problem.clone()).collect();
        let unread = |name: &str| weights.problems.iter().any(|(held, _)| held == name);
        let mut used = BTreeSet::new();
        for param in store.params() {
            let place = &places[param.name()];
            let expected = place.shape(param.shape());
            // Several of ours may be parts of one of theirs.
            if !used.insert(place.name.clone()) || unread(&place.name) {
                continue;
            }
            match weights.get(&place.name) {
                None if let Some(how) = &self.quantisation
                    && quantised::holds(weights, &place.name) =>
                {
                    let found = quantised::misfits(weights, &place.name, &expected, how);
                    used.extend(found.0);
                    problems.extend(found.1);
                }
                Some(stored) if stored.encoding.is_part() => problems.push(Problem::Type {
                    name: weights.shown(&stored.name, stored.file),
                    dtype: format!("{:?}", stored.encoding),
                }),
                None => problems.push(Problem::Missing {
                    name: match index.get(&place.name).and_then(Value::as_str) {
                        Some(file) => format!("{} in {file}", place.name),
                        None => place.name.clone(),
                    },
                    shape: expected,
                }),
                Some(stored) if stored.shape != expected => problems.push(Problem::Shape {
                    name: weights.shown(&stored.name, stored.file),
                    expected,
                    got: stored.shape.clone(),
                }),
                Some(_) => {}
            }
        }
        let extra = weights
            .tensors()
            .iter()
            .filter(|stored| !used.contains(&stored.name) && !spare(&stored.name));
        problems.extend(extra.map(|stored| Problem::Extra {
            name: weights.shown(&stored.name, stored.file),
            shape: stored.shape.clone(),
        }));
        problems
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
