//! Safetensors files: eight bytes of header length, a JSON header, the values. Read through the format's own crate,
//! written here so that equal tensors give equal bytes.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;

use anyformer_ops::{Param, ParamStore};
use safetensors::SafeTensorError;
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value, json};

use crate::atomic::write_file;
use crate::encoding::Encoding;
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
        store.params().iter().map(Self::of_param).collect()
    }

    /// One of them.
    pub(crate) fn of_param(param: &Param) -> NamedTensor {
        NamedTensor {
            name: param.name().to_string(),
            shape: param.shape().to_vec(),
            values: param.values(),
        }
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
    let length = header_length(path, bytes, bytes.len() as u64)?;
    let data = bytes.get(8 + length..).unwrap_or_default();
    let layout = layout(path, &bytes[8..8 + length], data.len() as u64)?;
    let mut problems = layout.problems;
    let mut tensors = Vec::new();
    for (name, shape, encoding, offset) in layout.tensors {
        if encoding.is_part() {
            let dtype = format!("{encoding:?}");
            problems.push(Problem::Type { name, dtype });
            continue;
        }
        let mut values = vec![0.0; shape.iter().product()];
        let size = encoding.bytes(values.len()).unwrap_or(0);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let Some(data) = data.get(start..start.saturating_add(size)) else {
            let message = format!("{name} lies outside the file");
            return Err(HubError::damaged(path, Damage::Layout(message)));
        };
        encoding.decode(data, &mut values);
        problems.extend(not_finite(&name, &values));
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
    Ok(TensorFile {
        tensors,
        metadata: layout.metadata,
    })
}

/// What the header of a safetensors file says, checked against the length of the data after it.
#[derive(Debug, Default)]
pub(crate) struct Layout {
    /// Name, shape, encoding and offset in the data, in the order of the values.
    pub(crate) tensors: Vec<(String, Vec<usize>, Encoding, u64)>,
    /// Tensors of types that are not read.
    pub(crate) problems: Vec<Problem>,
    metadata: BTreeMap<String, String>,
}

/// The length of the header, from the first bytes of a file of `total` bytes.
pub(crate) fn header_length(path: &Path, first: &[u8], total: u64) -> Result<usize, HubError> {
    let bytes = usize::try_from(total).unwrap_or(usize::MAX);
    let Some(eight) = first.first_chunk() else {
        return Err(HubError::damaged(path, Damage::NoHeader { bytes }));
    };
    let claimed = u64::from_le_bytes(*eight);
    if claimed > LONGEST_HEADER {
        let allowed = LONGEST_HEADER;
        let damage = Damage::HeaderTooLarge { claimed, allowed };
        return Err(HubError::damaged(path, damage));
    }
    if claimed > total - 8 {
        let damage = Damage::HeaderBeyondFile { claimed, bytes };
        return Err(HubError::damaged(path, damage));
    }
    Ok(claimed as usize)
}

/// Reads a header and compares it with the `data` bytes after it.
pub(crate) fn layout(path: &Path, header: &[u8], data: u64) -> Result<Layout, HubError> {
    let not_json = |error: serde_json::Error| {
        HubError::damaged(path, Damage::HeaderNotJson(error.to_string()))
    };
    let mut table: Map<String, Value> = serde_json::from_slice(header).map_err(not_json)?;
    let metadata = match table.remove("__metadata__") {
        None => BTreeMap::new(),
        Some(text) => serde_json::from_value(text).map_err(not_json)?,
    };
    let mut infos = Vec::new();
    for (name, entry) in table {
        let info: TensorInfo = serde_json::from_value(entry).map_err(not_json)?;
        infos.push((name, info));
    }
    infos.sort_by(|(a, x), (b, y)| x.data_offsets.cmp(&y.data_offsets).then(a.cmp(b)));
    let expected = infos.iter().map(|(_, info)| info.data_offsets.1).max();
    let metadata_of = Metadata::new(None, infos.clone());
    metadata_of.map_err(|error| HubError::damaged(path, contradiction(error)))?;
    let (expected, got) = (
        expected.unwrap_or(0),
        usize::try_from(data).unwrap_or(usize::MAX),
    );
    if expected != got {
        return Err(HubError::damaged(path, Damage::Length { expected, got }));
    }
    let mut found = Layout {
        metadata,
        ..Layout::default()
    };
    for (name, info) in infos {
        match Encoding::of_safetensors(info.dtype) {
            Some(encoding) => {
                let offset = info.data_offsets.0 as u64;
                found.tensors.push((name, info.shape, encoding, offset));
            }
            None => found.problems.push(Problem::Type {
                name,
                dtype: format!("{:?}", info.dtype),
            }),
        }
    }
    Ok(found)
}

fn contradiction(error: SafeTensorError) -> Damage {
    Damage::Layout(match error {
        SafeTensorError::InvalidOffset(name) => {
            format!("the values of {name} do not follow those before them")
        }
        SafeTensorError::TensorInvalidInfo => "a tensor's shape and size differ".to_string(),
        SafeTensorError::ValidationOverflow => {
            "a tensor's shape is larger than any memory".to_string()
        }
        other => other.to_string(),
    })
}

pub(crate) fn not_finite(name: &str, values: &[f32]) -> Option<Problem> {
    let mut found = NotFinite::default();
    found.look(0, values, |value| value.is_finite());
    found.problem(name)
}

/// Values that are no numbers, of a tensor that is looked at piece by piece.
#[derive(Default)]
pub(crate) struct NotFinite {
    count: usize,
    first: usize,
}

impl NotFinite {
    /// Looks at the values from place `at` on.
    pub(crate) fn look<T: Copy>(&mut self, at: usize, values: &[T], finite: impl Fn(T) -> bool) {
        let Some(first) = values.iter().position(|value| !finite(*value)) else {
            return;
        };
        if self.count == 0 {
            self.first = at + first;
        }
        self.count += values.iter().filter(|value| !finite(**value)).count();
    }

    pub(crate) fn problem(&self, name: &str) -> Option<Problem> {
        (self.count > 0).then(|| Problem::NotFinite {
            name: name.to_string(),
            count: self.count,
            first: self.first,
        })
    }
}

/// Writes a safetensors file of f32 tensors under a temporary name and renames it.
pub fn write_safetensors(
    path: &Path,
    tensors: &[NamedTensor],
    metadata: &BTreeMap<String, String>,
) -> Result<(), HubError> {
    write_file(path, |file| write_tensors(file, tensors, metadata))
}

/// A tensor as it will lie in a file.
pub(crate) struct Piece<'a> {
    pub(crate) name: String,
    pub(crate) dtype: &'static str,
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Data<'a>,
}

/// What a tensor holds.
pub(crate) enum Data<'a> {
    Values(&'a [f32]),
    Bytes(Vec<u8>),
}

impl<'a> Piece<'a> {
    pub(crate) fn of(tensor: &'a NamedTensor) -> Self {
        assert_eq!(
            tensor.shape.iter().product::<usize>(),
            tensor.values.len(),
            "{}",
            tensor.name
        );
        Piece {
            name: tensor.name.clone(),
            dtype: "F32",
            shape: tensor.shape.clone(),
            data: Data::Values(&tensor.values),
        }
    }
}

/// Writes the bytes of a safetensors file: the values in the given order, the header padded to eight bytes.
pub fn write_tensors(
    file: &mut dyn Write,
    tensors: &[NamedTensor],
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
    let pieces: Vec<Piece> = tensors.iter().map(Piece::of).collect();
    write_pieces(file, &pieces, metadata)
}

/// As [`write_tensors`], of tensors of any type.
pub(crate) fn write_pieces(
    file: &mut dyn Write,
    tensors: &[Piece],
    metadata: &BTreeMap<String, String>,
) -> io::Result<()> {
    let mut table = Map::new();
    if !metadata.is_empty() {
        table.insert("__metadata__".into(), json!(metadata));
    }
    let mut offset = 0;
    for tensor in tensors {
        let bytes = match &tensor.data {
            Data::Values(values) => 4 * values.len(),
            Data::Bytes(bytes) => bytes.len(),
        };
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, offset + bytes]});
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
    for tensor in tensors {
        let values = match &tensor.data {
            Data::Values(values) => *values,
            Data::Bytes(bytes) => {
                file.write_all(bytes)?;
                continue;
            }
        };
        for chunk in values.chunks(1 << 14) {
            buffer.clear();
            buffer.extend(chunk.iter().flat_map(|value| value.to_le_bytes()));
            file.write_all(&buffer)?;
        }
    }
    Ok(())
}
