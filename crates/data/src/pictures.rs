//! Pictures in memory, and how they are read from CIFAR-10 batches and folders.

use std::path::{Path, PathBuf};

use crate::error::DataError;

/// Pictures of one size with a class each.
pub(crate) struct Pictures {
    /// Height, width, channels.
    pub(crate) shape: [usize; 3],
    /// All values, picture by picture, channels last.
    pub(crate) pixels: Vec<u8>,
    pub(crate) labels: Vec<u16>,
}

fn read(path: &Path) -> Result<Vec<u8>, DataError> {
    std::fs::read(path).map_err(|error| DataError::Read {
        path: path.to_path_buf(),
        error,
    })
}

/// The binary version of CIFAR-10: a label, then 1,024 red, green and blue values per picture.
pub(crate) fn cifar(folder: &Path) -> Result<(Pictures, Pictures), DataError> {
    const AREA: usize = 32 * 32;
    const RECORD: usize = 1 + 3 * AREA;
    let load = |names: &[String]| {
        let mut all = Pictures {
            shape: [32, 32, 3],
            pixels: Vec::new(),
            labels: Vec::new(),
        };
        for name in names {
            let path = folder.join(name);
            let bytes = read(&path)?;
            let wrong = |message: String| DataError::Format {
                path: path.clone(),
                message,
            };
            if bytes.is_empty() || !bytes.len().is_multiple_of(RECORD) {
                return Err(wrong(format!(
                    "expected records of {RECORD} bytes, got {} bytes; the file is truncated or not CIFAR-10's binary version",
                    bytes.len()
                )));
            }
            for (index, record) in bytes.chunks_exact(RECORD).enumerate() {
                if record[0] > 9 {
                    return Err(wrong(format!(
                        "record {index}: expected a label from 0 to 9, got {}",
                        record[0]
                    )));
                }
                all.labels.push(u16::from(record[0]));
                for pixel in 0..AREA {
                    let values = (0..3).map(|channel| record[1 + channel * AREA + pixel]);
                    all.pixels.extend(values);
                }
            }
        }
        Ok(all)
    };
    let train: Vec<String> = (1..=5)
        .map(|part| format!("data_batch_{part}.bin"))
        .collect();
    Ok((load(&train)?, load(&["test_batch.bin".to_string()])?))
}

/// Sorted entries of a folder.
fn entries(path: &Path) -> Result<Vec<PathBuf>, DataError> {
    let fail = |error| DataError::Read {
        path: path.to_path_buf(),
        error,
    };
    let listing = std::fs::read_dir(path).map_err(fail)?;
    let mut found = listing
        .map(|entry| entry.map(|entry| entry.path()).map_err(fail))
        .collect::<Result<Vec<_>, _>>()?;
    found.sort();
    Ok(found)
}

/// A folder of classes (one in six pictures is for test), or `train` and `test` with a folder per class each.
pub(crate) fn folder(path: &Path) -> Result<(Pictures, Pictures), DataError> {
    if path.join("train").is_dir() && path.join("test").is_dir() {
        return Ok((classes(&path.join("train"))?, classes(&path.join("test"))?));
    }
    let all = classes(path)?;
    let size: usize = all.shape.iter().product();
    let part = |test: bool| {
        let keep: Vec<usize> = (0..all.labels.len())
            .filter(|i| (i % 6 == 5) == test)
            .collect();
        Pictures {
            shape: all.shape,
            pixels: keep
                .iter()
                .flat_map(|i| all.pixels[i * size..(i + 1) * size].iter().copied())
                .collect(),
            labels: keep.iter().map(|i| all.labels[*i]).collect(),
        }
    };
    Ok((part(false), part(true)))
}

fn classes(path: &Path) -> Result<Pictures, DataError> {
    let wrong = |path: &Path, message: String| DataError::Format {
        path: path.to_path_buf(),
        message,
    };
    let folders: Vec<PathBuf> = entries(path)?
        .into_iter()
        .filter(|entry| entry.is_dir())
        .collect();
    if folders.is_empty() {
        return Err(wrong(path, "the folder holds no folder per class".into()));
    }
    let mut all = Pictures {
        shape: [0, 0, 3],
        pixels: Vec::new(),
        labels: Vec::new(),
    };
    for (class, folder) in folders.iter().enumerate() {
        for file in entries(folder)?.into_iter().filter(|file| file.is_file()) {
            let picture = image::open(&file).map_err(|error| wrong(&file, error.to_string()))?;
            let picture = picture.to_rgb8();
            let shape = [picture.height() as usize, picture.width() as usize, 3];
            if all.labels.is_empty() {
                all.shape = shape;
            }
            if shape != all.shape {
                return Err(wrong(
                    &file,
                    format!(
                        "expected {} x {} pixels as the pictures before, got {} x {}; make all one size",
                        all.shape[0], all.shape[1], shape[0], shape[1]
                    ),
                ));
            }
            all.pixels.extend(picture.into_raw());
            all.labels.push(class as u16);
        }
    }
    match all.labels.is_empty() {
        true => Err(wrong(path, "the folders hold no picture".into())),
        false => Ok(all),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_become_classes_and_bad_files_are_named() {
        let root = tempfile::tempdir().expect("a folder");
        assert!(folder(root.path()).is_err());
        for (class, value) in [("cat", 10u8), ("dog", 200)] {
            std::fs::create_dir(root.path().join(class)).expect("made");
            for index in 0..6 {
                let picture = image::RgbImage::from_pixel(3, 2, image::Rgb([value; 3]));
                let path = root.path().join(class).join(format!("{index}.png"));
                picture.save(path).expect("written");
            }
        }
        let (train, test) = folder(root.path()).expect("two classes");
        assert_eq!((train.labels.len(), test.labels.len()), (10, 2));
        assert_eq!(test.labels, [0, 1]);
        assert_eq!(test.shape, [2, 3, 3]);
        assert_eq!(test.pixels[18], 200);
        std::fs::write(root.path().join("cat/9.png"), b"no picture").expect("written");
        let error = folder(root.path()).err().expect("damaged").to_string();
        assert!(error.contains("9.png"), "{error}");
    }

    #[test]
    fn cifar_batches_are_turned_channels_last() {
        let root = tempfile::tempdir().expect("a folder");
        let mut record = vec![3u8];
        record.extend([[1u8; 1024], [2; 1024], [3; 1024]].concat());
        for part in 1..=5 {
            let path = root.path().join(format!("data_batch_{part}.bin"));
            std::fs::write(path, &record).expect("written");
        }
        std::fs::write(root.path().join("test_batch.bin"), &record[..99]).expect("written");
        let error = cifar(root.path()).err().expect("truncated").to_string();
        assert!(
            error.contains("test_batch.bin") && error.contains("truncated"),
            "{error}"
        );
        std::fs::write(root.path().join("test_batch.bin"), &record).expect("written");
        let (train, test) = cifar(root.path()).expect("whole");
        assert_eq!((train.labels.len(), test.labels.len()), (5, 1));
        assert_eq!(test.pixels[..6], [1, 2, 3, 1, 2, 3]);
    }
}
