//! Samples of a picture task as one PNG, to look at.

use std::path::Path;

use crate::error::DataError;
use crate::task::{Split, Targets, Task, TaskKind};

/// Pixels between pictures.
const GAP: u32 = 2;

/// Writes the first `rows x columns` pictures of a split into `path`, white between them, and gives their classes. Sequences
/// of pixels are drawn as the squares that they are.
pub fn draw(
    task: &dyn Task,
    split: Split,
    [rows, columns]: [usize; 2],
    path: &Path,
) -> Result<Vec<i64>, DataError> {
    let spec = task.spec();
    let wrong = |message: String| DataError::Position {
        task: spec.name.clone(),
        message,
    };
    let (height, width, channels) = match spec.kind {
        TaskKind::Pictures {
            height,
            width,
            channels,
        } => (height, width, channels),
        TaskKind::Classify if spec.vocab == 256 && spec.time.isqrt().pow(2) == spec.time => {
            (spec.time.isqrt(), spec.time.isqrt(), 1)
        }
        kind => {
            return Err(wrong(format!(
                "expected a task of pictures, got one of {kind:?}"
            )));
        }
    };
    let batch = task.loader(split, rows * columns, 0)?.next_batch()?;
    let level = |at: usize| match &batch.pixels {
        Some(pixels) => (255.0 * pixels[at]).round() as u8,
        None => batch.tokens[at] as u8,
    };
    let across = columns as u32 * (width as u32 + GAP) + GAP;
    let down = rows as u32 * (height as u32 + GAP) + GAP;
    let mut sheet = image::RgbImage::from_pixel(across, down, image::Rgb([255; 3]));
    for index in 0..rows * columns {
        let left = GAP + (index % columns) as u32 * (width as u32 + GAP);
        let top = GAP + (index / columns) as u32 * (height as u32 + GAP);
        for place in 0..height * width {
            let at = (index * height * width + place) * channels;
            let value = |channel: usize| level(at + channel.min(channels - 1));
            let colour = image::Rgb([value(0), value(1), value(2)]);
            sheet.put_pixel(
                left + (place % width) as u32,
                top + (place / width) as u32,
                colour,
            );
        }
    }
    let failed = |message: String| DataError::Format {
        path: path.to_path_buf(),
        message,
    };
    let part = path.with_extension("part");
    sheet
        .save_with_format(&part, image::ImageFormat::Png)
        .map_err(|error| failed(error.to_string()))?;
    std::fs::rename(&part, path).map_err(|error| failed(error.to_string()))?;
    match batch.targets {
        Targets::Classes(classes) => Ok(classes),
        Targets::Tokens(_) => Err(wrong("pictures have classes".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn pictures_and_sequences_of_pixels_look_alike() {
        let folder = tempfile::tempdir().expect("a folder");
        let sheet = |as_sequence: bool| {
            let options = json!({"as_sequence": as_sequence});
            let made = crate::task("pathfinder", &options).expect("fits");
            let path = folder.path().join(format!("{as_sequence}.png"));
            let classes = draw(&*made, Split::Test, [2, 3], &path).expect("drawn");
            (classes, image::open(path).expect("a picture").to_rgb8())
        };
        let (classes, picture) = sheet(false);
        assert_eq!(
            (classes.len(), picture.dimensions()),
            (6, (3 * 34 + 2, 2 * 34 + 2))
        );
        assert_eq!(sheet(true), (classes, picture));
        let text = crate::task("toy_reviews", &json!({})).expect("fits");
        assert!(draw(&*text, Split::Test, [1, 1], &folder.path().join("no.png")).is_err());
    }
}
