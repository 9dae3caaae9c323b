//! Goldens: inputs, weights, outputs and gradients made by implementations that are not ours (`oracles/`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyformer_mixers::{Context, Options, channel_mixer, token_mixer};
use anyformer_ops::{Builder, Device, ParamStore, Tensor, tensor_values};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;
use serde_json::Value;

use crate::tolerance::{GRADIENT, OUTPUT, check};

/// One golden file, read.
pub struct Golden {
    /// File name without the ending.
    pub name: String,
    /// The mixer it is of, or `model`.
    pub mixer: String,
    /// Our config for it.
    pub config: Options,
    /// Who made it: package, versions, seed, script.
    pub provenance: Value,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
}

/// Keys of a golden's config that state how the reference computes, not knobs of ours; a mixer that has the knob keeps it.
const FACTS: &[&str] = &[
    "beta",
    "bias",
    "denominator_eps",
    "dim",
    "eps",
    "head_dim",
    "heads",
    "l2_eps",
    "norm_eps",
    "pool_size",
    "qk_norm",
    "scale",
    "use_short_conv",
];

/// A reference may keep more of the past than is needed to go on (one more column of a convolution's inputs): the last
/// columns are what we hold.
fn last_columns(want: &[f32], theirs: &[usize], ours: &[usize]) -> Option<Vec<f32>> {
    if theirs == ours {
        return Some(want.to_vec());
    }
    let (last, first) = (theirs.split_last()?, ours.split_last()?);
    if last.1 != first.1 || last.0 < first.0 {
        return None;
    }
    let rows = want
        .chunks(*last.0)
        .flat_map(|row| &row[last.0 - first.0..]);
    Some(rows.copied().collect())
}

/// How close we came.
#[derive(Clone, Debug)]
pub struct Closeness {
    /// The golden.
    pub name: String,
    /// The mixer.
    pub mixer: String,
    /// `package version` of the reference.
    pub reference: String,
    /// Largest relative error of outputs and states.
    pub output: f64,
    /// Largest relative error of gradients.
    pub gradient: f64,
}

/// The folder of the committed goldens.
pub fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("goldens")
}

/// Every golden, sorted by name.
pub fn all() -> Result<Vec<Golden>, String> {
    let listing = std::fs::read_dir(folder()).map_err(|error| format!("list goldens: {error}"))?;
    let mut paths: Vec<PathBuf> = listing
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            path.extension()
                .is_some_and(|ending| ending == "safetensors")
        })
        .collect();
    paths.sort();
    paths.iter().map(|path| Golden::read(path)).collect()
}

impl Golden {
    /// Reads one file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        let fail = |what: String| format!("read golden {name}: {what}");
        let bytes = std::fs::read(path).map_err(|error| fail(error.to_string()))?;
        let (_, header) =
            SafeTensors::read_metadata(&bytes).map_err(|error| fail(error.to_string()))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|error| fail(error.to_string()))?;
        let notes = header.metadata().clone().unwrap_or_default();
        let note = |key: &str| {
            notes
                .get(key)
                .cloned()
                .ok_or_else(|| fail(format!("no {key} in the metadata")))
        };
        let json = |text: String| {
            serde_json::from_str::<Value>(&text).map_err(|error| fail(error.to_string()))
        };
        let Value::Object(config) = json(note("config")?)? else {
            return Err(fail("config is not a table".into()));
        };
        let mut tensors = BTreeMap::new();
        for (key, view) in file.tensors() {
            let values = match view.dtype() {
                Dtype::F32 => view
                    .data()
                    .chunks_exact(4)
                    .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                    .collect(),
                Dtype::I64 => view
                    .data()
                    .chunks_exact(8)
                    .map(|b| {
                        i64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]) as f32
                    })
                    .collect(),
                other => return Err(fail(format!("{key} is {other:?}, expected F32"))),
            };
            tensors.insert(key, (view.shape().to_vec(), values));
        }
        Ok(Golden {
            name: name.to_string(),
            mixer: note("mixer")?,
            config,
            provenance: json(note("provenance")?)?,
            tensors,
        })
    }

    /// The reference with the version of its package, for tables.
    pub fn reference(&self) -> String {
        let text = |value: Option<&Value>| value.and_then(Value::as_str).unwrap_or("").to_string();
        let reference = text(self.provenance.get("reference"));
        let package = reference.split(' ').next().unwrap_or("").to_string();
        let versions = self.provenance.get("versions").and_then(Value::as_object);
        // `fla` is installed as `fla-core`, `torch.nn` as `torch`.
        let installed = versions
            .into_iter()
            .flatten()
            .find(|(name, _)| name.starts_with(&package) || package.starts_with(name.as_str()));
        let version = text(installed.map(|(_, version)| version));
        let rest = reference.strip_prefix(&package).unwrap_or("");
        format!("{package} {version}{rest}").replace('|', "/")
    }

    /// Shape and values of a tensor.
    pub fn get(&self, key: &str) -> Result<(&[usize], &[f32]), String> {
        match self.tensors.get(key) {
            Some((shape, values)) => Ok((shape, values)),
            None => Err(format!("golden {}: no tensor {key}", self.name)),
        }
    }

    /// Names of the tensors.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Gives every parameter of `store` its value `w.NAME`; each must be there, and none may be left over.
    pub fn fill(&self, store: &ParamStore) -> Result<(), String> {
        let mut wanted: Vec<&str> = self
            .keys()
            .filter_map(|key| key.strip_prefix("w."))
            .collect();
        for param in store.params() {
            let (shape, values) = self.get(&format!("w.{}", param.name()))?;
            if shape.iter().product::<usize>() != param.count() {
                return Err(format!(
                    "golden {}: {} is {shape:?}, ours {:?}",
                    self.name,
                    param.name(),
                    param.shape()
                ));
            }
            param
                .set(values.to_vec())
                .map_err(|error| error.to_string())?;
            wanted.retain(|name| *name != param.name());
        }
        match wanted.is_empty() {
            true => Ok(()),
            false => Err(format!(
                "golden {}: weights {wanted:?} are not ours",
                self.name
            )),
        }
    }

    fn tensor(&self, key: &str, device: &Device) -> Result<Tensor<3>, String> {
        let (shape, values) = self.get(key)?;
        let Ok(shape) = <[usize; 3]>::try_from(shape.to_vec()) else {
            return Err(format!("golden {}: {key} is {shape:?}", self.name));
        };
        Ok(Tensor::<1>::from_data(values, device).reshape(shape))
    }

    /// Runs our mixer on the golden's input and compares outputs, the final state and every gradient.
    pub fn check_mixer(&self) -> Result<Closeness, String> {
        let device = Device::flex().autodiff();
        let x = self.tensor("x", &device)?.require_grad();
        let dim = x.dims()[2];
        let builder = Builder::new(&device, 0);
        let text = |error: anyformer_mixers::ConfigError| format!("golden {}: {error}", self.name);
        let mut config = self.config.clone();
        let known = match token_mixer(&self.mixer) {
            Ok(entry) => (entry.resolve)(&Options::new()),
            Err(_) => channel_mixer(&self.mixer).and_then(|entry| (entry.resolve)(&Options::new())),
        };
        let known = known.map_err(text)?;
        for fact in FACTS {
            if !known.contains_key(*fact) {
                config.remove(*fact);
            }
        }
        let grid = match (config.remove("height"), config.remove("width")) {
            (Some(height), Some(width)) => {
                let side = |value: Value| value.as_u64().unwrap_or(0) as usize;
                Some([side(height), side(width)])
            }
            _ => None,
        };
        let context = Context {
            grid,
            keep_state: true,
            ..Context::default()
        };
        let (y, state) = match token_mixer(&self.mixer) {
            Ok(entry) => {
                let mixer = (entry.build)(dim, &config, &builder).map_err(text)?;
                self.fill(&builder.store())?;
                let run = mixer.forward(x.clone(), &context, None);
                run.map_err(|error| error.to_string())?
            }
            Err(_) => {
                let entry = channel_mixer(&self.mixer).map_err(text)?;
                let mixer = (entry.build)(dim, &config, &builder).map_err(text)?;
                self.fill(&builder.store())?;
                (mixer.forward(x.clone(), &context), None)
            }
        };
        let at = |what: &str| format!("golden {} {what}", self.name);
        let (_, want) = self.get("y")?;
        let mut output = check(&at("y"), &tensor_values(y.clone()), want, OUTPUT)?;
        if let Some(state) = &state {
            for (name, tensor) in state.tensors() {
                let Ok((shape, want)) = self.get(&format!("state.{name}")) else {
                    continue;
                };
                let want = last_columns(want, shape, &tensor.shape)
                    .ok_or_else(|| at(&format!("{name}: {shape:?}, ours {:?}", tensor.shape)))?;
                let got = tensor_values(tensor.values());
                output = output.max(check(&at(name), &got, &want, OUTPUT)?);
            }
        }
        let loss = (y * self.tensor("cotangent", &device)?).sum();
        let mut gradients = loss.backward();
        let Some(dx) = x.grad(&gradients) else {
            return Err(at("x has no gradient"));
        };
        let (_, want) = self.get("grad.x")?;
        let mut gradient = check(&at("grad.x"), &tensor_values(dx), want, GRADIENT)?;
        for param in builder.store().params() {
            if !param.trainable() {
                continue;
            }
            let (_, want) = self.get(&format!("grad.w.{}", param.name()))?;
            let Some(got) = param.gradient(&mut gradients) else {
                return Err(at(&format!("{} has no gradient", param.name())));
            };
            gradient = gradient.max(check(&at(param.name()), &got, want, GRADIENT)?);
        }
        Ok(Closeness {
            name: self.name.clone(),
            mixer: self.mixer.clone(),
            reference: self.reference(),
            output,
            gradient,
        })
    }
}
