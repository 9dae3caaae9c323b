//! The tensors of a model as they lie in one or several files: opened at once, their values read piece by piece, so that
//! loading needs little memory beside the model's own. A mapping would bring nothing (`docs/src/checkpoints.md`): what is packed is copied anyway.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyformer_ops::Param;
use anyformer_ops::quantised::quant::{Bits, Packed};

use crate::encoding::Encoding;
use crate::error::{HubError, Problem};
use crate::families::names::Place;
use crate::quantised::{in_pieces, of_blocks, pack_as, packed};
use crate::tensors::{NotFinite, header_length, layout, not_finite};

/// Bytes that are read at once, unless a row is longer.
const PIECE: usize = 1 << 20;

/// A tensor in a file.
#[derive(Clone, Debug)]
pub(crate) struct Stored {
    pub(crate) name: String,
    /// Extents, outermost first.
    pub(crate) shape: Vec<usize>,
    pub(crate) encoding: Encoding,
    /// Which file.
    pub(crate) file: usize,
    /// First byte in the file.
    pub(crate) offset: u64,
}

/// Opened files with the tensors that they hold.
#[derive(Debug, Default)]
pub(crate) struct Weights {
    files: Vec<(PathBuf, File)>,
    tensors: Vec<Stored>,
    by_name: HashMap<String, usize>,
    /// Tensors that cannot be read, by name: unknown types, names that stand twice.
    pub(crate) problems: Vec<(String, Problem)>,
}

pub(crate) fn unreadable(path: &Path) -> impl Fn(io::Error) -> HubError {
    move |source| HubError::Read {
        path: path.to_path_buf(),
        source,
    }
}

impl Weights {
    /// Adds a safetensors file.
    pub(crate) fn add_safetensors(&mut self, path: &Path) -> Result<(), HubError> {
        let mut file = File::open(path).map_err(unreadable(path))?;
        let total = file.metadata().map_err(unreadable(path))?.len();
        let mut first = Vec::new();
        let start = (&mut file).take(8).read_to_end(&mut first);
        start.map_err(unreadable(path))?;
        let length = header_length(path, &first, total)?;
        let mut header = vec![0; length];
        file.read_exact(&mut header).map_err(unreadable(path))?;
        let data = 8 + length as u64;
        let layout = layout(path, &header, total - data)?;
        let number = self.add_file(path, file);
        for problem in layout.problems {
            let Problem::Type { name, dtype } = problem else {
                continue;
            };
            let shown = self.shown(&name, number);
            self.problems
                .push((name, Problem::Type { name: shown, dtype }));
        }
        for (name, shape, encoding, offset) in layout.tensors {
            self.add(Stored {
                name,
                shape,
                encoding,
                file: number,
                offset: data + offset,
            });
        }
        Ok(())
    }

    /// Adds a file, whose tensors [`Weights::add`] then tells.
    pub(crate) fn add_file(&mut self, path: &Path, file: File) -> usize {
        self.files.push((path.to_path_buf(), file));
        self.files.len() - 1
    }

    /// Adds a tensor that lies within its file.
    pub(crate) fn add(&mut self, stored: Stored) {
        if let Some(other) = self.by_name.get(&stored.name) {
            let other = &self.tensors[*other];
            let twice = Problem::Twice {
                name: stored.name.clone(),
                files: [other.file, stored.file].map(|file| self.file_name(file)),
            };
            self.problems.push((stored.name, twice));
            return;
        }
        self.by_name.insert(stored.name.clone(), self.tensors.len());
        self.tensors.push(stored);
    }

    pub(crate) fn len(&self) -> usize {
        self.tensors.len()
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Stored> {
        self.by_name.get(name).map(|at| &self.tensors[*at])
    }

    pub(crate) fn tensors(&self) -> &[Stored] {
        &self.tensors
    }

    fn file_name(&self, file: usize) -> String {
        let name = self.files[file].0.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// The name of a tensor for messages: with its file, where there are several.
    pub(crate) fn shown(&self, name: &str, file: usize) -> String {
        match self.files.len() {
            0 | 1 => name.to_string(),
            _ => format!("{name} in {}", self.file_name(file)),
        }
    }

    /// Reads whole rows of a tensor, from row `first` on, into `values`.
    fn rows(
        &self,
        stored: &Stored,
        columns: usize,
        first: usize,
        values: &mut [f32],
    ) -> Result<(), HubError> {
        let width = stored.encoding.bytes(columns).unwrap_or(0);
        let mut at = first * width;
        let at_once = (PIECE / width.max(1)).max(1) * columns;
        let mut bytes = Vec::new();
        for values in values.chunks_mut(at_once) {
            bytes.resize(values.len() / columns * width, 0);
            self.read(stored, at, &mut bytes)?;
            at += bytes.len();
            stored.encoding.decode(&bytes, values);
        }
        Ok(())
    }

    /// Bytes of a tensor from byte `at` of it on.
    fn read(&self, stored: &Stored, at: usize, bytes: &mut [u8]) -> Result<(), HubError> {
        let (path, mut file) = {
            let (path, file) = &self.files[stored.file];
            (path, file)
        };
        file.seek(SeekFrom::Start(stored.offset + at as u64))
            .and_then(|_| file.read_exact(bytes))
            .map_err(unreadable(path))
    }

    /// The bytes of some rows of ours, each of `width` bytes, out of a matrix of `rows`.
    pub(crate) fn row_bytes(
        &self,
        stored: &Stored,
        place: &Place,
        rows: usize,
        ours: Range<usize>,
        width: usize,
    ) -> Result<Vec<u8>, HubError> {
        let mut bytes = vec![0; ours.len() * width];
        let mut start = ours.start;
        while start < ours.end {
            let (first, run) = place.run(start..ours.end, rows);
            let at = (start - ours.start) * width;
            self.read(stored, first * width, &mut bytes[at..][..run * width])?;
            start += run;
        }
        Ok(bytes)
    }

    /// Every byte of a tensor.
    pub(crate) fn bytes(&self, stored: &Stored) -> Result<Vec<u8>, HubError> {
        let values = stored.shape.iter().product();
        let mut bytes = vec![0; stored.encoding.bytes(values).unwrap_or(0)];
        self.read(stored, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// As [`Weights::fill`]; values of 16 bits and blocks of 8 or 4 stay what they are where a matrix is made of whole rows of theirs.
    pub(crate) fn fill_packed(
        &self,
        param: &Param,
        stored: &Stored,
        place: &Place,
    ) -> Result<Option<Problem>, HubError> {
        let &[rows, columns] = param.shape() else {
            return self.fill(param, stored, place);
        };
        if !param.packs() {
            return self.fill(param, stored, place);
        }
        let halves = match stored.encoding {
            Encoding::F16 => Some(Bits::Half),
            Encoding::BF16 => Some(Bits::Brain),
            Encoding::Q8_0 | Encoding::Q4_0 | Encoding::Q4_1 => None,
            _ => return self.fill(param, stored, place),
        };
        if place.transposed {
            return self.fill(param, stored, place);
        }
        let width = stored.encoding.bytes(columns).unwrap_or(0);
        let shown = self.shown(&stored.name, stored.file);
        let mut found = NotFinite::default();
        let piece = |ours: Range<usize>| {
            let shape = [ours.len(), columns];
            let first = ours.start * columns;
            let bytes = self.row_bytes(stored, place, rows, ours, width)?;
            let Some(bits) = halves else {
                return Ok(packed(param, &of_blocks(stored.encoding, shape, &bytes)));
            };
            let pairs = bytes.as_chunks().0.iter();
            let weights: Vec<u16> = pairs.map(|pair| u16::from_le_bytes(*pair)).collect();
            let exponent = if bits == Bits::Half { 0x7c00 } else { 0x7f80 };
            found.look(first, &weights, |half| half & exponent != exponent);
            Ok(Ok(Packed::of_halves(bits, shape, &weights)))
        };
        let made = in_pieces(rows, width, piece)?;
        if let Some(problem) = found.problem(&shown) {
            return Ok(Some(problem));
        }
        Ok(made.and_then(|packed| pack_as(param, packed)).err())
    }

    /// Gives a parameter its values out of a tensor whose shape fits `place`. Values that are not finite are the answer.
    pub(crate) fn fill(
        &self,
        param: &Param,
        stored: &Stored,
        place: &Place,
    ) -> Result<Option<Problem>, HubError> {
        let mut outcome = Ok(None);
        param.update(|values| {
            outcome = self.fill_values(param.shape(), stored, place, values);
        });
        outcome
    }

    fn fill_values(
        &self,
        shape: &[usize],
        stored: &Stored,
        place: &Place,
        values: &mut [f32],
    ) -> Result<Option<Problem>, HubError> {
        let own = shape.first().copied().unwrap_or(1);
        let columns = (values.len() / own.max(1)).max(1);
        if place.transposed && shape.len() == 2 {
            let theirs = stored.shape[1];
            let mut row = vec![0.0; theirs];
            for column in 0..columns {
                self.rows(stored, theirs, column, &mut row)?;
                for at in 0..own {
                    values[at * columns + column] = row[place.row(at, own)];
                }
            }
        } else {
            let mut start = 0;
            while start < own {
                let (first, run) = place.run(start..own, own);
                let values = &mut values[start * columns..(start + run) * columns];
                self.rows(stored, columns, first, values)?;
                start += run;
            }
        }
        let shown = self.shown(&stored.name, stored.file);
        Ok(not_finite(&shown, values))
    }
}
