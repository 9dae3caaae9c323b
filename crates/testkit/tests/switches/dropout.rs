//! What is drawn or moved in training: nothing without a pass of a run, the same for the same pass, however the rows lie.

use anyformer_mixers::{Card, channel_mixers, token_mixers};

use super::*;

#[test]
fn dropout_is_of_training_and_the_same_for_the_same_key_and_layout() {
    for wiring in ["pre_norm", "post_norm", "parallel"] {
        let plain = model(json!({"wiring": wiring}));
        let drops = model(json!({"wiring": wiring, "dropout": 0.3}));
        assert_eq!(scores(&plain), scores(&drops));
        let none = gradients(&plain, &Pass::default());
        assert_eq!(gradients(&drops, &Pass::default()), none);
        let with = |pass: u64| Pass {
            training: Some(Training { seed: 1, nth: pass }),
            ..Pass::default()
        };
        let first = gradients(&drops, &with(1));
        assert_eq!(gradients(&drops, &with(1)), first);
        assert_ne!(gradients(&drops, &with(2)).0, first.0);
        assert_ne!(first.0, none.0);
        // Padded rows are packed; they drop what they drop as a batch.
        let target = Target::Tokens(&WANTED);
        let packed = drops.loss_with(input(), Some(&[5, 5]), target, &with(1));
        let packed = tensor_values(packed.expect("runs").loss)[0];
        assert!((packed - first.0).abs() < 1e-5, "{packed} and {}", first.0);
    }
}

/// What mixers drop inside themselves, each that has a knob for it.
#[test]
fn mixers_drop_in_training_only_and_the_same_for_the_same_key_and_layout() {
    let has = |card: &Card| card.knobs.iter().any(|knob| knob.name == "dropout");
    let named = |name: &str, dropout: f64| {
        let mut spec = json!({"name": name});
        if dropout > 0.0 {
            spec["dropout"] = json!(dropout);
        }
        spec
    };
    let token = token_mixers().iter().map(|entry| entry.card);
    let token = token.filter(|card| has(card)).map(|card| card.name);
    let channel = channel_mixers().iter().map(|entry| entry.card);
    let channel = channel.filter(|card| has(card)).map(|card| card.name);
    let both = |name: &str, dropout: f64, of_token: bool| match of_token {
        true => json!({"mixers": [named(name, dropout)]}),
        false => json!({"channel": named(name, dropout)}),
    };
    let all: Vec<(&str, bool)> = token
        .map(|name| (name, true))
        .chain(channel.map(|name| (name, false)))
        .collect();
    assert!(all.len() >= 11, "{all:?}");
    for (name, of_token) in all {
        let plain = classes(both(name, 0.0, of_token));
        let drops = classes(both(name, 0.3, of_token));
        assert_eq!(scores(&plain), scores(&drops), "{name}");
        let grads = |model: &Model, pass: &Pass| all_gradients(model, None, pass);
        let none = grads(&plain, &Pass::default());
        assert_eq!(grads(&drops, &Pass::default()), none, "{name}");
        let with = |pass: u64, recompute: bool| Pass {
            training: Some(Training { seed: 1, nth: pass }),
            recompute,
            ..Pass::default()
        };
        let first = grads(&drops, &with(1, false));
        assert_eq!(grads(&drops, &with(1, false)), first, "{name}");
        assert_ne!(grads(&drops, &with(2, false))[0], first[0], "{name}");
        assert_ne!(first[0], none[0], "{name}");
        close(name, &grads(&drops, &with(1, true)), &first);
        let packed = all_gradients(&drops, Some(&[5, 5]), &with(1, false));
        close(name, &packed, &first);
    }
    for (spec, words) in [
        (both("attention", 1.0, true), "below 1, got 1"),
        (both("sparse", 1.5, true), "below 1, got 1.5"),
        (
            json!({"channel": {"name": "mlp", "dropout": -0.5}}),
            "at least 0",
        ),
        (
            json!({"mixers": [{"name": "attention", "position": "fire", "dropout": 0.1}]}),
            "matrix",
        ),
    ] {
        let config = ModelConfig::from_json(&spec);
        let built = config.and_then(|config| Model::shapes(&config).map(|_| ()));
        let error = built.expect_err("refused").to_string();
        assert!(error.contains(words), "{spec}: {error}");
    }
}

fn buffer(model: &Model, ending: &str) -> Vec<f32> {
    let params = model.params().params();
    let named = params.iter().find(|param| param.name().ends_with(ending));
    named.expect("a buffer").values()
}

fn nth(nth: u64, recompute: bool) -> Pass<'static> {
    Pass {
        training: Some(Training { seed: 5, nth }),
        recompute,
        ..Pass::default()
    }
}

#[test]
fn performer_draws_its_matrix_anew_every_so_many_passes_of_training() {
    let ending = "layers.1.mixer.projection_matrix";
    let build = || classes(json!({"mixers": [{"name": "performer", "redraw": 3}]}));
    let model = build();
    let first = buffer(&model, ending);
    for pass in [0, 1, 2] {
        all_gradients(&model, None, &nth(pass, false));
        assert_eq!(buffer(&model, ending), first);
    }
    let drawn = all_gradients(&model, None, &nth(3, false));
    let second = buffer(&model, ending);
    assert_ne!(second, first);
    assert_ne!(buffer(&model, "layers.0.mixer.projection_matrix"), second);
    // Evaluation and other passes leave it, another model draws the same, and blocks may be run again.
    all_gradients(&model, None, &nth(4, false));
    scores(&model);
    assert_eq!(buffer(&model, ending), second);
    let other = build();
    close(
        "run again",
        &all_gradients(&other, None, &nth(3, true)),
        &drawn,
    );
    assert_eq!(buffer(&other, ending), second);
    let spec = json!({"mixers": [{"name": "performer", "kernel": "lra_compat", "redraw": 3}]});
    let config = ModelConfig::from_json(&spec).expect("a config");
    assert!(Model::shapes(&config).is_err_and(|error| error.to_string().contains("redraw")));
}

#[test]
fn routing_moves_its_directions_in_training_and_pulls_tokens_to_them() {
    let ending = "layers.2.mixer.means";
    for causal in [false, true] {
        let build = |decay: f64, commitment: f64| {
            let mut spec = json!({"name": "routing", "heads": 2, "clusters": 3, "causal": causal});
            (spec["decay"], spec["commitment"]) = (json!(decay), json!(commitment));
            classes(json!({"mixers": [spec]}))
        };
        let model = build(0.9, 0.5);
        let first = buffer(&model, ending);
        scores(&model);
        all_gradients(&model, None, &Pass::default());
        assert_eq!(buffer(&model, ending), first);
        let (got, pulled) = (
            all_gradients(&model, None, &nth(0, false)),
            buffer(&model, ending),
        );
        assert_ne!(pulled, first);
        for direction in pulled.chunks(8) {
            let length: f32 = direction.iter().map(|value| value * value).sum();
            assert!((length - 1.0).abs() < 1e-5);
        }
        let mut losses = vec![got[0].1[0]];
        // Blocks that are run again see the directions as they were.
        let again = build(0.9, 0.5);
        close(
            "run again",
            &all_gradients(&again, None, &nth(0, true)),
            &got,
        );
        assert_eq!(buffer(&again, ending), pulled);
        let (still, plain) = (build(0.0, 0.5), build(0.0, 0.0));
        close("still", &all_gradients(&still, None, &nth(0, false)), &got);
        assert_eq!(buffer(&still, ending), first);
        let none = all_gradients(&plain, None, &nth(0, false));
        assert!(none[0].1[0] < got[0].1[0]);
        // Directions come nearer to the same tokens.
        for pass in 1..20 {
            losses.push(all_gradients(&model, None, &nth(pass, false))[0].1[0]);
        }
        assert!(losses[19] < losses[0], "{losses:?}");
    }
}
