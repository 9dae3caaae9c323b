//! Quantising the linear layers of a model, one block after the other.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyformer_models::{Gives, Input, Model, Pair, Target};
use anyformer_ops::Param;
use anyformer_ops::quantised::observe;
use anyformer_ops::quantised::quant::{QuantError, Quants, gptq, round, search};

use crate::error::HubError;
use crate::extra::Extra;
use crate::model::{ModelFolder, save};
use crate::quantised::{Method, Quantisation, pack_as, packed};

/// Quantises every linear layer of a model where it is. `rows` are texts of at least two tokens; all but
/// [`Method::Rtn`] look at the inputs that the layers get from them. A block sees what the blocks before it make once they
/// are quantised (Frantar et al., 2022, section 4). The head, and with it a tied embedding, gets 8 bits, rounded to the
/// nearest. `done` is told of every block: its number and that of all.
pub fn quantise(
    model: &Model,
    how: &Quantisation,
    rows: &[Vec<u32>],
    done: &mut dyn FnMut(usize, usize),
) -> Result<(), HubError> {
    let refused = |reason: String| HubError::Quantise {
        name: "the model".into(),
        reason,
    };
    let scheme = how.scheme().map_err(refused)?;
    let run = |row: &Vec<u32>| -> Result<(), HubError> {
        let ran = match model.config().gives {
            Gives::NextToken { .. } => {
                let (ids, target) = shifted(row);
                let input = Input::Tokens { ids, batch: 1 };
                let loss = model.loss(input, None, Target::Tokens(&target));
                loss.map(|_| ())
            }
            _ => {
                // A head of pairs gets the text twice: what its layers read of one is what they read of two.
                let pairs =
                    matches!(model.config().gives, Gives::Class { pair, .. } if pair != Pair::None);
                let batch = if pairs { 2 } else { 1 };
                let ids = &row.repeat(batch);
                model
                    .forward(Input::Tokens { ids, batch }, None)
                    .map(|_| ())
            }
        };
        ran.map_err(|error| refused(error.to_string()))
    };
    let Some(first) = rows.first() else {
        return Err(refused("there is no text to look at".into()));
    };
    let (result, names) = observe(None, || run(first));
    result?;
    let mut blocks: BTreeMap<Option<usize>, Vec<&Param>> = BTreeMap::new();
    for param in model.params().params() {
        if names.contains_key(param.name()) {
            blocks.entry(layer(param.name())).or_default().push(param);
        }
    }
    let outer = blocks.remove(&None).unwrap_or_default();
    let total = blocks.len() + usize::from(!outer.is_empty());
    for (number, params) in blocks.values().enumerate() {
        let wanted: BTreeSet<String> = params.iter().map(|param| param.name().into()).collect();
        let (result, inputs) = match how.method {
            Method::Rtn => (Ok(()), BTreeMap::new()),
            _ => observe(Some(wanted), || rows.iter().try_for_each(run)),
        };
        result?;
        for param in params {
            let (shape, weights) = (shape(param)?, param.values());
            let seen = inputs.get(param.name());
            let quants = match (how.method, seen) {
                (Method::Gptq, Some(seen)) => {
                    let options = gptq::Options {
                        by_size: how.act_order,
                        ..Default::default()
                    };
                    gptq::quantise(scheme, options, shape[0], &weights, seen)
                }
                (Method::Awq, Some(seen)) => {
                    search::activation_aware(scheme, shape[0], &weights, seen)
                }
                (Method::SmoothQuant, Some(seen)) => {
                    let alpha = how.alpha.unwrap_or(0.5);
                    search::smooth(scheme, alpha, shape[0], &weights, seen)
                }
                _ => round::nearest(scheme, shape, &weights),
            };
            put(param, quants)?;
        }
        done(number + 1, total);
    }
    for param in &outer {
        put(
            param,
            round::nearest(how.outer(), shape(param)?, &param.values()),
        )?;
    }
    if !outer.is_empty() {
        done(total, total);
    }
    Ok(())
}

/// The inputs of a text, and the token after each.
pub fn shifted(row: &[u32]) -> (&[u32], Vec<i64>) {
    let ids = &row[..row.len().saturating_sub(1)];
    let next = row.iter().skip(1).map(|id| i64::from(*id));
    (ids, next.collect())
}

/// The number of the block of a parameter.
fn layer(name: &str) -> Option<usize> {
    let (number, _) = name.strip_prefix("layers.")?.split_once('.')?;
    number.parse().ok()
}

fn shape(param: &Param) -> Result<[usize; 2], HubError> {
    param.shape().try_into().map_err(|_| HubError::Quantise {
        name: param.name().to_string(),
        reason: format!(
            "is of shape {:?}, and only matrices are quantised",
            param.shape()
        ),
    })
}

fn put(param: &Param, quants: Result<Quants, QuantError>) -> Result<(), HubError> {
    let wrong = |reason: String| HubError::Quantise {
        name: param.name().to_string(),
        reason,
    };
    let quants = quants.map_err(|error| wrong(error.to_string()))?;
    packed(param, &quants)
        .and_then(|packed| pack_as(param, packed))
        .map_err(|problem| wrong(problem.to_string()))
}

/// Writes a model that was quantised as a folder of ours, with the tokenizer, the chat template and the facts of the folder
/// that it came from.
pub fn save_quantised(
    dir: &Path,
    model: &Model,
    source: &ModelFolder,
    how: &Quantisation,
) -> Result<(), HubError> {
    let extra = Extra {
        quantisation: Some(*how),
        ..Extra::of(source)?
    };
    save(dir, model, &extra)
}
