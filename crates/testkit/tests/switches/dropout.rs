//! Dropout: nothing without a key, the same for the same key, however the rows lie.

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
            dropout: Some(Key::new(1, pass)),
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
            dropout: Some(Key::new(1, pass)),
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
