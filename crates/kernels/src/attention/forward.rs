//! The forward pass: online softmax over blocks of keys.

use rayon::prelude::*;

use super::block::{Block, Running, gather_transposed, soften};
use super::dropped::Kept;
use super::{Attention, Group, KEYS, ROWS, decode};
use crate::disjoint::Disjoint;
use crate::gemm::Matrix;
use crate::gemm::products::Products;
use crate::simd::PARALLEL_FLOPS;
use crate::transpose::transpose;

/// What [`forward`] gives.
#[derive(Clone, Debug)]
pub struct Output {
    /// `[total_q, heads, value_dim]`.
    pub o: Vec<f32>,
    /// Natural logarithm of the sum of exponentials, `[total_q, heads]`.
    pub lse: Vec<f32>,
}

/// Where tasks write: each its own rows.
pub(super) struct Shared<'a> {
    o: Disjoint<'a>,
    lse: Disjoint<'a>,
}

impl Shared<'_> {
    /// The output row and lse at index `row` of `[total_q, heads]`.
    #[allow(unsafe_code)]
    pub(super) fn write(&self, row: usize, o: &[f32], lse: f32) {
        // SAFETY: each row of `[total_q, heads]` belongs to one block of one group, which one task handles; the parts
        // are gone when this returns.
        unsafe {
            self.o.part(row * o.len(), o.len()).copy_from_slice(o);
            self.lse.part(row, 1)[0] = lse;
        }
    }
}

/// Computes the outputs.
pub fn forward(attention: &Attention) -> Output {
    attention.check();
    let fold = attention.fold();
    let rows = attention.q_offsets[attention.q_offsets.len() - 1] * attention.heads;
    let mut o = vec![0.0; rows * attention.value_dim];
    let mut lse = vec![f32::NEG_INFINITY; rows];
    let shared = Shared {
        o: Disjoint::new(&mut o),
        lse: Disjoint::new(&mut lse),
    };
    let parallel = attention.flops() >= PARALLEL_FLOPS;
    let groups = attention.groups();
    let (mut few, mut tasks) = (Vec::new(), Vec::new());
    for sequence in groups.chunks_exact(attention.kv_heads) {
        let rows = sequence[0].queries * fold;
        if rows == 0 {
            continue;
        }
        // The way of a few rows knows neither lists of keys, biases by distance, numbers nor dropout.
        let plain = attention.plans.is_none()
            && attention.bias.is_none()
            && attention.ids.is_none()
            && attention.dropout.is_none();
        if rows <= decode::ROWS && plain {
            few.push(sequence);
            continue;
        }
        for group in sequence {
            let blocks = attention.row_blocks(group).into_iter();
            tasks.extend(blocks.map(|(first, rows)| (group, first, rows)));
        }
    }
    decode::forward(attention, &few, &shared, parallel);
    let run = |scratch: &mut Scratch, (group, first, rows): (&Group, usize, usize)| {
        run(attention, group, first, rows, &shared, scratch);
    };
    let scratch = || Scratch::new(attention);
    if parallel {
        tasks
            .into_par_iter()
            .with_max_len(1)
            .for_each_init(scratch, run);
    } else if !tasks.is_empty() {
        let mut scratch = scratch();
        tasks.into_iter().for_each(|task| run(&mut scratch, task));
    }
    Output { o, lse }
}

/// Buffers of one thread.
struct Scratch {
    /// `[head_dim, ROWS]`.
    q: Vec<f32>,
    /// `[KEYS, ROWS]`.
    scores: Vec<f32>,
    /// `[value_dim, ROWS]`.
    o: Vec<f32>,
    /// `[ROWS, value_dim]`.
    turned: Vec<f32>,
    /// Keys and values of a tile, where they are held in bf16 or do not lie together.
    wide: (Vec<f32>, Vec<f32>),
    kept: Option<Kept>,
    products: Products,
}

impl Scratch {
    fn new(attention: &Attention) -> Self {
        Scratch {
            q: vec![0.0; attention.head_dim * ROWS],
            scores: vec![0.0; KEYS * ROWS],
            o: vec![0.0; attention.value_dim * ROWS],
            turned: vec![0.0; attention.value_dim * ROWS],
            wide: (
                vec![0.0; attention.wide_block()],
                vec![0.0; attention.wide_block()],
            ),
            kept: Kept::of(attention),
            products: Products::new(attention.precision),
        }
    }
}

fn run(
    attention: &Attention,
    group: &Group,
    first: usize,
    rows: usize,
    shared: &Shared,
    scratch: &mut Scratch,
) {
    let (head_dim, value_dim) = (attention.head_dim, attention.value_dim);
    let block = Block::new(attention, group, first, rows);
    let Scratch {
        q,
        scores,
        o,
        turned,
        wide,
        kept,
        products,
    } = scratch;
    gather_transposed(
        attention,
        group,
        &block,
        attention.q,
        head_dim,
        attention.scale,
        q,
    );
    o.fill(0.0);
    let mut running = Running::new();
    for tile in block.tiles(group.kv_head) {
        let keys = tile.keys;
        let (k, k_stride) = attention.keys(group, tile, &mut wide.0);
        let (v, v_stride) = attention.values(group, tile, &mut wide.1);
        let scores = &mut scores[..keys * ROWS];
        let q = Matrix {
            data: q,
            strides: (1, ROWS),
        };
        let k = Matrix {
            data: k,
            strides: (1, k_stride),
        };
        products.run(
            [block.width, head_dim, keys],
            q,
            k,
            scores,
            (1, ROWS),
            false,
        );
        soften(&block, tile, scores, &mut running, o);
        if let Some(kept) = kept {
            kept.draw(attention, group, first, tile);
            kept.apply(scores);
        }
        let p = Matrix {
            data: scores,
            strides: (1, ROWS),
        };
        let v = Matrix {
            data: v,
            strides: (v_stride, 1),
        };
        products.run([block.width, keys, value_dim], p, v, o, (1, ROWS), true);
    }
    transpose([value_dim, rows], 1.0, o, ROWS, turned, value_dim);
    for (lane, row) in turned.chunks_exact_mut(value_dim).enumerate().take(rows) {
        let sum = running.sum[lane];
        if sum == 0.0 {
            continue;
        }
        let inverse = 1.0 / sum;
        row.iter_mut().for_each(|o| *o *= inverse);
        let lse = running.largest[lane] + sum.ln();
        shared.write(attention.row(group, first + lane), row, lse);
    }
}
