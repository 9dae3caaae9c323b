//! Switches of the survey on faster and lighter transformers: at its neutral value each changes no bit.

mod dropout;
mod precision;

use anyformer_mixers::{Context, Losses, MixerSpec, Options, Training, channel_mixer};
use anyformer_models::{Gives, Input, Model, ModelConfig, Pass, Target, Teacher};
use anyformer_ops::recompute::kept;
use anyformer_ops::{Builder, Device, tensor_values};
use anyformer_testkit::uniform;
use serde_json::{Value, json};

const IDS: [u32; 10] = [3, 1, 4, 1, 5, 2, 6, 5, 3, 5];
const WANTED: [i64; 10] = [1, 4, 1, 5, 9, 6, 5, 3, 5, 8];

fn model(changes: Value) -> Model {
    let mut config = json!({"dim": 16, "layers": 3, "reads": {"tokens": {"vocab": 11}}});
    for (key, value) in changes.as_object().expect("a table") {
        config[key] = value.clone();
    }
    let config = ModelConfig::from_json(&config).expect("a config");
    Model::new(&config, &Device::flex().autodiff(), 4).expect("a model")
}

fn classes(changes: Value) -> Model {
    let mut all = json!({"gives": {"class": {"classes": 4}}});
    for (key, value) in changes.as_object().expect("a table") {
        all[key] = value.clone();
    }
    model(all)
}

fn input() -> Input<'static> {
    Input::Tokens {
        ids: &IDS,
        batch: 2,
    }
}

fn scores(model: &Model) -> Vec<f32> {
    tensor_values(model.forward(input(), None).expect("runs"))
}

/// Loss and every gradient, by name.
fn gradients(model: &Model, pass: &Pass) -> (f32, Vec<(String, Option<Vec<f32>>)>) {
    let scored = model
        .loss_with(input(), None, Target::Tokens(&WANTED), pass)
        .expect("runs");
    let loss = tensor_values(scored.loss.clone())[0];
    let mut grads = scored.loss.backward();
    let params = model.params().params().iter();
    let named = params.map(|param| (param.name().to_string(), param.gradient(&mut grads)));
    (loss, named.collect())
}

#[test]
fn shared_layers_are_equal_layers() {
    let own = model(json!({}));
    assert_eq!(scores(&own), scores(&model(json!({"share_layers": 3}))));
    let shared = model(json!({"share_layers": 1}));
    for layer in 0..3 {
        for param in shared.params().params() {
            if let Some(rest) = param.name().strip_prefix("layers.0.") {
                let twin = own.params().get(&format!("layers.{layer}.{rest}"));
                twin.expect("a twin").set(param.values()).expect("fits");
            }
        }
    }
    assert_eq!(scores(&own), scores(&shared));
    let (few, many) = (shared.cost(5), own.cost(5));
    assert_eq!(few.params, shared.params().count() as u64);
    assert_eq!((few.flops, few.state_bytes), (many.flops, many.state_bytes));
    let (_, one) = gradients(&shared, &Pass::default());
    let (_, all) = gradients(&own, &Pass::default());
    let of = |list: &[(String, Option<Vec<f32>>)], name: &str| {
        let found = list.iter().find(|(held, _)| held == name);
        found.expect("there").1.clone().expect("a gradient")
    };
    let name = "mixer.q_proj.weight";
    let got = of(&one, &format!("layers.0.{name}"));
    for (at, got) in got.iter().enumerate() {
        let sum: f32 = (0..3)
            .map(|layer| of(&all, &format!("layers.{layer}.{name}"))[at])
            .sum();
        assert!((got - sum).abs() < 1e-5, "{got} {sum}");
    }
    // A stream carries a state for every layer, shared or not.
    let (_, state) = shared.prefill(&IDS[..4], 1, None, None).expect("streams");
    assert_eq!(state.layers.len(), 3);
}

#[test]
fn mixers_that_differ_cannot_share() {
    let config =
        json!({"layers": 4, "share_layers": 1, "mixers": [{"name": "gla"}, {"name": "local"}]});
    let error = ModelConfig::from_json(&config).expect_err("two mixers");
    assert!(error.to_string().contains("share_layers 1"), "{error}");
    let config =
        json!({"layers": 4, "share_layers": 2, "mixers": [{"name": "gla"}, {"name": "local"}]});
    assert!(ModelConfig::from_json(&config).is_ok());
}

#[test]
fn one_expert_is_the_dense_mixer() {
    let device = Device::flex().autodiff();
    for name in ["mlp", "swiglu"] {
        let build = |name: &str, options: Value, path: &str| {
            let builder = Builder::new(&device, 7);
            let entry = channel_mixer(name).expect("registered");
            let options: Options = options.as_object().cloned().expect("a table");
            let mixer = (entry.build)(16, &options, &builder.at(path)).expect("builds");
            (mixer, builder.store())
        };
        let (dense, weights) = build(name, json!({}), "a");
        let options = json!({"expert": name, "experts": 1, "top_k": 1});
        let (sparse, own) = build("moe", options, "b");
        for param in weights.params() {
            let place = param.name().replace("a.", "b.experts.0.");
            own.get(&place)
                .expect("there")
                .set(param.values())
                .expect("fits");
        }
        let x = || uniform(3, [2, 5, 16], &device);
        let losses = Losses::default();
        let context = Context {
            losses: Some(losses.clone()),
            ..Context::default()
        };
        let (want, got) = (dense.forward(x(), &context), sparse.forward(x(), &context));
        assert_eq!(tensor_values(got.clone()), tensor_values(want.clone()));
        let balance = tensor_values(losses.sum().expect("a balance"))[0];
        assert!((balance - 0.01).abs() < 1e-8, "{balance}");
        let (mut want, mut got) = (
            (want.clone() * want).sum().backward(),
            (got.clone() * got).sum().backward(),
        );
        for param in weights.params() {
            let place = param.name().replace("a.", "b.experts.0.");
            let twin = own.get(&place).expect("there");
            assert_eq!(
                twin.gradient(&mut got),
                param.gradient(&mut want),
                "{place}"
            );
        }
        assert_eq!(sparse.cost(5).params as usize, own.count());
    }
}

#[test]
fn experts_are_balanced_and_the_balance_is_shown() {
    let channel =
        json!({"name": "moe", "experts": 4, "top_k": 1, "normalise": false, "balance": 0.5});
    let model = model(json!({"channel": channel}));
    let scored = model
        .loss(input(), None, Target::Tokens(&WANTED))
        .expect("runs");
    // Three layers, each at least at its smallest, 0.5, when all experts are used alike.
    let extra = scored.extra.expect("a balance");
    assert!(tensor_values(extra.clone())[0] > 1.4);
    let mut grads = extra.backward();
    let router = model.params().get("layers.0.channel.router.weight");
    let gradient = router.expect("there").gradient(&mut grads).expect("learns");
    assert!(gradient.iter().any(|value| *value != 0.0));
}

#[test]
fn factors_with_a_whole_middle_are_the_weight() {
    for (name, layers) in [
        ("mlp", vec!["fc1", "fc2"]),
        ("swiglu", vec!["gate_proj", "up_proj", "down_proj"]),
    ] {
        let channel = |rank: usize| json!({"channel": {"name": name, "hidden": 16, "rank": rank}});
        let (whole, thin) = (model(channel(0)), model(channel(16)));
        for param in thin.params().params() {
            let held = match whole.params().get(param.name()) {
                Some(same) => same.values(),
                None if param.name().ends_with("down.weight") => (0..16 * 16)
                    .map(|at| f32::from(u8::from(at / 16 == at % 16)))
                    .collect(),
                None => {
                    let place = param.name().replace(".up.weight", ".weight");
                    let place = place.replace(".up.bias", ".bias");
                    whole.params().get(&place).expect("the weight").values()
                }
            };
            param.set(held).expect("fits");
        }
        assert_eq!(scores(&thin), scores(&whole));
        let small = model(channel(2));
        assert_eq!(small.cost(5).params as usize, small.params().count());
        let spared = (16 * 16 - 2 * 2 * 16) * 3 * layers.len();
        assert_eq!(whole.params().count() - small.params().count(), spared);
    }
}

#[test]
fn exits_change_nothing_until_they_are_taken() {
    let (plain, exits) = (classes(json!({})), classes(json!({"exits": [1, 2]})));
    assert_eq!(scores(&plain), scores(&exits));
    let early = |threshold: f32| {
        let (scores, layers) = exits.forward_early(input(), None, threshold).expect("runs");
        (tensor_values(scores), layers)
    };
    assert_eq!(early(1.0), (scores(&plain), 3));
    let (first, layers) = early(0.0);
    assert_eq!(layers, 1);
    assert_ne!(first, scores(&plain));
    assert_eq!(exits.cost(5).params as usize, exits.params().count());
    let scored = exits
        .loss(input(), None, Target::Classes(&[1, 3]))
        .expect("runs");
    let total = scored.loss + scored.extra.expect("the exits' losses");
    let mut grads = total.backward();
    for param in exits.params().params() {
        assert!(param.gradient(&mut grads).is_some(), "{}", param.name());
    }
    let wrong = json!({"layers": 2, "exits": [2]});
    let error = ModelConfig::from_json(&wrong).expect_err("no layer left");
    assert!(error.to_string().contains("exits [2]"), "{error}");
}

#[test]
fn a_pass_that_leaves_nothing_out_and_learns_from_nobody_is_the_plain_one() {
    let model = model(json!({}));
    let plain = gradients(&model, &Pass::default());
    let skip = [false; 3];
    let answers = model.answers(input(), None, Target::Tokens(&WANTED));
    let answers = tensor_values(answers.expect("runs"));
    let teacher = |mix: f64| {
        Some(Teacher {
            scores: &answers,
            temperature: 2.0,
            mix,
        })
    };
    let neutral = Pass {
        skip: &skip,
        teacher: teacher(0.0),
        // Of a model that drops nothing.
        training: Some(Training { seed: 1, nth: 2 }),
        ..Pass::default()
    };
    assert_eq!(gradients(&model, &neutral), plain);
    // Nothing is to be learned from oneself.
    let own = Pass {
        teacher: teacher(1.0),
        ..Pass::default()
    };
    let (loss, grads) = gradients(&model, &own);
    assert!(loss.abs() < 1e-6, "{loss}");
    let flat = |(_, gradient): &(String, Option<Vec<f32>>)| {
        gradient.iter().flatten().all(|value| value.abs() < 1e-6)
    };
    assert!(grads.iter().all(flat));
    // A layer that is left out gets no gradient.
    let skip = [false, true, false];
    let (loss, grads) = gradients(
        &model,
        &Pass {
            skip: &skip,
            ..Pass::default()
        },
    );
    assert_ne!(loss, plain.0);
    for (name, gradient) in grads {
        assert_eq!(gradient.is_none(), name.starts_with("layers.1."), "{name}");
    }
    let short = Pass {
        teacher: Some(Teacher {
            scores: &answers[1..],
            temperature: 1.0,
            mix: 0.5,
        }),
        ..Pass::default()
    };
    let error = model.loss_with(input(), None, Target::Tokens(&WANTED), &short);
    assert!(error.is_err_and(|error| error.to_string().contains("teacher")));
}

/// The knob of the pool of experts reaches the config of a model by name.
#[test]
fn a_mixture_needs_as_many_experts_as_it_takes() {
    let mut spec = MixerSpec::named("moe");
    spec.options.insert("top_k".into(), json!(9));
    let config = ModelConfig {
        channel: spec,
        ..ModelConfig::default()
    };
    let error = Model::shapes(&config).err().expect("nine of four");
    assert!(error.to_string().contains("top_k"), "{error}");
}

/// Every gradient of the loss and of what mixers add to it, by name.
fn all_gradients(model: &Model, lengths: Option<&[usize]>, pass: &Pass) -> Vec<(String, Vec<f32>)> {
    let target = match model.config().gives {
        Gives::Class { .. } => Target::Classes(&[1, 3]),
        _ => Target::Tokens(&WANTED),
    };
    let scored = model
        .loss_with(input(), lengths, target, pass)
        .expect("runs");
    let total = match scored.extra {
        Some(extra) => scored.loss + extra,
        None => scored.loss,
    };
    let mut all = vec![("loss".to_string(), tensor_values(total.clone()))];
    let mut grads = total.backward();
    for param in model.params().params() {
        let gradient = param.gradient(&mut grads).unwrap_or_default();
        all.push((param.name().to_string(), gradient));
    }
    all
}

fn close(what: &str, got: &[(String, Vec<f32>)], want: &[(String, Vec<f32>)]) {
    assert_eq!(got.len(), want.len());
    for ((name, got), (_, want)) in got.iter().zip(want) {
        assert_eq!(got.len(), want.len(), "{what}: {name}");
        let largest = want.iter().fold(1e-3f32, |a, b| a.max(b.abs()));
        for (got, want) in got.iter().zip(want) {
            let off = (got - want).abs() / largest;
            assert!(off < 1e-4, "{what}: {name}: {got}, want {want}");
        }
    }
}

#[test]
fn two_streams_run_backwards_have_the_gradients_of_two_streams_kept() {
    let moe = json!({"name": "moe", "experts": 4, "top_k": 1, "normalise": false});
    for changes in [
        json!({}),
        json!({"wiring": "parallel", "norm": "layer"}),
        json!({"channel": {"name": "none"}, "mixers": [{"name": "mamba"}]}),
        json!({"channel": moe}),
        json!({"share_layers": 1, "ff_chunks": 3}),
        json!({"gives": {"class": {"classes": 4}}, "mixers": [{"name": "reformer", "chunk": 2}], "exits": [1]}),
        json!({"gives": {"class": {"classes": 4, "pool": "cls"}}, "mixers": [{"name": "routing"}]}),
    ] {
        let mut all = changes.clone();
        all["reversible"] = json!(true);
        let (model, what) = (model(all), changes.to_string());
        let skip = [false, true, false];
        for pass in [
            Pass::default(),
            Pass {
                skip: &skip,
                ..Pass::default()
            },
        ] {
            for lengths in [None, Some(&[4, 3][..])] {
                let kept = kept(|| all_gradients(&model, lengths, &pass));
                close(&what, &all_gradients(&model, lengths, &pass), &kept);
            }
        }
    }
}

#[test]
fn two_streams_are_what_their_definition_says() {
    let two = model(json!({"reversible": true, "layers": 1, "gives": "hidden"}));
    let one = model(json!({"layers": 1, "gives": "hidden", "channel": {"name": "none"}}));
    for param in one.params().params() {
        let twin = two.params().get(param.name()).expect("a twin");
        param.set(twin.values()).expect("fits");
    }
    // With a channel mixer that adds nothing, both streams begin as x and end as x + f(x) and x: norm(x + f(x) / 2).
    for name in ["gate_proj", "up_proj", "down_proj"] {
        let weight = format!("layers.0.channel.{name}.weight");
        let weight = two.params().get(&weight).expect("there");
        weight.set(vec![0.0; weight.count()]).expect("fits");
    }
    let halved = one
        .params()
        .get("layers.0.mixer.o_proj.weight")
        .expect("there");
    halved.update(|values| values.iter_mut().for_each(|value| *value *= 0.5));
    for (got, want) in scores(&two).iter().zip(scores(&one)) {
        assert!((got - want).abs() < 1e-5, "{got} {want}");
    }
}

#[test]
fn two_streams_carry_states_and_step() {
    for (mixer, channel) in [
        ("attention", "swiglu"),
        ("gla", "swiglu"),
        ("mamba", "none"),
    ] {
        let model = model(json!({
            "reversible": true, "mixers": [{"name": mixer}], "channel": {"name": channel}
        }));
        model.params().set_tracking(false);
        let whole = scores(&model);
        let (first, state) = model.prefill(&IDS[..3], 1, None, None).expect("reads");
        let vocab = 11;
        let near = |got: &[f32], place: usize| {
            for (got, want) in got.iter().zip(&whole[place * vocab..][..vocab]) {
                assert!((got - want).abs() < 1e-5, "{mixer}: {got} {want}");
            }
        };
        near(&tensor_values(first), 2);
        let (next, state) = model.step(&IDS[3..4], &state).expect("steps");
        near(&tensor_values(next), 3);
        let (last, _) = model.step(&IDS[4..5], &state).expect("steps");
        near(&tensor_values(last), 4);
    }
}

#[test]
fn blocks_run_again_and_chunks_change_no_number() {
    let plain = model(json!({}));
    let again = Pass {
        recompute: true,
        ..Pass::default()
    };
    let want = all_gradients(&plain, None, &Pass::default());
    assert_eq!(all_gradients(&plain, None, &again), want);
    for wiring in ["pre_norm", "post_norm", "parallel"] {
        let config = |chunks: usize| json!({"wiring": wiring, "ff_chunks": chunks});
        let (whole, chunked) = (model(config(0)), model(config(4)));
        // Products of few rows sum in another order.
        for (got, want) in scores(&chunked).iter().zip(scores(&whole)) {
            assert!((got - want).abs() < 1e-6, "{wiring}: {got} {want}");
        }
        let kept = all_gradients(&whole, None, &Pass::default());
        close(
            wiring,
            &all_gradients(&chunked, None, &Pass::default()),
            &kept,
        );
        close(wiring, &all_gradients(&chunked, None, &again), &kept);
    }
}
