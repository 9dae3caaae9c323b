//! What a training step holds at once, by the number of layers.

use anyformer_kernels::memory::{Counting, allocated, peak, reset_peak};
use anyformer_models::{Input, Model, ModelConfig, Pass, Target};
use anyformer_ops::Device;
use serde_json::{Value, json};

#[global_allocator]
static ALLOCATOR: Counting<std::alloc::System> = Counting(std::alloc::System);

const TIME: usize = 512;

/// Most bytes of a forward and a backward pass beside the model itself and the gradients that it ends with.
fn activations(layers: usize, changes: Value, pass: &Pass) -> usize {
    let mut config = json!({"dim": 32, "layers": layers, "reads": {"tokens": {"vocab": 11}}});
    for (key, value) in changes.as_object().expect("a table") {
        config[key] = value.clone();
    }
    let config = ModelConfig::from_json(&config).expect("a config");
    let model = Model::new(&config, &Device::flex().autodiff(), 1).expect("a model");
    let ids: Vec<u32> = (0..TIME as u32).map(|at| at * 7 % 11).collect();
    let wanted: Vec<i64> = ids.iter().map(|id| i64::from(*id)).collect();
    let step = || {
        let input = Input::Tokens {
            ids: &ids,
            batch: 1,
        };
        let scored = model.loss_with(input, None, Target::Tokens(&wanted), pass);
        scored.expect("runs").loss.backward()
    };
    drop(step());
    let before = allocated();
    reset_peak();
    let gradients = step();
    let most = peak() - before;
    drop(gradients);
    most - 4 * model.params().count()
}

/// One test: the counters are the process's.
#[test]
fn what_a_step_holds() {
    let plain = Pass::default();
    let again = Pass {
        recompute: true,
        ..Pass::default()
    };
    let kept = |layers| activations(layers, json!({}), &plain);
    let reversible = |layers| activations(layers, json!({"reversible": true}), &plain);
    let recomputed = |layers| activations(layers, json!({}), &again);
    let stream = 4 * TIME * 32;
    let (few, many) = (kept(2), kept(12));
    assert!(
        many > few + 10 * 8 * stream,
        "kept whole, it grows: {few} {many}"
    );
    let (few, many) = (reversible(2), reversible(12));
    assert!(
        many < few + stream,
        "it does not grow with depth: {few} {many}"
    );
    let (few, many) = (recomputed(2), recomputed(12));
    assert!(many < few + 12 * stream, "a stream a layer: {few} {many}");
    let wide = |chunks: usize| {
        let channel = json!({"name": "swiglu", "hidden": 512});
        let changes = json!({"reversible": true, "ff_chunks": chunks, "channel": channel});
        activations(4, changes, &plain)
    };
    let (whole, chunked) = (wide(0), wide(8));
    assert!(
        3 * chunked < whole,
        "an eighth of the tokens at a time: {whole} {chunked}"
    );
}
