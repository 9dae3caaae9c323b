//! Head counts by name.

use serde::{Deserialize, Serialize};

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

impl Variant {
    /// Query heads and key heads, from the nominal ones and what was given.
    pub(super) fn counts(self, heads: usize, query: usize, keys: usize) -> (usize, usize) {
        let at_least_one = |count: usize| count.max(1);
        match self {
            Variant::Explicit => {
                let query = if query == 0 { heads } else { query };
                (query, if keys == 0 { query } else { keys })
            }
            Variant::Mha => (heads, heads),
            Variant::Gqa => (heads, at_least_one(heads / 4)),
            Variant::Mqa => (heads, 1),
            Variant::Sqa => (at_least_one(heads / 2), at_least_one(heads / 4)),
            Variant::SymmetricSqa => (at_least_one(heads / 2), at_least_one(heads / 2)),
            Variant::ExtremeSqa => (at_least_one(heads / 4), at_least_one(heads / 4)),
            Variant::ExtremeSmqa => (at_least_one(heads / 4), 1),
            Variant::LightSqa => (at_least_one(3 * heads / 4), at_least_one(heads / 4)),
            Variant::ReverseSqa => (at_least_one(heads / 4), at_least_one(heads / 2)),
        }
    }
}
