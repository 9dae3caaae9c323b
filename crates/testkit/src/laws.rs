//! The laws. Each takes one registered token mixer in one config and says what is broken, or nothing.

use std::sync::Arc;

use anyformer_mixers::{Context, Options, State, TokenMixer};
use anyformer_ops::recompute::{given, noted};
use anyformer_ops::{Device, ParamStore, Precision, Tensor, meter, portable, tensor_values};
use serde_json::json;

use crate::cases::{Case, DIM};
use crate::tolerance::{DIFFERENCE, GRADIENT, ROUNDED, SELF, check};
use crate::uniform;

type Law = fn(&Case) -> Result<(), String>;

/// Every law with its name.
pub const LAWS: &[(&str, Law)] = &[
    ("kernel form equals portable form", kernel_equals_portable),
    ("operands rounded to bf16 change little", rounded_is_near),
    ("streamed equals whole", streamed_equals_whole),
    ("sequences leave and join a state", states_part_and_join),
    ("a mixer that cannot stream refuses a state", refuses_state),
    ("no look-ahead", no_look_ahead),
    ("packed equals alone", packed_equals_alone),
    ("batch order changes nothing", batch_order),
    ("gradients equal finite differences", finite_differences),
    ("declared cost equals counted cost", cost_is_true),
    ("same seed gives same bits", same_bits),
    ("every parameter gets a gradient", every_gradient),
    ("unknown keys are refused with the nearest", refuses_keys),
    ("every knob is on the card", knobs_are_true),
];

fn run(
    mixer: &dyn TokenMixer,
    x: Tensor<3>,
    context: &Context,
    state: Option<&State>,
) -> Result<(Tensor<3>, Option<State>), String> {
    mixer
        .forward(x, context, state)
        .map_err(|error| error.to_string())
}

fn gradients(
    mixer: &dyn TokenMixer,
    store: &ParamStore,
    x: &Tensor<3>,
    context: &Context,
) -> Result<Vec<(String, Vec<f32>)>, String> {
    let (y, state) = run(mixer, x.clone(), context, None)?;
    let weight = uniform(91, y.dims(), &x.device());
    let mut loss = (y.clone() * weight).sum();
    let mut all = vec![("y".to_string(), tensor_values(y))];
    for (name, tensor) in state.iter().flat_map(|state| state.tensors()) {
        all.push((format!("state {name}"), tensor_values(tensor.values())));
        let values = tensor.values();
        let shape = values.dims();
        loss = loss + (values * uniform(92, shape, &x.device())).sum();
    }
    let mut grads = loss.backward();
    let dx = x.grad(&grads).ok_or("x has no gradient")?;
    all.push(("grad x".into(), tensor_values(dx)));
    for param in store.params().iter().filter(|param| param.trainable()) {
        let grad = param
            .gradient(&mut grads)
            .ok_or_else(|| format!("{} has no gradient", param.name()))?;
        all.push((format!("grad {}", param.name()), grad));
    }
    Ok(all)
}

fn kernel_equals_portable(case: &Case) -> Result<(), String> {
    let device = Device::flex().autodiff();
    let (mixer, store) = case.build(&device)?;
    for time in [1, 19, 70] {
        let x = uniform(1, [2, case.time(time), DIM], &device).require_grad();
        let context = Context {
            keep_state: case.streams(),
            ..case.context()
        };
        let fast = gradients(&*mixer, &store, &x, &context)?;
        let slow = portable(|| gradients(&*mixer, &store, &x, &context))?;
        for ((name, got), (_, want)) in fast.iter().zip(&slow) {
            let tolerance = match name.starts_with("grad") {
                true => GRADIENT,
                false => SELF,
            };
            check(&format!("time {time}, {name}"), got, want, tolerance)?;
        }
    }
    Ok(())
}

/// What a pass in bf16 rounds within a mixer leaves three digits: of its attention, where it has one that is exact.
fn rounded_is_near(case: &Case) -> Result<(), String> {
    let (mixer, store) = case.build(&Device::flex().autodiff())?;
    let x = uniform(1, [2, case.time(70), DIM], &store.device()).require_grad();
    let of = |precision| {
        let context = case.context();
        gradients(
            &*mixer,
            &store,
            &x,
            &Context {
                precision,
                ..context
            },
        )
    };
    let (want, got) = (of(Precision::F32)?, of(Precision::Bf16)?);
    check("y", &got[0].1, &want[0].1, ROUNDED)?;
    // All together: gradients that nearly cancel hold less than three digits of the others.
    let [got, want] = [got, want].map(|all| all.into_iter().flat_map(|(_, values)| values));
    let (got, want): (Vec<f32>, Vec<f32>) = (got.collect(), want.collect());
    check("gradients", &got, &want, ROUNDED).map(|_| ())
}

fn streamed_equals_whole(case: &Case) -> Result<(), String> {
    if !case.streams() {
        return Ok(());
    }
    let device = Device::flex();
    let (mixer, _) = case.build(&device)?;
    let time = 75;
    let x = uniform(2, [2, time, DIM], &device);
    let context = Context::with_state();
    let (whole, last) = run(&*mixer, x.clone(), &context, None)?;
    let last = last.ok_or("no state although the card says that it streams")?;
    for cuts in [
        vec![0, 1, 64, 75],
        vec![0, 37, 75],
        vec![0, 70, 71, 72, 73, 74, 75],
    ] {
        let mut state: Option<State> = None;
        let mut parts = Vec::new();
        for pair in cuts.windows(2) {
            let piece = x.clone().slice([0..2, pair[0]..pair[1]]);
            let (y, next) = match (&state, pair[1] - pair[0]) {
                (Some(state), 1) => mixer
                    .step(piece, state)
                    .map(|(y, state)| (y, Some(state)))
                    .map_err(|error| error.to_string())?,
                _ => run(&*mixer, piece, &context, state.as_ref())?,
            };
            parts.push(y);
            state = next;
        }
        let got = tensor_values(Tensor::cat(parts, 1));
        check(
            &format!("cuts {cuts:?}"),
            &got,
            &tensor_values(whole.clone()),
            SELF,
        )?;
        let state = state.ok_or("the state was lost on the way")?;
        if state.times != last.times {
            return Err(format!(
                "times {:?}, expected {:?}",
                state.times, last.times
            ));
        }
        for ((name, got), (_, want)) in state.tensors().iter().zip(last.tensors()) {
            let (got, want) = (tensor_values(got.values()), tensor_values(want.values()));
            check(&format!("cuts {cuts:?}, state {name}"), &got, &want, SELF)?;
        }
    }
    Ok(())
}

fn states_part_and_join(case: &Case) -> Result<(), String> {
    if !case.streams() {
        return Ok(());
    }
    let device = Device::flex();
    let (mixer, _) = case.build(&device)?;
    let x = uniform(2, [3, 12, DIM], &device);
    let piece = |row: usize, from: usize, to: usize| x.clone().slice([row..row + 1, from..to]);
    let step = |x: Tensor<3>, state: &State| {
        mixer
            .step(x, state)
            .map(|(y, state)| (tensor_values(y), state))
            .map_err(|error| error.to_string())
    };
    let mut alone = Vec::new();
    for (row, length) in [(0, 3), (1, 11), (2, 7)] {
        let (_, state) = run(&*mixer, piece(row, 0, length), &Context::with_state(), None)?;
        alone.push(state.ok_or("no state although the card says that it streams")?);
    }
    let all = State::join(&alone.iter().collect::<Vec<_>>());
    let both = all.select(&[2, 0]);
    let (got, both) = step(Tensor::cat(vec![piece(2, 7, 8), piece(0, 3, 4)], 0), &both)?;
    for (at, row, time) in [(0, 2, 7), (1, 0, 3)] {
        let (want, state) = step(piece(row, time, time + 1), &alone[row])?;
        let own = &got[at * DIM..(at + 1) * DIM];
        check(&format!("sequence {row} beside another"), own, &want, SELF)?;
        let left = both.select(&[at]);
        if left.times != state.times {
            return Err(format!(
                "times {:?}, expected {:?}",
                left.times, state.times
            ));
        }
        for ((name, got), (_, want)) in left.tensors().iter().zip(state.tensors()) {
            let (got, want) = (tensor_values(got.values()), tensor_values(want.values()));
            check(&format!("sequence {row}, state {name}"), &got, &want, SELF)?;
        }
    }
    Ok(())
}

fn refuses_state(case: &Case) -> Result<(), String> {
    if case.streams() {
        return Ok(());
    }
    let device = Device::flex();
    let (mixer, _) = case.build(&device)?;
    let x = uniform(2, [1, case.time(8), DIM], &device);
    let context = Context {
        keep_state: true,
        ..case.context()
    };
    let (_, state) = run(&*mixer, x.clone(), &context, None)?;
    if state.is_some() {
        return Err("a state came back although the card says that it cannot stream".into());
    }
    match mixer.forward(x, &case.context(), Some(&State::new(vec![4]))) {
        Ok(_) => Err("a state was taken without a word".into()),
        Err(_) => Ok(()),
    }
}

fn no_look_ahead(case: &Case) -> Result<(), String> {
    let device = Device::flex();
    let (mixer, _) = case.build(&device)?;
    let time = case.time(70);
    let x = uniform(3, [1, time, DIM], &device);
    let (before, _) = run(&*mixer, x.clone(), &case.context(), None)?;
    let before = tensor_values(before);
    let mut looked = false;
    for at in [1, time / 2, time - 1] {
        let mut values = tensor_values(x.clone());
        for value in &mut values[at * DIM..(at + 1) * DIM] {
            *value = 3.0 - *value;
        }
        let changed = Tensor::<1>::from_data(values.as_slice(), &device).reshape([1, time, DIM]);
        let (after, _) = run(&*mixer, changed, &case.context(), None)?;
        let after = tensor_values(after);
        let same = before[..at * DIM] == after[..at * DIM];
        looked |= !same;
        if case.causal() && !same {
            return Err(format!(
                "a change at {at} of {time} reached an earlier output"
            ));
        }
        if before[at * DIM..(at + 1) * DIM] == after[at * DIM..(at + 1) * DIM] {
            return Err(format!("a change at {at} did not reach its own output"));
        }
    }
    match case.causal() || looked {
        true => Ok(()),
        false => Err("the card says bidirectional, yet nothing looked ahead".into()),
    }
}

fn packed_equals_alone(case: &Case) -> Result<(), String> {
    if case.grid.is_some() {
        return Ok(()); // a grid has one length; its batch is the dense one
    }
    let device = Device::flex().autodiff();
    let (mixer, _) = case.build(&device)?;
    let lengths = [5usize, 70, 1, 33];
    let mut offsets = vec![0];
    for length in lengths {
        offsets.push(offsets[offsets.len() - 1] + length);
    }
    let total = offsets[lengths.len()];
    let x = uniform(4, [1, total, DIM], &device).require_grad();
    let context = Context {
        offsets: Some(Arc::new(offsets.clone())),
        keep_state: case.streams(),
        ..Context::default()
    };
    let weight = uniform(93, [1, total, DIM], &device);
    let (packed, states) = run(&*mixer, x.clone(), &context, None)?;
    let grads = (packed.clone() * weight.clone()).sum().backward();
    let packed_dx = x.grad(&grads).ok_or("x has no gradient")?;
    let mut parts = Vec::new();
    let mut grad_parts = Vec::new();
    let mut ends: Vec<State> = Vec::new();
    for pair in offsets.windows(2) {
        let range = pair[0]..pair[1];
        let piece = x.clone().inner().slice([0..1, range.clone()]);
        let piece = Tensor::<3>::from_inner(piece).require_grad();
        let context = Context {
            keep_state: case.streams(),
            ..Context::default()
        };
        let (y, state) = run(&*mixer, piece.clone(), &context, None)?;
        let grads = (y.clone() * weight.clone().slice([0..1, range]))
            .sum()
            .backward();
        grad_parts.push(piece.grad(&grads).ok_or("x has no gradient")?);
        parts.push(y);
        ends.extend(state);
    }
    let alone = tensor_values(Tensor::cat(parts, 1));
    check("outputs", &tensor_values(packed), &alone, SELF)?;
    let alone = tensor_values(Tensor::cat(grad_parts, 1));
    check("gradient of x", &tensor_values(packed_dx), &alone, GRADIENT)?;
    // Going on from the packed state must give what going on alone gives.
    let Some(states) = states else { return Ok(()) };
    let next = uniform(5, [lengths.len(), 3, DIM], &device.clone().inner());
    let next = Tensor::<3>::from_inner(next);
    let (together, _) = run(&*mixer, next.clone(), &Context::with_state(), Some(&states))?;
    for (row, end) in ends.iter().enumerate() {
        let piece = next.clone().slice([row..row + 1]);
        let (alone, _) = run(&*mixer, piece, &Context::with_state(), Some(end))?;
        let got = tensor_values(together.clone().slice([row..row + 1]));
        check(
            &format!("row {row} going on"),
            &got,
            &tensor_values(alone),
            SELF,
        )?;
    }
    Ok(())
}

fn batch_order(case: &Case) -> Result<(), String> {
    let device = Device::flex();
    let (mixer, _) = case.build(&device)?;
    let x = uniform(6, [3, case.time(21), DIM], &device);
    let (y, _) = run(&*mixer, x.clone(), &case.context(), None)?;
    let turned = Tensor::cat(vec![x.clone().slice([2..3]), x.slice([0..2])], 0);
    let (z, _) = run(&*mixer, turned, &case.context(), None)?;
    let back = Tensor::cat(vec![z.clone().slice([1..3]), z.slice([0..1])], 0);
    match tensor_values(y) == tensor_values(back) {
        true => Ok(()),
        false => Err("a row's output depends on its place in the batch".into()),
    }
}

fn finite_differences(case: &Case) -> Result<(), String> {
    let device = Device::flex().autodiff();
    let (mixer, store) = case.build(&device)?;
    let time = case.time(11);
    let x = uniform(7, [1, time, DIM], &device).require_grad();
    let weight = uniform(94, [1, time, DIM], &device);
    let loss = |x: &Tensor<3>| -> Result<Tensor<1>, String> {
        let (y, _) = run(&*mixer, x.clone(), &case.context(), None)?;
        Ok((y * weight.clone()).sum())
    };
    // Which bucket, cluster or expert: held as they are here, because a step that turns one is a jump.
    let (first, choices) = noted(|| loss(&x));
    let value = |x: &Tensor<3>| -> Result<f64, String> {
        let choices = choices.clone();
        let (y, _) = given(choices, || run(&*mixer, x.clone(), &case.context(), None))?;
        let weights = tensor_values(weight.clone());
        let y = tensor_values(y);
        Ok(y.iter()
            .zip(&weights)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum())
    };
    let mut grads = first?.backward();
    let dx = tensor_values(x.grad(&grads).ok_or("x has no gradient")?);
    let eps = 1e-2f32;
    let compare = |what: &str, analytic: f64, plus: f64, minus: f64, scale: f64| {
        let numeric = (plus - minus) / (2.0 * f64::from(eps));
        let error = (analytic - numeric).abs() / scale.max(1e-2);
        match error < DIFFERENCE {
            true => Ok(()),
            false => Err(format!(
                "{what}: analytic {analytic:.5}, numeric {numeric:.5}, error {error:.1e}"
            )),
        }
    };
    // Along one random direction per tensor: every entry takes part.
    let along = |grad: &[f32], direction: &[f32]| -> f64 {
        grad.iter()
            .zip(direction)
            .map(|(g, d)| f64::from(*g) * f64::from(*d))
            .sum()
    };
    let norm = |values: &[f32]| {
        values
            .iter()
            .map(|v| f64::from(*v).powi(2))
            .sum::<f64>()
            .sqrt()
    };
    let unit = |seed: u64, count: usize| {
        let values = tensor_values(uniform(seed, [count], &Device::flex()));
        let length = norm(&values) as f32;
        values
            .iter()
            .map(|value| value / length)
            .collect::<Vec<f32>>()
    };
    let direction = unit(8, dx.len());
    let base = tensor_values(x.clone());
    let moved = |sign: f32| {
        let values: Vec<f32> = base
            .iter()
            .zip(&direction)
            .map(|(v, d)| v + sign * eps * d)
            .collect();
        Tensor::<1>::from_data(values.as_slice(), &device).reshape([1, time, DIM])
    };
    compare(
        "x",
        along(&dx, &direction),
        value(&moved(1.0))?,
        value(&moved(-1.0))?,
        norm(&dx),
    )?;
    for param in store.params().iter().filter(|param| param.trainable()) {
        let grad = param
            .gradient(&mut grads)
            .ok_or_else(|| format!("{} has no gradient", param.name()))?;
        let direction = unit(9, grad.len());
        let base = param.values();
        let at = |sign: f32| {
            let values = base
                .iter()
                .zip(&direction)
                .map(|(v, d)| v + sign * eps * d)
                .collect();
            param.set(values).map_err(|error| error.to_string())?;
            value(&x)
        };
        let (plus, minus) = (at(1.0)?, at(-1.0)?);
        param.set(base.clone()).map_err(|error| error.to_string())?;
        compare(
            param.name(),
            along(&grad, &direction),
            plus,
            minus,
            norm(&grad),
        )?;
    }
    Ok(())
}

fn cost_is_true(case: &Case) -> Result<(), String> {
    let device = Device::flex();
    let (mixer, store) = case.build(&device)?;
    for time in [1, 40, 70] {
        let time = case.time(time);
        let declared = mixer.cost(time);
        let x = uniform(10, [1, time, DIM], &device);
        let context = Context {
            keep_state: case.streams(),
            ..case.context()
        };
        let (result, flops) = meter::count(|| run(&*mixer, x, &context, None));
        let bytes = result?.1.map_or(0, |state| state.bytes());
        let counted = (store.count() as u64, flops, bytes);
        let declared = (declared.params, declared.flops, declared.state_bytes);
        if counted != declared {
            return Err(format!(
                "time {time}: declared (parameters, operations, state bytes) {declared:?}, counted {counted:?}"
            ));
        }
    }
    Ok(())
}

fn same_bits(case: &Case) -> Result<(), String> {
    let once = || -> Result<Vec<Vec<u32>>, String> {
        let device = Device::flex().autodiff();
        let (mixer, store) = case.build(&device)?;
        let x = uniform(11, [2, case.time(70), DIM], &device).require_grad();
        let all = gradients(&*mixer, &store, &x, &case.context())?;
        let bits = |(_, values): (String, Vec<f32>)| values.iter().map(|v| v.to_bits()).collect();
        Ok(all.into_iter().map(bits).collect())
    };
    match once()? == once()? {
        true => Ok(()),
        false => Err("two runs differ".into()),
    }
}

fn every_gradient(case: &Case) -> Result<(), String> {
    let device = Device::flex().autodiff();
    let (mixer, store) = case.build(&device)?;
    let x = uniform(12, [2, case.time(20), DIM], &device).require_grad();
    for (name, values) in gradients(&*mixer, &store, &x, &case.context())? {
        if !values.iter().all(|value| value.is_finite()) {
            return Err(format!("{name} is not finite"));
        }
        if name.starts_with("grad") && values.iter().all(|value| *value == 0.0) {
            return Err(format!("{name} is zero everywhere"));
        }
    }
    Ok(())
}

fn refuses_keys(case: &Case) -> Result<(), String> {
    let mut options = case.options.clone();
    options.insert("headz_".into(), json!(3));
    match (case.entry.resolve)(&options) {
        Ok(_) => Err("an unknown key was taken".into()),
        Err(error) if error.to_string().contains("headz_") => Ok(()),
        Err(error) => Err(format!("the error does not name the key: {error}")),
    }
}

fn knobs_are_true(case: &Case) -> Result<(), String> {
    let resolved = (case.entry.resolve)(&Options::new()).map_err(|error| error.to_string())?;
    let mut keys: Vec<&str> = resolved.keys().map(String::as_str).collect();
    let mut knobs: Vec<&str> = case.entry.card.knobs.iter().map(|knob| knob.name).collect();
    keys.sort_unstable();
    knobs.sort_unstable();
    match keys == knobs {
        true => Ok(()),
        false => Err(format!("the config has {keys:?}, the card {knobs:?}")),
    }
}
