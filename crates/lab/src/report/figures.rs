//! Which plots there are: learning curves, quality against state, inference against length.

use std::collections::BTreeMap;

use super::axis::{Axis, Scale, Unit};
use super::plot::{Joined, Plot, Point, Series};
use super::{ReportData, TaskInfo};
use crate::stats::{Summary, median};
use crate::trial::{CurvePoint, LatencyPoint, Metric, MetricUnit, TrialRecord, TrialResult};

/// A longer curve is averaged down to this many points.
const MOST_POINTS: usize = 120;

fn point(x: f64, summary: &Summary, scale: impl Fn(f64) -> f64) -> Point {
    let error = summary
        .standard_error
        .filter(|error| error.is_finite())
        .unwrap_or(0.0);
    let (a, b) = (scale(summary.mean - error), scale(summary.mean + error));
    Point {
        x,
        y: scale(summary.mean),
        low: a.min(b),
        high: a.max(b),
    }
}

/// The finished trials of one contender, on one task or all.
fn results<'a>(
    data: &'a ReportData,
    mixer: &str,
    task: Option<&str>,
) -> Vec<(&'a TrialRecord, &'a TrialResult)> {
    let wanted = |record: &&TrialRecord| {
        record.key.mixer == mixer && task.is_none_or(|task| record.key.task == task)
    };
    data.records
        .iter()
        .filter(wanted)
        .filter_map(|record| Some((record, record.result.as_ref()?)))
        .collect()
}

fn series(
    data: &ReportData,
    task: Option<(usize, &TaskInfo)>,
    points: impl Fn(&[(&TrialRecord, &TrialResult)]) -> Vec<Point>,
) -> Vec<Series> {
    let each = data.mixers.iter().enumerate().map(|(style, mixer)| Series {
        name: mixer.clone(),
        style,
        points: points(&results(
            data,
            mixer,
            task.map(|(_, info)| info.name.as_str()),
        )),
        link: task.map_or(format!("#m{style}"), |(index, _)| {
            format!("#m{style}t{index}")
        }),
    });
    each.filter(|series| !series.points.is_empty()).collect()
}

fn metric<'a>(data: &'a ReportData, task: &TaskInfo) -> Option<&'a Metric> {
    let mut all = data
        .records
        .iter()
        .filter(|record| record.key.task == task.name);
    all.find_map(|record| record.result.as_ref())
        .map(|result| &result.metric)
}

fn metric_axis(metric: &Metric) -> Axis {
    match metric.unit {
        MetricUnit::Fraction => {
            Axis::new(format!("{} (%)", metric.name), Scale::Linear, Unit::Count).within(0.0, 100.0)
        }
        MetricUnit::Plain => Axis::new(metric.name.clone(), Scale::Linear, Unit::Count),
    }
}

fn floor(task: &TaskInfo, unit: MetricUnit) -> Option<(f64, String)> {
    task.floor.as_ref().map(|floor| {
        let value = unit.scale(floor.value);
        (
            value,
            format!(
                "floor: {} ({})",
                floor.label,
                crate::units::three_digits(value)
            ),
        )
    })
}

/// Curves of several seeds as one: mean and standard error at each step, then neighbours averaged if there are too many.
fn curve(
    found: &[(&TrialRecord, &TrialResult)],
    get: impl Fn(&CurvePoint) -> Option<f64>,
    unit: MetricUnit,
) -> Vec<Point> {
    let mut steps: BTreeMap<u64, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
    for at in found.iter().flat_map(|(_, result)| &result.curve) {
        if let Some(value) = get(at).filter(|value| value.is_finite()) {
            let (tokens, values) = steps.entry(at.step).or_default();
            tokens.push(at.tokens as f64);
            values.push(value);
        }
    }
    let points: Vec<Point> = steps
        .values()
        .filter_map(|(tokens, values)| {
            Some(point(
                Summary::of(tokens)?.mean,
                &Summary::of(values)?,
                |value| unit.scale(value),
            ))
        })
        .collect();
    let width = points.len().div_ceil(MOST_POINTS).max(1);
    let average = |group: &[Point], get: fn(&Point) -> f64| {
        group.iter().map(get).sum::<f64>() / group.len() as f64
    };
    let join = |group: &[Point]| Point {
        x: average(group, |p| p.x),
        y: average(group, |p| p.y),
        low: average(group, |p| p.low),
        high: average(group, |p| p.high),
    };
    points.chunks(width).map(join).collect()
}

/// Learning curves: the metric on held-out data and the training loss, a plot of each per task.
pub(super) fn learning(data: &ReportData) -> Vec<Plot> {
    let mut plots = Vec::new();
    for (index, task) in data.tasks.iter().enumerate() {
        let tokens = || Axis::new("training tokens", Scale::Linear, Unit::Count);
        if let Some(metric) = metric(data, task) {
            plots.push(Plot {
                title: format!("{}: {} on held-out data", task.name, metric.name),
                caption: String::new(),
                x: tokens(),
                y: metric_axis(metric),
                joined: Joined::Line,
                series: series(data, Some((index, task)), |found| {
                    curve(found, |at| at.metric, metric.unit)
                }),
                floor: floor(task, metric.unit),
            });
        }
        plots.push(Plot {
            title: format!("{}: training loss", task.name),
            caption: String::new(),
            x: tokens(),
            y: Axis::new("loss (nats)", Scale::Linear, Unit::Count),
            joined: Joined::Line,
            series: series(data, Some((index, task)), |found| {
                curve(found, |at| Some(at.train_loss), MetricUnit::Plain)
            }),
            floor: None,
        });
    }
    plots
}

/// Quality against the size of the carried state, a plot per task.
pub(super) fn quality_against_state(data: &ReportData) -> Vec<Plot> {
    let plot = |(index, task): (usize, &TaskInfo)| {
        let metric = metric(data, task)?;
        let points = |found: &[(&TrialRecord, &TrialResult)]| {
            let state = median(
                &found
                    .iter()
                    .filter_map(|(_, r)| r.state_bytes.map(|b| b as f64))
                    .collect::<Vec<_>>(),
            );
            let values: Vec<f64> = found
                .iter()
                .map(|(_, result)| result.metric.value)
                .collect();
            let both = state.filter(|state| *state > 0.0).zip(Summary::of(&values));
            both.map(|(state, summary)| point(state, &summary, |value| metric.unit.scale(value)))
                .into_iter()
                .collect()
        };
        let series = series(data, Some((index, task)), points);
        let absent: Vec<&str> = data
            .mixers
            .iter()
            .filter(|mixer| !results(data, mixer, Some(&task.name)).is_empty())
            .filter(|mixer| !series.iter().any(|series| &series.name == *mixer))
            .map(String::as_str)
            .collect();
        let caption = if absent.is_empty() {
            String::new()
        } else {
            format!("No carried state: {}.", absent.join(", "))
        };
        Some(Plot {
            title: format!("{}: {} against state", task.name, metric.name),
            caption,
            x: Axis::new("state per sequence (bytes, log)", Scale::Log2, Unit::Bytes),
            y: metric_axis(metric),
            joined: Joined::Marks,
            series,
            floor: floor(task, metric.unit),
        })
    };
    data.tasks.iter().enumerate().filter_map(plot).collect()
}

/// Prefill time, time per token, memory and state against length, each on two logarithmic axes.
pub(super) fn inference(data: &ReportData) -> Vec<Plot> {
    let plot = |title: &str, label: &str, scale, unit, get: fn(&LatencyPoint) -> Option<f64>| {
        let points = |found: &[(&TrialRecord, &TrialResult)]| -> Vec<Point> {
            let mut lengths: BTreeMap<u64, Vec<f64>> = BTreeMap::new();
            for at in found.iter().flat_map(|(_, result)| &result.latency) {
                if let Some(value) = get(at).filter(|value| *value > 0.0) {
                    lengths.entry(at.length).or_default().push(value);
                }
            }
            let middle = |(length, values): (u64, Vec<f64>)| {
                let y = median(&values)?;
                Some(Point {
                    x: length as f64,
                    y,
                    low: y,
                    high: y,
                })
            };
            lengths.into_iter().filter_map(middle).collect()
        };
        Plot {
            title: title.into(),
            caption: String::new(),
            x: Axis::new("length (tokens, log)", Scale::Log2, Unit::Count),
            y: Axis::new(label, scale, unit),
            joined: Joined::Line,
            series: series(data, None, points),
            floor: None,
        }
    };
    vec![
        plot(
            "Prefill time against length",
            "time (seconds, log)",
            Scale::Log10,
            Unit::Seconds,
            |at| Some(at.prefill_seconds),
        ),
        plot(
            "Time per token against length",
            "time per token (seconds, log)",
            Scale::Log10,
            Unit::Seconds,
            |at| at.step_seconds,
        ),
        plot(
            "Prefill memory against length",
            "peak memory (bytes, log)",
            Scale::Log2,
            Unit::Bytes,
            |at| at.memory_bytes.map(|bytes| bytes as f64),
        ),
        plot(
            "Carried state against length",
            "state (bytes, log)",
            Scale::Log2,
            Unit::Bytes,
            |at| at.state_bytes.map(|bytes| bytes as f64),
        ),
    ]
}
