//! Taking weights out of a trained model: the smallest ones, a pattern of them, whole heads, units or layers.
//!
//! Magnitudes: Han et al. (2015), arXiv 1506.02626; N of M: Zhou et al. (2021), arXiv 2102.04010; heads, units and layers go
//! whole, by the norm of their weights (Michel et al. 2019, arXiv 1905.10650, prune heads by a gradient instead; Fan et al. 2019,
//! arXiv 1909.11556, layers). What the pattern leaves is set to zero and saves no time here; heads, units and layers make a
//! smaller model.

use anyformer_mixers::token_mixer;
use anyformer_models::{Model, ModelConfig};
use anyformer_ops::Device;
use serde_json::{Value, json};

use crate::tensors::NamedTensor;

/// What is taken out.
#[derive(Clone, Debug, PartialEq)]
pub enum Prune {
    /// The smallest part of all weights of the layers' matrices, by magnitude.
    Smallest {
        /// From 0 to 1.
        part: f64,
    },
    /// All but the `keep` largest of every `of` neighbours along the inputs.
    Pattern {
        /// How many stay.
        keep: usize,
        /// Out of how many.
        of: usize,
    },
    /// All but this many attention heads of every layer.
    Heads(usize),
    /// All but this many inner units of every channel mixer.
    Units(usize),
    /// All layers but these, counted from 0.
    Layers(Vec<usize>),
}

/// What was done.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Pruned {
    /// Parameters before.
    pub before: usize,
    /// Parameters after.
    pub after: usize,
    /// Of the weights of the layers' matrices, how many are zero after.
    pub zeros: usize,
    /// How many these weights are.
    pub weights: usize,
}

/// A pruned copy of a model, or why it cannot be.
pub fn prune(model: &Model, how: &Prune) -> Result<(Model, Pruned), String> {
    let mut tensors = NamedTensor::of(model.params());
    let mut config = model.config().clone();
    match how {
        Prune::Smallest { part } => smallest(&mut tensors, *part)?,
        Prune::Pattern { keep, of } => pattern(&mut tensors, *keep, *of)?,
        Prune::Heads(keep) => heads(&mut config, &mut tensors, *keep)?,
        Prune::Units(keep) => units(&mut config, &mut tensors, *keep)?,
        Prune::Layers(keep) => layers(&mut config, &mut tensors, keep)?,
    }
    let after = Model::new(&config, &Device::flex(), 0).map_err(|error| error.to_string())?;
    for tensor in &tensors {
        let param = after.params().get(&tensor.name);
        let param = param.filter(|param| param.shape() == tensor.shape);
        let param =
            param.ok_or_else(|| format!("{} has no place in the smaller model", tensor.name))?;
        param
            .set(tensor.values.clone())
            .map_err(|error| error.to_string())?;
    }
    let matrices = tensors.iter().filter(|tensor| is_matrix(tensor));
    let (mut zeros, mut weights) = (0, 0);
    for tensor in matrices {
        zeros += tensor.values.iter().filter(|value| **value == 0.0).count();
        weights += tensor.values.len();
    }
    let report = Pruned {
        before: model.params().count(),
        after: after.params().count(),
        zeros,
        weights,
    };
    Ok((after, report))
}

/// A matrix of a layer.
fn is_matrix(tensor: &NamedTensor) -> bool {
    tensor.shape.len() == 2
        && tensor.name.starts_with("layers.")
        && tensor.name.ends_with(".weight")
}

fn smallest(tensors: &mut [NamedTensor], part: f64) -> Result<(), String> {
    if !(0.0..=1.0).contains(&part) {
        return Err(format!("the part to prune must be from 0 to 1, is {part}"));
    }
    let matrices = || (0..tensors.len()).filter(|at| is_matrix(&tensors[*at]));
    let mut order: Vec<(usize, usize)> = matrices()
        .flat_map(|at| (0..tensors[at].values.len()).map(move |value| (at, value)))
        .collect();
    let count = (part * order.len() as f64).round() as usize;
    let size = |(at, value): &(usize, usize)| tensors[*at].values[*value].abs();
    if count > 0 && count < order.len() {
        // Of equals the earlier one goes, so that exactly so many go.
        order.select_nth_unstable_by(count - 1, |a, b| size(a).total_cmp(&size(b)).then(a.cmp(b)));
    }
    for (at, value) in &order[..count] {
        tensors[*at].values[*value] = 0.0;
    }
    Ok(())
}

fn pattern(tensors: &mut [NamedTensor], keep: usize, of: usize) -> Result<(), String> {
    if keep == 0 || of == 0 || keep > of {
        return Err(format!("expected N:M with 1 <= N <= M, got {keep}:{of}"));
    }
    for tensor in tensors.iter_mut().filter(|tensor| is_matrix(tensor)) {
        let columns = tensor.shape[1];
        if !columns.is_multiple_of(of) {
            return Err(format!(
                "{} has {columns} inputs, which groups of {of} do not fill",
                tensor.name
            ));
        }
        for group in tensor.values.chunks_mut(of) {
            let mut order: Vec<usize> = (0..of).collect();
            order.sort_by(|a, b| group[*b].abs().total_cmp(&group[*a].abs()).then(a.cmp(b)));
            order[keep..].iter().for_each(|at| group[*at] = 0.0);
        }
    }
    Ok(())
}

/// The tensor of that name, or that there is none.
fn find(tensors: &[NamedTensor], name: &str) -> Result<usize, String> {
    let found = tensors.iter().position(|tensor| tensor.name == name);
    found.ok_or_else(|| format!("the model has no {name}"))
}

/// Squares of the rows of a tensor (columns of a matrix, where `across`), `width` neighbours together.
fn squares(tensor: &NamedTensor, across: bool, width: usize, sums: &mut [f64]) {
    let columns = tensor.values.len() / tensor.shape[0].max(1);
    for (at, value) in tensor.values.iter().enumerate() {
        let place = if across { at % columns } else { at / columns };
        sums[place / width] += f64::from(*value) * f64::from(*value);
    }
}

/// The `keep` largest, in their order.
fn kept(sums: &[f64], keep: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..sums.len()).collect();
    order.sort_by(|a, b| sums[*b].total_cmp(&sums[*a]).then(a.cmp(b)));
    order.truncate(keep);
    order.sort_unstable();
    order
}

/// Leaves groups of `width` rows (or columns) of a tensor.
fn leave(tensor: &mut NamedTensor, across: bool, width: usize, groups: &[usize]) {
    let columns = tensor.values.len() / tensor.shape[0].max(1);
    let places: Vec<usize> = groups
        .iter()
        .flat_map(|group| group * width..(group + 1) * width)
        .collect();
    let value = |row: usize, column: usize| tensor.values[row * columns + column];
    let values = match across {
        false => places
            .iter()
            .flat_map(|row| (0..columns).map(move |column| (*row, column)))
            .map(|(row, column)| value(row, column))
            .collect(),
        true => (0..tensor.shape[0])
            .flat_map(|row| places.iter().map(move |column| (row, *column)))
            .map(|(row, column)| value(row, column))
            .collect(),
    };
    tensor.shape[usize::from(across)] = places.len();
    tensor.values = values;
}

/// Prunes `count` groups of the tensors of every layer that are named, by the sum of their squares: (ending, by columns).
fn groups(
    config: &ModelConfig,
    tensors: &mut [NamedTensor],
    [count, width, keep]: [usize; 3],
    parts: &[(&str, bool)],
    what: &str,
) -> Result<(), String> {
    if keep == 0 || keep > count {
        return Err(format!(
            "expected from 1 to {count} {what} to keep, got {keep}"
        ));
    }
    for layer in 0..config.unique_layers() {
        let mut sums = vec![0.0; count];
        let mut held = Vec::new();
        for (part, across) in parts {
            for ending in ["weight", "bias"] {
                let name = format!("layers.{layer}.{part}.{ending}");
                // A bias belongs to rows; the bias after the last matrix is of the stream.
                let at = match (ending, *across) {
                    ("weight", _) => find(tensors, &name)?,
                    (_, true) => continue,
                    (_, false) => match find(tensors, &name) {
                        Ok(at) => at,
                        Err(_) => continue,
                    },
                };
                squares(&tensors[at], *across, width, &mut sums);
                held.push((at, *across));
            }
        }
        let left = kept(&sums, keep);
        for (at, across) in held {
            leave(&mut tensors[at], across, width, &left);
        }
    }
    Ok(())
}

fn heads(config: &mut ModelConfig, tensors: &mut [NamedTensor], keep: usize) -> Result<(), String> {
    let dim = config.dim;
    let mut shape = None;
    for spec in &mut config.mixers {
        let entry = token_mixer(&spec.name).map_err(|error| error.to_string())?;
        let options = (entry.resolve)(&spec.options).map_err(|error| error.to_string())?;
        let number = |key: &str| options.get(key).and_then(Value::as_u64).unwrap_or(0) as usize;
        let heads = number("heads").max(1);
        let head_dim = match number("head_dim") {
            0 => dim / heads,
            given => given,
        };
        let queries = match number("query_heads") {
            0 => heads,
            given => given,
        };
        let plain = ["explicit", "mha"]
            .iter()
            .any(|word| options.get("variant") == Some(&json!(word)));
        let equal = [0, queries].contains(&number("kv_heads"));
        let fits = ["attention", "local"].contains(&spec.name.as_str()) && plain && equal;
        if !fits || options.get("position") == Some(&json!("alibi")) {
            return Err(format!(
                "heads can be taken out of attention and local with as many key heads as query heads and no slopes, not out of {} {}",
                spec.name,
                Value::Object(options)
            ));
        }
        if shape.is_some_and(|shape| shape != (queries, head_dim)) {
            return Err("the mixers have different heads".into());
        }
        shape = Some((queries, head_dim));
        for (key, value) in [("heads", keep), ("query_heads", keep), ("kv_heads", keep)] {
            spec.options.insert(key.into(), json!(value));
        }
        spec.options.insert("head_dim".into(), json!(head_dim));
        spec.options.remove("variant");
    }
    let (count, width) = shape.unwrap_or_default();
    let parts = [
        ("mixer.q_proj", false),
        ("mixer.k_proj", false),
        ("mixer.v_proj", false),
        ("mixer.o_proj", true),
    ];
    groups(config, tensors, [count, width, keep], &parts, "heads")
}

fn units(config: &mut ModelConfig, tensors: &mut [NamedTensor], keep: usize) -> Result<(), String> {
    let parts: &[(&str, bool)] = match config.channel.name.as_str() {
        "mlp" => &[("channel.fc1", false), ("channel.fc2", true)],
        "swiglu" => &[
            ("channel.gate_proj", false),
            ("channel.up_proj", false),
            ("channel.down_proj", true),
        ],
        name => {
            return Err(format!(
                "units can be taken out of mlp and swiglu, not out of {name}"
            ));
        }
    };
    let first = find(tensors, &format!("layers.0.{}.weight", parts[0].0))?;
    let count = tensors[first].shape[0];
    config.channel.options.insert("hidden".into(), json!(keep));
    groups(config, tensors, [count, 1, keep], parts, "units")
}

fn layers(
    config: &mut ModelConfig,
    tensors: &mut Vec<NamedTensor>,
    keep: &[usize],
) -> Result<(), String> {
    let rising = keep.windows(2).all(|pair| pair[0] < pair[1]);
    if keep.is_empty() || !rising || keep.iter().any(|layer| *layer >= config.layers) {
        return Err(format!(
            "the layers to keep must be rising numbers below {}, got {keep:?}",
            config.layers
        ));
    }
    if config.share_layers > 0 || !config.exits.is_empty() {
        return Err("layers can be taken out of a model without share_layers and exits".into());
    }
    let mixers = keep.iter().map(|layer| config.mixer(*layer).clone());
    let mixers: Vec<_> = mixers.collect();
    let same = mixers.iter().all(|mixer| *mixer == mixers[0]);
    config.mixers = mixers[..if same { 1 } else { mixers.len() }].to_vec();
    config.layers = keep.len();
    tensors.retain_mut(|tensor| {
        let Some((layer, rest)) = tensor
            .name
            .strip_prefix("layers.")
            .and_then(|rest| rest.split_once('.'))
        else {
            return true;
        };
        let at = keep.iter().position(|kept| layer == kept.to_string());
        if let Some(at) = at {
            tensor.name = format!("layers.{at}.{rest}");
        }
        at.is_some()
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyformer_mixers::MixerSpec;
    use anyformer_models::Input;
    use anyformer_ops::tensor_values;

    fn model(channel: &str) -> Model {
        let config = ModelConfig {
            dim: 16,
            layers: 3,
            channel: MixerSpec::named(channel),
            ..ModelConfig::default()
        };
        Model::new(&config, &Device::flex(), 5).expect("a model")
    }

    fn scores(model: &Model) -> Vec<f32> {
        let ids = [3, 1, 4, 1, 5, 9];
        let input = Input::Tokens {
            ids: &ids,
            batch: 2,
        };
        tensor_values(model.forward(input, None).expect("runs"))
    }

    /// Nothing taken out: the same bits.
    #[test]
    fn at_their_limits_nothing_changes() {
        for channel in ["mlp", "swiglu"] {
            let model = model(channel);
            let hidden = if channel == "mlp" { 64 } else { 48 };
            for how in [
                Prune::Smallest { part: 0.0 },
                Prune::Pattern { keep: 4, of: 4 },
                Prune::Heads(4),
                Prune::Units(hidden),
                Prune::Layers(vec![0, 1, 2]),
            ] {
                let (after, report) = prune(&model, &how).expect("nothing to do");
                assert_eq!(scores(&after), scores(&model), "{how:?}");
                assert_eq!(report.before, report.after);
                assert_eq!(report.zeros, 0);
            }
        }
    }

    #[test]
    fn what_goes_is_what_was_asked() {
        let model = model("swiglu");
        let (_, half) = prune(&model, &Prune::Smallest { part: 0.5 }).expect("halves");
        assert_eq!(half.zeros, half.weights.div_ceil(2));
        let (sparse, report) = prune(&model, &Prune::Pattern { keep: 2, of: 4 }).expect("2:4");
        assert_eq!(report.zeros * 2, report.weights);
        let weight = sparse.params().get("layers.1.mixer.q_proj.weight");
        let values = weight.expect("there").values();
        let zeros = |group: &[f32]| group.iter().filter(|value| **value == 0.0).count();
        assert!(values.chunks(4).all(|group| zeros(group) == 2));
        let (small, report) = prune(&model, &Prune::Heads(1)).expect("one head");
        assert_eq!(report.before - report.after, 3 * 4 * 12 * 16);
        assert_eq!(scores(&small).len(), scores(&model).len());
        let (_, report) = prune(&model, &Prune::Units(8)).expect("few units");
        assert_eq!(report.before - report.after, 3 * 3 * 40 * 16);
        let (short, _) = prune(&model, &Prune::Layers(vec![0, 2])).expect("two layers");
        let last = |model: &Model, name: &str| model.params().get(name).expect("there").values();
        assert_eq!(
            last(&short, "layers.1.mixer.q_proj.weight"),
            last(&model, "layers.2.mixer.q_proj.weight")
        );
    }

    /// A head that gives nothing is the first to go, and its loss changes nothing.
    #[test]
    fn a_silent_head_and_a_silent_unit_can_go() {
        let model = model("mlp");
        for layer in 0..3 {
            for (name, row) in [
                ("q_proj", true),
                ("k_proj", true),
                ("v_proj", true),
                ("o_proj", false),
            ] {
                let name = format!("layers.{layer}.mixer.{name}.weight");
                let param = model.params().get(&name).expect("there");
                param.update(|values| {
                    for (at, value) in values.iter_mut().enumerate() {
                        let place = if row { at / 16 } else { at % 16 };
                        if place / 4 == 2 {
                            *value = 0.0;
                        }
                    }
                });
            }
        }
        let (after, _) = prune(&model, &Prune::Heads(3)).expect("three heads");
        for (got, want) in scores(&after).iter().zip(scores(&model)) {
            assert!((got - want).abs() < 1e-5);
        }
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_name() {
        let model = model("mlp");
        let refused = |how: Prune| prune(&model, &how).err().expect("refused");
        assert!(refused(Prune::Smallest { part: 1.5 }).contains("1.5"));
        assert!(refused(Prune::Pattern { keep: 2, of: 3 }).contains("groups of 3"));
        assert!(refused(Prune::Heads(9)).contains("from 1 to 4 heads"));
        assert!(refused(Prune::Units(0)).contains("units"));
        assert!(refused(Prune::Layers(vec![1, 7])).contains("below 3"));
    }
}
