//! A model config that fits a task: what it reads and gives comes from the task unless given.

use anyformer_data::{TaskKind, TaskSpec};
use anyformer_models::{Gives, ModelConfig, ModelError, Pair, Pool, Reads};
use serde_json::{Map, Value};

/// Side of a patch of a picture when none is given: 4 where it divides, else 2 or 1.
fn patch(height: usize, width: usize) -> usize {
    let divides = |side: &usize| height.is_multiple_of(*side) && width.is_multiple_of(*side);
    [4, 2].into_iter().find(divides).unwrap_or(1)
}

/// Merges the tables, later ones winning, and fills `reads` and `gives` from the task. What is given must fit it.
pub fn task_model(
    shared: &Map<String, Value>,
    own: &Map<String, Value>,
    spec: &TaskSpec,
) -> Result<ModelConfig, ModelError> {
    let mut table = shared.clone();
    table.extend(own.clone());
    let reads = match spec.kind {
        TaskKind::NextToken | TaskKind::Classify | TaskKind::Match => {
            Reads::Tokens { vocab: spec.vocab }
        }
        TaskKind::Pictures {
            height,
            width,
            channels,
        } => Reads::Patches {
            height,
            width,
            channels,
            patch: patch(height, width),
        },
    };
    let gives = match spec.kind {
        TaskKind::NextToken => Gives::NextToken { tied: true },
        TaskKind::Classify | TaskKind::Pictures { .. } => Gives::class(spec.classes, Pool::Mean),
        TaskKind::Match => Gives::Class {
            classes: spec.classes,
            pool: Pool::Mean,
            hidden: 0,
            pair: Pair::Nli,
        },
    };
    let json = |value: Result<Value, serde_json::Error>| value.unwrap_or_default();
    table
        .entry("reads")
        .or_insert_with(|| json(serde_json::to_value(reads)));
    table
        .entry("gives")
        .or_insert_with(|| json(serde_json::to_value(gives)));
    if !table.contains_key("max_time") {
        table.insert("max_time".into(), Value::from(spec.time));
    }
    let config = ModelConfig::from_json(&Value::Object(table))?;
    let unfit = |what: String| {
        Err(ModelError::Impossible(format!(
            "the model does not fit task {}: {what}",
            spec.name
        )))
    };
    match (config.reads, spec.kind) {
        (Reads::Tokens { vocab }, TaskKind::NextToken | TaskKind::Classify | TaskKind::Match)
            if vocab < spec.vocab =>
        {
            unfit(format!("expected a vocab of at least {}, got {vocab}", spec.vocab))
        }
        (Reads::Tokens { .. }, TaskKind::Pictures { .. }) => {
            unfit("it reads tokens, the task gives pictures; set the task's as_sequence, or leave reads out".into())
        }
        (Reads::Patches { .. }, TaskKind::NextToken | TaskKind::Classify | TaskKind::Match) => {
            unfit("it reads patches, the task gives tokens; leave reads out".into())
        }
        (
            Reads::Patches {
                height,
                width,
                channels,
                ..
            },
            TaskKind::Pictures {
                height: rows,
                width: columns,
                channels: values,
            },
        ) if [height, width, channels] != [rows, columns, values] => unfit(format!(
            "expected pictures of {rows} x {columns} x {values}, got {height} x {width} x {channels}"
        )),
        _ => match (config.gives, spec.kind) {
            (
                Gives::NextToken { .. },
                TaskKind::Classify | TaskKind::Match | TaskKind::Pictures { .. },
            ) => {
                unfit("it gives tokens, the task asks for a class; leave gives out".into())
            }
            (Gives::Class { .. }, TaskKind::NextToken) => {
                unfit("it gives a class, the task asks for tokens; leave gives out".into())
            }
            (Gives::Class { pair, .. }, kind)
                if (pair == Pair::None) == (kind == TaskKind::Match) =>
            {
                unfit("a task of pairs needs gives.class.pair, and no other task takes it; leave gives out".into())
            }
            (Gives::Class { classes, .. }, _) if classes < spec.classes => unfit(format!(
                "expected at least {} classes, got {classes}",
                spec.classes
            )),
            _ => Ok(config),
        },
    }
}
