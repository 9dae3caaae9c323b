//! Pathfinder: do two discs stand at the ends of one dashed snake, among others?
//!
//! Linsley et al. (2018), arXiv 1805.08315; Long Range Arena, arXiv 2011.04006, where 32 x 32 is "Pathfinder" and 128 x 128
//! "Path-X". A picture has two long snakes whose first ends are a set distance apart, and short ones that distract. A disc
//! marks the first end of one long snake, another the last end of the same snake (class 1) or of the other (class 0). The
//! number of dashes of a long snake is the difficulty: 6 easy, 9 intermediate, 14 hard.
//!
//! Pictures are drawn here by the published procedure and numbers, not copied: see [`scene`] for what is ours.

mod scene;

use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::scene::{Scene, Style};
use crate::error::DataError;
use crate::task::{Numbered, Sample, SampleTarget, Samples, Split, Task, TaskKind, TaskSpec, read};

/// Options. The size of a picture is in the name of the task.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default)]
pub struct PathfinderOptions {
    /// Dashes of a long snake: 6 (easy), 9 (intermediate) or 14 (hard); the short ones have a third of it.
    pub contour_length: usize,
    /// Every pixel is a token from 0 to 255, row by row; otherwise a picture.
    pub as_sequence: bool,
    /// Training pictures; 0 for no end.
    pub train_rows: usize,
    /// Validation and test pictures, each.
    pub test_rows: usize,
}

impl Default for PathfinderOptions {
    fn default() -> Self {
        PathfinderOptions {
            contour_length: 14,
            as_sequence: true,
            train_rows: 160_000,
            test_rows: 20_000,
        }
    }
}

/// The published numbers of each size.
static STYLES: &[(&str, Style)] = &[
    (
        "pathfinder",
        Style {
            size: 32,
            padding: 1,
            margins: &[1],
            seed_distance: 7,
            marker_radius: 1.5,
            dash_length: 2,
            thickness: 0.5,
            distractor_dashes: 20,
            continuity: 1.0,
            brightness: 1.5,
        },
    ),
    (
        "pathfinder_64",
        Style {
            size: 64,
            padding: 1,
            margins: &[1],
            seed_distance: 12,
            marker_radius: 2.5,
            dash_length: 5,
            thickness: 1.0,
            distractor_dashes: 22,
            continuity: 1.8,
            brightness: 0.8,
        },
    ),
    (
        "path_x",
        Style {
            size: 128,
            padding: 1,
            margins: &[2, 3],
            seed_distance: 20,
            marker_radius: 3.0,
            dash_length: 5,
            thickness: 1.5,
            distractor_dashes: 35,
            continuity: 1.8,
            brightness: 0.9,
        },
    ),
    (
        "path_256",
        Style {
            size: 256,
            padding: 22,
            margins: &[3],
            seed_distance: 27,
            marker_radius: 5.0,
            dash_length: 5,
            thickness: 2.0,
            distractor_dashes: 30,
            continuity: 1.8,
            brightness: 1.0,
        },
    ),
];

pub(crate) fn task(name: &'static str, options: &Value) -> Result<Box<dyn Task>, DataError> {
    let (o, resolved): (PathfinderOptions, _) = read(name, options)?;
    let Some((_, style)) = STYLES.iter().find(|(held, _)| *held == name) else {
        panic!("no style for {name}")
    };
    if !(3..=18).contains(&o.contour_length) || o.test_rows == 0 {
        return Err(DataError::Option {
            task: name,
            message: format!(
                "expected contour_length from 3 to 18 (published: 6, 9, 14) and test_rows of at least 1, got {} and {}",
                o.contour_length, o.test_rows
            ),
        });
    }
    let side = style.size;
    let kind = match o.as_sequence {
        true => TaskKind::Classify,
        false => TaskKind::Pictures {
            height: side,
            width: side,
            channels: 1,
        },
    };
    Ok(Box::new(Numbered {
        spec: TaskSpec {
            name: name.into(),
            description: format!(
                "Pathfinder, {side} x {side} pixels, contour length {}: are the two discs joined by a dashed line?",
                o.contour_length
            ),
            source: "Linsley et al. (2018), arXiv 1805.08315; Long Range Arena, arXiv 2011.04006; drawn by the published procedure".into(),
            kind,
            time: side * side,
            vocab: if o.as_sequence { 256 } else { 0 },
            classes: 2,
            floor: Some(0.5),
            options: resolved,
        },
        samples: Pathfinder {
            name,
            style: *style,
            options: o,
        },
        tokenizer: None,
    }))
}

struct Pathfinder {
    name: &'static str,
    style: Style,
    options: PathfinderOptions,
}

/// How many pictures may be begun before the numbers are called impossible.
const PATIENCE: usize = 20_000;

impl Pathfinder {
    fn scene(&self, rng: &mut ChaCha8Rng) -> Result<Scene, DataError> {
        let connected = rng.random::<bool>();
        for _ in 0..PATIENCE {
            if let Some(scene) =
                Scene::draw(&self.style, self.options.contour_length, connected, rng)
            {
                return Ok(scene);
            }
        }
        Err(DataError::Option {
            task: self.name,
            message: format!(
                "two snakes of {} dashes found no room in {PATIENCE} tries; lower contour_length",
                self.options.contour_length
            ),
        })
    }
}

impl Samples for Pathfinder {
    fn count(&self, split: Split) -> Option<usize> {
        split.rows(self.options.train_rows, self.options.test_rows)
    }

    fn sample(
        &self,
        _: Split,
        _: usize,
        _: u64,
        rng: &mut ChaCha8Rng,
    ) -> Result<Sample, DataError> {
        let scene = self.scene(rng)?;
        let pixels = scene.pixels(&self.style);
        let (tokens, pixels) = match self.options.as_sequence {
            true => {
                let level = |value: f32| (255.0 * value).round() as u32;
                (pixels.into_iter().map(level).collect(), Vec::new())
            }
            false => (Vec::new(), pixels),
        };
        Ok(Sample {
            tokens,
            target: SampleTarget::Class(i64::from(scene.connected)),
            pixels,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::rng_for;

    fn maker(name: &'static str, contour_length: usize) -> Pathfinder {
        let (_, style) = STYLES.iter().find(|(held, _)| *held == name).expect("held");
        Pathfinder {
            name,
            style: *style,
            options: PathfinderOptions {
                contour_length,
                ..PathfinderOptions::default()
            },
        }
    }

    /// The chance that a statistic is larger in a connected picture than in another: 0.5 tells nothing.
    fn area(values: &[(f64, bool)]) -> f64 {
        let of = |class| values.iter().filter(move |(_, held)| *held == class);
        let mut above = 0.0;
        for (a, _) in of(true) {
            for (b, _) in of(false) {
                above += match a.total_cmp(b) {
                    std::cmp::Ordering::Greater => 1.0,
                    std::cmp::Ordering::Equal => 0.5,
                    std::cmp::Ordering::Less => 0.0,
                };
            }
        }
        above / (of(true).count() * of(false).count()) as f64
    }

    /// What can be counted in a picture does not tell the classes apart; following dashes from a disc does.
    #[test]
    fn only_the_path_tells_the_classes_apart() {
        for (name, rows, length) in [
            ("pathfinder", 400, 14),
            ("pathfinder_64", 200, 9),
            ("path_x", 100, 14),
        ] {
            let maker = maker(name, length);
            let [mut brightness, mut lit, mut apart] = [Vec::new(), Vec::new(), Vec::new()];
            let mut right = 0;
            for index in 0..rows {
                let scene = maker.scene(&mut rng_for(&[3, index])).expect("room");
                let pixels = scene.pixels(&maker.style);
                let class = scene.connected;
                brightness.push((pixels.iter().map(|p| f64::from(*p)).sum(), class));
                lit.push((pixels.iter().filter(|p| **p > 0.2).count() as f64, class));
                apart.push((scene.disc_distance(), class));
                right += usize::from(scene.follow(&maker.style) == class);
            }
            for (what, values) in [("brightness", &brightness), ("lit", &lit)] {
                let area = area(values);
                assert!((area - 0.5).abs() < 0.13, "{name} {what}: {area}");
            }
            // Discs of one snake may stand a little nearer or further; by far not enough to tell.
            let far = area(&apart);
            assert!((far - 0.5).abs() < 0.2, "{name} distance: {far}");
            let followed = right as f64 / rows as f64;
            assert!(followed == 1.0, "{name}: following is right in {followed}");
        }
    }

    #[test]
    fn dashes_keep_apart_and_stay_inside() {
        for (name, _) in STYLES {
            let maker = maker(name, 9);
            let scene = maker.scene(&mut rng_for(&[9])).expect("room");
            assert_eq!(scene.snakes[0].len(), 9);
            assert_eq!(scene.snakes[1].len(), 9);
            assert!(scene.snakes.len() > 2, "{name} has no distractor");
            assert!(
                scene.least_gap() >= 2.0 * maker.style.margins[0] as f64,
                "{name}"
            );
        }
        let options = serde_json::json!({"contour_length": 40});
        assert!(task("pathfinder", &options).is_err());
    }
}
