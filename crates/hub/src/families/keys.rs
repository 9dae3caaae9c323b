//! Reading the keys of another program's config: a wrong one is an error that names it.

use serde_json::{Value, json};

/// The keys of their config.
pub(crate) struct Keys<'a>(pub &'a Value);

impl<'a> Keys<'a> {
    pub(crate) fn given(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn wrong(&self, key: &str, expected: &str) -> String {
        match self.given(key) {
            Some(got) => format!("{key} should be {expected}, is {got}"),
            None => format!("{key} is missing, it should be {expected}"),
        }
    }

    pub(crate) fn number(&self, key: &str) -> Result<u64, String> {
        let value = self.given(key).and_then(Value::as_u64);
        // Larger ones could not be a size, and their products would overflow.
        value
            .filter(|value| *value < 1 << 31)
            .ok_or_else(|| self.wrong(key, "a whole number below 2^31"))
    }

    pub(crate) fn number_or(&self, key: &str, otherwise: u64) -> Result<u64, String> {
        match self.given(key) {
            None => Ok(otherwise),
            Some(_) => self.number(key),
        }
    }

    pub(crate) fn real(&self, key: &str) -> Result<f64, String> {
        let value = self.given(key).and_then(Value::as_f64);
        value.ok_or_else(|| self.wrong(key, "a number"))
    }

    pub(crate) fn real_or(&self, key: &str, otherwise: f64) -> Result<f64, String> {
        match self.given(key) {
            None => Ok(otherwise),
            Some(_) => self.real(key),
        }
    }

    pub(crate) fn flag(&self, key: &str, otherwise: bool) -> Result<bool, String> {
        match self.given(key) {
            None => Ok(otherwise),
            Some(value) => value
                .as_bool()
                .ok_or_else(|| self.wrong(key, "true or false")),
        }
    }

    /// A word out of a table, translated; the first entry where nothing is said.
    pub(crate) fn word(
        &self,
        key: &str,
        table: &[(&'static str, &'static str)],
    ) -> Result<&'static str, String> {
        let word = match self.given(key) {
            None => return Ok(table[0].1),
            Some(value) => value.as_str().unwrap_or_default(),
        };
        let known = || table.iter().map(|(theirs, _)| format!("{theirs:?}"));
        let found = table.iter().find(|(theirs, _)| *theirs == word);
        found.map(|(_, ours)| *ours).ok_or_else(|| {
            let known: Vec<String> = known().collect();
            self.wrong(key, &format!("{} to be read here", known.join(" or ")))
        })
    }

    /// Refuses a key that is given with another value than those that we compute.
    pub(crate) fn must(&self, key: &str, values: &[Value]) -> Result<(), String> {
        match self.given(key) {
            Some(value) if !values.contains(value) => {
                let known: Vec<String> = values.iter().map(Value::to_string).collect();
                Err(self.wrong(key, &format!("{} to be read here", known.join(" or "))))
            }
            _ => Ok(()),
        }
    }

    /// The rotary knobs of the attention mixer: base, features that turn, stretching. Newer files gather them in
    /// `rope_parameters`, older ones have `rope_theta`, `rope_scaling` and a factor of their own beside.
    pub(crate) fn rope(&self, head_dim: u64, old: [&str; 2]) -> Result<Rope, String> {
        let [old_base, old_partial] = old;
        let table = self.given("rope_parameters");
        let inner = table.map(Keys);
        let first = |key: &str, old: &str, otherwise: f64| match &inner {
            Some(inner) if inner.given(key).is_some() => inner.real(key),
            _ if self.given(key).is_some() => self.real(key),
            _ => self.real_or(old, otherwise),
        };
        let base = first("rope_theta", old_base, 10_000.0)?;
        let partial = first("partial_rotary_factor", old_partial, 1.0)?;
        if !(partial > 0.0 && partial <= 1.0) {
            return Err(format!(
                "partial_rotary_factor should be above 0 and at most 1, is {partial}"
            ));
        }
        let turned = (head_dim as f64 * partial) as u64;
        let scaling = match table.or(self.given("rope_scaling")) {
            None => json!({"type": "none"}),
            Some(table) => self.scaling(table)?,
        };
        Ok(Rope {
            base,
            dim: if turned == head_dim { 0 } else { turned },
            scaling,
        })
    }

    fn scaling(&self, table: &Value) -> Result<Value, String> {
        let inner = Keys(table);
        let kind = inner.given("rope_type").or(inner.given("type"));
        let kind = kind.map_or(Some("default"), Value::as_str);
        let longest = || self.number("max_position_embeddings");
        let trained = || match inner.given("original_max_position_embeddings") {
            Some(_) => inner.number("original_max_position_embeddings"),
            None => match self.given("original_max_position_embeddings") {
                Some(_) => self.number("original_max_position_embeddings"),
                None => longest(),
            },
        };
        match kind {
            Some("default") => Ok(json!({"type": "none"})),
            Some("linear") => Ok(json!({"type": "linear", "factor": inner.real("factor")?})),
            Some("dynamic") => Ok(
                json!({"type": "dynamic", "factor": inner.real("factor")?, "length": longest()?}),
            ),
            Some("llama3") => Ok(json!({
                "type": "llama3",
                "factor": inner.real("factor")?,
                "length": trained()?,
                "low_freq_factor": inner.real("low_freq_factor")?,
                "high_freq_factor": inner.real("high_freq_factor")?,
            })),
            Some("yarn") => {
                let length = trained()?;
                let factor = match inner.given("factor") {
                    Some(_) => inner.real("factor")?,
                    None => longest()? as f64 / length.max(1) as f64,
                };
                Ok(json!({
                    "type": "yarn",
                    "factor": factor,
                    "length": length,
                    "beta_fast": inner.real_or("beta_fast", 32.0)?,
                    "beta_slow": inner.real_or("beta_slow", 1.0)?,
                    "attention_factor": attention_factor(&inner, factor)?,
                    "truncate": inner.flag("truncate", true)?,
                }))
            }
            _ => Err(format!(
                "rope_type is {}; default, linear, dynamic, yarn and llama3 can be read",
                inner
                    .given("rope_type")
                    .or(inner.given("type"))
                    .unwrap_or(&Value::Null)
            )),
        }
    }
}

/// What yarn multiplies turned queries and keys by, where the file says it; 0 for its default.
fn attention_factor(table: &Keys, factor: f64) -> Result<f64, String> {
    let scale = |by: f64| match factor <= 1.0 {
        true => 1.0,
        false => 0.1 * by * factor.ln() + 1.0,
    };
    let (one, all) = (
        table.real_or("mscale", 0.0)?,
        table.real_or("mscale_all_dim", 0.0)?,
    );
    match table.given("attention_factor") {
        Some(_) => table.real("attention_factor"),
        None if one != 0.0 && all != 0.0 => Ok(scale(one) / scale(all)),
        None => Ok(0.0),
    }
}

/// Rotary positions as knobs of the attention mixer.
pub(crate) struct Rope {
    pub(crate) base: f64,
    pub(crate) dim: u64,
    pub(crate) scaling: Value,
}

impl Rope {
    /// Writes the knobs into a mixer.
    pub(crate) fn into_mixer(self, mixer: &mut Value) {
        mixer["rope_base"] = json!(self.base);
        mixer["rope_dim"] = json!(self.dim);
        mixer["rope_scaling"] = self.scaling;
    }
}

/// The reverse of [`Keys::rope`], of a resolved attention mixer: `rope_parameters`, and the longest sequence that it
/// implies (at least `longest`).
pub(crate) fn rope_parameters(mixer: &Value, head_dim: u64, longest: u64) -> (Value, u64) {
    let scaling = &mixer["rope_scaling"];
    let number = |key: &str| scaling[key].clone();
    let length = scaling["length"].as_u64().unwrap_or(0);
    let stretched = (length as f64 * scaling["factor"].as_f64().unwrap_or(1.0)) as u64;
    let (mut table, longest) = match scaling["type"].as_str() {
        Some("linear") => (
            json!({"rope_type": "linear", "factor": number("factor")}),
            longest,
        ),
        Some("dynamic") => (
            json!({"rope_type": "dynamic", "factor": number("factor")}),
            length,
        ),
        Some("llama3") => (
            json!({
                "rope_type": "llama3", "factor": number("factor"), "original_max_position_embeddings": length,
                "low_freq_factor": number("low_freq_factor"), "high_freq_factor": number("high_freq_factor"),
            }),
            stretched,
        ),
        Some("yarn") => {
            let mut table = json!({
                "rope_type": "yarn", "factor": number("factor"), "original_max_position_embeddings": length,
                "beta_fast": number("beta_fast"), "beta_slow": number("beta_slow"), "truncate": number("truncate"),
            });
            if scaling["attention_factor"] != json!(0.0) {
                table["attention_factor"] = number("attention_factor");
            }
            (table, stretched)
        }
        _ => (json!({"rope_type": "default"}), longest),
    };
    table["rope_theta"] = mixer["rope_base"].clone();
    let turned = mixer["rope_dim"].as_u64().unwrap_or(0);
    if turned > 0 {
        table["partial_rotary_factor"] = json!(turned as f64 / head_dim.max(1) as f64);
    }
    (table, longest)
}
