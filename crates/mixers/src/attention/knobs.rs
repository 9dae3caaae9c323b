//! What attention's knobs do, one line each.

use crate::card::{Knob, WEIGHT_DROPOUT};

/// The knobs, for the cards of this mixer and its windowed form.
pub(crate) const KNOBS: &[Knob] = &[
    Knob {
        name: "heads",
        doc: "nominal heads; head_dim is dim / heads unless given",
    },
    Knob {
        name: "query_heads",
        doc: "query heads; 0 takes heads",
    },
    Knob {
        name: "kv_heads",
        doc: "key and value heads; 0 takes the query heads",
    },
    Knob {
        name: "head_dim",
        doc: "features per head; 0 takes dim / heads",
    },
    Knob {
        name: "variant",
        doc: "head counts by name: mha, gqa, mqa, sqa, symmetric_sqa, extreme_sqa, extreme_smqa, light_sqa, reverse_sqa; explicit: as given",
    },
    Knob {
        name: "causal",
        doc: "look back only",
    },
    Knob {
        name: "window",
        doc: "keys nearer than this many tokens, itself counted; 0 for all",
    },
    Knob {
        name: "sinks",
        doc: "first tokens that are seen beside the window, however long ago they were (StreamingLLM, arXiv 2309.17453); with rope or no positions",
    },
    Knob {
        name: "position",
        doc: "rope, alibi, none, xpos (rope with a decay), t5, kerple_log, kerple_power, sandwich (biases by distance, learned), in memory linear in time; with the whole matrix of scores in memory: fire (a bias by distance over the query's place, learned), disentangled (DeBERTa's: products with vectors of distances, one table for all layers), rerope, self_extend (rope with far keys brought nearer, for evaluation)",
    },
    Knob {
        name: "rope_base",
        doc: "base of the rotary frequencies",
    },
    Knob {
        name: "rope_dim",
        doc: "features of a head that turn, from the first on; 0 turns all",
    },
    Knob {
        name: "rope_scaling",
        doc: "how the rotary frequencies are stretched to longer texts, a table with type: none, linear (factor), dynamic (factor, length), yarn (factor, length, beta_fast, beta_slow, attention_factor, truncate), llama3 (factor, length, low_freq_factor, high_freq_factor); length in tokens",
    },
    Knob {
        name: "position_buckets",
        doc: "buckets of t5, and of disentangled on each side; 0 there: none, a vector for each distance",
    },
    Knob {
        name: "position_distance",
        doc: "tokens from which on t5 and disentangled have one bucket",
    },
    Knob {
        name: "position_terms",
        doc: "terms of disentangled: both, to_place (content of the query, place of the key), from_place",
    },
    Knob {
        name: "position_shared",
        doc: "disentangled projects places as it does tokens",
    },
    Knob {
        name: "position_norm",
        doc: "a layer norm over the vectors of disentangled",
    },
    Knob {
        name: "position_window",
        doc: "tokens that rerope and self_extend treat as rope does",
    },
    Knob {
        name: "position_group",
        doc: "how much slower positions go beyond; 0 with rerope: they stop",
    },
    Knob {
        name: "bias",
        doc: "biases on all four projections",
    },
    Knob {
        name: "qkv_bias",
        doc: "biases on queries, keys and values, whatever bias says",
    },
    Knob {
        name: "qk_norm",
        doc: "an RMS norm per head on queries and keys, before they turn",
    },
    Knob {
        name: "norm_eps",
        doc: "added to the mean square in that norm, or the variance in that of places",
    },
    Knob {
        name: "cache",
        doc: "how keys and values are kept from token to token on the CPU: f32, or bf16 at half the memory; not with positions in the scores",
    },
    WEIGHT_DROPOUT,
];
