//! The backward pass, one key head of one sequence at a time.
//!
//! With `delta_i = do_i . o_i`: `dv_j = sum_i p_ij do_i`, `ds_ij = p_ij (do_i . v_j - delta_i)`,
//! `dq_i = scale sum_j ds_ij k_j`, `dk_j = scale sum_i ds_ij q_i`. Where weights are dropped, `m_ij` their factors,
//! `dv_j = sum_i m_ij p_ij do_i` and `ds_ij = p_ij (m_ij do_i . v_j - delta_i)`.

use std::ops::Range;

use rayon::prelude::*;

use super::block::{Block, Tile, gather, gather_transposed, soften_back};
use super::dropped::Kept;
use super::{Attention, Group, KEYS, ROWS};
use crate::disjoint::Disjoint;
use crate::gemm::Matrix;
use crate::gemm::products::Products;
use crate::transpose::transpose;

/// Gradients in the shapes of the arguments.
#[derive(Clone, Debug)]
pub struct Grads {
    /// `[total_q, heads, head_dim]`.
    pub q: Vec<f32>,
    /// `[total_k, kv_heads, head_dim]`.
    pub k: Vec<f32>,
    /// `[total_k, kv_heads, value_dim]`.
    pub v: Vec<f32>,
    /// `[heads, distances]` of the biases; empty where there are none.
    pub bias: Vec<f32>,
}

/// Gradients from that of `o` and, where lse was used, of `lse`; `o` and `lse` are what [`super::forward`] gave.
pub fn backward(
    attention: &Attention,
    o: &[f32],
    lse: &[f32],
    d_o: &[f32],
    dlse: Option<&[f32]>,
) -> Grads {
    attention.check();
    assert_eq!(d_o.len(), o.len(), "attention do");
    let keys = attention.k_offsets[attention.k_offsets.len() - 1];
    let mut grads = Grads {
        q: vec![0.0; attention.q.len()],
        k: vec![0.0; keys * attention.kv_heads * attention.head_dim],
        v: vec![0.0; keys * attention.kv_heads * attention.value_dim],
        bias: vec![0.0; attention.bias.map_or(0, |bias| bias.table.len())],
    };
    let shared = [
        Disjoint::new(&mut grads.q),
        Disjoint::new(&mut grads.k),
        Disjoint::new(&mut grads.v),
    ];
    let one = |group: Group| run(attention, &group, [o, lse], d_o, dlse, &shared);
    let groups = attention.groups().into_par_iter().with_max_len(1);
    if attention.bias.is_none() {
        groups.for_each(|group| {
            one(group);
        });
        return grads;
    }
    // Summed in the order of the groups, whatever the number of threads.
    let part = grads.bias.len() / attention.kv_heads;
    let parts: Vec<(usize, Vec<f32>)> = groups.map(|group| (group.kv_head, one(group))).collect();
    for (kv_head, table) in parts {
        let sum = &mut grads.bias[kv_head * part..][..part];
        for (sum, value) in sum.iter_mut().zip(&table[kv_head * part..]) {
            *sum += value;
        }
    }
    grads
}

/// One group; gives the gradient of the table of biases, of which only the group's heads are not zero.
fn run(
    attention: &Attention,
    group: &Group,
    [o, all_lse]: [&[f32]; 2],
    d_o: &[f32],
    dlse: Option<&[f32]>,
    [dq, dk, dv]: &[Disjoint; 3],
) -> Vec<f32> {
    let (head_dim, value_dim) = (attention.head_dim, attention.value_dim);
    let zeros = |rows: usize, cols: usize| vec![0.0f32; rows * cols];
    let (mut dk_here, mut dv_here) = (zeros(group.keys, head_dim), zeros(group.keys, value_dim));
    let (mut q, mut q_rows, mut dq_here) = (
        zeros(ROWS, head_dim),
        zeros(ROWS, head_dim),
        zeros(ROWS, head_dim),
    );
    let (mut g, mut g_rows) = (zeros(ROWS, value_dim), zeros(ROWS, value_dim));
    let (mut scores, mut dp) = (zeros(KEYS, ROWS), zeros(KEYS, ROWS));
    let mut turned = zeros(ROWS, head_dim);
    let mut kept = Kept::of(attention);
    let mut products = Products::new(attention.precision);
    let mut dbias = vec![0.0; attention.bias.map_or(0, |bias| bias.table.len())];
    let block = attention.wide_block();
    let mut wide = (zeros(1, block), zeros(1, block));
    // Gradients of the keys and values of a tile that do not lie together.
    let gathered = if attention.plans.is_some() { KEYS } else { 0 };
    let (mut dk_tile, mut dv_tile) = (zeros(gathered, head_dim), zeros(gathered, value_dim));
    for (first, count) in attention.row_blocks(group) {
        let block = Block::new(attention, group, first, count);
        let width = block.width;
        if block.rows < ROWS {
            [&mut q, &mut q_rows, &mut g, &mut g_rows]
                .into_iter()
                .for_each(|x| x.fill(0.0));
        }
        gather_transposed(
            attention,
            group,
            &block,
            attention.q,
            head_dim,
            attention.scale,
            &mut q,
        );
        gather(
            attention,
            group,
            &block,
            attention.q,
            head_dim,
            attention.scale,
            &mut q_rows,
        );
        gather_transposed(attention, group, &block, d_o, value_dim, 1.0, &mut g);
        gather(attention, group, &block, d_o, value_dim, 1.0, &mut g_rows);
        // Infinity makes p zero: for padding, and for rows that no key reached.
        let (mut lse, mut delta) = ([f32::INFINITY; ROWS], [0.0; ROWS]);
        for lane in 0..block.rows {
            let index = attention.row(group, first + lane);
            if all_lse[index] != f32::NEG_INFINITY {
                lse[lane] = all_lse[index];
                let o = &o[index * value_dim..][..value_dim];
                let g = &g_rows[lane * value_dim..][..value_dim];
                let dot: f32 = o.iter().zip(g).map(|(o, g)| o * g).sum();
                delta[lane] = dot - dlse.map_or(0.0, |dlse| dlse[index]);
            }
        }
        dq_here.fill(0.0);
        for tile in block.tiles(group.kv_head) {
            let keys = tile.keys;
            let pieces = attention.pieces(group, tile);
            let (k, k_stride) = attention.keys(group, tile, &mut wide.0);
            let (v, v_stride) = attention.values(group, tile, &mut wide.1);
            let (scores, dp) = (&mut scores[..keys * ROWS], &mut dp[..keys * ROWS]);
            let turned = |data| Matrix {
                data,
                strides: (1, ROWS),
            };
            let k_turned = Matrix {
                data: k,
                strides: (1, k_stride),
            };
            let v_turned = Matrix {
                data: v,
                strides: (1, v_stride),
            };
            products.run(
                [width, head_dim, keys],
                turned(&q),
                k_turned,
                scores,
                (1, ROWS),
                false,
            );
            products.run(
                [width, value_dim, keys],
                turned(&g),
                v_turned,
                dp,
                (1, ROWS),
                false,
            );
            if let Some(kept) = &mut kept {
                kept.draw(attention, group, first, tile);
                kept.apply(dp);
            }
            soften_back(&block, tile, scores, dp, &lse, &delta);
            if let Some(kept) = &kept {
                kept.apply(scores);
            }
            block.add_biases(dp, tile.from, &mut dbias);
            let (p, ds) = (turned(scores), turned(dp));
            let k = Matrix {
                data: k,
                strides: (k_stride, 1),
            };
            products.run(
                [width, keys, head_dim],
                ds,
                k,
                &mut dq_here,
                (1, ROWS),
                true,
            );
            // Transposed results: their columns, the keys, are the rows of the buffers.
            let g = Matrix {
                data: &g_rows,
                strides: (1, value_dim),
            };
            let shape = [value_dim, width, keys];
            add_product(
                &mut products,
                shape,
                [g, p],
                tile,
                pieces,
                &mut dv_tile,
                &mut dv_here,
            );
            let q = Matrix {
                data: &q_rows,
                strides: (1, head_dim),
            };
            let shape = [head_dim, width, keys];
            add_product(
                &mut products,
                shape,
                [q, ds],
                tile,
                pieces,
                &mut dk_tile,
                &mut dk_here,
            );
        }
        transpose(
            [head_dim, block.rows],
            attention.scale,
            &dq_here,
            ROWS,
            &mut turned,
            head_dim,
        );
        for (lane, row) in turned.chunks_exact(head_dim).enumerate().take(block.rows) {
            write(dq, attention.row(group, first + lane), row);
        }
    }
    for (gradient, here, dim) in [(dk, &dk_here, head_dim), (dv, &dv_here, value_dim)] {
        for (key, row) in here.chunks_exact(dim).enumerate() {
            write(
                gradient,
                (group.first_key + key) * attention.kv_heads + group.kv_head,
                row,
            );
        }
    }
    dbias
}

/// Adds a product `[dim, keys]` to the rows of a tile's keys, by way of `scratch` where they lie in pieces.
fn add_product(
    products: &mut Products,
    [dim, inner, keys]: [usize; 3],
    [left, right]: [Matrix; 2],
    tile: Tile,
    pieces: &[Range<usize>],
    scratch: &mut [f32],
    all: &mut [f32],
) {
    let shape = [dim, inner, keys];
    if pieces.is_empty() {
        let rows = &mut all[tile.from * dim..];
        products.run(shape, left, right, rows, (1, dim), true);
        return;
    }
    products.run(shape, left, right, scratch, (1, dim), false);
    let mut at = 0;
    for piece in pieces {
        let (from, count) = (piece.start * dim, piece.len() * dim);
        for (sum, value) in all[from..from + count].iter_mut().zip(&scratch[at..]) {
            *sum += value;
        }
        at += count;
    }
}

/// Writes row `row` of a `[.., values.len()]` array.
#[allow(unsafe_code)]
fn write(shared: &Disjoint, row: usize, values: &[f32]) {
    // SAFETY: a key head of a sequence, and the query heads that read it, belong to one task; the part is gone when this
    // returns.
    unsafe { shared.part(row * values.len(), values.len()) }.copy_from_slice(values);
}
