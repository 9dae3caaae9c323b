//! A run as the user writes it: TOML with the tables `[task]`, `[model]`, `[train]`, `[run]`, and dotted overrides.
//!
//! The tables are read here; what stands in them is checked by the crate that it is for. The task fills in what the
//! model reads and gives.

use std::path::Path;

use anyformer_mixers::card::nearest_name;
use anyformer_models::ModelConfig;
use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::exit::{Failure, Kind, bad_input};
use crate::overrides;

/// The tables of a run file.
const TABLES: [&str; 4] = ["task", "model", "train", "run"];

/// The tables as given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tables {
    /// `name` and the task's own options.
    pub task: Map<String, Value>,
    /// Keys of the model's config.
    pub model: Map<String, Value>,
    /// Keys of the training options.
    pub train: Map<String, Value>,
    /// Where and how it runs.
    pub run: Place,
}

/// The table `[run]`: nothing in it changes what is learned.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Place {
    /// `cpu` or `gpu`; absent: `cpu`.
    pub device: Option<String>,
    /// Worker threads; 0: all cores.
    pub threads: usize,
}

/// Splits `[CONFIG.toml] [KEY=VALUE]...`: the first word is a file unless it looks like an override and no file has
/// that name.
pub fn split(words: &[String]) -> (Option<&Path>, &[String]) {
    match words.first() {
        Some(first) if !first.contains('=') || Path::new(first).is_file() => {
            (Some(Path::new(first)), &words[1..])
        }
        _ => (None, words),
    }
}

/// Reads the file, if there is one, and applies the overrides in order.
pub fn read(file: Option<&Path>, changes: &[String]) -> Result<Tables, Failure> {
    let root = match file {
        None => Map::new(),
        Some(path) => {
            let text = std::fs::read_to_string(path);
            let text = text
                .with_context(|| format!("read {}", path.display()))
                .input()?;
            let table: Result<Map<String, Value>, _> = toml::from_str(&text);
            table
                .with_context(|| format!("read {}", path.display()))
                .input()?
        }
    };
    let place = file.map_or("the overrides".to_string(), |path| {
        path.display().to_string()
    });
    from_root(root, changes, &place)
}

fn from_root(
    mut root: Map<String, Value>,
    changes: &[String],
    place: &str,
) -> Result<Tables, Failure> {
    known(&root, place)?;
    let defaults = ModelConfig::default().to_json();
    expand(&mut root);
    for text in changes {
        let change = overrides::parse(text)?;
        // `model.mixers.0.heads=8` changes the mixer that is there by default.
        if let [table, key, _, ..] = change.path.as_slice()
            && table == "model"
            && (key == "mixers" || key == "channel")
            && let Value::Object(model) = root.entry("model").or_insert_with(|| json!({}))
            && !model.contains_key(key)
        {
            model.insert(key.clone(), defaults[key].clone());
        }
        overrides::apply(&mut root, &change)?;
        expand(&mut root);
    }
    known(&root, place)?;
    let mut take = |name: &str| match root.remove(name) {
        None => Ok(Map::new()),
        Some(Value::Object(map)) => Ok(map),
        Some(other) => Err(bad_input(format!(
            "read {place}: {name} must be a table, is {other}"
        ))),
    };
    let run = take("run")?;
    Ok(Tables {
        task: take("task")?,
        model: take("model")?,
        train: take("train")?,
        run: read_place(run, place)?,
    })
}

/// The tables of options that are already resolved: those of a run folder.
pub fn tables_of(options: &Value, place: &str) -> Result<Tables, Failure> {
    match options {
        Value::Object(root) => from_root(root.clone(), &[], place),
        other => Err(bad_input(format!(
            "read {place}: expected tables, got {other}"
        ))),
    }
}

fn known(root: &Map<String, Value>, place: &str) -> Result<(), Failure> {
    check_keys(root, TABLES, place, "table")
}

/// Refuses keys that are not among `keys`, with the nearest.
pub(crate) fn check_keys<'a>(
    map: &Map<String, Value>,
    keys: impl IntoIterator<Item = &'a str> + Clone,
    place: &str,
    what: &str,
) -> Result<(), Failure> {
    for key in map.keys() {
        if !keys.clone().into_iter().any(|known| known == key) {
            let hint = nearest_name(key, keys.clone());
            let hint = hint.map_or(String::new(), |hint| format!("; did you mean {hint:?}?"));
            let all: Vec<&str> = keys.into_iter().collect();
            let all = all.join(", ");
            return Err(bad_input(format!(
                "read {place}: unknown {what} {key:?}{hint}; there are {all}"
            )));
        }
    }
    Ok(())
}

fn read_place(map: Map<String, Value>, place: &str) -> Result<Place, Failure> {
    check_keys(&map, ["device", "threads"], place, "key of [run]")?;
    serde_json::from_value(Value::Object(map))
        .with_context(|| format!("read {place}: [run]"))
        .input()
}

fn expand(root: &mut Map<String, Value>) {
    if let Some(Value::Object(model)) = root.get_mut("model") {
        expand_mixers(model);
    }
}

/// A mixer may be given by its name alone: `"gla"` is `{ name = "gla" }`.
pub fn expand_mixers(model: &mut Map<String, Value>) {
    let named = |value: &mut Value| {
        if let Value::String(name) = value {
            *value = json!({ "name": name });
        }
    };
    match model.get_mut("mixers") {
        Some(Value::Array(mixers)) => mixers.iter_mut().for_each(named),
        Some(one @ Value::String(_)) => {
            named(one);
            *one = Value::Array(vec![one.take()]);
        }
        _ => {}
    }
    if let Some(channel) = model.get_mut("channel") {
        named(channel);
    }
}

/// The model of a run: what the task says that it reads and gives, under what the user says. Where they contradict each
/// other it is an error.
pub fn model_config(
    mut model: Map<String, Value>,
    own: &ModelConfig,
) -> Result<ModelConfig, Failure> {
    model
        .entry("max_time")
        .or_insert_with(|| json!(own.max_time));
    for (key, own) in [("reads", json!(own.reads)), ("gives", json!(own.gives))] {
        let given = model.remove(key).unwrap_or_else(|| json!({}));
        let given = given
            .as_object()
            .ok_or_else(|| bad_input(format!("read [model]: {key} must be a table, is {given}")))?;
        let merged = fill(key, &own, given)?;
        model.insert(key.to_string(), merged);
    }
    ModelConfig::from_json(&Value::Object(model)).input()
}

/// Keys of `reads` and `gives` that are the user's to choose; the others are the data's.
const FREE: [&str; 3] = ["tied", "pool", "patch"];

fn fill(key: &str, own: &Value, given: &Map<String, Value>) -> Result<Value, Failure> {
    let Value::Object(own) = own else {
        return Ok(Value::Object(given.clone()));
    };
    let mut merged = own.clone();
    for (kind, values) in given {
        let wrong =
            |what: String| bad_input(format!("fit the model to the task: model.{key} {what}"));
        let own_kind = own.keys().next().map_or("", String::as_str);
        let Some(Value::Object(held)) = merged.get_mut(kind) else {
            return Err(wrong(format!(
                "is {kind:?}, but the task has {own_kind:?}; leave it out"
            )));
        };
        let Value::Object(values) = values else {
            return Err(wrong(format!("{kind} must be a table, is {values}")));
        };
        for (name, value) in values {
            match held.get(name) {
                Some(data) if !FREE.contains(&name.as_str()) && data != value => {
                    return Err(wrong(format!(
                        "says {name} = {value}, but the task has {data}; leave it out"
                    )));
                }
                _ => {
                    held.insert(name.clone(), value.clone());
                }
            }
        }
    }
    Ok(Value::Object(merged))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyformer_models::{Gives, Pool, Reads};

    fn tables(file: &str, changes: &[&str]) -> Result<Tables, String> {
        let root: Map<String, Value> = toml::from_str(file).expect("TOML");
        let changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
        from_root(root, &changes, "a.toml").map_err(|failure| format!("{failure:?}"))
    }

    #[test]
    fn overrides_reach_defaults_and_short_names() {
        let got = tables("", &["model.mixers.0.heads=8"]).expect("tables");
        assert_eq!(
            got.model["mixers"],
            json!([{"name": "attention", "heads": 8}])
        );
        let got = tables(
            "[model]\nmixers = [\"gla\", \"local\"]\nchannel = \"mlp\"",
            &[
                "model.mixers.1.window=16",
                "model.channel.hidden=8",
                "run.threads=1",
            ],
        )
        .expect("tables");
        assert_eq!(
            got.model["mixers"],
            json!([{"name": "gla"}, {"name": "local", "window": 16}])
        );
        assert_eq!(got.model["channel"], json!({"name": "mlp", "hidden": 8}));
        assert_eq!(got.run.threads, 1);
        let got = tables("", &["model.mixers=gla"]).expect("tables");
        assert_eq!(got.model["mixers"], json!([{"name": "gla"}]));
    }

    #[test]
    fn unknown_tables_and_keys_name_the_nearest() {
        assert!(
            tables("[modle]\ndim = 3", &[])
                .unwrap_err()
                .contains("did you mean \"model\"?")
        );
        assert!(
            tables("", &["trian.lr=3"])
                .unwrap_err()
                .contains("did you mean \"train\"?")
        );
        assert!(
            tables("[run]\nthread = 3", &[])
                .unwrap_err()
                .contains("did you mean \"threads\"?")
        );
        assert!(
            tables("[run]\nthreads = \"all\"", &[])
                .unwrap_err()
                .contains("[run]")
        );
        assert!(
            tables("model = 3", &[])
                .unwrap_err()
                .contains("must be a table")
        );
    }

    #[test]
    fn the_task_fills_in_and_contradictions_are_refused() {
        let reads = Reads::Tokens { vocab: 50 };
        let gives = Gives::class(10, Pool::Mean);
        let own = ModelConfig {
            reads,
            gives,
            ..ModelConfig::default()
        };
        let config = |model: Value| {
            let Value::Object(model) = model else {
                panic!("a table")
            };
            model_config(model, &own).map_err(|failure| format!("{failure:?}"))
        };
        assert_eq!(config(json!({})).map(|config| config.reads), Ok(reads));
        let last = config(json!({"gives": {"class": {"pool": "last"}}})).map(|config| config.gives);
        assert_eq!(last, Ok(Gives::class(10, Pool::Last)));
        let error = config(json!({"reads": {"tokens": {"vocab": 60}}})).unwrap_err();
        assert!(
            error.contains("vocab = 60") && error.contains("50"),
            "{error}"
        );
        let error = config(json!({"gives": {"next_token": {"tied": true}}})).unwrap_err();
        assert!(error.contains("next_token"), "{error}");
        assert!(
            config(json!({"layrs": 3}))
                .unwrap_err()
                .contains("did you mean")
        );
    }
}
