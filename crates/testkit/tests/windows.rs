//! Attention behind a window, over texts of several pages: what left the window is let go and changes nothing.

use anyformer_mixers::{Context, Options, token_mixer};
use anyformer_ops::{Device, tensor_values};
use anyformer_testkit::{stirred, uniform};
use serde_json::{Value, json};

const DIM: usize = 32;
const TIME: usize = 300;

fn options(options: Value) -> Options {
    options.as_object().cloned().expect("a table")
}

#[test]
fn steps_over_many_pages_equal_the_whole() {
    let device = Device::flex();
    for knobs in [
        json!({"window": 1}),
        json!({"window": 9, "kv_heads": 2}),
        json!({"window": 70}),
        json!({"window": 9, "sinks": 4}),
        json!({"window": 65, "sinks": 70, "position": "none"}),
        json!({"window": 9, "position": "t5"}),
    ] {
        let entry = token_mixer("attention").expect("registered");
        let (mixer, _) = stirred(entry, DIM, &options(knobs.clone()), &device).expect("builds");
        let x = uniform(3, [1, TIME, DIM], &device);
        let whole = mixer.forward(x.clone(), &Context::default(), None);
        let whole = tensor_values(whole.expect("runs").0);
        let mut state = None;
        let mut at = 0;
        // Steps, a piece longer than the window and a page, steps again.
        for count in std::iter::repeat_n(1, 90)
            .chain([130])
            .chain(std::iter::repeat_n(1, 80))
        {
            let piece = x.clone().narrow(1, at, count);
            let (y, next) = mixer
                .forward(piece, &Context::with_state(), state.as_ref())
                .expect("runs");
            for (got, want) in tensor_values(y).iter().zip(&whole[at * DIM..]) {
                assert!((got - want).abs() < 1e-5, "{knobs} at {at}: {got} {want}");
            }
            at += count;
            let next = next.expect("streams");
            assert_eq!(next.bytes(), mixer.cost(at).state_bytes, "{knobs} at {at}");
            state = Some(next);
        }
        assert_eq!(at, TIME);
    }
}

/// With no more tokens than the sinks and the window hold, sinks are attention; so is a window of the whole text.
#[test]
fn a_window_that_holds_all_is_attention() {
    let device = Device::flex();
    let x = uniform(3, [2, 40, DIM], &device);
    let run = |knobs: Value| {
        let entry = token_mixer("attention").expect("registered");
        let (mixer, _) = stirred(entry, DIM, &options(knobs), &device).expect("builds");
        let y = mixer.forward(x.clone(), &Context::default(), None);
        tensor_values(y.expect("runs").0)
    };
    let full = run(json!({}));
    for knobs in [json!({"window": 40}), json!({"window": 33, "sinks": 7})] {
        for (got, want) in run(knobs).iter().zip(&full) {
            assert!((got - want).abs() < 1e-5, "{got} {want}");
        }
    }
}
