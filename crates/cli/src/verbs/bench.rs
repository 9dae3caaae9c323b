//! `anyformer bench`: speed of mixers against length, on random tokens.

use std::time::Instant;

use anyformer_kernels::instructions::Instructions;
use anyformer_kernels::memory;
use anyformer_lab::units::{bytes, seconds};
use anyformer_mixers::{MixerSpec, token_mixer, token_mixers};
use anyformer_models::{Input, Model, ModelConfig, Target};
use anyformer_ops::{Device, device_is_cpu};
use anyformer_train::{AdamW, TrainConfig};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::args::Global;
use crate::exit::{Failure, Kind, bad_input};
use crate::format::table;
use crate::overrides;
use crate::say::Say;
use crate::session::gives_tokens;
use crate::setup::{device, device_name, start_threads};
use crate::verbs::info::of_mixer;

mod cases;
mod ops;
mod profile;

use profile::{Peaks, Profile};

/// Flags.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    /// What to measure instead of mixers
    #[command(subcommand)]
    pub what: Option<What>,
    /// Token mixers, by commas [default: all]
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    pub mixers: Vec<String>,
    /// Lengths in tokens, by commas
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "LENGTHS",
        default_value = "256,512,1024,2048"
    )]
    pub lengths: Vec<usize>,
    /// Rows of a batch
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub batch: usize,
    /// Width of the model
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub dim: usize,
    /// Blocks of the model
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub layers: usize,
    /// Timed runs of each measurement, after one that is not timed; the median is told
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub runs: usize,
    /// Time whole training steps too: forward, backward, clipping and AdamW
    #[arg(long)]
    pub step: bool,
    /// Tell what each kernel takes of a training step, with its operations and bytes per second beside the machine's peaks
    #[arg(long)]
    pub profile: bool,
    /// Time ops alone instead of models, forward and backward: as a kernel, and composed out of tensor operations
    #[arg(long, conflicts_with_all = ["mixers", "lengths", "batch", "dim", "layers", "step", "profile", "changes"])]
    pub ops: bool,
    /// With --ops: these only, by commas
    #[arg(long, value_delimiter = ',', value_name = "OPS", requires = "ops")]
    pub only: Vec<String>,
    /// With --ops: leave the composed forms out
    #[arg(long, requires = "ops")]
    pub kernels: bool,
    /// Use no more than these instructions: what a machine without the others would do
    #[arg(long, value_enum, value_name = "SET")]
    pub instructions: Option<Set>,
    /// Keys of the model that differ, as model.channel.name=mlp or model.mixers.0.heads=8
    #[arg(value_name = "KEY=VALUE")]
    pub changes: Vec<String>,
}

/// Sets of instructions; each holds those before it.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub enum Set {
    /// What every processor of this kind has
    Portable,
    /// AVX2 and FMA
    Avx2,
    /// AVX-512
    Avx512,
}

impl Set {
    /// Holds this thread and the workers to them.
    fn apply(self) -> Instructions {
        let most = match self {
            Set::Portable => Instructions::Portable,
            Set::Avx2 => Instructions::Avx2,
            Set::Avx512 => Instructions::Avx512,
        };
        most.limit_this_thread();
        rayon::broadcast(|_| most.limit_this_thread());
        most
    }
}

/// Starts the workers, held to the instructions asked for: their number, and the most that kernels then use.
fn start(args: &Args, global: &Global) -> Result<(usize, Instructions), Failure> {
    let threads = start_threads(global, None)?;
    let best = Instructions::best();
    let most = args.instructions.map(|set| set.apply().min(best));
    Ok((threads, most.unwrap_or(best)))
}

/// What can be measured beside mixers.
#[derive(Debug, clap::Subcommand)]
pub enum What {
    /// Measure a server under an open-loop load: throughput, and the times that clients see
    Serve(super::bench_serve::Args),
}

/// One measured point; times are medians in seconds.
#[derive(Debug, Serialize)]
struct Row {
    mixer: String,
    length: usize,
    forward_backward_s: f64,
    /// A whole update; absent unless asked for.
    update_s: Option<f64>,
    parameters: usize,
    train_tokens_per_s: f64,
    peak_bytes: usize,
    /// Absent for mixers that cannot stream.
    prefill_s: Option<f64>,
    step_s: Option<f64>,
    state_bytes: Option<u64>,
    /// Absent unless asked for.
    profile: Option<Profile>,
}

/// Prints the table.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    if args.ops {
        return run_ops(args, global, say);
    }
    if let Some(What::Serve(args)) = &args.what {
        return super::bench_serve::run(args, global, say);
    }
    let names: Vec<&str> = match args.mixers.is_empty() {
        true => token_mixers().iter().map(|entry| entry.card.name).collect(),
        false => args.mixers.iter().map(String::as_str).collect(),
    };
    for name in &names {
        token_mixer(name).input()?;
    }
    if args.lengths.contains(&0) || args.runs == 0 || args.batch == 0 {
        return Err(bad_input(
            "measure: lengths, batch and runs must be at least 1",
        ));
    }
    let configs: Vec<ModelConfig> = names
        .iter()
        .map(|name| config(args, name))
        .collect::<Result<_, _>>()?;
    let (threads, most) = start(args, global)?;
    let device = device(&device_name(global, None))?;
    let mut rows = Vec::new();
    for config in &configs {
        for length in &args.lengths {
            say.note(format!("{} at {length}", config.mixers[0].name));
            rows.push(measure(config, *length, args, &device)?);
        }
    }
    let peaks = args.profile.then(Peaks::measure);
    let value = json!({
        "peaks": peaks, "dim": args.dim, "layers": args.layers, "batch": args.batch, "runs": args.runs, "threads": threads,
        "simd": super::doctor::simd(most), "version": env!("CARGO_PKG_VERSION"), "rows": rows,
    });
    say.result(&value, || {
        let cells = rows.iter().map(|row| {
            let optional = |value: Option<String>| value.unwrap_or("-".to_string());
            vec![
                row.mixer.clone(),
                row.length.to_string(),
                seconds(row.forward_backward_s),
                optional(row.update_s.map(seconds)),
                format!("{:.0}", row.train_tokens_per_s),
                bytes(row.peak_bytes as f64),
                optional(row.prefill_s.map(seconds)),
                optional(row.step_s.map(seconds)),
                optional(row.state_bytes.map(|state| bytes(state as f64))),
            ]
        });
        let header =
            ["mixer", "length", "forward+backward", "update", "tokens/s", "peak memory", "prefill", "one token", "state"];
        let mut text = table(&header, &[1, 2, 3, 4, 5, 6, 7, 8], &cells.collect::<Vec<_>>());
        text += &format!(
            "\ndim {}, {} layers, batch {}, {threads} threads, median of {} runs; one token: after a prompt of that length\n",
            args.dim, args.layers, args.batch, args.runs
        );
        for row in &rows {
            if let Some(profile) = &row.profile {
                text += &profile.text(&row.mixer, row.length);
            }
        }
        if let Some(peaks) = &peaks {
            text += &peaks.line();
        }
        text
    });
    Ok(())
}

fn run_ops(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    if args.runs == 0 {
        return Err(bad_input("measure: runs must be at least 1"));
    }
    let name = device_name(global, None);
    if !device_is_cpu(&device(&name)?) {
        return Err(bad_input(format!(
            "measure ops on {name}: their kernels run on the CPU; leave --device out, or measure a mixer there"
        )));
    }
    let (threads, most) = start(args, global)?;
    let measured = ops::measure(&args.only, args.runs, !args.kernels, |text| say.note(text))?;
    let peaks = Peaks::measure();
    let value = json!({
        "threads": threads, "runs": args.runs, "simd": super::doctor::simd(most), "peaks": peaks,
        "version": env!("CARGO_PKG_VERSION"), "ops": measured,
    });
    say.result(&value, || ops::text(&measured, &peaks));
    Ok(())
}

fn config(args: &Args, name: &str) -> Result<ModelConfig, Failure> {
    let config = ModelConfig {
        dim: args.dim,
        layers: args.layers,
        max_time: args.lengths.iter().copied().max().unwrap_or(0).max(2048),
        ..of_mixer(MixerSpec::named(name))
    };
    let mut root = Map::new();
    root.insert("model".into(), Value::Object(config.to_json()));
    for text in &args.changes {
        let change = overrides::parse(text)?;
        if change.path[0] != "model" || change.path.len() < 2 {
            return Err(bad_input(format!(
                "measure with {text}: only keys of the model may differ: model.KEY=VALUE"
            )));
        }
        overrides::apply(&mut root, &change)?;
    }
    let config = ModelConfig::from_json(&root["model"]).input()?;
    // Refused before anything is measured, so that no table stops in the middle.
    Model::shapes(&config).input()?;
    Ok(config)
}

/// Numbers below 256 that repeat in no short pattern; the same in every run.
fn tokens(count: usize) -> Vec<u32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    (0..count)
        .map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u32
        })
        .collect()
}

fn median(runs: usize, mut work: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    work()?;
    let mut times = Vec::new();
    for _ in 0..runs {
        let began = Instant::now();
        work()?;
        times.push(began.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    Ok(match runs % 2 {
        1 => times[runs / 2],
        _ => (times[runs / 2 - 1] + times[runs / 2]) / 2.0,
    })
}

fn measure(
    config: &ModelConfig,
    length: usize,
    args: &Args,
    device: &Device,
) -> Result<Row, Failure> {
    let batch = args.batch;
    let ids = tokens(batch * length);
    let targets: Vec<i64> = tokens(batch * length + 1)[1..]
        .iter()
        .map(|id| i64::from(*id))
        .collect();
    let classes: Vec<i64> = (0..batch as i64).map(|row| row % 10).collect();
    let model = Model::new(config, &device.clone().autodiff(), 0).input()?;
    let held = memory::allocated();
    memory::reset_peak();
    let input = Input::Tokens { ids: &ids, batch };
    let target = match gives_tokens(config) {
        true => Target::Tokens(&targets),
        false => Target::Classes(&classes),
    };
    let forward_backward_s = median(args.runs, || {
        let scored = model.loss(input, None, target).broken()?;
        let mut gradients = scored.loss.backward();
        // Read one, so that nothing is left to be computed later.
        for param in model.params().params() {
            std::hint::black_box(param.gradient(&mut gradients));
        }
        Ok(())
    })?;
    let update_s = match args.step {
        true => Some(median(args.runs, updates(&model, input, target))?),
        false => None,
    };
    let profile = match args.profile {
        true => Some(Profile::measure(&model, input, target, args.runs)?),
        false => None,
    };
    let peak_bytes = memory::peak().saturating_sub(held);
    model.params().set_tracking(false);
    let (mut prefill_s, mut step_s, mut state_bytes) = (None, None, None);
    if config.streams() {
        let mut kept = None;
        prefill_s = Some(median(args.runs, || {
            let (scores, state) = model.prefill(&ids, batch, None, None).broken()?;
            std::hint::black_box(anyformer_ops::tensor_values(scores));
            kept = Some(state);
            Ok(())
        })?);
        if let Some(state) = &kept {
            let last: Vec<u32> = ids.iter().take(batch).copied().collect();
            state_bytes = Some(state.bytes());
            step_s = Some(median(args.runs.max(5), || {
                let (scores, _) = model.step(&last, state).broken()?;
                std::hint::black_box(anyformer_ops::tensor_values(scores));
                Ok(())
            })?);
        }
    }
    Ok(Row {
        mixer: config.mixers[0].name.clone(),
        length,
        forward_backward_s,
        update_s,
        parameters: model.params().count(),
        train_tokens_per_s: (batch * length) as f64 / forward_backward_s,
        peak_bytes,
        prefill_s,
        step_s,
        state_bytes,
        profile,
    })
}

/// An update by the trainer's own optimiser at every call: forward, backward, clipping and AdamW.
fn updates<'a>(
    model: &'a Model,
    input: Input<'a>,
    target: Target<'a>,
) -> impl FnMut() -> Result<(), Failure> + 'a {
    let mut optimizer = AdamW::new(model.params());
    let config = TrainConfig::default();
    move || {
        let mut sum = optimizer.gradient();
        let scored = model.loss(input, None, target).broken()?;
        let mut gradients = scored.loss.backward();
        optimizer.accumulate(&mut sum, &mut gradients, 1.0);
        optimizer.update(&sum, sum.norm(), config.lr, &config);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_leaves_the_first_run_out() {
        let mut calls = 0;
        let time = median(3, || {
            calls += 1;
            if calls == 1 {
                std::thread::sleep(std::time::Duration::from_millis(300));
            }
            Ok(())
        });
        assert!(time.is_ok_and(|time| time < 0.2));
        assert_eq!(calls, 4);
        let ids = tokens(1000);
        assert!(ids.iter().all(|id| *id < 256) && ids[..500] != ids[500..]);
    }
}
