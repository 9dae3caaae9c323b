//! Heads that give a class (`…ForSequenceClassification`): how many classes, and what stands before the scores.

use serde_json::{Map, Value, json};

use super::keys::Keys;

/// The number of classes: as many as have a name; where nothing is said, two.
pub(super) fn count(keys: &Keys) -> Result<u64, String> {
    match keys.given("id2label") {
        Some(Value::Object(names)) => Ok(names.len() as u64),
        Some(other) => Err(format!("id2label should be a table, is {other}")),
        None => keys.number_or("num_labels", 2),
    }
}

/// Names for so many classes.
pub(super) fn put(theirs: &mut Value, ours: &Value) {
    let count = ours["gives"]["class"]["classes"].as_u64().unwrap_or(0);
    let name = |at: u64| format!("LABEL_{at}");
    let names = (0..count).map(|at| (at.to_string(), json!(name(at))));
    let numbers = (0..count).map(|at| (name(at), json!(at)));
    theirs["id2label"] = Value::Object(names.collect());
    theirs["label2id"] = Value::Object(numbers.collect());
}

/// Whether a file was saved with such a head.
pub(super) fn asked(keys: &Keys) -> bool {
    let saved = keys.0["architectures"][0].as_str().unwrap_or_default();
    saved.ends_with("ForSequenceClassification")
}

/// Fills in what the head derives from other keys, and drops what has no effect.
pub(super) fn complete(ours: &mut Map<String, Value>) {
    let gives = &ours["gives"];
    let class = &gives["class"];
    let inner = class["hidden"].as_u64().unwrap_or(0) > 0;
    let is_class = class.is_object();
    let otherwise = match (gives == "masked_token", inner) {
        (true, _) => json!("gelu"),
        (false, true) => json!("relu"),
        (false, false) => Value::Null,
    };
    if otherwise.is_null() || ours["head_activation"].is_null() {
        ours.insert("head_activation".into(), otherwise);
    }
    if !is_class {
        ours.insert("head_bias".into(), json!(true));
    }
}
