use super::*;
use crate::testing::{Close, assert_close, assert_near, differences, rand_vec};

/// Holds the outputs and every gradient against the equation.
fn check(name: &str, attention: &FeatureAttention, tol: f32) {
    check_by(assert_close, name, attention, tol);
}

fn check_by(close: Close, name: &str, attention: &FeatureAttention, tol: f32) {
    let dy = rand_vec(9, attention.v.len());
    let constants = naive::stabilisers(attention);
    let inputs = [attention.q, attention.k, attention.v];
    let (want, grads) = differences(&inputs, &dy, |x| {
        naive::forward(attention, [x[0], x[1], x[2]], &constants)
    });
    let (o, got) = both(attention, &dy);
    close(&format!("{name} o"), &o, &want, tol);
    for ((what, got), want) in ["dq", "dk", "dv"].iter().zip(&got).zip(&grads) {
        close(&format!("{name} {what}"), got, want, tol);
    }
}

/// The outputs and the gradients of q, k and v; what is not written stays NaN.
fn both(attention: &FeatureAttention, dy: &[f32]) -> (Vec<f32>, [Vec<f32>; 3]) {
    let unknown = |values: &[f32]| vec![f32::NAN; values.len()];
    let mut o = unknown(attention.v);
    let saved = forward(attention, &mut o);
    let mut grads = [attention.q, attention.k, attention.v].map(unknown);
    backward(
        attention,
        &saved,
        dy,
        grads.each_mut().map(Vec::as_mut_slice),
    );
    (o, grads)
}

#[test]
fn every_map_matches_the_equation() {
    let offsets = [0, 3, 3, 8, 9];
    let (heads, dim, value_dim, total) = (2, 5, 3, 9);
    let (q, k) = (
        rand_vec(1, total * heads * dim),
        rand_vec(2, total * heads * dim),
    );
    let v = rand_vec(3, total * heads * value_dim);
    let rows: Vec<f32> = rand_vec(4, 7 * dim).iter().map(|x| 2.0 * x).collect();
    let (sin, cos): (Vec<f32>, Vec<f32>) =
        (0..total).map(|at| (0.15 * at as f32).sin_cos()).unzip();
    let maps = [
        Map::Elu,
        Map::Relu { add: 1e-3 },
        Map::Turned {
            sin: &sin,
            cos: &cos,
        },
        Map::RandomRelu {
            rows: &rows,
            add: 1e-3,
        },
        Map::RandomExp {
            rows: &rows,
            eps: 1e-2,
        },
        Map::Identity,
    ];
    for map in maps {
        for normalise in [true, false] {
            if normalise && matches!(map, Map::Identity) {
                continue;
            }
            let attention = FeatureAttention {
                q: &q,
                k: &k,
                v: &v,
                offsets: &offsets,
                heads,
                dim,
                value_dim,
                map,
                normalise,
            };
            check(&format!("{map:?} {normalise}"), &attention, 1e-4);
        }
    }
}

/// A problem from bytes, against the equation.
pub(crate) fn fuzz(bytes: &mut crate::fuzzing::Bytes) {
    let offsets = bytes.offsets(5);
    let total = offsets[offsets.len() - 1];
    let (heads, dim, value_dim) = (bytes.number(1, 3), bytes.number(1, 6), bytes.number(1, 18));
    let (q, k) = (
        rand_vec(1, total * heads * dim),
        rand_vec(2, total * heads * dim),
    );
    let v = rand_vec(3, total * heads * value_dim);
    let rows: Vec<f32> = rand_vec(4, bytes.number(1, 9) * dim)
        .iter()
        .map(|x| 2.0 * x)
        .collect();
    let (sin, cos): (Vec<f32>, Vec<f32>) =
        (0..total).map(|at| (0.15 * at as f32).sin_cos()).unzip();
    let (map, normalise) = match bytes.number(0, 5) {
        0 => (Map::Elu, bytes.flag()),
        1 => (Map::Relu { add: 1e-2 }, bytes.flag()),
        2 => (
            Map::Turned {
                sin: &sin,
                cos: &cos,
            },
            false,
        ),
        3 => (
            Map::RandomRelu {
                rows: &rows,
                add: 1e-2,
            },
            bytes.flag(),
        ),
        4 => (
            Map::RandomExp {
                rows: &rows,
                eps: 1e-2,
            },
            bytes.flag(),
        ),
        _ => (Map::Identity, false),
    };
    let attention = FeatureAttention {
        q: &q,
        k: &k,
        v: &v,
        offsets: &offsets,
        heads,
        dim,
        value_dim,
        map,
        normalise,
    };
    let name = format!("{map:?} {normalise} {offsets:?}");
    check_by(assert_near, &name, &attention, 1e-3);
}

/// More than one block, and a last one that is not full.
#[test]
fn long_sequences_match_the_equation() {
    let (heads, dim, value_dim, total) = (1, 3, 9, 70);
    let (q, k) = (rand_vec(1, total * dim), rand_vec(2, total * dim));
    let v = rand_vec(3, total * value_dim);
    let rows: Vec<f32> = rand_vec(4, 4 * dim).iter().map(|x| 2.0 * x).collect();
    for map in [
        Map::Elu,
        Map::RandomExp {
            rows: &rows,
            eps: 1e-4,
        },
    ] {
        let attention = FeatureAttention {
            q: &q,
            k: &k,
            v: &v,
            offsets: &[0, 67, 70],
            heads,
            dim,
            value_dim,
            map,
            normalise: true,
        };
        check(&format!("{map:?}"), &attention, 2e-4);
    }
}

/// More than one part, whose sums are put together; where exponentials are of the same largest one, some parts have a lower
/// one of their own.
#[test]
fn parts_of_a_sequence_match_the_equation() {
    let (heads, dim, total) = (1, 2, PART + 9);
    let mut k = rand_vec(2, total * dim);
    k[..PART].iter_mut().for_each(|k| *k *= 0.3);
    let (q, v) = (rand_vec(1, total * dim), rand_vec(3, total));
    for map in [
        Map::Elu,
        Map::RandomExp {
            rows: &[2.0, -1.5, 0.5, 1.0],
            eps: 1e-2,
        },
    ] {
        let attention = FeatureAttention {
            q: &q,
            k: &k,
            v: &v,
            offsets: &[0, total],
            heads,
            dim,
            value_dim: 1,
            map,
            normalise: true,
        };
        assert_eq!(attention.parts().len(), 2);
        check(&format!("parts, {map:?}"), &attention, 2e-4);
    }
}

/// Queries that no feature of the keys reaches: a quotient of the smallest divisor, and no gradient through it.
#[test]
fn empty_divisors_are_guarded() {
    let (q, k, v) = ([-1.0, 2.0], [-1.0, -3.0], [1.0, 2.0]);
    let attention = FeatureAttention {
        q: &q,
        k: &k,
        v: &v,
        offsets: &[0, 2],
        heads: 1,
        dim: 1,
        value_dim: 1,
        map: Map::Relu { add: 0.0 },
        normalise: true,
    };
    let (o, grads) = both(&attention, &[1.0, 1.0]);
    assert_eq!(o, [0.0, 0.0]);
    assert!(grads.iter().flatten().all(|x| *x == 0.0));
}

#[test]
fn fewer_instructions_match_as_well() {
    crate::testing::with_fewer_instructions(&[
        every_map_matches_the_equation,
        long_sequences_match_the_equation,
        parts_of_a_sequence_match_the_equation,
        empty_divisors_are_guarded,
    ]);
}
