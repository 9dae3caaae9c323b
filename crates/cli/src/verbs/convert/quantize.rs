//! `anyformer convert quantize FOLDER`: another form of a model, and a receipt of what that changed.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyformer_hub::{Method, ModelFolder, Quantisation, quantise, save_quantised};
use anyformer_lab::units::bytes;
use anyformer_models::{Model, Pool};
use anyformer_ops::tensor_values;
use serde_json::{Value, json};

use crate::args::Global;
use crate::exit::{Failure, Kind, bad_input};
use crate::format::table;
use crate::products::round_inputs;
use crate::progress::spinner;
use crate::say::Say;
use crate::scoring::{self, Windows, foresee, longest, tokens};
use crate::session::{gives_tokens, open_model};
use crate::setup::{device, start_threads};
use crate::verbs::generate::tokenizer;

/// Tokens made one at a time to measure the speed of it.
const STEPS: usize = 48;

/// Flags of `convert quantize`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A run folder (its newest checkpoint is taken), a model folder, or a GGUF file
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
    /// The folder to write; it must not exist or be empty
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
    /// Text (UTF-8): its beginning is what the method looks at, what follows is what perplexity, or of an encoder the change of
    /// vectors, is measured on
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// How weights are found: rtn the nearest; gptq later columns make up for earlier ones; awq weights of large inputs are
    /// enlarged first; smoothquant weights and inputs of 8 bits
    #[arg(long, value_name = "NAME", default_value = "rtn", value_parser = ["rtn", "gptq", "awq", "smoothquant"])]
    pub method: String,
    /// Bits of a weight in a layer; the head and a tied embedding have 8
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u8).range(4..=8))]
    pub bits: u8,
    /// Neighbours in a row that share a scale, a multiple of 8; 0 for the whole row [default: 32, smoothquant 0]
    #[arg(long, value_name = "N")]
    pub group: Option<usize>,
    /// A zero beside every scale (4 bits)
    #[arg(long)]
    pub zeros: bool,
    /// gptq: columns in the order of the size of their inputs
    #[arg(long)]
    pub act_order: bool,
    /// smoothquant: how much of the outliers moves into the weights [default: 0.5]
    #[arg(long, value_name = "X")]
    pub alpha: Option<f32>,
    /// What was written is measured with inputs rounded to 8 bits, as `generate --round-inputs` runs it
    #[arg(long)]
    pub round_inputs: bool,
    /// Tokens that the method looks at; at most half of the text
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u32).range(2..))]
    pub calibrate: u32,
    /// Tokens that are measured on at most
    #[arg(long, value_name = "N", default_value_t = 8192, value_parser = clap::value_parser!(u32).range(2..))]
    pub measure: u32,
    /// Tokens of a window of the text
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..))]
    pub time: u32,
}

fn how(args: &Args) -> Result<Quantisation, Failure> {
    let (method, group) = match args.method.as_str() {
        "gptq" => (Method::Gptq, 32),
        "awq" => (Method::Awq, 32),
        "smoothquant" => (Method::SmoothQuant, 0),
        _ => (Method::Rtn, 32),
    };
    let how = Quantisation {
        method,
        bits: args.bits,
        group: args.group.unwrap_or(group),
        zeros: args.zeros,
        act_order: args.act_order,
        alpha: args.alpha,
    };
    match how.scheme() {
        Ok(_) => Ok(how),
        Err(reason) => Err(bad_input(format!("quantize: {reason}"))),
    }
}

/// Quantises.
pub fn run(args: &Args, global: &Global, say: &Say) -> Result<(), Failure> {
    let how = how(args)?;
    if global
        .device
        .as_deref()
        .is_some_and(|device| device != "cpu")
    {
        return Err(bad_input(
            "quantize: it runs on the CPU; leave --device out",
        ));
    }
    let opened = open_model(&args.folder)?;
    let pool = match gives_tokens(&opened.config) {
        true => None,
        false => Some(opened.pool().input()?),
    };
    if args
        .out
        .read_dir()
        .is_ok_and(|mut files| files.next().is_some())
    {
        return Err(bad_input(format!(
            "write {}: it is not empty; choose another name or remove it first",
            args.out.display()
        )));
    }
    let ids = scoring::read(&args.text, &tokenizer(&opened)?)?;
    let (seen, scored) = windows(&ids, args, longest(&opened)?)?;
    start_threads(global, None)?;
    let model = opened.load(&device("cpu")?).input()?;
    let before = measure(&model, &scored, pool)?;
    let from = size(&opened).broken()?;
    let bar = spinner(say, "quantising");
    let progress = &mut |done: usize, all: usize| {
        if let Some(bar) = &bar {
            bar.set_message(format!("quantising: block {done} of {all}"));
        }
    };
    quantise(&model, &how, &seen, progress).input()?;
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    save_quantised(&args.out, &model, &opened, &how).input()?;
    // What was written is what is measured.
    let written = ModelFolder::open(&args.out).broken()?;
    let model = written.load(&device("cpu")?).broken()?;
    round_inputs(&model, args.round_inputs)?;
    let after = measure(&model, &scored, pool)?;
    let to = size(&written).broken()?;
    let mut value = json!({
        "model": opened.path, "to": args.out, "quantisation": how,
        "calibrated_on": tokens(&seen), "measured_on": tokens(&scored),
        "before": before.json(from), "after": after.json(to),
    });
    let cosines = before.cosines(&after);
    if let Some([mean, least]) = cosines {
        value["vectors"] = json!({"mean_cosine": mean, "least_cosine": least});
    }
    say.result(&value, || {
        let decode = |one: &Measured| one.decode.map_or("-".into(), |speed| format!("{speed:.1}"));
        let row = |name: &str, before: String, after: String| vec![name.to_string(), before, after];
        let mut rows = vec![
            row("bytes of weights", bytes(from as f64), bytes(to as f64)),
            row(
                "read, tokens/s",
                format!("{:.0}", before.read),
                format!("{:.0}", after.read),
            ),
        ];
        if let [Some(before), Some(after)] = [before.perplexity, after.perplexity] {
            let shown = |perplexity: f64| format!("{perplexity:.4}");
            rows.insert(1, row("perplexity", shown(before), shown(after)));
        }
        if before.decode.is_some() {
            rows.push(row("made, tokens/s", decode(&before), decode(&after)));
        }
        if let Some([mean, least]) = cosines {
            let name = "cosine of vectors before and after";
            rows.push(row(
                name,
                format!("mean {mean:.5}"),
                format!("least {least:.5}"),
            ));
        }
        let looked = match how.method {
            Method::Rtn => String::new(),
            _ => format!("; {} tokens looked at", tokens(&seen)),
        };
        format!(
            "{} written, {} bits by {}; {} tokens scored{looked}\n\n{}",
            args.out.display(),
            how.bits,
            args.method,
            tokens(&scored),
            table(&["", "before", "after"], &[1, 2], &rows)
        )
    });
    Ok(())
}

/// The windows that the method looks at and, after them, those that are scored.
fn windows(ids: &[u32], args: &Args, longest: usize) -> Result<(Windows, Windows), Failure> {
    let cut = (args.calibrate as usize).min(ids.len() / 2);
    let end = ids.len().min(cut + args.measure as usize);
    let time = longest.min(args.time as usize);
    let seen = scoring::windows(&ids[..cut], time);
    let scored = scoring::windows(&ids[cut..end], time);
    if seen.is_empty() || scored.is_empty() {
        return Err(bad_input(format!(
            "read {}: {} tokens are too few to look at one half and score the other; give a longer text",
            args.text.display(),
            ids.len()
        )));
    }
    Ok((seen, scored))
}

/// Bytes of the weights of a folder or file.
fn size(opened: &ModelFolder) -> std::io::Result<u64> {
    if opened.path.is_file() {
        return Ok(opened.path.metadata()?.len());
    }
    let mut total = 0;
    for entry in opened.path.read_dir()? {
        let entry = entry?;
        if Path::new(&entry.file_name())
            .extension()
            .is_some_and(|end| end == "safetensors")
        {
            total += entry.metadata()?.len();
        }
    }
    Ok(total)
}

struct Measured {
    /// Of models that give the next token.
    perplexity: Option<f64>,
    /// Of encoders, a vector for each window.
    vectors: Vec<Vec<f32>>,
    /// Tokens read in a second.
    read: f64,
    /// Tokens made in a second, of models that can go on from a state.
    decode: Option<f64>,
}

impl Measured {
    /// The mean and the least cosine of the vectors of these windows and `other`'s; none of a language model.
    fn cosines(&self, other: &Measured) -> Option<[f64; 2]> {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            let pairs = a.iter().zip(b);
            pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let pairs = self.vectors.iter().zip(&other.vectors);
        let all: Vec<f64> = pairs
            .map(|(a, b)| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(1e-30))
            .collect();
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        let least = all.iter().copied().reduce(f64::min)?;
        Some([mean, least])
    }

    fn json(&self, bytes: u64) -> Value {
        json!({
            "bytes": bytes, "perplexity": self.perplexity, "read_tokens_per_s": self.read,
            "made_tokens_per_s": self.decode,
        })
    }
}

fn measure(model: &Model, rows: &Windows, pool: Option<Pool>) -> Result<Measured, Failure> {
    if let Some(pool) = pool {
        let began = Instant::now();
        let vector = |row: &Vec<u32>| model.vectors(&[row], pool).map(tensor_values);
        let vectors: Result<Vec<_>, _> = rows.iter().map(vector).collect();
        let read: usize = rows.iter().map(Vec::len).sum();
        return Ok(Measured {
            perplexity: None,
            vectors: vectors.input()?,
            read: read as f64 / began.elapsed().as_secs_f64(),
            decode: None,
        });
    }
    let found = foresee(model, rows)?;
    let decode = match model.config().streams() {
        true => Some(decode_speed(model, &rows[0])?),
        false => None,
    };
    Ok(Measured {
        perplexity: Some(found.loss.exp()),
        vectors: Vec::new(),
        read: found.counted as f64 / found.seconds,
        decode,
    })
}

/// Tokens of the text read one at a time in a second, after a first few that are not timed.
fn decode_speed(model: &Model, row: &[u32]) -> Result<f64, Failure> {
    let (_, mut state) = model.prefill(&row[..1], 1, None, None).input()?;
    let steps: Vec<u32> = row[1..].iter().copied().take(STEPS).collect();
    let warm = steps.len() / 4;
    let mut began = Instant::now();
    for (at, id) in steps.iter().enumerate() {
        if at == warm {
            began = Instant::now();
        }
        let (scores, next) = model.step(&[*id], &state).input()?;
        tensor_values(scores);
        state = next;
    }
    Ok((steps.len() - warm) as f64 / began.elapsed().as_secs_f64())
}
