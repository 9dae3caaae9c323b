//! The mixers and configs that the laws are held against.

use anyformer_mixers::{Context, Direction, Options, TokenEntry, TokenMixer};
use anyformer_ops::{Device, ParamStore};
use serde_json::{Value, json};

use crate::stirred;

/// Width of the models under test.
pub const DIM: usize = 32;

/// One config of one mixer under test.
pub struct Case {
    /// The mixer.
    pub entry: &'static TokenEntry,
    /// Knobs beside the defaults.
    pub options: Options,
    /// Rows and columns that the mixer is told of; test lengths are then their product.
    pub grid: Option<[usize; 2]>,
}

impl Case {
    /// `name {options}` for messages.
    pub fn label(&self) -> String {
        format!(
            "{} {}",
            self.entry.card.name,
            Value::Object(self.options.clone())
        )
    }

    /// Whether this config is causal, by its card and its knob.
    pub fn causal(&self) -> bool {
        self.entry.causal(&self.options)
    }

    /// Whether this config must stream.
    pub fn streams(&self) -> bool {
        self.entry.streams(&self.options)
    }

    pub(crate) fn build(
        &self,
        device: &Device,
    ) -> Result<(Box<dyn TokenMixer>, ParamStore), String> {
        stirred(self.entry, DIM, &self.options, device).map_err(|error| error.to_string())
    }

    pub(crate) fn context(&self) -> Context {
        Context {
            grid: self.grid,
            ..Context::default()
        }
    }

    pub(crate) fn time(&self, time: usize) -> usize {
        self.grid.map_or(time, |[rows, columns]| rows * columns)
    }
}

/// Both directions of every registered mixer at its defaults for width [`DIM`], and configs that run other code.
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for entry in anyformer_mixers::token_mixers().iter().copied() {
        let mut push = |options: Value, grid: Option<[usize; 2]>| {
            let Value::Object(options) = options else {
                return;
            };
            cases.push(Case {
                entry,
                options,
                grid,
            });
        };
        let knob = |name: &str| entry.card.knobs.iter().any(|knob| knob.name == name);
        match entry.card.direction {
            Direction::Either if knob("causal") => {
                push(json!({"causal": true}), None);
                push(json!({"causal": false}), None);
            }
            _ => push(json!({}), None),
        }
        // Configs whose code differs from the defaults'.
        let more = match entry.card.name {
            "attention" => vec![
                json!({"kv_heads": 1, "position": "alibi"}),
                json!({"variant": "sqa", "bias": true}),
                json!({"variant": "reverse_sqa", "heads": 8}),
                json!({"window": 1, "position": "none"}),
                json!({"window": 6, "sinks": 3}),
                json!({"window": 1, "sinks": 1, "position": "none", "kv_heads": 1}),
                json!({"position": "xpos"}),
                json!({"position": "t5", "kv_heads": 2}),
                json!({"position": "t5", "causal": false, "position_buckets": 8, "position_distance": 9}),
                json!({"position": "kerple_log", "window": 9}),
                json!({"position": "kerple_power"}),
                json!({"position": "fire"}),
                json!({"position": "sandwich", "causal": false}),
                json!({"position": "disentangled", "causal": false, "position_buckets": 8, "position_distance": 20}),
                json!({"position": "disentangled", "position_buckets": 0, "position_distance": 9, "position_norm": true, "bias": true}),
                json!({"position": "disentangled", "position_terms": "to_place", "position_shared": false}),
                json!({"position": "disentangled", "position_terms": "from_place", "position_shared": false, "window": 9}),
                json!({"position": "rerope", "position_window": 4}),
                json!({"position": "self_extend", "position_window": 5, "position_group": 3}),
            ],
            "local" => vec![
                json!({"window": 8, "kv_heads": 2}),
                json!({"window": 5, "sinks": 2, "variant": "reverse_sqa", "heads": 8}),
                json!({"window": 7, "lra_compat": true}),
                json!({"window": 19, "lra_compat": true, "bias": true}),
            ],
            "linear_attention" => vec![json!({"normalise": false, "feature_map": "identity"})],
            "delta_net" => vec![json!({"conv_size": 0, "allow_neg_eigval": true})],
            "gated_delta_net" => vec![json!({"conv_size": 1, "head_dim": 12, "heads": 2})],
            "mamba" => vec![json!({"conv": 1, "state": 3, "expand": 1})],
            "mamba2" => vec![json!({"head_dim": 8, "groups": 2, "state": 6, "conv": 2})],
            "performer" => vec![
                json!({"kernel": "relu", "nb_features": 5}),
                json!({"kernel": "lra_compat"}),
                json!({"kernel": "lra_compat", "causal": false}),
            ],
            "linformer" => vec![json!({"share_kv": true, "one_kv_head": true, "k": 5})],
            "fnet" => vec![json!({"ortho": true})],
            "nystromformer" => vec![json!({"landmarks": 8, "iterations": 3, "conv": 0})],
            "synthesizer" => vec![
                json!({"variant": "random", "max_time": 80}),
                json!({"variant": "factorised_dense", "max_time": 80, "causal": false}),
                json!({"variant": "factorised_random", "max_time": 80, "rank": 3}),
            ],
            "longformer" => vec![
                json!({"window": 3, "globals": 5}),
                json!({"window": 70, "globals": 0, "bias": false}),
            ],
            "bigbird" => vec![json!({"block": 4, "random": 2, "seed": 3})],
            "sparse" => vec![
                json!({"pattern": "strided", "stride": 11, "bias": true, "summary": 1}),
                json!({"stride": 12, "summary": 3}),
            ],
            "combiner" => vec![
                json!({"segment": 6}),
                json!({"segment": 6, "causal": false}),
                json!({"pattern": "logsparse"}),
                json!({"pattern": "axial", "segment": 7}),
                json!({"pattern": "axial", "segment": 7, "causal": false}),
                json!({"pattern": "axial", "segment": 7, "row_summary": "proj"}),
                json!({"pattern": "axial", "segment": 7, "row_summary": "wsum"}),
                json!({"pattern": "axial", "segment": 5, "row_summary": "wsum_proj", "causal": false}),
                json!({"pattern": "mixture", "segment": 6, "heads": 2}),
            ],
            "sinkhorn" => vec![
                json!({"block": 5, "heads": 2, "bias": true}),
                json!({"block": 5, "cut": 2}),
                json!({"block": 5, "causal": true, "heads": 2}),
                json!({"block": 6, "lra_compat": true}),
            ],
            "reformer" => vec![
                json!({"chunk": 6, "hashes": 3, "buckets": 4}),
                json!({"chunk": 6, "hashes": 1, "buckets": 10, "lra_compat": true}),
            ],
            "routing" => vec![
                json!({"clusters": 3, "iterations": 0, "bias": true}),
                json!({"clusters": 3, "causal": true, "window": 4, "bias": true}),
            ],
            "s4d" => vec![json!({"state": 2})],
            "lru" => vec![json!({"state": 5, "r_min": 0.8, "max_phase": 0.5})],
            "transformer_xl" => vec![json!({"segment": 5, "memory": 3, "heads": 2})],
            "compressive" => vec![
                json!({"segment": 6, "memory": 4, "rate": 2, "slots": 3, "compression": "conv"}),
                json!({"segment": 4, "memory": 0, "rate": 2, "slots": 5}),
            ],
            "luna" => vec![json!({"length": 3, "bias": false, "heads": 2})],
            _ => vec![],
        };
        for options in more {
            push(options, None);
        }
        if entry.card.name == "pool" {
            push(json!({"kind": "2d"}), Some([5, 4]));
        }
    }
    cases
}
