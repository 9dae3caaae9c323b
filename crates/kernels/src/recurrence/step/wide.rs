//! A token on AVX-512: columns of the state by eight vectors, whose sums over its rows stay in registers.

use std::arch::x86_64::*;

use super::Token;
use crate::simd::dot;
use crate::transpose::wide::lanes;

/// Where a token reads and writes.
struct Place {
    from: *const f32,
    to: *mut f32,
    o: *mut f32,
}

/// The state goes from `before`, or from where it is, to `state`; outputs are overwritten. Panics when sizes do not fit.
/// AVX-512 must be there.
pub(super) fn step(token: &Token, before: Option<&[f32]>, state: &mut [f32], o: &mut [f32]) {
    let (kd, vd) = (token.k.len(), o.len());
    assert!(
        token.q.len() == kd
            && token.decay.len() == kd
            && token.v.len() == vd
            && state.len() == kd * vd
            && before.is_none_or(|before| before.len() == kd * vd)
            && is_x86_feature_detected!("avx512f"),
        "a step of other sizes"
    );
    let to = state.as_mut_ptr();
    let place = Place {
        from: before.map_or(to.cast_const(), <[f32]>::as_ptr),
        to,
        o: o.as_mut_ptr(),
    };
    // SAFETY: every element lies within its slice, as just checked, and so does the level; an element is read before it is
    // written, where the state is in place.
    unsafe { columns(token, &place, vd) };
}

#[target_feature(enable = "avx512f")]
unsafe fn columns(token: &Token, place: &Place, vd: usize) {
    let mut column = 0;
    while column < vd {
        let left = vd - column;
        // SAFETY: the columns exist.
        unsafe {
            column += match left {
                128.. => strip::<8>(token, place, vd, column, !0),
                64.. => strip::<4>(token, place, vd, column, !0),
                32.. => strip::<2>(token, place, vd, column, !0),
                _ => strip::<1>(token, place, vd, column, lanes(left)),
            };
        }
    }
}

/// `V` vectors of columns from `column` on, of which the last one has the lanes of `mask`; returns how many columns.
///
/// # Safety
/// Those columns exist, and AVX-512 is there.
#[target_feature(enable = "avx512f")]
unsafe fn strip<const V: usize>(
    token: &Token,
    place: &Place,
    vd: usize,
    column: usize,
    mask: __mmask16,
) -> usize {
    let masks: [__mmask16; V] = std::array::from_fn(|v| if v + 1 == V { mask } else { !0 });
    let load = |from: *const f32| -> [__m512; V] {
        // SAFETY: lanes past the columns are masked out.
        std::array::from_fn(|v| unsafe { _mm512_maskz_loadu_ps(masks[v], from.add(16 * v)) })
    };
    let (mut written, mut sums) = ([_mm512_setzero_ps(); V], [_mm512_setzero_ps(); V]);
    // SAFETY: rows and columns exist.
    unsafe {
        let value = load(token.v.as_ptr().add(column));
        match token.beta {
            None => written = value,
            Some(beta) => {
                for i in 0..token.k.len() {
                    let decay = token.decay[i];
                    let query = _mm512_set1_ps(token.q[i] * decay);
                    let key = _mm512_set1_ps(token.k[i] * decay);
                    let state = load(place.from.add(i * vd + column));
                    for v in 0..V {
                        written[v] = _mm512_fmadd_ps(key, state[v], written[v]);
                        sums[v] = _mm512_fmadd_ps(query, state[v], sums[v]);
                    }
                }
                let beta = _mm512_set1_ps(beta);
                let along = _mm512_set1_ps(dot(token.q, token.k));
                for v in 0..V {
                    written[v] = _mm512_mul_ps(beta, _mm512_sub_ps(value[v], written[v]));
                    sums[v] = _mm512_fmadd_ps(along, written[v], sums[v]);
                }
            }
        }
        for i in 0..token.k.len() {
            let decay = _mm512_set1_ps(token.decay[i]);
            let key = _mm512_set1_ps(token.k[i]);
            let query = _mm512_set1_ps(token.q[i]);
            let mut state = load(place.from.add(i * vd + column));
            let to = place.to.add(i * vd + column);
            for v in 0..V {
                state[v] = _mm512_fmadd_ps(key, written[v], _mm512_mul_ps(decay, state[v]));
                _mm512_mask_storeu_ps(to.add(16 * v), masks[v], state[v]);
            }
            if token.beta.is_none() {
                for v in 0..V {
                    sums[v] = _mm512_fmadd_ps(query, state[v], sums[v]);
                }
            }
        }
        let scale = _mm512_set1_ps(token.scale);
        for v in 0..V {
            let o = _mm512_mul_ps(scale, sums[v]);
            _mm512_mask_storeu_ps(place.o.add(column + 16 * v), masks[v], o);
        }
    }
    16 * V
}
