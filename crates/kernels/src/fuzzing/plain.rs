//! Loops over values or rows: activations and gated units, rope, embedding, dropout, AdamW, and the iterated inverse.

use super::Bytes;
use crate::activation::{self, Activation};
use crate::adamw::AdamW;
use crate::dropout::{Dropout, Key};
use crate::rope::{Rotations, inverse_frequencies, rotate};
use crate::testing::assert_near;
use crate::{embedding, glu, inverse};

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|value| f64::from(*value)).collect()
}

fn near(name: &str, got: &[f32], want: impl Iterator<Item = f64>, tolerance: f32) {
    let want: Vec<f32> = want.map(|value| value as f32).collect();
    assert_near(name, got, &want, tolerance);
}

/// One of them.
pub(super) fn fuzz(bytes: &mut Bytes) {
    let kinds = [activations, halves, turns, rows, drops, updates, inverses];
    bytes.one_of(&kinds)(bytes);
}

fn activations(bytes: &mut Bytes) {
    let f = bytes.one_of(&[
        Activation::Silu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Sigmoid,
        Activation::Softplus,
        Activation::LogSigmoid { temperature: 16.0 },
        Activation::Gelu,
    ]);
    let count = bytes.length(300);
    let [a, b, dy] = [12.0, 30.0, 30.0].map(|largest| bytes.values(count, largest));
    let value = |x: &f32| activation::naive(f, f64::from(*x));
    let mut y = vec![0.0; count];
    f.forward(&a, &mut y);
    near("activation", &y, a.iter().map(value), 2e-6);
    let mut held = a.clone();
    f.replace(&mut held);
    assert_eq!(held, y, "activation in place");
    f.gated(&a, &b, &mut y);
    let products = |x: &'_ [f32]| {
        wide(x)
            .into_iter()
            .zip(a.clone())
            .map(move |(x, a)| x * value(&a))
    };
    near("gated", &y, products(&b), 4e-6);
    let [mut da, mut db, mut dx] = [(); 3].map(|()| vec![0.0; count]);
    f.gated_backward(&a, &b, &dy, &mut da, &mut db);
    near("gated db", &db, products(&dy), 4e-6);
    let through: Vec<f32> = dy.iter().zip(&b).map(|(dy, b)| dy * b).collect();
    f.backward(&a, &through, &mut dx);
    near("gated da", &da, wide(&dx).into_iter(), 4e-6);
    // Away from the corner of relu, where differences see both slopes.
    let slope = |(x, dy): (&f32, &f32)| {
        let (x, dy) = (f64::from(*x), f64::from(*dy));
        let (up, down) = (
            activation::naive(f, x + 1e-5),
            activation::naive(f, x - 1e-5),
        );
        match f {
            Activation::Relu => dy * f64::from(u8::from(x > 0.0)),
            _ => dy * (up - down) / 2e-5,
        }
    };
    near(
        "activation dx",
        &dx,
        a.iter().zip(&through).map(slope),
        2e-5,
    );
}

fn halves(bytes: &mut Bytes) {
    let (dim, count) = (bytes.length(90).max(1), bytes.length(20));
    let (x, dy) = (
        bytes.values(2 * dim * count, 20.0),
        bytes.values(dim * count, 20.0),
    );
    let [mut y, mut dx] = [dim, 2 * dim].map(|width| vec![0.0; width * count]);
    glu::glu(dim, &x, &mut y);
    glu::glu_backward(dim, &x, &dy, &mut dx);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let (x, dy) = (wide(&x), wide(&dy));
    let at = |row: usize, c: usize| (x[2 * row * dim + c], x[(2 * row + 1) * dim + c]);
    let all = || (0..count).flat_map(|row| (0..dim).map(move |c| (row, c)));
    near(
        "glu",
        &y,
        all().map(|(row, c)| at(row, c).0 * sigmoid(at(row, c).1)),
        4e-6,
    );
    let mut want = vec![0.0; x.len()];
    for (row, c) in all() {
        let ((a, b), dy) = (at(row, c), dy[row * dim + c]);
        want[2 * row * dim + c] = dy * sigmoid(b);
        want[(2 * row + 1) * dim + c] = dy * a * sigmoid(b) * (1.0 - sigmoid(b));
    }
    near("glu dx", &dx, want.into_iter(), 4e-6);
}

fn turns(bytes: &mut Bytes) {
    let (heads, half) = (bytes.number(1, 3), bytes.length(40));
    let dim = 2 * half + bytes.number(usize::from(half == 0), 9);
    let (period, times) = (bytes.length(30).max(1), bytes.number(1, 3));
    let first = bytes.number(0, 60_000);
    let positions: Vec<usize> = (0..period).map(|t| first + t).collect();
    let frequencies = inverse_frequencies(2 * half, 10_000.0);
    let x = bytes.values(period * times * heads * dim, 30.0);
    let rotations = Rotations::new(&positions, &frequencies);
    let (mut y, mut back) = (vec![0.0; x.len()], vec![0.0; x.len()]);
    rotate(heads, dim, &rotations, false, &x, &mut y);
    rotate(heads, dim, &rotations, true, &y, &mut back);
    near("rope there and back", &back, wide(&x).into_iter(), 4e-6);
    let mut want = wide(&x);
    for (at, row) in want.chunks_exact_mut(dim).enumerate() {
        let position = positions[at / heads % period] as f32;
        for i in 0..half {
            let angle = f64::from(position * frequencies[i]);
            let (low, high) = (row[i], row[half + i]);
            row[i] = low * angle.cos() - high * angle.sin();
            row[half + i] = high * angle.cos() + low * angle.sin();
        }
    }
    near("rope", &y, want.into_iter(), 4e-6);
}

fn rows(bytes: &mut Bytes) {
    let dim = bytes.one_of(&[1, 3, 8, 16, 32, 33, 64, 100]);
    let (vocabulary, count) = (bytes.length(200).max(1), bytes.length(300));
    let ids: Vec<u32> = (0..count)
        .map(|_| bytes.number(0, vocabulary - 1) as u32)
        .collect();
    let (weight, dout) = (
        bytes.values(vocabulary * dim, 30.0),
        bytes.values(count * dim, 30.0),
    );
    let (mut out, mut dweight) = (
        vec![f32::NAN; count * dim],
        vec![f32::NAN; vocabulary * dim],
    );
    embedding::gather(dim, &weight, &ids, &mut out);
    embedding::scatter_add(dim, &dout, &ids, &mut dweight);
    let mut want = vec![0.0; dweight.len()];
    for (at, id) in ids.iter().enumerate() {
        let row = *id as usize * dim;
        assert_eq!(out[at * dim..][..dim], weight[row..][..dim], "embedding");
        for c in 0..dim {
            want[row + c] += f64::from(dout[at * dim + c]);
        }
    }
    near("embedding gradient", &dweight, want.into_iter(), 1e-5);
}

fn drops(bytes: &mut Bytes) {
    let (offsets, dim) = (bytes.offsets(40), bytes.length(150).max(1));
    let dropout = Dropout {
        key: Key::new(bytes.number(0, 9) as u64, bytes.number(0, 9) as u64),
        site: bytes.number(0, 9) as u32,
        chance: bytes.one_of(&[0.0, 0.1, 0.5, 0.99]),
    };
    let total = offsets[offsets.len() - 1] * dim;
    let x = bytes.values(total, 1e30);
    let run = |offsets: &[usize], x: &[f32]| {
        let mut y = vec![f32::NAN; x.len()];
        dropout.apply(offsets, dim, x, &mut y);
        y
    };
    let (y, kept) = (run(&offsets, &x), run(&offsets, &vec![1.0; total]));
    for ((y, x), kept) in y.iter().zip(&x).zip(&kept) {
        assert!(*kept == 0.0 || *kept == 1.0 / (1.0 - dropout.chance));
        assert!(*y == x * kept, "dropout of {x} by {kept}: {y}");
    }
    // Later tokens change nothing before them, in the first sequence at least.
    let short = offsets[1] / 2;
    assert_eq!(
        run(&[0, short], &x[..short * dim]),
        y[..short * dim],
        "dropout of a part"
    );
}

fn updates(bytes: &mut Bytes) {
    let count = bytes.length(300);
    let mut p = bytes.values(count, 30.0);
    let g = bytes.values(count, 30.0);
    let (mut m, mut v) = (bytes.values(count, 1.0), bytes.values(count, 1.0));
    v.iter_mut().for_each(|v| *v = v.abs());
    let optimiser = AdamW {
        learning_rate: bytes.one_of(&[1e-3, 0.1, 0.0]),
        beta1: bytes.one_of(&[0.9, 0.0]),
        beta2: bytes.one_of(&[0.999, 0.95]),
        eps: 1e-8,
        weight_decay: bytes.one_of(&[0.0, 0.1]),
        step: bytes.number(1, 1000) as u64,
        gradient_scale: bytes.one_of(&[1.0, 0.01]),
    };
    let AdamW {
        learning_rate: lr,
        beta1: b1,
        beta2: b2,
        ..
    } = optimiser;
    let [mut p64, mut m64, mut v64] = [&p, &m, &v].map(|x| wide(x));
    for (at, g) in wide(&g).into_iter().enumerate() {
        let g = g * f64::from(optimiser.gradient_scale);
        m64[at] = b1 * m64[at] + (1.0 - b1) * g;
        v64[at] = b2 * v64[at] + (1.0 - b2) * g * g;
        let power = |beta: f64| 1.0 - beta.powf(optimiser.step as f64);
        let root = (v64[at] / power(b2)).sqrt() + optimiser.eps;
        p64[at] = p64[at] * (1.0 - lr * optimiser.weight_decay) - lr * m64[at] / power(b1) / root;
    }
    optimiser.update(&mut p, &g, &mut m, &mut v);
    near("adamw m", &m, m64.into_iter(), 1e-5);
    near("adamw v", &v, v64.into_iter(), 1e-5);
    // Where the second moment is denormal, f32 has few digits of its root.
    near("adamw p", &p, p64.into_iter(), 1e-3);
}

fn inverses(bytes: &mut Bytes) {
    let (m, steps, count) = (
        bytes.length(20).max(1),
        bytes.number(0, 6),
        bytes.number(1, 3),
    );
    let seed = bytes.number(0, 65_535) as u64;
    let a = inverse::weights(seed, count, m);
    let (z, _) = inverse::forward(&a, m, steps, false);
    let want = wide(&a);
    let want = want.chunks(m * m).flat_map(|a| inverse::naive(a, m, steps));
    near("inverse", &z, want, 2e-4);
}
