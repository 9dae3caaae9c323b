//! Safetensors files: eight bytes of header length, a JSON header, the values. Read through the format's own crate,
//! written here so that equal tensors give equal bytes.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use anyformer_ops::ParamStore;
use half::{bf16, f16};
use safetensors::tensor::TensorInfo;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::{Map, Value, json};

use crate::atomic::write_file;
use crate::error::{Damage, HubError, Problem};
use crate::folder::read;

/// The longest header that is read (the format's own limit).
const LONGEST_HEADER: u64 = 100_000_000;

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    /// Its name.
    pub name: String,
    /// Extents, outermost first.
    pub shape: Vec<usize>,
    /// The values, row-major.
    pub values: Vec<f32>,
}

impl NamedTensor {
    /// Every parameter and buffer of a model, in order of construction.
    pub fn of(store: &ParamStore) -> Vec<NamedTensor> {
        let tensor = |param: &anyformer_ops::Param| NamedTensor {
            name: param.name().to_string(),
            shape: param.shape().to_vec(),
            values: param.values(),
        };
        store.params().iter().map(tensor).collect()
    }
}

/// What a safetensors file holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorFile {
    /// The tensors, in the order of their values in the file.
    pub tensors: Vec<NamedTensor>,
    /// The free text of the header.
    pub metadata: BTreeMap<String, String>,
}

/// Reads a safetensors file; F16 and BF16 become f32. Every tensor of another type, and every tensor with a value that
/// is not finite, is named in one error.
pub fn read_safetensors(path: &Path) -> Result<TensorFile, HubError> {
    parse_safetensors(path, &read(path)?)
}

/// As [`read_safetensors`], of bytes that were read from `path`.
pub fn parse_safetensors(path: &Path, bytes: &[u8]) -> Result<TensorFile, HubError> {
    let (header, metadata) = SafeTensors::read_metadata(bytes)
        .map_err(|error| HubError::damaged(path, damage(error, bytes)))?;
    let mut problems = Vec::new();
    let mut tensors = Vec::new();
    for name in metadata.offset_keys() {
        let Some(info) = metadata.info(&name) else {
            continue;
        };
        let (from, to) = info.data_offsets;
        let start = 8 + header;
        let Some(data) = bytes.get(start + from..start + to) else {
            let message = format!("{name} lies outside the file");
            return Err(HubError::damaged(path, Damage::Layout(message)));
        };
        let Some(values) = floats(info, data) else {
            let dtype = format!("{:?}", info.dtype);
            problems.push(Problem::Type { name, dtype });
            continue;
        };
        problems.extend(not_finite(&name, &values));
        let shape = info.shape.clone();
        tensors.push(NamedTensor {
            name,
            shape,
            values,
        });
    }
    if !problems.is_empty() {
        let path = path.to_path_buf();
        return Err(HubError::Mismatch { path, problems });
    }
    let metadata = metadata.metadata().clone().unwrap_or_default();
    Ok(TensorFile {
        tensors,
        metadata: metadata.into_iter().collect(),
    })
}

fn floats(info: &TensorInfo, data: &[u8]) -> Option<Vec<f32>> {
    let half =
        |read: fn([u8; 2]) -> f32| data.as_chunks().0.iter().map(|pair| read(*pair)).collect();
    match info.dtype {
        Dtype::F32 => Some(
            data.as_chunks()
                .0
                .iter()
                .map(|four| f32::from_le_bytes(*four))
                .collect(),
        ),
        Dtype::F16 => Some(half(|pair| f16::from_le_bytes(pair).to_f32())),
        Dtype::BF16 => Some(half(|pair| bf16::from_le_bytes(pair).to_f32())),
        _ => None,
    }
}

pub(crate) fn not_finite(name: &str, values: &[f32]) -> Option<Problem> {
    let first = values.iter().position(|value| !value.is_finite())?;
    Some(Problem::NotFinite {
        name: name.to_string(),
        count: values.iter().filter(|value| !value.is_finite()).count(),
        first,
    })
}

fn damage(error: SafeTensorError, bytes: &[u8]) -> Damage {
    let claimed = bytes
        .first_chunk()
        .map_or(0, |eight| u64::from_le_bytes(*eight));
    let text = |error: SafeTensorError| match error {
        SafeTensorError::InvalidOffset(name) => {
            format!("the values of {name} do not follow those before them")
        }
        SafeTensorError::TensorInvalidInfo => "a tensor's shape and size differ".to_string(),
        SafeTensorError::ValidationOverflow => {
            "a tensor's shape is larger than any memory".to_string()
        }
        other => other.to_string(),
    };
    match error {
        SafeTensorError::HeaderTooSmall => Damage::NoHeader { bytes: bytes.len() },
        SafeTensorError::HeaderTooLarge => Damage::HeaderTooLarge {
            claimed,
            allowed: LONGEST_HEADER,
        },
        SafeTensorError::InvalidHeaderLength => Damage::HeaderBeyondFile {
            claimed,
            bytes: bytes.len(),
        },
        SafeTensorError::InvalidHeader(error) => Damage::HeaderNotJson(error.to_string()),
        SafeTensorError::InvalidHeaderDeserialization(error) => {
            Damage::HeaderNotJson(error.to_string())
        }
        SafeTensorError::MetadataIncompleteBuffer => {
            let header = usize::try_from(claimed).unwrap_or(0);
            let expected = length(bytes.get(8..8 + header).unwrap_or_default());
            Damage::Length {
                expected,
                got: bytes.len().saturating_sub(8 + header),
            }
        }
        other => Damage::Layout(text(other)),
    }
}

/// The end of the last tensor that a header names.
fn length(header: &[u8]) -> usize {
    let Ok(Value::Object(table)) = serde_json::from_slice(header) else {
        return 0;
    };
    let ends = table
        .values()
        .filter_map(|entry| entry["data_offsets"][1].as_u64());
    ends.max()
        .and_then(|end| usize::try_from(end).ok())
        .unwrap_or(0)
}

/// Writes a safetensors file of f32 tensors under a temporary name and renames it.
pub fn write_safetensors(
    path: &Path,
    tensors: &[NamedTensor],
    metadata: &BTreeMap<String, String>,
) -> Result<(), HubError> {
    write_file(path, |file| write_tensors(file, tensors, metadata))
}

/// Writes the bytes of a safetensors file: the values in the given order, the header padded to eight bytes.
pub fn write_tensors(
    file: &mut dyn Write,
    tensors: &[NamedTensor],
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
    let mut table = Map::new();
    if !metadata.is_empty() {
        table.insert("__metadata__".into(), json!(metadata));
    }
    let mut offset = 0;
    for tensor in tensors {
        let bytes = 4 * tensor.values.len();
        assert_eq!(
            tensor.shape.iter().product::<usize>(),
            tensor.values.len(),
            "{}",
            tensor.name
        );
        let entry = json!({"dtype": "F32", "shape": tensor.shape, "data_offsets": [offset, offset + bytes]});
        table.insert(tensor.name.clone(), entry);
        offset += bytes;
    }
    assert_eq!(
        table.len(),
        tensors.len() + usize::from(!metadata.is_empty()),
        "names are unique"
    );
    let mut header = Value::Object(table).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(&header)?;
    let mut buffer = Vec::new();
    for chunk in tensors
        .iter()
        .flat_map(|tensor| tensor.values.chunks(1 << 14))
    {
        buffer.clear();
        buffer.extend(chunk.iter().flat_map(|value| value.to_le_bytes()));
        file.write_all(&buffer)?;
    }
    Ok(())
}
