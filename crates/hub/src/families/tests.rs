//! Tests of the families' configs.

use super::*;

fn llama() -> Value {
    json!({
        "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "rms_norm_eps": 1e-6, "vocab_size": 64, "rope_theta": 5e5,
    })
}

fn family(kind: &str) -> Family {
    Family::named(kind).expect(kind)
}

#[test]
fn what_is_not_said_is_the_default() {
    let ours = family("llama").config(&llama()).expect("fits").to_json();
    let mixer = &ours["mixers"][0];
    assert_eq!(
        (&mixer["kv_heads"], &mixer["head_dim"]),
        (&json!(4), &json!(8))
    );
    assert_eq!(mixer["rope_base"].as_f64(), Some(5e5));
    assert_eq!(ours["norm_eps"].as_f64(), Some(1e-6));
}

#[test]
fn what_we_do_not_compute_is_refused_by_its_key() {
    for (key, value) in [
        ("hidden_act", json!("gelu")),
        ("mlp_bias", json!("no")),
        (
            "rope_scaling",
            json!({"rope_type": "longrope", "factor": 4.0}),
        ),
        ("hidden_size", json!(-3)),
        ("vocab_size", Value::Null),
    ] {
        let mut config = llama();
        config[key] = value;
        let error = family("llama").config(&config).expect_err(key);
        let key = if key == "rope_scaling" {
            "rope_type"
        } else {
            key
        };
        assert!(error.contains(key), "{key}: {error}");
    }
    let other = Family::of(&json!({"model_type": "t5"})).expect_err("unknown");
    assert!(other.contains("t5") && other.contains("mamba2"), "{other}");
}

#[test]
fn stretched_positions_come_through_and_back() {
    for scaling in [
        json!({"type": "linear", "factor": 2.0}),
        json!({"rope_type": "dynamic", "factor": 2.0}),
        json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 1.5}),
        json!({
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }),
    ] {
        let mut config = llama();
        config["max_position_embeddings"] = json!(256);
        config["rope_scaling"] = scaling.clone();
        let ours = family("llama").config(&config).expect("fits");
        let theirs = family("llama").export(&ours).expect("fits");
        let table = &theirs["rope_parameters"];
        assert_eq!(table["factor"].as_f64(), scaling["factor"].as_f64());
        assert_eq!(table["rope_theta"].as_f64(), Some(5e5));
        assert_eq!(
            family("llama").config(&theirs).map(|back| back.mixers),
            Ok(ours.mixers)
        );
    }
}

#[test]
fn a_model_goes_to_the_family_that_has_it() {
    let of = |config: Value| {
        let config = ModelConfig::from_json(&config).expect("a config");
        Family::fitting(&config).map(|(family, _)| family.kind())
    };
    let base = |mixer: Value| json!({"dim": 16, "mixers": [mixer]});
    assert_eq!(of(base(json!({"name": "attention"}))), Ok("llama"));
    assert_eq!(
        of(base(json!({"name": "local", "window": 8}))),
        Ok("mistral")
    );
    assert_eq!(
        of(base(json!({"name": "attention", "qkv_bias": true}))),
        Ok("qwen2")
    );
    let normed = json!({"name": "attention", "qk_norm": true, "norm_eps": 1e-5});
    assert_eq!(of(base(normed)), Ok("qwen3"));
    // What matters to training only stands in no folder of theirs.
    let mut trained = base(json!({"name": "attention"}));
    trained["dropout"] = json!(0.1);
    assert_eq!(of(trained), Ok("llama"));
    let none = of(base(json!({"name": "performer"}))).expect_err("no family");
    assert!(none.contains("llama: it is made of attention"), "{none}");
}
