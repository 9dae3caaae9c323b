//! How many heads queries and keys have.

use serde::{Deserialize, Serialize};

use super::AttentionConfig;

/// Published choices of head counts, from `heads = H`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// As `query_heads` and `kv_heads` say.
    #[default]
    Explicit,
    /// `H` query heads, `H` key heads.
    Mha,
    /// `H`, `H/4`.
    Gqa,
    /// `H`, 1.
    Mqa,
    /// `H/2`, `H/4`.
    Sqa,
    /// `H/2`, `H/2`.
    SymmetricSqa,
    /// `H/4`, `H/4`.
    ExtremeSqa,
    /// `H/4`, 1.
    ExtremeSmqa,
    /// `3H/4`, `H/4`.
    LightSqa,
    /// `H/4`, `H/2`: fewer query heads than key heads.
    ReverseSqa,
}

/// Query heads and key heads of a config.
pub(super) fn counts(config: &AttentionConfig) -> (usize, usize) {
    let heads = config.heads;
    let part = |numerator: usize, denominator: usize| (numerator * heads / denominator).max(1);
    match config.variant {
        Variant::Explicit => {
            let or = |given: usize, other: usize| if given == 0 { other } else { given };
            let query = or(config.query_heads, heads);
            (query, or(config.kv_heads, query))
        }
        Variant::Mha => (heads, heads),
        Variant::Gqa => (heads, part(1, 4)),
        Variant::Mqa => (heads, 1),
        Variant::Sqa => (part(1, 2), part(1, 4)),
        Variant::SymmetricSqa => (part(1, 2), part(1, 2)),
        Variant::ExtremeSqa => (part(1, 4), part(1, 4)),
        Variant::ExtremeSmqa => (part(1, 4), 1),
        Variant::LightSqa => (part(3, 4), part(1, 4)),
        Variant::ReverseSqa => (part(1, 4), part(1, 2)),
    }
}
