use super::*;
use serde_json::json;

#[test]
fn unknown_keys_name_the_nearest() {
    let error = ModelConfig::from_json(&json!({"layrs": 3})).expect_err("unknown key");
    assert!(error.to_string().contains("did you mean \"layers\""));
    let error = ModelConfig::from_json(&json!({"channel": {"name": "swiglo"}}));
    let error = error.expect_err("unknown mixer").to_string();
    assert!(error.contains("did you mean \"swiglu\""), "{error}");
}

#[test]
fn shared_layers_and_narrow_embeddings_have_their_limits() {
    for (config, part) in [
        (json!({"share_layers": 1, "layers": 5000}), "5000 layers"),
        (json!({"embed_dim": 8}), "tied = false"),
        (
            json!({"embed_dim": 8, "gives": {"class": {"classes": 2, "pool": "cls"}}}),
            "pool = \"cls\"",
        ),
    ] {
        let error = ModelConfig::from_json(&config).expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    }
    for (config, part) in [
        (json!({"dropout": 1.0}), "below 1, got 1"),
        (json!({"dropout": -0.1}), "at least 0"),
        (json!({"dropout": 0.99999999999}), "below 1"),
    ] {
        let error = ModelConfig::from_json(&config).expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    }
    let fits = json!({"embed_dim": 8, "share_layers": 1, "gives": {"next_token": {"tied": false}}});
    assert!(ModelConfig::from_json(&fits).is_ok());
}

#[test]
fn streams_and_chunks_have_their_limits() {
    for (config, part) in [
        (
            json!({"reversible": true, "wiring": "post_norm"}),
            "pre_norm",
        ),
        (
            json!({"ff_chunks": 2, "channel": {"name": "moe"}}),
            "ff_chunks = 0",
        ),
        // It looks both ways, this one back only.
        (
            json!({"first_conv": 3, "mixers": [{"name": "sparse"}]}),
            "first_conv",
        ),
    ] {
        let error = ModelConfig::from_json(&config).expect_err(part).to_string();
        assert!(error.contains(part), "{error}");
    }
    let fits = json!({"reversible": true, "wiring": "parallel", "ff_chunks": 3});
    assert!(ModelConfig::from_json(&fits).is_ok());
}
