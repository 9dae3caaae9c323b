//! Image classification: MNIST-style IDX files, CIFAR-10 binary batches, folders of pictures, or the shipped subset of
//! Fashion-MNIST.

use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::DataError;
use crate::pictures::{Pictures, cifar, folder};
use crate::task::{Numbered, Sample, SampleTarget, Samples, Split, Task, TaskKind, TaskSpec, read};

const NAME: &str = "images";

/// What a path holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// Looks at the names of the files.
    #[default]
    Auto,
    /// `train-images-idx3-ubyte` and its three companions, gzipped or not.
    Idx,
    /// `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin`.
    Cifar10,
    /// A folder per class, or `train` and `test` with a folder per class each.
    Folder,
}

/// Options.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct ImagesOptions {
    /// A folder; absent: the shipped subset of Fashion-MNIST, 6,000 + 1,000 pictures.
    pub path: Option<PathBuf>,
    /// What it holds.
    pub format: Format,
    /// Every value of every pixel is a token from 0 to 255, row by row.
    pub as_sequence: bool,
}

/// One of ten training pictures is for validation.
const VALIDATION: usize = 10;

pub(crate) fn task(options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (ImagesOptions, _) = read(NAME, options)?;
    let (train, test, source) = match &o.path {
        None => {
            let (train, test) = shipped()?;
            (
                train,
                test,
                "Fashion-MNIST (MIT licence), a class-balanced subset".to_string(),
            )
        }
        Some(path) => {
            let (train, test) = load(path, o.format)?;
            (train, test, path.display().to_string())
        }
    };
    let [height, width, channels] = train.shape;
    if test.shape != train.shape || train.labels.is_empty() || test.labels.is_empty() {
        return Err(DataError::Option {
            task: NAME,
            message: format!(
                "expected pictures of one size to train and to test on, got {} of {:?} and {} of {:?}",
                train.labels.len(),
                train.shape,
                test.labels.len(),
                test.shape
            ),
        });
    }
    let classes = train
        .labels
        .iter()
        .chain(&test.labels)
        .max()
        .map_or(0, |most| usize::from(*most) + 1);
    let mut counts = vec![0usize; classes];
    test.labels
        .iter()
        .for_each(|label| counts[usize::from(*label)] += 1);
    let floor = counts.iter().copied().max().unwrap_or(0) as f64 / test.labels.len() as f64;
    let kind = match o.as_sequence {
        true => TaskKind::Classify,
        false => TaskKind::Pictures {
            height,
            width,
            channels,
        },
    };
    Ok(Box::new(Numbered {
        spec: TaskSpec {
            name: NAME.into(),
            description: format!(
                "Image classification: {} + {} pictures of {height} x {width} x {channels} in {classes} classes; one in {VALIDATION} training pictures is for validation.",
                train.labels.len(),
                test.labels.len()
            ),
            source,
            kind,
            time: height * width * if o.as_sequence { channels } else { 1 },
            vocab: if o.as_sequence { 256 } else { 0 },
            classes,
            floor: Some(floor),
            options: resolved,
        },
        samples: Images {
            train,
            test,
            as_sequence: o.as_sequence,
        },
        tokenizer: None,
    }))
}

struct Images {
    train: Pictures,
    test: Pictures,
    as_sequence: bool,
}

impl Samples for Images {
    fn count(&self, split: Split) -> Option<usize> {
        let all = self.train.labels.len();
        let validation = all / VALIDATION;
        Some(match split {
            Split::Train => all - validation,
            Split::Validation => validation,
            Split::Test => self.test.labels.len(),
        })
    }

    fn sample(
        &self,
        split: Split,
        index: usize,
        _: u64,
        _: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError> {
        // The last of every ten is for validation.
        let (set, place) = match split {
            Split::Train => {
                let full = self.train.labels.len() / VALIDATION * (VALIDATION - 1);
                match index < full {
                    true => (&self.train, index + index / (VALIDATION - 1)),
                    false => (&self.train, index + self.train.labels.len() / VALIDATION),
                }
            }
            Split::Validation => (&self.train, index * VALIDATION + VALIDATION - 1),
            Split::Test => (&self.test, index),
        };
        let size: usize = set.shape.iter().product();
        let pixels = &set.pixels[place * size..(place + 1) * size];
        let (tokens, pixels) = match self.as_sequence {
            true => (
                pixels.iter().map(|value| u32::from(*value)).collect(),
                Vec::new(),
            ),
            false => {
                let scaled = pixels.iter().map(|value| f32::from(*value) / 255.0);
                (Vec::new(), scaled.collect())
            }
        };
        Ok(Sample {
            tokens,
            target: SampleTarget::Class(i64::from(set.labels[place])),
            pixels,
        })
    }
}

fn shipped() -> Result<(Pictures, Pictures), DataError> {
    macro_rules! file {
        ($name:literal) => {
            (
                Path::new($name),
                include_bytes!(concat!("../assets/fashion-mnist/", $name, ".gz")).as_slice(),
            )
        };
    }
    let train = (
        file!("train-images-idx3-ubyte"),
        file!("train-labels-idx1-ubyte"),
    );
    let test = (
        file!("t10k-images-idx3-ubyte"),
        file!("t10k-labels-idx1-ubyte"),
    );
    let pair = |((images, pixels), (labels, classes)): ((&Path, &[u8]), (&Path, &[u8]))| {
        idx_pair(images, pixels.to_vec(), labels, classes.to_vec())
    };
    Ok((pair(train)?, pair(test)?))
}

fn load(path: &Path, format: Format) -> Result<(Pictures, Pictures), DataError> {
    let has = |name: &str| path.join(name).is_file();
    let idx = |name: &str| has(name) || has(&format!("{name}.gz"));
    let format = match format {
        Format::Auto if idx("train-images-idx3-ubyte") => Format::Idx,
        Format::Auto if has("data_batch_1.bin") => Format::Cifar10,
        Format::Auto => Format::Folder,
        given => given,
    };
    match format {
        Format::Idx => {
            let read = |name: &str| {
                let plain = path.join(name);
                let file = if plain.is_file() {
                    plain
                } else {
                    path.join(format!("{name}.gz"))
                };
                let bytes = std::fs::read(&file).map_err(|error| DataError::Read {
                    path: file.clone(),
                    error,
                })?;
                Ok::<_, DataError>((file, bytes))
            };
            let pair = |part: &str| {
                let (images, pixels) = read(&format!("{part}-images-idx3-ubyte"))?;
                let (labels, classes) = read(&format!("{part}-labels-idx1-ubyte"))?;
                idx_pair(&images, pixels, &labels, classes)
            };
            Ok((pair("train")?, pair("t10k")?))
        }
        Format::Cifar10 => cifar(path),
        Format::Folder | Format::Auto => folder(path),
    }
}

/// Pictures and labels of two IDX files, gzipped or not.
fn idx_pair(
    images: &Path,
    pixels: Vec<u8>,
    labels: &Path,
    classes: Vec<u8>,
) -> Result<Pictures, DataError> {
    let (sizes, pixels) = idx(images, pixels, 3)?;
    let (count, labels_read) = idx(labels, classes, 1)?;
    if sizes[0] != count[0] {
        return Err(DataError::Format {
            path: labels.to_path_buf(),
            message: format!(
                "expected {} labels, one per picture, got {}",
                sizes[0], count[0]
            ),
        });
    }
    Ok(Pictures {
        shape: [sizes[1], sizes[2], 1],
        pixels,
        labels: labels_read.into_iter().map(u16::from).collect(),
    })
}

/// The extents and bytes of an IDX file of unsigned bytes with `rank` dimensions.
fn idx(path: &Path, bytes: Vec<u8>, rank: usize) -> Result<(Vec<usize>, Vec<u8>), DataError> {
    let wrong = |message: String| DataError::Format {
        path: path.to_path_buf(),
        message,
    };
    let bytes = match bytes.starts_with(&[0x1f, 0x8b]) {
        true => {
            let mut plain = Vec::new();
            let read = GzDecoder::new(bytes.as_slice()).read_to_end(&mut plain);
            read.map_err(|error| wrong(format!("the gzip data is damaged: {error}")))?;
            plain
        }
        false => bytes,
    };
    let header = 4 + 4 * rank;
    let magic = [0, 0, 8, rank as u8];
    if bytes.len() < header || bytes[..4] != magic {
        return Err(wrong(format!(
            "expected an IDX header that begins with {magic:?}, got {:?}",
            &bytes[..bytes.len().min(4)]
        )));
    }
    let extents: Vec<usize> = bytes[4..header]
        .chunks(4)
        .map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]) as usize)
        .collect();
    let size = extents
        .iter()
        .try_fold(1usize, |size, extent| size.checked_mul(*extent));
    match size {
        Some(size) if bytes.len() - header == size => Ok((extents, bytes[header..].to_vec())),
        _ => Err(wrong(format!(
            "expected {extents:?} values after the header, got {}; the file is truncated or damaged",
            bytes.len() - header
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_shipped_pictures_are_balanced() {
        let made = task(&json!({})).expect("shipped");
        assert_eq!(made.spec().classes, 10);
        assert_eq!(made.spec().floor, Some(0.1));
        let counts = [Split::Train, Split::Validation, Split::Test].map(|split| made.count(split));
        assert_eq!(counts, [Some(5400), Some(600), Some(1000)]);
        let batch = made
            .loader(Split::Train, 4, 0)
            .and_then(|mut loader| loader.next_batch());
        let pixels = batch.expect("a batch").pixels.expect("pictures");
        assert_eq!(pixels.len(), 4 * 784);
        assert!(pixels.iter().all(|value| (0.0..=1.0).contains(value)));
    }

    #[test]
    fn damaged_idx_files_are_named() {
        let folder = tempfile::tempdir().expect("a folder");
        let images = [
            &[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2][..],
            &[1, 2, 3, 4],
        ]
        .concat();
        let labels = [0, 0, 8, 1, 0, 0, 0, 2, 0, 1];
        let write = |name: &str, bytes: &[u8]| {
            std::fs::write(folder.path().join(name), bytes).expect("written");
        };
        for part in ["train", "t10k"] {
            write(&format!("{part}-images-idx3-ubyte"), &images);
            write(&format!("{part}-labels-idx1-ubyte"), &labels);
        }
        let options = json!({"path": folder.path(), "as_sequence": true});
        let made = task(&options).expect("good files");
        assert_eq!((made.spec().time, made.spec().classes), (2, 2));
        write("train-images-idx3-ubyte", &images[..18]);
        let error = task(&options).err().expect("truncated").to_string();
        assert!(
            error.contains("truncated") && error.contains("train-images"),
            "{error}"
        );
        write("train-images-idx3-ubyte", &[9; 20]);
        let error = task(&options).err().expect("wrong magic").to_string();
        assert!(error.contains("IDX header"), "{error}");
    }
}
