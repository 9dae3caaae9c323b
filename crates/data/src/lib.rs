//! Data: tasks with seeded samples, tokenizers, data sets that ship and data sets that are fetched.
//!
//! [`task`] makes a task from its name and options; a [`Task`] gives a [`Loader`] per split, a loader gives batches and a
//! [`Position`] from which it can go on exactly.

mod babi;
mod cifar_sequence;
mod copying;
mod detokenizer;
mod dialect;
mod error;
mod expression;
pub mod fetch;
pub mod grammar;
mod images;
mod list_ops;
mod matching;
mod mqar;
mod needle;
mod pathfinder;
mod pictures;
pub mod sheet;
mod task;
mod text;
mod text_classify;
pub mod tokenizer;
mod toy_text;

use serde_json::{Map, Value};

pub use babi::BabiOptions;
pub use cifar_sequence::SequentialCifarOptions;
pub use copying::{CopyOptions, InductionOptions};
pub use detokenizer::Detokenizer;
pub use dialect::Dialect;
pub use error::DataError;
pub use expression::{Expression, Operator, write_tsv};
pub use grammar::{Constraint, GrammarError, Grammars, Shape};
pub use images::{Format, ImagesOptions};
pub use list_ops::ListOpsOptions;
pub use matching::MatchingOptions;
pub use mqar::MqarOptions;
pub use needle::{ContextOptions, Needle, NeedleOptions};
pub use pathfinder::PathfinderOptions;
pub use task::{Batch, Loader, Position, Split, Targets, Task, TaskKind, TaskSpec};
pub use text::TextOptions;
pub use text_classify::TextClassifyOptions;
pub use tokenizer::Tokenizer;
pub use toy_text::{ToyCitationsOptions, ToyReviewsOptions};

/// A registered task.
pub struct TaskEntry {
    /// Its name.
    pub name: &'static str,
    /// One line.
    pub doc: &'static str,
    make: fn(&Value) -> Result<Box<dyn Task>, DataError>,
    defaults: fn() -> Value,
}

impl TaskEntry {
    /// Every option with its default.
    pub fn defaults(&self) -> Map<String, Value> {
        match (self.defaults)() {
            Value::Object(map) => map,
            other => panic!("options serialise to a map, not {other:?}"),
        }
    }
}

fn defaults<O: Default + serde::Serialize>() -> Value {
    serde_json::to_value(O::default()).unwrap_or_default()
}

static TASKS: &[TaskEntry] = &[
    TaskEntry {
        name: "babi",
        doc: "stories of the bAbI kind, alone or hidden in other text (BABILong)",
        make: babi::task,
        defaults: defaults::<BabiOptions>,
    },
    TaskEntry {
        name: "images",
        doc: "image classification: Fashion-MNIST subset, IDX files, CIFAR-10, folders",
        make: images::task,
        defaults: defaults::<ImagesOptions>,
    },
    TaskEntry {
        name: "induction_heads",
        doc: "what followed the special token the first time (Mamba paper)",
        make: copying::induction_task,
        defaults: defaults::<InductionOptions>,
    },
    TaskEntry {
        name: "list_ops",
        doc: "the value of nested list operations (Long Range Arena)",
        make: list_ops::task,
        defaults: defaults::<ListOpsOptions>,
    },
    TaskEntry {
        name: "matching",
        doc: "does one paper cite the other, on bytes (Long Range Arena): your copy of the pairs",
        make: matching::task,
        defaults: defaults::<MatchingOptions>,
    },
    TaskEntry {
        name: "mqar",
        doc: "multi-query associative recall (zoology)",
        make: mqar::task,
        defaults: defaults::<MqarOptions>,
    },
    TaskEntry {
        name: "needle",
        doc: "RULER's needles in a haystack, byte by byte",
        make: needle::needle,
        defaults: defaults::<NeedleOptions>,
    },
    TaskEntry {
        name: "passkey",
        doc: "a number between lines of filler, byte by byte",
        make: needle::passkey,
        defaults: defaults::<ContextOptions>,
    },
    TaskEntry {
        name: "path_256",
        doc: "pathfinder on 256 x 256 pixels",
        make: |options| pathfinder::task("path_256", options),
        defaults: defaults::<PathfinderOptions>,
    },
    TaskEntry {
        name: "path_x",
        doc: "pathfinder on 128 x 128 pixels (Long Range Arena's Path-X)",
        make: |options| pathfinder::task("path_x", options),
        defaults: defaults::<PathfinderOptions>,
    },
    TaskEntry {
        name: "pathfinder",
        doc: "are two discs joined by a dashed line, on 32 x 32 pixels (Long Range Arena)",
        make: |options| pathfinder::task("pathfinder", options),
        defaults: defaults::<PathfinderOptions>,
    },
    TaskEntry {
        name: "pathfinder_64",
        doc: "pathfinder on 64 x 64 pixels",
        make: |options| pathfinder::task("pathfinder_64", options),
        defaults: defaults::<PathfinderOptions>,
    },
    TaskEntry {
        name: "selective_copy",
        doc: "data tokens among noise, to be repeated in order (Mamba paper)",
        make: copying::copy_task,
        defaults: defaults::<CopyOptions>,
    },
    TaskEntry {
        name: "sequential_cifar10",
        doc: "CIFAR-10 as 1,024 grey pixels (Long Range Arena): your copy of the batches",
        make: cifar_sequence::task,
        defaults: defaults::<SequentialCifarOptions>,
    },
    TaskEntry {
        name: "text",
        doc: "language modelling on bytes or BPE tokens: your files or the shipped Shakespeare",
        make: text::task,
        defaults: defaults::<TextOptions>,
    },
    TaskEntry {
        name: "text_classify",
        doc: "is a review positive, on bytes (Long Range Arena): your copy of the IMDb reviews",
        make: text_classify::task,
        defaults: defaults::<TextClassifyOptions>,
    },
    TaskEntry {
        name: "toy_citations",
        doc: "are two generated documents of one topic; stands in for matching",
        make: toy_text::citations,
        defaults: defaults::<ToyCitationsOptions>,
    },
    TaskEntry {
        name: "toy_reviews",
        doc: "is a generated review for its film; stands in for text_classify",
        make: toy_text::reviews,
        defaults: defaults::<ToyReviewsOptions>,
    },
    TaskEntry {
        name: "variable_tracking",
        doc: "RULER's chain of assignments, byte by byte",
        make: needle::variables,
        defaults: defaults::<ContextOptions>,
    },
];

/// Every task, sorted by name.
pub fn tasks() -> &'static [TaskEntry] {
    TASKS
}

/// The task of that name with these options (a table, or null for all defaults).
pub fn task(name: &str, options: &Value) -> Result<Box<dyn Task>, DataError> {
    let found = TASKS.iter().find(|entry| entry.name == name);
    match found {
        Some(entry) => (entry.make)(options),
        None => Err(DataError::UnknownTask {
            name: name.to_string(),
            hint: error::hint(name, TASKS.iter().map(|entry| entry.name)),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Data of the tasks that read the user's files, made once.
    fn files() -> &'static std::path::Path {
        static FILES: std::sync::OnceLock<tempfile::TempDir> = std::sync::OnceLock::new();
        let root = FILES.get_or_init(|| {
            let root = tempfile::tempdir().expect("a folder");
            text_classify::tests::folder(root.path(), 40);
            matching::tests::folder(root.path(), 40);
            cifar_sequence::tests::folder(root.path());
            root
        });
        root.path()
    }

    fn small(name: &str) -> Value {
        match name {
            "text_classify" | "matching" | "sequential_cifar10" => json!({"path": files()}),
            "pathfinder" | "pathfinder_64" | "path_x" | "path_256" => json!({"contour_length": 4}),
            "needle" | "passkey" | "variable_tracking" => json!({"time": 800, "test_rows": 20}),
            "toy_reviews" | "toy_citations" => json!({"time": 200}),
            "mqar" => json!({"vocab": 64, "time": 32, "pairs": 4, "train_rows": 50}),
            "list_ops" => {
                json!({"max_depth": 4, "max_args": 4, "min_length": 5, "max_length": 40, "train_rows": 70})
            }
            "selective_copy" => json!({"time": 20, "tokens": 4}),
            "induction_heads" => json!({"time": 16}),
            "text" => json!({"time": 64}),
            _ => json!({}),
        }
    }

    #[test]
    fn every_loader_goes_on_exactly_from_its_position() {
        for entry in tasks() {
            let made = task(entry.name, &small(entry.name)).expect("options fit");
            for split in [Split::Train, Split::Validation, Split::Test] {
                let mut whole = made.loader(split, 8, 5).expect("a loader");
                // Past the end of the small sets, so that passes are counted too.
                for _ in 0..12 {
                    whole.next_batch().expect("a batch");
                }
                let position = whole.position();
                let text = serde_json::to_string(&position).expect("a position is JSON");
                let mut other = made.loader(split, 8, 99).expect("a loader");
                let position = serde_json::from_str(&text).expect("read back");
                other.seek(&position).expect("a place in the data");
                for _ in 0..3 {
                    let (a, b) = (whole.next_batch(), other.next_batch());
                    assert_eq!(a.expect("a batch"), b.expect("a batch"), "{}", entry.name);
                }
            }
        }
    }

    #[test]
    fn seeds_change_training_and_leave_held_out_rows_alone() {
        for entry in tasks() {
            let made = task(entry.name, &small(entry.name)).expect("options fit");
            let first = |split, seed| {
                let batch = made
                    .loader(split, 8, seed)
                    .and_then(|mut loader| loader.next_batch());
                batch.expect("a batch")
            };
            assert_ne!(
                first(Split::Train, 0),
                first(Split::Train, 1),
                "{}",
                entry.name
            );
            assert_eq!(
                first(Split::Test, 0),
                first(Split::Test, 1),
                "{}",
                entry.name
            );
            assert_ne!(
                first(Split::Test, 0),
                first(Split::Validation, 0),
                "{}",
                entry.name
            );
        }
    }

    #[test]
    fn unknown_names_and_options_are_refused_with_the_nearest() {
        let error = task("list_op", &Value::Null)
            .err()
            .expect("unknown")
            .to_string();
        assert!(error.contains("did you mean \"list_ops\""), "{error}");
        for entry in tasks() {
            let options = json!({"tme": 3});
            let error = task(entry.name, &options)
                .err()
                .expect("unknown")
                .to_string();
            assert!(error.contains("tme"), "{error}");
            assert!(!entry.defaults().is_empty());
        }
    }
}
