//! One plot as inline SVG through plotters, with theme colours, a legend and links.
//!
//! Plotters works in whole pixels, so a plot is drawn on a canvas four times its nominal size and scaled by the page. Its fixed
//! colours are stand-ins for the variables of the style sheet, so that one SVG serves the light and the dark theme.

use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::prelude::*;
use plotters::style::FontStyle;

use super::ReportError;
use super::axis::Axis;
use super::html::escape;

/// Canvas pixels per nominal pixel.
const FINE: i32 = 4;
const SIZE: (u32, u32) = (440 * FINE as u32, 300 * FINE as u32);
/// Colours of the style sheet, `--s0` and on; more series repeat them with dashed lines.
const COLORS: usize = 8;

const INK: RGBColor = RGBColor(1, 1, 1);
const GRID: RGBColor = RGBColor(2, 2, 2);
const FLOOR: RGBColor = RGBColor(3, 3, 3);

/// One measured point.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    /// Ends of the band or error bar; equal to `y` without repetitions.
    pub(super) low: f64,
    pub(super) high: f64,
}

/// One line of a plot.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Series {
    pub(super) name: String,
    /// Colour and marker.
    pub(super) style: usize,
    pub(super) points: Vec<Point>,
    /// Where a click leads, such as `#m0`.
    pub(super) link: String,
}

/// How points are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Joined {
    /// A line with a band between `low` and `high`, and a marker at every point if they are few.
    Line,
    /// Markers with error bars.
    Marks,
}

/// A plot, ready to be drawn.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plot {
    pub(super) title: String,
    pub(super) caption: String,
    pub(super) x: Axis,
    pub(super) y: Axis,
    pub(super) joined: Joined,
    pub(super) series: Vec<Series>,
    /// A dashed horizontal line with its name.
    pub(super) floor: Option<(f64, String)>,
}

/// A range of transformed coordinates with ticks at given places.
struct Ticked {
    low: f64,
    high: f64,
    ticks: Vec<f64>,
}

impl Ticked {
    fn new((low, high): (f64, f64), ticks: Vec<f64>) -> Self {
        Self { low, high, ticks }
    }
}

impl Ranged for Ticked {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        let share = (value - self.low) / (self.high - self.low);
        (f64::from(first) + f64::from(last - first) * share).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.ticks.clone()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.low..self.high
    }
}

fn series_color(style: usize) -> RGBColor {
    RGBColor(10, 10, 100 + (style % COLORS) as u8)
}

/// Corner offsets of a marker in units of its radius; `None` is a circle.
fn marker(style: usize) -> Option<Vec<(f64, f64)>> {
    let corners: &[(f64, f64)] = match style % COLORS {
        1 => &[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        2 => &[(0.0, -1.15), (1.05, 0.75), (-1.05, 0.75)],
        3 => &[(0.0, -1.25), (1.25, 0.0), (0.0, 1.25), (-1.25, 0.0)],
        4 => &[(0.0, 1.15), (1.05, -0.75), (-1.05, -0.75)],
        5 => &[
            (-0.4, -1.2),
            (0.4, -1.2),
            (0.4, -0.4),
            (1.2, -0.4),
            (1.2, 0.4),
            (0.4, 0.4),
            (0.4, 1.2),
            (-0.4, 1.2),
            (-0.4, 0.4),
            (-1.2, 0.4),
            (-1.2, -0.4),
            (-0.4, -0.4),
        ],
        6 => &[
            (0.0, -1.2),
            (1.14, -0.37),
            (0.7, 0.97),
            (-0.7, 0.97),
            (-1.14, -0.37),
        ],
        7 => &[
            (-1.1, 0.0),
            (-0.55, -0.95),
            (0.55, -0.95),
            (1.1, 0.0),
            (0.55, 0.95),
            (-0.55, 0.95),
        ],
        _ => return None,
    };
    Some(corners.to_vec())
}

fn dashed(style: usize) -> bool {
    (style / COLORS) % 2 == 1
}

impl Plot {
    /// The figure: title, SVG, legend, caption. `None` if no point has a place on both axes.
    pub(super) fn figure(&self) -> Result<Option<String>, ReportError> {
        let Some(svg) = self.svg()? else {
            return Ok(None);
        };
        let legend: String = self.series.iter().map(legend).collect();
        let floor = self.floor.as_ref().map_or(String::new(), |(_, name)| {
            format!(
                "<li><svg class=\"key\" viewBox=\"0 0 28 12\"><path d=\"M1 6H27\" stroke=\"var(--floor)\" \
                 stroke-width=\"2\" stroke-dasharray=\"5 3\"/></svg>{}</li>",
                escape(name)
            )
        });
        let caption = if self.caption.is_empty() {
            String::new()
        } else {
            format!("<p>{}</p>", escape(&self.caption))
        };
        Ok(Some(format!(
            "<figure><figcaption>{}</figcaption>{svg}<ul class=\"legend\">{legend}{floor}</ul>{caption}</figure>",
            escape(&self.title)
        )))
    }

    fn svg(&self) -> Result<Option<String>, ReportError> {
        let shown = |point: &&Point| self.x.holds(point.x) && self.y.holds(point.y);
        let points = || {
            self.series
                .iter()
                .flat_map(|series| &series.points)
                .filter(shown)
        };
        let floor = self.floor.as_ref().map(|(value, _)| *value);
        let x = self.x.range(points().map(|point| point.x));
        let y = self.y.range(
            points()
                .flat_map(|point| [point.low, point.y, point.high])
                .chain(floor),
        );
        let (Some(x), Some(y)) = (x, y) else {
            return Ok(None);
        };
        if points().next().is_none() {
            return Ok(None);
        }
        let mut svg = String::new();
        let targets = self
            .draw(&mut svg, x, y)
            .map_err(|error| ReportError::Plot {
                title: self.title.clone(),
                detail: error.to_string(),
            })?;
        Ok(Some(self.finish(svg, &targets)))
    }

    /// Draws into `svg`; returns the link targets: place in canvas pixels, link, tooltip.
    fn draw(
        &self,
        svg: &mut String,
        x: (f64, f64),
        y: (f64, f64),
    ) -> Result<Vec<((i32, i32), String, String)>, Box<dyn std::error::Error>> {
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let font = |size: i32| {
            ("system-ui, sans-serif", size * FINE, FontStyle::Normal)
                .into_font()
                .color(&INK)
        };
        let (x_ticks, y_ticks) = (self.x.ticks(x.0, x.1), self.y.ticks(y.0, y.1));
        // The widest label decides the room at the left; a digit is about 0.6 of the font size.
        let widest = y_ticks
            .iter()
            .map(|tick| self.y.tick(*tick).chars().count())
            .max()
            .unwrap_or(1) as i32;
        let mut chart = ChartBuilder::on(&root)
            .margin_top(8 * FINE)
            .margin_right(20 * FINE)
            .x_label_area_size(40 * FINE)
            .y_label_area_size((28 + widest * 8) * FINE)
            .build_cartesian_2d(Ticked::new(x, x_ticks), Ticked::new(y, y_ticks))?;
        chart
            .configure_mesh()
            .max_light_lines(0)
            .bold_line_style(GRID.stroke_width(FINE as u32))
            .axis_style(INK.stroke_width(FINE as u32))
            .x_label_formatter(&|place| self.x.tick(*place))
            .y_label_formatter(&|place| self.y.tick(*place))
            .label_style(font(13))
            .axis_desc_style(font(13))
            .x_desc(&self.x.label)
            .y_desc(&self.y.label)
            .x_labels(12)
            .y_labels(12)
            .set_all_tick_mark_size(4 * FINE)
            .draw()?;
        let style = FLOOR.stroke_width(2 * FINE as u32);
        if let Some((value, _)) = self
            .floor
            .as_ref()
            .filter(|(value, _)| self.y.holds(*value))
        {
            let level = self.y.forward(*value);
            let line = [(x.0, level), (x.1, level)].into_iter();
            chart.draw_series(DashedLineSeries::new(line, 7 * FINE, 5 * FINE, style))?;
        }
        let mut targets = Vec::new();
        for series in &self.series {
            let color = series_color(series.style);
            let line = color.stroke_width(2 * FINE as u32);
            let place = |point: &Point, level: f64| {
                (
                    self.x.forward(point.x),
                    self.y.forward(level).clamp(y.0, y.1),
                )
            };
            let points: Vec<&Point> = series
                .points
                .iter()
                .filter(|point| self.x.holds(point.x) && self.y.holds(point.y))
                .collect();
            let bound =
                |point: &Point, level: f64| if self.y.holds(level) { level } else { point.y };
            if self.joined == Joined::Line && points.len() > 1 {
                if points.iter().any(|point| point.low < point.high) {
                    let upper = points
                        .iter()
                        .map(|point| place(point, bound(point, point.high)));
                    let lower = points
                        .iter()
                        .rev()
                        .map(|point| place(point, bound(point, point.low)));
                    let outline: Vec<_> = upper.chain(lower).collect();
                    chart.draw_series([Polygon::new(outline, color.mix(0.16).filled())])?;
                }
                let path: Vec<_> = points.iter().map(|point| place(point, point.y)).collect();
                if dashed(series.style) {
                    chart.draw_series(DashedLineSeries::new(path, 8 * FINE, 4 * FINE, line))?;
                } else {
                    chart.draw_series([PathElement::new(path, line)])?;
                }
            }
            if self.joined == Joined::Marks {
                for point in points.iter().filter(|point| point.low < point.high) {
                    let bar = vec![
                        place(point, bound(point, point.low)),
                        place(point, bound(point, point.high)),
                    ];
                    chart.draw_series([PathElement::new(bar, line)])?;
                }
            }
            let sparse = points.len() <= 12;
            for point in points.iter().filter(|_| sparse) {
                let radius = f64::from(FINE)
                    * if self.joined == Joined::Marks {
                        5.0
                    } else {
                        3.6
                    };
                let at = place(point, point.y);
                match marker(series.style) {
                    None => {
                        chart.draw_series([Circle::new(at, radius as i32, color.filled())])?;
                    }
                    Some(corners) => {
                        let scale =
                            |(dx, dy): (f64, f64)| ((dx * radius) as i32, (dy * radius) as i32);
                        let outline: Vec<_> = corners.into_iter().map(scale).collect();
                        let mark = EmptyElement::at(at) + Polygon::new(outline, color.filled());
                        chart.draw_series([mark])?;
                    }
                }
                let tip = format!(
                    "{}: {} at {}",
                    series.name,
                    self.y.value(point.y),
                    self.x.value(point.x)
                );
                targets.push((chart.backend_coord(&at), series.link.clone(), tip));
            }
        }
        root.present()?;
        drop(chart);
        drop(root);
        Ok(targets)
    }

    /// Turns the stand-in colours into theme colours, the fixed size into a flexible one, and adds the links.
    fn finish(&self, mut svg: String, targets: &[((i32, i32), String, String)]) -> String {
        let name = |color: RGBColor| format!("\"#{:02X}{:02X}{:02X}\"", color.0, color.1, color.2);
        for (color, variable) in [(INK, "ink"), (GRID, "grid"), (FLOOR, "floor")] {
            svg = svg.replace(&name(color), &format!("\"var(--{variable})\""));
        }
        for style in 0..COLORS {
            svg = svg.replace(&name(series_color(style)), &format!("\"var(--s{style})\""));
        }
        let links: String = targets
            .iter()
            .map(|((x, y), link, tip)| {
                format!(
                    "<a href=\"{}\"><circle cx=\"{x}\" cy=\"{y}\" r=\"{}\" fill=\"transparent\"><title>{}</title></circle></a>",
                    escape(link),
                    9 * FINE,
                    escape(tip)
                )
            })
            .collect();
        let body = svg.find('>').map_or("", |end| &svg[end + 1..]);
        let body = body
            .strip_suffix("</svg>\n")
            .unwrap_or(body.trim_end().trim_end_matches("</svg>"));
        format!(
            "<svg class=\"plot\" role=\"img\" aria-label=\"{}\" viewBox=\"0 0 {} {}\">{body}{links}</svg>",
            escape(&self.title),
            SIZE.0,
            SIZE.1
        )
    }
}

/// The legend entry of a series: a piece of its line with its marker.
fn legend(series: &Series) -> String {
    let color = format!("var(--s{})", series.style % COLORS);
    let dash = if dashed(series.style) {
        " stroke-dasharray=\"6 3\""
    } else {
        ""
    };
    let mark = match marker(series.style) {
        None => format!("<circle cx=\"14\" cy=\"6\" r=\"4\" fill=\"{color}\"/>"),
        Some(corners) => {
            let corners: Vec<String> = corners
                .iter()
                .map(|(x, y)| format!("{:.1},{:.1}", 14.0 + 4.0 * x, 6.0 + 4.0 * y))
                .collect();
            format!(
                "<polygon points=\"{}\" fill=\"{color}\"/>",
                corners.join(" ")
            )
        }
    };
    format!(
        "<li><svg class=\"key\" viewBox=\"0 0 28 12\"><path d=\"M1 6H27\" stroke=\"{color}\" stroke-width=\"2\"{dash}/>{mark}</svg>\
         <a href=\"{}\">{}</a></li>",
        escape(&series.link),
        escape(&series.name)
    )
}
