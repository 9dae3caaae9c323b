//! A kept state as one safetensors file: the tensors of the layers, and in the header the tokens that they stand for, the
//! model they belong to, and checksums. Written under a temporary name, synced, renamed.
//!
//! Tensors are named `LAYER.INDEX.NAME`; `rows` of attention are the first extent. Header keys: `format`, `model`, `name`
//! (of a named state), `ids` (all tokens, decimal), `time` (tokens that the tensors have consumed), `rolls` (whether
//! earlier tokens can be had by cutting), `ids_sha256`, `sha256` (of the values).

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use anyformer_hub::{NamedTensor, read_safetensors, write_safetensors};
use anyformer_mixers::{State, StateTensor};
use anyformer_models::ModelState;
use anyformer_ops::{Device, Tensor, tensor_values};
use sha2::{Digest, Sha256};

const FORMAT: &str = "anyformer-state-1";
/// The longest header that is read: a million tokens and more.
const LONGEST_HEADER: u64 = 32 << 20;

/// What the header of a file says.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Head {
    pub name: Option<String>,
    pub ids: Vec<u32>,
    pub time: usize,
    pub rolls: bool,
}

fn hex(sum: Sha256) -> String {
    let bytes = sum.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The checksum of tokens.
pub(super) fn ids_sum(ids: &[u32]) -> String {
    let mut sum = Sha256::new();
    for id in ids {
        sum.update(id.to_le_bytes());
    }
    hex(sum)
}

fn values_sum(tensors: &[NamedTensor]) -> String {
    let mut sum = Sha256::new();
    for tensor in tensors {
        sum.update(tensor.name.as_bytes());
        let bytes: Vec<u8> = tensor.values.iter().flat_map(|x| x.to_le_bytes()).collect();
        sum.update(bytes);
    }
    hex(sum)
}

/// Writes a state of one sequence; `None` writes the tokens alone.
pub(super) fn write(
    path: &Path,
    model: &str,
    head: &Head,
    state: Option<&ModelState>,
) -> Result<(), String> {
    let mut tensors = Vec::new();
    for (layer, held) in state
        .iter()
        .flat_map(|state| state.layers.iter().enumerate())
    {
        for (index, (name, tensor)) in held.tensors().iter().enumerate() {
            tensors.push(NamedTensor {
                name: format!("{layer}.{index}.{name}"),
                shape: tensor.shape.clone(),
                values: tensor_values(tensor.values()),
            });
        }
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let ids: Vec<String> = head.ids.iter().map(u32::to_string).collect();
    let mut metadata = BTreeMap::from([
        ("format".to_string(), FORMAT.to_string()),
        ("model".to_string(), model.to_string()),
        ("ids".to_string(), ids.join(" ")),
        ("time".to_string(), head.time.to_string()),
        ("rolls".to_string(), head.rolls.to_string()),
        ("ids_sha256".to_string(), ids_sum(&head.ids)),
        ("sha256".to_string(), values_sum(&tensors)),
    ]);
    if let Some(name) = &head.name {
        metadata.insert("name".to_string(), name.clone());
    }
    write_safetensors(path, &tensors, &metadata).map_err(|error| error.to_string())
}

/// Reads the header alone.
pub(super) fn read_head(path: &Path, model: &str) -> Result<Head, String> {
    let wrong = |message: &str| format!("read {}: {message}", path.display());
    let mut file = std::fs::File::open(path).map_err(|error| wrong(&error.to_string()))?;
    let mut length = [0; 8];
    file.read_exact(&mut length)
        .map_err(|error| wrong(&error.to_string()))?;
    let length = u64::from_le_bytes(length);
    if length > LONGEST_HEADER {
        return Err(wrong("its header is too long for a state"));
    }
    let mut header = Vec::new();
    file.take(length)
        .read_to_end(&mut header)
        .map_err(|error| wrong(&error.to_string()))?;
    let header: serde_json::Value =
        serde_json::from_slice(&header).map_err(|error| wrong(&error.to_string()))?;
    let metadata = header["__metadata__"].as_object();
    let metadata = metadata.ok_or_else(|| wrong("no metadata"))?;
    let text = |key: &str| metadata.get(key).and_then(|value| value.as_str());
    parse_head(text, model).map_err(|message| wrong(&message))
}

fn parse_head<'a>(text: impl Fn(&str) -> Option<&'a str>, model: &str) -> Result<Head, String> {
    let need = |key: &str| text(key).ok_or_else(|| format!("no {key} in its header"));
    if need("format")? != FORMAT {
        return Err(format!("its format is not {FORMAT}"));
    }
    if need("model")? != model {
        return Err("it belongs to another model".into());
    }
    let ids = need("ids")?.split_whitespace().map(str::parse);
    let ids: Vec<u32> = ids
        .collect::<Result<_, _>>()
        .map_err(|error| format!("its ids: {error}"))?;
    if need("ids_sha256")? != ids_sum(&ids) {
        return Err("the checksum of its tokens is another; it was damaged".into());
    }
    let time = need("time")?.parse::<usize>();
    let time = time.map_err(|error| format!("its time: {error}"))?;
    if time > ids.len() {
        return Err(format!(
            "its time {time} is beyond its {} tokens",
            ids.len()
        ));
    }
    Ok(Head {
        name: text("name").map(str::to_string),
        rolls: need("rolls")? == "true",
        ids,
        time,
    })
}

/// Reads a state and checks it against one that the model made (`like`, of one sequence).
pub(super) fn read(
    path: &Path,
    model: &str,
    like: &ModelState,
    device: &Device,
) -> Result<(Head, ModelState), String> {
    let wrong = |message: String| format!("read {}: {message}", path.display());
    let mut file = read_safetensors(path).map_err(|error| error.to_string())?;
    let text = |key: &str| file.metadata.get(key).map(String::as_str);
    let head = parse_head(text, model).map_err(wrong)?;
    file.tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let sum = file.metadata.get("sha256").cloned().unwrap_or_default();
    if sum != values_sum(&file.tensors) {
        return Err(wrong(
            "the checksum of its values is another; it was damaged".into(),
        ));
    }
    let mut tensors: BTreeMap<String, NamedTensor> = file
        .tensors
        .into_iter()
        .map(|tensor| (tensor.name.clone(), tensor))
        .collect();
    let mut layers = Vec::new();
    for (layer, held) in like.layers.iter().enumerate() {
        let mut state = State::new(vec![head.time]);
        for (index, (name, known)) in held.tensors().iter().enumerate() {
            let key = format!("{layer}.{index}.{name}");
            let tensor = tensors.remove(&key);
            let tensor = tensor.ok_or_else(|| wrong(format!("{key} is missing")))?;
            let fits = tensor.shape.len() == known.shape.len()
                && tensor.shape[1..] == known.shape[1..]
                && (known.rows.is_some() || tensor.shape[0] == 1)
                && tensor.shape[0] <= head.time.max(1);
            if !fits {
                let (got, expected) = (&tensor.shape, &known.shape);
                return Err(wrong(format!("{key} is {got:?}, expected {expected:?}")));
            }
            let rows = known.rows.is_some().then(|| vec![tensor.shape[0]]);
            let values = Tensor::<1>::from_data(tensor.values.as_slice(), device);
            let stored = StateTensor::new(tensor.shape, rows, values);
            state = state.with_stored(name.to_string(), stored);
        }
        layers.push(state);
    }
    if let Some(extra) = tensors.keys().next() {
        return Err(wrong(format!("{extra} is not in the model's state")));
    }
    let times = vec![head.time];
    Ok((head, ModelState { times, layers }))
}
