//! Dotted overrides: `train.lr=3e-4`, `model.mixers.0.heads=8`, `model.mixers=["gla"]`.

use serde_json::{Map, Value};

use crate::exit::{Failure, bad_input};

/// One `key=value` from the command line.
#[derive(Clone, Debug, PartialEq)]
pub struct Override {
    /// The parts of the key between dots.
    pub path: Vec<String>,
    /// The value.
    pub value: Value,
}

/// Reads `key=value`. The value is read as TOML; what is no TOML is a string, so `task.name=mqar` needs no quotes.
pub fn parse(text: &str) -> Result<Override, Failure> {
    let wrong = |what: &str| {
        bad_input(format!(
            "read the override {text:?}: {what}; write KEY.KEY=VALUE, as train.lr=3e-4"
        ))
    };
    let Some((key, value)) = text.split_once('=') else {
        return Err(wrong("no \"=\""));
    };
    let path: Vec<String> = key.trim().split('.').map(str::to_string).collect();
    if path.iter().any(String::is_empty) {
        return Err(wrong("an empty key"));
    }
    let value = value.trim();
    Ok(Override {
        path,
        value: toml_value(value).unwrap_or_else(|| Value::String(value.to_string())),
    })
}

fn toml_value(text: &str) -> Option<Value> {
    // A value ends where its line ends, unless brackets or quotes are open.
    let mut table: Map<String, Value> = toml::from_str(&format!("value = {text}")).ok()?;
    match table.len() {
        1 => table.remove("value"),
        _ => None,
    }
}

/// Puts the value in its place, making tables on the way. An array takes an index below its length, or its length to
/// add one.
pub fn apply(root: &mut Map<String, Value>, change: &Override) -> Result<(), Failure> {
    let Some((last, way)) = change.path.split_last() else {
        return Err(bad_input("read an override: an empty key"));
    };
    let name = change.path.join(".");
    let mut place = Place::Table(root);
    for part in way {
        place = match place.entry(part, &name)? {
            Value::Object(map) => Place::Table(map),
            Value::Array(list) => Place::List(list),
            other => {
                return Err(bad_input(format!(
                    "set {name}: {part:?} holds {other}, which has no keys"
                )));
            }
        };
    }
    *place.entry(last, &name)? = change.value.clone();
    Ok(())
}

enum Place<'a> {
    Table(&'a mut Map<String, Value>),
    List(&'a mut Vec<Value>),
}

impl<'a> Place<'a> {
    /// The value under a key; a new key begins as an empty table.
    fn entry(self, key: &str, name: &str) -> Result<&'a mut Value, Failure> {
        let empty = || Value::Object(Map::new());
        match self {
            Place::Table(map) => Ok(map.entry(key).or_insert_with(empty)),
            Place::List(list) => {
                let length = list.len();
                let index = key.parse::<usize>().ok().filter(|index| *index <= length);
                let index = index.ok_or_else(|| {
                    bad_input(format!(
                        "set {name}: expected an index from 0 to {length} for {key:?}"
                    ))
                })?;
                if index == length {
                    list.push(empty());
                }
                Ok(&mut list[index])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn set(mut value: Value, changes: &[&str]) -> Result<Value, String> {
        let map = value.as_object_mut().expect("a table");
        for change in changes {
            parse(change)
                .and_then(|change| apply(map, &change))
                .map_err(|failure| format!("{failure:?}"))?;
        }
        Ok(value)
    }

    #[test]
    fn values_are_toml_or_else_text() {
        let got = set(
            json!({}),
            &[
                "a.b=3e-4",
                "a.c=[1, 2]",
                "a.d=mqar",
                "a.e=\"7\"",
                "a.f=true",
                "a.g=-5",
                "a.h=",
            ],
        );
        let wanted = json!({"a": {"b": 3e-4, "c": [1, 2], "d": "mqar", "e": "7", "f": true, "g": -5, "h": ""}});
        assert_eq!(got, Ok(wanted));
    }

    #[test]
    fn arrays_take_indices() {
        let got = set(
            json!({"m": [{"name": "gla"}]}),
            &["m.0.heads=8", "m.1.name=local"],
        );
        assert_eq!(
            got,
            Ok(json!({"m": [{"name": "gla", "heads": 8}, {"name": "local"}]}))
        );
        assert!(
            set(json!({"m": []}), &["m.1.name=local"])
                .unwrap_err()
                .contains("0 to 0")
        );
    }

    #[test]
    fn what_cannot_be_set_says_so() {
        for (value, change) in [
            (json!({}), "lr"),
            (json!({}), "=3"),
            (json!({}), "a..b=3"),
            (json!({"a": 1}), "a.b=3"),
        ] {
            let error = set(value, &[change]).unwrap_err();
            assert!(
                error.contains("read the override") || error.contains("no keys"),
                "{error}"
            );
        }
    }
}
