//! A comparison that asks for more than the store's: further tasks, contenders or seeds, all else alike.

use serde_json::Value;

use crate::canonical;

/// Lists of a plan that may get longer: a trial is known by its own key, whatever else is compared.
const LISTS: [&str; 3] = ["tasks", "mixers", "seeds"];
/// Lists whose first entry decides about the rest: the first contender sets the budget, the first seed the learning rate.
const LED: [&str; 2] = ["mixers", "seeds"];

/// Whether `asked` has all that `stored` has, in lists of any order, and differs in nothing else.
pub(super) fn grows(stored: &Value, asked: &Value) -> bool {
    let (Value::Object(stored), Value::Object(asked)) = (stored, asked) else {
        return false;
    };
    let same = |a: &Value, b: &Value| canonical::text(a) == canonical::text(b);
    let mut keys = stored.keys().chain(asked.keys());
    keys.all(|key| match (stored.get(key), asked.get(key)) {
        (Some(Value::Array(held)), Some(Value::Array(wanted))) if LISTS.contains(&key.as_str()) => {
            let leads = !LED.contains(&key.as_str())
                || held
                    .first()
                    .zip(wanted.first())
                    .is_some_and(|(a, b)| same(a, b));
            leads && held.iter().all(|a| wanted.iter().any(|b| same(a, b)))
        }
        (Some(a), Some(b)) => same(a, b),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_lists_grow_and_their_leaders_stay() {
        let held = json!({"tasks": [{"name": "a", "steps": 5}], "mixers": ["x", "y"], "seeds": [0], "budget": 1});
        let with = |key: &str, value: Value| {
            let mut asked = held.clone();
            asked[key] = value;
            grows(&held, &asked)
        };
        assert!(with("seeds", json!([0, 1])));
        assert!(with("mixers", json!(["x", "z", "y"])));
        assert!(with(
            "tasks",
            json!([{"name": "b"}, {"steps": 5, "name": "a"}])
        ));
        // Another leader, an entry less, another value of an entry, another setting, a setting more.
        assert!(!with("mixers", json!(["y", "x"])));
        assert!(!with("seeds", json!([1, 0])));
        assert!(!with("mixers", json!(["x"])));
        assert!(!with("tasks", json!([{"name": "a", "steps": 6}])));
        assert!(!with("budget", json!(2)));
        assert!(!with("more", json!(2)));
        assert!(!grows(&json!(1), &held));
    }
}
