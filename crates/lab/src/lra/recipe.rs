//! Models and training of each task: the released configurations, and small ones.

use anyformer_data::Dialect;

use super::define::{Column, Preset};

/// A task's published model and training. Widths in features, lengths in tokens.
pub(super) struct Recipe {
    pub(super) dim: usize,
    pub(super) heads: usize,
    pub(super) layers: usize,
    pub(super) qkv: usize,
    pub(super) mlp: usize,
    pub(super) pool: &'static str,
    pub(super) learned_positions: bool,
    pub(super) steps: u64,
    pub(super) batch: usize,
    pub(super) lr: f64,
    pub(super) warmup: u64,
    pub(super) rsqrt: bool,
    pub(super) decay: f64,
    pub(super) clip: f64,
    pub(super) dropout: f64,
    /// Of the weights of attention.
    pub(super) attention_dropout: f64,
}

impl Recipe {
    /// The recipe of a column.
    pub(super) fn of(preset: Preset, dialect: Dialect, column: Column) -> Self {
        let base = Recipe {
            dim: 64,
            heads: 4,
            layers: 2,
            qkv: 64,
            mlp: 128,
            pool: "mean",
            learned_positions: false,
            steps: 1000,
            batch: 16,
            lr: 1e-3,
            warmup: 100,
            rsqrt: false,
            decay: 0.01,
            clip: 1.0,
            dropout: 0.0,
            attention_dropout: 0.0,
        };
        match (preset, dialect) {
            (Preset::Smoke, _) => Recipe {
                dim: 32,
                layers: 1,
                qkv: 32,
                mlp: 64,
                steps: 2,
                batch: if column == Column::PathX { 1 } else { 2 },
                warmup: 0,
                ..base
            },
            (Preset::Small, _) => Recipe {
                lr: 2e-3,
                steps: match column {
                    Column::ListOps => 3000,
                    Column::Text | Column::Retrieval => 1000,
                    Column::Image | Column::Pathfinder => 500,
                    Column::PathX => 200,
                },
                batch: match column {
                    Column::ListOps => 32,
                    Column::PathX => 4,
                    _ => 16,
                },
                ..base
            },
            (Preset::Paper, Dialect::Official) => official(column),
            (Preset::Paper, Dialect::Nystrom) => Recipe {
                heads: 2,
                learned_positions: true,
                steps: match column {
                    Column::ListOps => 5000,
                    Column::Text => 20_000,
                    Column::Retrieval => 30_000,
                    Column::Image => 35_000,
                    Column::Pathfinder | Column::PathX => 62_400,
                },
                batch: official(column).batch,
                lr: 1e-4,
                warmup: 0,
                clip: 0.0,
                ..base
            },
            (Preset::Paper, Dialect::S4) => {
                let dim = if column == Column::Image { 512 } else { 256 };
                Recipe {
                    dim,
                    heads: 8,
                    layers: 6,
                    qkv: dim,
                    mlp: 2 * dim,
                    pool: "mean",
                    learned_positions: false,
                    lr: match column {
                        Column::Pathfinder => 0.004,
                        Column::PathX => 0.001,
                        _ => 0.01,
                    },
                    rsqrt: false,
                    decay: 0.05,
                    clip: 0.0,
                    dropout: 0.0,
                    attention_dropout: 0.0,
                    ..official(column)
                }
            }
        }
    }
}

/// The released configurations and schedules of the Transformer.
fn official(column: Column) -> Recipe {
    let rsqrt = |dim: usize, heads: usize, mlp: usize, pool, steps, warmup: u64| Recipe {
        dim,
        heads,
        layers: 4,
        qkv: dim,
        mlp,
        pool,
        learned_positions: false,
        steps,
        batch: 32,
        // The factor 0.05 over the root of the update, where the warm-up ends.
        lr: 0.05 / (warmup as f64).sqrt(),
        warmup,
        rsqrt: true,
        decay: 0.1,
        clip: 0.0,
        dropout: 0.1,
        attention_dropout: 0.1,
    };
    match column {
        Column::ListOps => rsqrt(512, 8, 1024, "cls", 5000, 1000),
        Column::Text => rsqrt(256, 4, 1024, "cls", 20_000, 8000),
        // The published run never leaves its warm-up of 8,000.
        Column::Retrieval => Recipe {
            lr: 0.05 / 8000f64.sqrt() * 5000.0 / 8000.0,
            warmup: 5000,
            ..rsqrt(128, 4, 512, "first", 5000, 8000)
        },
        Column::Image => Recipe {
            dim: 128,
            heads: 8,
            layers: 1,
            qkv: 64,
            mlp: 128,
            pool: "cls",
            learned_positions: true,
            steps: 35_000,
            batch: 256,
            lr: 5e-4,
            warmup: 175,
            rsqrt: false,
            decay: 0.0,
            clip: 0.0,
            dropout: 0.3,
            attention_dropout: 0.2,
        },
        Column::Pathfinder => Recipe {
            dim: 32,
            heads: 4,
            layers: 4,
            qkv: 16,
            mlp: 32,
            pool: "mean",
            learned_positions: false,
            steps: 62_400,
            batch: 512,
            lr: 1e-3,
            warmup: 312,
            rsqrt: false,
            decay: 0.0,
            clip: 0.0,
            dropout: 0.2,
            attention_dropout: 0.1,
        },
        Column::PathX => Recipe {
            heads: 2,
            layers: 1,
            learned_positions: true,
            steps: 500_000,
            batch: 64,
            warmup: 2500,
            clip: 1.0,
            dropout: 0.1,
            ..official(Column::Pathfinder)
        },
    }
}
