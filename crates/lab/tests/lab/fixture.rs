//! Made-up results that look like real ones: six contenders, three tasks, three seeds.

use anyformer_lab::trial::{
    Budget, BudgetKind, CurvePoint, Goal, LatencyPoint, Metric, MetricUnit, Status, TrialKey,
    TrialRecord, TrialResult,
};
use serde_json::json;

pub const MIXERS: [&str; 6] = [
    "attention",
    "linear_attention",
    "gla",
    "gated_delta_net",
    "mamba2",
    "pool",
];
pub const TASKS: [&str; 3] = ["mqar", "list_ops", "shakespeare"];

/// A number in `[-1, 1]` that depends on the four arguments only.
fn noise(a: u64, b: u64, c: u64, d: u64) -> f64 {
    let mut x = a.wrapping_mul(0x9E37_79B9_7F4A_7C15)
        ^ b.wrapping_mul(0xBF58_476D_1CE4_E5B9)
        ^ (c << 32)
        ^ (d << 7);
    for _ in 0..3 {
        x ^= x >> 31;
        x = x.wrapping_mul(0x94D0_49BB_1331_11EB);
    }
    (x >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

pub fn key(task: &str, mixer: &str, seed: u64) -> TrialKey {
    TrialKey {
        task: task.into(),
        mixer: mixer.into(),
        size: json!({"width": 128, "layers": 2, "hidden": 512}),
        setup: json!({"steps": 400, "batch": 16, "length": 256, "learning_rate": 1e-3}),
        seed,
        budget: Budget {
            kind: BudgetKind::Params,
            target: 412_000.0,
            tolerance: 0.02,
        },
    }
}

pub fn result(task: usize, mixer: usize, seed: u64) -> TrialResult {
    let (t, m) = (task as u64, mixer as u64);
    let skill = [
        [0.992, 0.61, 0.78, 0.985, 0.81, 0.05],
        [0.39, 0.37, 0.41, 0.42, 0.40, 0.31],
        [1.62, 1.74, 1.60, 1.57, 1.58, 2.31],
    ];
    let language = task == 2;
    let end = skill[task][mixer] * (1.0 + 0.012 * noise(t, m, seed, 1));
    let start = if language { 5.5 } else { 0.02 };
    let mut curve = Vec::new();
    for point in 1..=40u64 {
        let progress = 1.0 - (-(point as f64) / (6.0 + m as f64)).exp();
        let value = start + (end - start) * progress * (1.0 + 0.02 * noise(t, m, seed, point + 10));
        let loss = if language {
            value * 0.69
        } else {
            4.2 * (1.0 - 0.9 * progress * end) + 0.1 * noise(t, m, seed, point)
        };
        curve.push(CurvePoint {
            step: point * 10,
            tokens: point * 10 * 4096,
            seconds: point as f64 * 0.4,
            train_loss: loss,
            metric: point.is_multiple_of(4).then_some(value),
        });
    }
    let latency = (0..6u32)
        .map(|power| {
            let length = 256u64 << power;
            let grows = mixer == 0;
            let base = 1e-6 * (3.0 + m as f64) * length as f64;
            LatencyPoint {
                length,
                prefill_seconds: base
                    + if grows {
                        6e-9 * (length * length) as f64
                    } else {
                        0.0
                    },
                step_seconds: (mixer != 5).then_some(
                    80e-6 + 9e-6 * m as f64 + if grows { 9e-8 * length as f64 } else { 0.0 },
                ),
                state_bytes: (mixer != 5).then_some(if grows {
                    2048 * length
                } else {
                    16_384 << mixer
                }),
                memory_bytes: Some(4 * 128 * 12 * length + if grows { length * length } else { 0 }),
            }
        })
        .collect();
    TrialResult {
        metric: Metric {
            name: if language {
                "bits per byte".into()
            } else {
                "accuracy".into()
            },
            value: end,
            unit: if language {
                MetricUnit::Plain
            } else {
                MetricUnit::Fraction
            },
            goal: if language {
                Goal::Minimize
            } else {
                Goal::Maximize
            },
        },
        loss: if language {
            end * 0.69
        } else {
            1.0 - end * 0.8
        },
        budget_value: 412_000.0 + 1000.0 * m as f64 - 2000.0,
        params: 410_000 + 1000 * m,
        flops_per_token: 1.1e6 + 5e4 * m as f64,
        state_bytes: (mixer != 5).then_some(if mixer == 0 { 524_288 } else { 16_384 << mixer }),
        train_tokens_per_second: 48_000.0 / (1.0 + 0.25 * m as f64)
            * (1.0 + 0.03 * noise(t, m, seed, 3)),
        peak_memory_bytes: Some(180_000_000 + 20_000_000 * m),
        wall_seconds: 14.0 + m as f64,
        curve,
        latency,
        commit: "0123abc".into(),
        machine: "AMD EPYC 7B13, 2 cores, 2 threads, 7.7 GiB".into(),
        command: "anyformer compare --task mqar,list_ops,shakespeare --match params --tolerance 2%"
            .into(),
        started: 1_750_000_000 + seed as i64 * 60,
        finished: 1_750_000_014 + seed as i64 * 60,
    }
}

pub fn records() -> Vec<TrialRecord> {
    let mut out = Vec::new();
    for (t, task) in TASKS.iter().enumerate() {
        for (m, mixer) in MIXERS.iter().enumerate() {
            for seed in 0..3 {
                let key = key(task, mixer, seed);
                let failed = (t, m, seed) == (1, 5, 2);
                out.push(TrialRecord {
                    id: key.id(),
                    key,
                    status: if failed { Status::Failed } else { Status::Done },
                    attempts: 1,
                    result: (!failed).then(|| result(t, m, seed)),
                    error: failed.then(|| "loss is NaN at step 30 in layer 1 <token mixer>".into()),
                });
            }
        }
    }
    out
}
