//! One picture of Pathfinder: where its dashes and discs are, and what its pixels are.
//!
//! A snake grows dash by dash. From a pivot half a gap past its last dash, the next dash ends on a circle around the
//! pivot; a place on it whose direction turns by `d` has weight `cos²(min(continuity · d, 90°))`, none where it would touch.
//! A distractor that finds no room is left out.
//!
//! Ours, where the published program works on bitmaps: places are real numbers; dashes keep apart by exact distances
//! between their lines (a gap and a thickness, so that only the next dash of a snake is a gap away); all dashes are equally
//! bright; a pixel is the mean of a 4 x 4 grid in it, not a Lanczos filter. A long snake that finds no room goes a few
//! dashes back before it starts afresh.

use std::f64::consts::{FRAC_PI_2, PI, TAU};

use rand::Rng;
use rand_chacha::ChaCha8Rng;

use crate::task::below;

/// Row and column, in pixels.
type Point = [f64; 2];

/// What pictures of one size look like. Lengths in pixels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Style {
    pub(super) size: usize,
    /// Kept free at the edges.
    pub(super) padding: usize,
    /// Half the gap between dashes; one is drawn for each picture.
    pub(super) margins: &'static [usize],
    /// Between the first ends of the two long snakes.
    pub(super) seed_distance: usize,
    pub(super) marker_radius: f64,
    pub(super) dash_length: usize,
    pub(super) thickness: f64,
    /// Dashes of all distractors together.
    pub(super) distractor_dashes: usize,
    /// 1 lets a snake turn by up to 90 degrees, more makes it straighter.
    pub(super) continuity: f64,
    /// Of a dash; 1 is white.
    pub(super) brightness: f64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Dash {
    tail: Point,
    head: Point,
}

pub(super) struct Scene {
    /// The two long ones first.
    pub(super) snakes: Vec<Vec<Dash>>,
    discs: [Point; 2],
    /// Whether both discs are on one snake.
    pub(super) connected: bool,
}

/// Tries for the direction of one dash, as published.
const DASH_TRIES: usize = 3;
/// Places looked at for a distractor, per pixel of the side.
const DISTRACTOR_TRIES: usize = 5;
/// Times that the long snakes may go back, and by how many dashes.
const SETBACKS: usize = 40;
const BACK: usize = 4;

fn ahead([y, x]: Point, direction: f64, distance: f64) -> Point {
    [
        y + distance * direction.sin(),
        x + distance * direction.cos(),
    ]
}

fn between(a: Point, b: Point) -> f64 {
    (a[0] - b[0]).hypot(a[1] - b[1])
}

impl Dash {
    fn reach(&self, point: Point) -> f64 {
        let along = [self.head[0] - self.tail[0], self.head[1] - self.tail[1]];
        let from = [point[0] - self.tail[0], point[1] - self.tail[1]];
        let length = along[0] * along[0] + along[1] * along[1];
        let part = (from[0] * along[0] + from[1] * along[1]) / length.max(1e-9);
        let part = part.clamp(0.0, 1.0);
        between(from, [part * along[0], part * along[1]])
    }

    fn gap(&self, other: &Dash) -> f64 {
        let side = |dash: &Dash, point: Point| {
            (dash.head[0] - dash.tail[0]) * (point[1] - dash.tail[1])
                - (dash.head[1] - dash.tail[1]) * (point[0] - dash.tail[0])
        };
        let parted = |a: &Dash, b: &Dash| side(a, b.tail) * side(a, b.head) >= 0.0;
        if !parted(self, other) && !parted(other, self) {
            return 0.0;
        }
        [
            self.reach(other.tail),
            self.reach(other.head),
            other.reach(self.tail),
            other.reach(self.head),
        ]
        .into_iter()
        .fold(f64::INFINITY, f64::min)
    }
}

/// A snake that grows: its dashes, and of each the pivot before it and its direction.
struct Snake {
    dashes: Vec<Dash>,
    steps: Vec<(Point, f64)>,
}

struct Drawing<'a> {
    style: &'a Style,
    margin: f64,
    rng: &'a mut ChaCha8Rng,
}

impl Drawing<'_> {
    fn clearance(&self) -> f64 {
        2.0 * self.margin + self.style.thickness
    }

    fn inside(&self, point: Point, border: f64) -> bool {
        let last = self.style.size as f64 - 1.0 - border;
        point.iter().all(|at| (border..=last).contains(at))
    }

    fn fits(&self, dash: &Dash) -> bool {
        let border = self.style.padding as f64 + self.margin;
        self.inside(dash.tail, border) && self.inside(dash.head, border)
    }

    fn free<'d>(&self, dash: &Dash, mut others: impl Iterator<Item = &'d Dash>) -> bool {
        let clearance = self.clearance();
        self.fits(dash) && others.all(|other| other.gap(dash) >= clearance)
    }

    fn degrees(&mut self) -> f64 {
        f64::from(below(self.rng, 360)) * PI / 180.0 - PI
    }

    /// A first dash from `tail` in a random direction.
    fn seed(&mut self, tail: Point) -> Snake {
        let direction = self.degrees();
        let head = ahead(tail, direction, self.style.dash_length as f64);
        Snake {
            dashes: vec![Dash { tail, head }],
            steps: vec![(ahead(tail, direction, -self.margin), direction)],
        }
    }

    /// One more dash that touches none of `others` nor the snake before its last dash.
    fn extend(&mut self, snake: &mut Snake, others: &[&[Dash]]) -> bool {
        let length = self.style.dash_length as f64;
        let (pivot, direction) = snake.steps[snake.steps.len() - 1];
        let pivot = ahead(pivot, direction, length + 2.0 * self.margin);
        let radius = length + self.margin;
        let places = (TAU * radius).ceil() as usize;
        let own = &snake.dashes[..snake.dashes.len() - 1];
        let border = self.style.padding as f64 + self.margin;
        // Directions, and the sum of the weights up to each.
        let mut open: Vec<(f64, f64)> = Vec::new();
        let mut total = 0.0;
        for place in 0..places {
            let aim = TAU * (place as f64 + self.rng.random::<f64>()) / places as f64;
            let turn = (aim - direction).rem_euclid(TAU);
            let turn = turn.min(TAU - turn) * self.style.continuity;
            if turn >= FRAC_PI_2 {
                continue;
            }
            let head = ahead(pivot, aim, radius);
            let mut others = others.iter().flat_map(|dashes| dashes.iter()).chain(own);
            if self.inside(head, border) && others.all(|dash| dash.reach(head) >= self.clearance())
            {
                total += turn.cos().powi(2);
                open.push((aim, total));
            }
        }
        for _ in 0..DASH_TRIES {
            let draw = self.rng.random::<f64>() * total;
            let Some((aim, _)) = open.iter().find(|(_, upto)| *upto > draw) else {
                return false;
            };
            let dash = Dash {
                tail: ahead(pivot, *aim, self.margin),
                head: ahead(pivot, *aim, radius),
            };
            let all = others.iter().flat_map(|dashes| dashes.iter());
            if self.free(&dash, all.chain(own)) {
                snake.dashes.push(dash);
                snake.steps.push((pivot, *aim));
                return true;
            }
        }
        false
    }

    fn pixel(&mut self, low: usize, high: usize) -> Point {
        [(); 2].map(|()| (low + below(self.rng, (high - low) as u32) as usize) as f64)
    }

    /// The two long snakes.
    fn pair(&mut self, length: usize) -> Option<[Snake; 2]> {
        let far = 2 * self.style.seed_distance;
        let tail = self.pixel(far, self.style.size - far);
        let mut first = self.seed(tail);
        if !self.inside(first.dashes[0].head, far as f64) {
            return None;
        }
        let angle = self.degrees();
        let distance = self.style.seed_distance as f64;
        let tail = [
            tail[0] + distance * angle.sin(),
            tail[1] + distance * angle.cos(),
        ];
        let mut second = self.seed(tail);
        if !self.free(&second.dashes[0], first.dashes.iter()) {
            return None;
        }
        let mut setbacks = 0;
        while second.dashes.len() < length {
            if self.extend(&mut first, &[&second.dashes])
                && self.extend(&mut second, &[&first.dashes])
            {
                continue;
            }
            setbacks += 1;
            if setbacks > SETBACKS {
                return None;
            }
            let left = second.dashes.len().saturating_sub(BACK).max(1);
            for snake in [&mut first, &mut second] {
                snake.dashes.truncate(left);
                snake.steps.truncate(left);
            }
        }
        Some([first, second])
    }

    /// A distractor, if there is room.
    fn short(&mut self, length: usize, held: &[Vec<Dash>]) -> Option<Vec<Dash>> {
        let tail = self.pixel(1, self.style.size - 1);
        let mut snake = self.seed(tail);
        let others: Vec<&[Dash]> = held.iter().map(Vec::as_slice).collect();
        if !self.free(&snake.dashes[0], held.iter().flatten()) {
            return None;
        }
        let grown = (1..length).all(|_| self.extend(&mut snake, &others));
        grown.then_some(snake.dashes)
    }
}

impl Scene {
    /// A picture with long snakes of `length` dashes, if this try finds room for them.
    pub(super) fn draw(
        style: &Style,
        length: usize,
        connected: bool,
        rng: &mut ChaCha8Rng,
    ) -> Option<Scene> {
        let margin = style.margins[below(rng, style.margins.len() as u32) as usize] as f64;
        let mut drawing = Drawing { style, margin, rng };
        let long = drawing.pair(length)?;
        let mut snakes: Vec<Vec<Dash>> = long.into_iter().map(|snake| snake.dashes).collect();
        let short = (length / 3).max(1);
        for _ in 0..style.distractor_dashes / short {
            // Free first dashes are rare in a full picture: places are looked for as long as an area is searched.
            let places = DISTRACTOR_TRIES * style.size;
            let found = (0..places).find_map(|_| drawing.short(short, &snakes));
            snakes.extend(found);
        }
        let first = below(rng, 2) as usize;
        let last = if connected { first } else { 1 - first };
        let discs = [snakes[first][0].tail, snakes[last][length - 1].head];
        Some(Scene {
            snakes,
            discs,
            connected,
        })
    }

    /// Brightness of every pixel from 0 to 1, row by row.
    pub(super) fn pixels(&self, style: &Style) -> Vec<f32> {
        let size = style.size;
        let mut pixels = vec![0.0f32; size * size];
        let mut paint = |low: Point, high: Point, value: f64, covers: &dyn Fn(Point) -> bool| {
            let range = |axis: usize| {
                let last = (high[axis].ceil() as usize + 1).min(size);
                low[axis].floor().max(0.0) as usize..last
            };
            for row in range(0) {
                for column in range(1) {
                    let inside = (0..16).filter(|part| {
                        let at = |cell: usize| (cell as f64 + 0.5) / 4.0 - 0.5;
                        covers([row as f64 + at(part / 4), column as f64 + at(part % 4)])
                    });
                    let lit = (value * inside.count() as f64 / 16.0).min(1.0) as f32;
                    let pixel = &mut pixels[row * size + column];
                    *pixel = pixel.max(lit);
                }
            }
        };
        let half = style.thickness / 2.0;
        for dash in self.snakes.iter().flatten() {
            let ends = |pick: fn(f64, f64) -> f64, by: f64| {
                [0, 1].map(|axis| pick(dash.tail[axis], dash.head[axis]) + by)
            };
            let covers = |point: Point| dash.reach(point) <= half;
            let (low, high) = (ends(f64::min, -half), ends(f64::max, half));
            paint(low, high, style.brightness, &covers);
        }
        let radius = style.marker_radius;
        for disc in self.discs {
            let covers = |point: Point| between(point, disc) <= radius;
            let (low, high) = (disc.map(|at| at - radius), disc.map(|at| at + radius));
            paint(low, high, 1.0, &covers);
        }
        pixels
    }
}

#[cfg(test)]
impl Scene {
    pub(super) fn disc_distance(&self) -> f64 {
        between(self.discs[0], self.discs[1])
    }

    /// The least distance between dashes of different snakes.
    pub(super) fn least_gap(&self) -> f64 {
        let mut least = f64::INFINITY;
        for (index, snake) in self.snakes.iter().enumerate() {
            for other in self.snakes[..index].iter().flatten() {
                for dash in snake {
                    least = least.min(dash.gap(other));
                }
            }
        }
        least
    }

    /// Goes from the first disc from dash to dash over gaps of the usual width, and says whether it comes to the second.
    /// It sees dashes, not which snake they belong to.
    pub(super) fn follow(&self, style: &Style) -> bool {
        let mut left: Vec<Dash> = self.snakes.iter().flatten().copied().collect();
        let near = |dash: &Dash, disc: Point| dash.reach(disc) < 0.01;
        let widest = 2.0 * style.margins[style.margins.len() - 1] as f64;
        let gap = widest.min(self.least_gap() - style.thickness) + style.thickness / 2.0;
        let mut reached: Vec<Dash> = left
            .extract_if(.., |dash| near(dash, self.discs[0]))
            .collect();
        while let Some(at) = reached.pop() {
            if near(&at, self.discs[1]) {
                return true;
            }
            reached.extend(left.extract_if(.., |dash| dash.gap(&at) < gap));
        }
        false
    }
}
