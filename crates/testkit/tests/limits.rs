//! Where an efficient mixer has nothing to leave out, it is softmax attention.

use anyformer_mixers::{Context, Options, token_mixer};
use anyformer_models::{Input, Model, ModelConfig};
use anyformer_ops::{Builder, Device, tensor_values};
use anyformer_testkit::{tolerance, uniform};
use serde_json::{Value, json};

const DIM: usize = 32;
const TIME: usize = 19;

fn table(value: Value) -> Options {
    value.as_object().cloned().expect("a table")
}

#[test]
fn at_their_limits_mixers_are_attention() {
    let device = Device::flex();
    let x = uniform(3, [2, TIME, DIM], &device);
    for causal in [true, false] {
        let plain = json!({"causal": causal, "position": "none"});
        let (want, weights) = {
            let builder = Builder::new(&device, 1);
            let entry = token_mixer("attention").expect("registered");
            let mixer = (entry.build)(DIM, &table(plain), &builder).expect("builds");
            let y = mixer.forward(x.clone(), &Context::default(), None);
            (tensor_values(y.expect("runs").0), builder.store())
        };
        // Segments of one token are the tokens themselves, and one segment is all of them; ahead of itself the combiner sees
        // its own segment twice, so only its causal form is exact.
        let back = [
            ("combiner", json!({"segment": 1})),
            ("combiner", json!({"segment": TIME})),
            ("combiner", json!({"segment": TIME, "pattern": "axial"})),
            ("local", json!({"position": "none", "window": TIME})),
            ("sparse", json!({"stride": 64})),
        ];
        let both = [
            (
                "local",
                json!({"causal": false, "position": "none", "window": TIME}),
            ),
            ("routing", json!({"clusters": 1, "iterations": 3})),
            ("sinkhorn", json!({"block": 64})),
            ("sinkhorn", json!({"block": 64, "cut": 1})),
        ];
        let own = if causal { back.to_vec() } else { both.to_vec() };
        for (name, options) in own {
            let builder = Builder::new(&device, 2);
            let entry = token_mixer(name).expect("registered");
            let mixer = (entry.build)(DIM, &table(options.clone()), &builder).expect("builds");
            for param in builder
                .store()
                .params()
                .iter()
                .filter(|param| param.trainable())
            {
                let held = weights.get(param.name()).expect("the same name");
                param.set(held.values()).expect("the same size");
            }
            let y = mixer.forward(x.clone(), &Context::default(), None);
            let got = tensor_values(y.expect("runs").0);
            let close = tolerance::check(name, &got, &want, 5e-5);
            assert!(close.is_ok(), "{options} causal {causal}: {close:?}");
        }
    }
}

/// Positions that bring far keys nearer are rotary ones where no key is far.
#[test]
fn at_their_limits_positions_are_rotary() {
    let device = Device::flex();
    let x = uniform(3, [2, TIME, DIM], &device);
    let run = |options: Value| {
        let builder = Builder::new(&device, 1);
        let entry = token_mixer("attention").expect("registered");
        let mixer = (entry.build)(DIM, &table(options), &builder).expect("builds");
        let y = mixer.forward(x.clone(), &Context::default(), None);
        tensor_values(y.expect("runs").0)
    };
    let want = run(json!({}));
    for options in [
        json!({"position": "rerope", "position_window": TIME}),
        json!({"position": "rerope", "position_window": 4, "position_group": 1}),
        json!({"position": "self_extend", "position_window": TIME, "position_group": 3}),
        json!({"position": "self_extend", "position_window": 4, "position_group": 1}),
    ] {
        let close = tolerance::check("rope", &run(options.clone()), &want, 5e-5);
        assert!(close.is_ok(), "{options}: {close:?}");
    }
    let far = run(json!({"position": "rerope", "position_window": 4}));
    assert!(tolerance::check("rope", &far, &want, 1e-3).is_err());
}

/// A sequence longer than a mixer's table is refused, with the limit and what to raise.
#[test]
fn a_length_beyond_a_table_is_told() {
    let device = Device::flex();
    let x = uniform(3, [1, TIME, DIM], &device);
    for (name, options) in [
        ("linformer", json!({"max_time": TIME - 1, "k": 4})),
        ("synthesizer", json!({"max_time": TIME - 1})),
        ("cosformer", json!({"max_time": TIME - 1})),
    ] {
        let entry = token_mixer(name).expect("registered");
        let mixer = (entry.build)(DIM, &table(options), &Builder::new(&device, 1));
        let y = mixer
            .expect("builds")
            .forward(x.clone(), &Context::default(), None);
        let error = y.expect_err("too long").to_string();
        for part in [name, "at most 18", "got 19", "max_time"] {
            assert!(error.contains(part), "{error}");
        }
    }
    let config = ModelConfig::from_json(&json!({"positions": "learned", "max_time": 5}));
    let model = Model::new(&config.expect("a config"), &device, 1).expect("a model");
    let ids = [1; 6];
    let input = Input::Tokens {
        ids: &ids,
        batch: 1,
    };
    let error = model.forward(input, None).expect_err("too long");
    let error = error.to_string();
    assert!(
        error.contains("position 5") && error.contains("raise max_time"),
        "{error}"
    );
}
