//! One text per JSON value, whatever order its keys were written in, and a hash of it.

use serde_json::Value;
use sha2::{Digest, Sha256};

/// JSON text of `value` with the keys of every object sorted and no spaces. `1` and `1.0` stay different.
pub fn text(value: &Value) -> String {
    let mut out = String::new();
    write(value, &mut out);
    out
}

fn write(value: &Value, out: &mut String) {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            entries.sort_by(|a, b| a.0.cmp(b.0));
            out.push('{');
            for (index, (key, item)) in entries.into_iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                out.push_str(&Value::String(key.clone()).to_string());
                out.push(':');
                write(item, out);
            }
            out.push('}');
        }
        Value::Array(items) => {
            out.push('[');
            for (index, item) in items.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                write(item, out);
            }
            out.push(']');
        }
        other => out.push_str(&other.to_string()),
    }
}

/// SHA-256 of `text` as 64 lower-case hexadecimal digits.
pub fn hash(text: &str) -> String {
    Sha256::digest(text.as_bytes())
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The places where two JSON values differ, as `path: left, here right`, at most `limit` of them.
pub fn differences(stored: &Value, asked: &Value, limit: usize) -> Vec<String> {
    let mut out = Vec::new();
    compare(stored, asked, "", &mut out);
    if out.len() > limit {
        let more = out.len() - limit;
        out.truncate(limit);
        out.push(format!("and {more} more"));
    }
    out
}

fn compare(stored: &Value, asked: &Value, path: &str, out: &mut Vec<String>) {
    match (stored, asked) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let place = if path.is_empty() {
                    key.clone()
                } else {
                    format!("{path}.{key}")
                };
                match (a.get(key), b.get(key)) {
                    (Some(x), Some(y)) => compare(x, y, &place, out),
                    (Some(x), None) => out.push(format!(
                        "{place} is {} in the store and absent here",
                        text(x)
                    )),
                    (None, Some(y)) => out.push(format!(
                        "{place} is absent in the store and {} here",
                        text(y)
                    )),
                    (None, None) => {}
                }
            }
        }
        (a, b) if text(a) == text(b) => {}
        (a, b) => {
            let place = if path.is_empty() { "the plan" } else { path };
            out.push(format!(
                "{place} is {} in the store and {} here",
                text(a),
                text(b)
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn key_order_changes_nothing() {
        let a: Value = serde_json::from_str(r#"{"b":[1,{"y":1,"x":"q\"uote"}],"a":2.5}"#).unwrap();
        let b: Value = serde_json::from_str(r#"{"a":2.5, "b":[1,{"x":"q\"uote","y":1}]}"#).unwrap();
        assert_eq!(text(&a), text(&b));
        assert_eq!(text(&a), r#"{"a":2.5,"b":[1,{"x":"q\"uote","y":1}]}"#);
        assert_ne!(text(&json!([1, 2])), text(&json!([2, 1])));
    }

    #[test]
    fn sha256_of_abc() {
        assert_eq!(
            hash("abc"),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[test]
    fn differences_name_the_place() {
        let found = differences(
            &json!({"a": {"b": 1, "c": 2}, "d": 1}),
            &json!({"a": {"b": 3, "c": 2}, "e": [1]}),
            10,
        );
        assert_eq!(
            found,
            [
                "a.b is 1 in the store and 3 here",
                "d is 1 in the store and absent here",
                "e is absent in the store and [1] here"
            ]
        );
        assert_eq!(
            differences(&json!({"a": 1, "b": 1}), &json!({}), 1).len(),
            2
        );
    }
}
