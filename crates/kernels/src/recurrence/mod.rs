//! The chunkwise linear recurrence: one engine for linear attention, retention, GLA, Mamba-2, DeltaNet, Gated DeltaNet.
//!
//! Per head, with a state `S [key_dim, value_dim]`, for every token
//! ```text
//! S <- diag(exp(g_t)) S                      gate: none, one log decay per head, or one per key feature
//! u_t = v_t                                  additive write
//! u_t = beta_t (v_t - k_t S)                 delta write: what the decayed state returns for the key is replaced
//! S <- S + k_t^T u_t
//! o_t = scale q_t S
//! ```
//! Yang et al. 2024, arXiv 2312.06635 (gates, chunks, two levels) and arXiv 2406.06484 (delta rule in chunks);
//! Yang, Kautz, Hatamizadeh 2025, arXiv 2412.06464 (both).
//!
//! In a chunk of `C` tokens with `D_ij` the product of the decays of tokens `j+1..=i` (per key feature or one number) and
//! `gram(X, Y)_ij = sum_c X_ic Y_jc D_ijc` for `j <= i`:
//! ```text
//! P = gram(scale Q, K),  M = gram(K, K) below the diagonal
//! U = V, or (I + diag(beta) M) U = diag(beta) (V - (K D_i0) S)
//! O = (scale Q D_i0) S + P U
//! S <- D_C0 S + (K D_Ci)^T U
//! ```
//! Nothing is divided by a decay and every factor is at most one, so that no decay is too strong. Chunks of a head follow
//! each other; heads and sequences run in parallel. Sequences of a few tokens go token by token. The backward pass keeps
//! the states at chunk borders and computes the rest again.

mod backward;
mod chunk;
mod chunk_backward;
mod forward;
mod gram;
#[cfg(test)]
mod known;
#[cfg(any(test, fuzzing))]
mod naive;
mod solve;
mod step;
#[cfg(any(test, fuzzing))]
mod tests;
#[cfg(any(test, fuzzing))]
pub(crate) use tests::fuzz;
#[cfg(any(test, fuzzing))]
mod whole;

pub use backward::{Gradients, backward};
pub use forward::{Output, forward};

/// The decay of the state.
#[derive(Clone, Copy, Debug)]
pub enum Gate<'a> {
    /// None.
    None,
    /// One log decay per head, at most zero: `[total, heads]`.
    Scalar(&'a [f32]),
    /// One log decay per key feature, at most zero: `[total, heads, key_dim]`.
    Vector(&'a [f32]),
}

/// How a token is written into the state.
#[derive(Clone, Copy, Debug)]
pub enum Write<'a> {
    /// Its value is added.
    Additive,
    /// What the state returns for its key is moved towards its value by the share `beta [total, heads]`.
    Delta(&'a [f32]),
}

/// Sizes of a problem.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// Cumulative lengths of the packed sequences: first 0, last the total time.
    pub offsets: &'a [usize],
    /// Heads of values, gates and states.
    pub heads: usize,
    /// Heads of queries and keys; divides `heads`. Head `h` reads query and key head `h / (heads / key_heads)`.
    pub key_heads: usize,
    /// Features of a key.
    pub key_dim: usize,
    /// Features of a value.
    pub value_dim: usize,
    /// Factor on the queries.
    pub scale: f32,
    /// Tokens of a chunk.
    pub chunk_len: usize,
}

/// A chunk length that is good for most sizes.
pub const CHUNK_LEN: usize = 64;

impl Problem<'_> {
    fn total(&self) -> usize {
        self.offsets[self.offsets.len() - 1]
    }

    fn sequences(&self) -> usize {
        self.offsets.len() - 1
    }

    fn state(&self) -> usize {
        self.key_dim * self.value_dim
    }

    /// Chunks before each sequence, and of all.
    fn chunks(&self) -> Vec<usize> {
        let mut all = vec![0];
        for pair in self.offsets.windows(2) {
            all.push(all[all.len() - 1] + (pair[1] - pair[0]).div_ceil(self.chunk_len));
        }
        all
    }

    /// Tokens of the longest chunk.
    fn slots(&self) -> usize {
        let longest = self.offsets.windows(2).map(|pair| pair[1] - pair[0]).max();
        longest.unwrap_or(0).min(self.chunk_len)
    }

    /// Operations of the forward pass over all sequences.
    fn work(&self, write: Write) -> u64 {
        let delta = matches!(write, Write::Delta(_));
        flops(
            self.total(),
            self.heads,
            self.key_dim,
            self.value_dim,
            delta,
        )
    }

    fn check(&self, q: &[f32], k: &[f32], v: &[f32], gate: Gate, write: Write) {
        let (total, heads) = (self.total(), self.heads);
        assert!(
            self.chunk_len > 0 && self.key_dim > 0 && self.value_dim > 0,
            "chunk_len, key_dim and value_dim are positive"
        );
        assert!(
            self.key_heads > 0 && heads > 0 && heads.is_multiple_of(self.key_heads),
            "key_heads {} divides heads {heads}",
            self.key_heads
        );
        assert!(
            self.offsets[0] == 0 && self.offsets.is_sorted(),
            "offsets start at 0 and grow"
        );
        assert_eq!(q.len(), total * self.key_heads * self.key_dim, "queries");
        assert_eq!(k.len(), q.len(), "keys");
        assert_eq!(v.len(), total * heads * self.value_dim, "values");
        match gate {
            Gate::None => {}
            Gate::Scalar(gate) => assert_eq!(gate.len(), total * heads, "scalar gate"),
            Gate::Vector(gate) => assert_eq!(gate.len(), total * heads * self.key_dim, "gate"),
        }
        if let Write::Delta(beta) = write {
            assert_eq!(beta.len(), total * heads, "beta");
        }
    }
}

/// Operations of a forward pass over one sequence of `time` tokens, in the recurrent form of the equation: reading and
/// writing a rank-one update of the state, `4 key_dim value_dim` per token and head, and as much half again for the
/// delta rule's read. One multiply-add is two operations. The chunked form that is run trades a few more for matrix
/// products; decays are not counted. This count is the same whatever the chunk and the gate.
pub fn flops(time: usize, heads: usize, key_dim: usize, value_dim: usize, delta: bool) -> u64 {
    let per_token = if delta { 6 } else { 4 };
    (per_token * time * heads * key_dim * value_dim) as u64
}
