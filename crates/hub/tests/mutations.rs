//! Files that chance has damaged: whatever reads them gives a value or an error, never a panic, and takes no more memory than
//! the file could fill. The same entry functions are fuzz targets under `fuzz/`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyformer_hub::tensors::write_tensors;
use anyformer_hub::{
    ChatTemplate, Family, Message, ModelFolder, NamedTensor, parse_safetensors, save,
};
use anyformer_models::{Model, ModelConfig};
use anyformer_ops::Device;
use serde_json::{Value, json};

/// Numbers that look random.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        ((self.0 >> 33) % limit.max(1) as u64) as usize
    }

    /// One to four damages of some bytes.
    fn damage(&mut self, valid: &[u8]) -> Vec<u8> {
        let mut bytes = valid.to_vec();
        for _ in 0..1 + self.below(4) {
            let at = self.below(bytes.len());
            let end = (at + 1 + self.below(16)).min(bytes.len());
            match self.below(7) {
                0 => bytes.truncate(at),
                1 => bytes.extend_from_within(at..end),
                2 => drop(bytes.drain(at..end)),
                3 => {
                    let number = [0, 1, 1 << 60, u64::MAX, i64::MAX as u64][self.below(5)];
                    for (to, from) in bytes[at..].iter_mut().zip(number.to_le_bytes()) {
                        *to = from;
                    }
                }
                4 if !bytes.is_empty() => bytes[at] = b"0\"{}[],:-9\xff\\"[self.below(12)],
                _ if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                _ => {}
            }
        }
        bytes
    }

    /// A JSON value with one of its parts replaced.
    fn replaced(&mut self, value: &Value) -> Value {
        let odd = || {
            vec![
                json!(null),
                json!(-1),
                json!(0),
                json!(1u64 << 60),
                json!(u64::MAX),
                json!(1e300),
                json!(0.5),
                json!(""),
                json!("x"),
                json!([]),
                json!({}),
                json!([[{}]]),
                json!(true),
            ]
        };
        match value {
            Value::Object(map) if !map.is_empty() => {
                let mut map = map.clone();
                let at = self.below(map.len());
                if let Some((_, inner)) = map.iter_mut().nth(at) {
                    *inner = self.replaced(inner);
                }
                Value::Object(map)
            }
            Value::Array(items) if !items.is_empty() && self.below(3) > 0 => {
                let mut items = items.clone();
                let at = self.below(items.len());
                items[at] = self.replaced(&items[at]);
                Value::Array(items)
            }
            _ => {
                let odd = odd();
                odd[self.below(odd.len())].clone()
            }
        }
    }
}

fn model() -> Model {
    let config = json!({
        "dim": 8, "layers": 1, "mixers": [{"name": "attention", "heads": 2}], "reads": {"tokens": {"vocab": 5}},
    });
    let config = ModelConfig::from_json(&config).unwrap();
    Model::new(&config, &Device::flex(), 1).unwrap()
}

fn safetensors() -> Vec<u8> {
    let mut bytes = Vec::new();
    let tensors = NamedTensor::of(model().params());
    write_tensors(&mut bytes, &tensors, &BTreeMap::new()).unwrap();
    bytes
}

#[test]
fn damaged_safetensors_are_errors() {
    let valid = safetensors();
    let path = Path::new("model.safetensors");
    assert!(parse_safetensors(path, &valid).is_ok());
    let (mut chance, mut refused) = (Chance(1), 0);
    for _ in 0..4000 {
        let read = parse_safetensors(path, &chance.damage(&valid));
        refused += usize::from(read.is_err());
    }
    assert!((1000..4000).contains(&refused), "{refused}");
    // A header that claims more than there could be.
    for claim in [
        r#"{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4611686018427387904]}}"#,
        r#"{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}}"#,
        r#"{"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,18446744073709551612]}}"#,
    ] {
        let mut bytes = (claim.len() as u64).to_le_bytes().to_vec();
        bytes.extend(claim.as_bytes());
        bytes.extend([0; 4]);
        assert!(parse_safetensors(path, &bytes).is_err(), "{claim}");
    }
}

#[test]
fn damaged_folders_are_errors() {
    let place = tempfile::tempdir().unwrap();
    let from = place.path().join("model");
    save(&from, &model(), &Default::default()).unwrap();
    fs::remove_file(from.join("SHA256SUMS")).unwrap();
    let valid = ["config.json", "model.safetensors"].map(|name| fs::read(from.join(name)).unwrap());
    let (mut chance, mut refused) = (Chance(2), 0);
    for round in 0..600 {
        for (number, name) in ["config.json", "model.safetensors"].iter().enumerate() {
            let bytes = match round % 2 == number {
                true => chance.damage(&valid[number]),
                false => valid[number].clone(),
            };
            fs::write(from.join(name), bytes).unwrap();
        }
        let read = ModelFolder::open(&from).and_then(|folder| folder.load(&Device::flex()));
        refused += usize::from(read.is_err());
    }
    assert!((200..600).contains(&refused), "{refused}");
}

#[test]
fn a_width_that_the_file_does_not_have_costs_neither_time_nor_memory() {
    let place = tempfile::tempdir().unwrap();
    let tensors = NamedTensor::of(model().params());
    anyformer_hub::write_safetensors(
        &place.path().join("model.safetensors"),
        &tensors,
        &BTreeMap::new(),
    )
    .unwrap();
    let wide = 1usize << 30;
    let llama = json!({
        "model_type": "llama", "hidden_size": wide, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 5, "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    });
    let retnet = json!({
        "model_type": "retnet", "hidden_size": wide, "num_hidden_layers": 1, "num_heads": 2, "vocab_size": 5, "hidden_ratio": 2,
        "expand_k": 1, "expand_v": 2, "hidden_act": "swish", "norm_eps": 1e-6,
    });
    for config in [llama, retnet] {
        fs::write(place.path().join("config.json"), config.to_string()).unwrap();
        let began = std::time::Instant::now();
        let read = ModelFolder::open(place.path())
            .unwrap()
            .load(&Device::flex());
        let message = read.err().unwrap().to_string();
        assert!(message.contains("missing"), "{message}");
        // A table of a number for each feature alone took seconds, and gigabytes.
        assert!(
            began.elapsed().as_millis() < 1000,
            "{config}: {:?}",
            began.elapsed()
        );
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../testkit/goldens")
        .join(name)
}

#[test]
fn damaged_gguf_files_are_errors() {
    let valid = fs::read(golden("llama_tokenizer.gguf")).unwrap();
    let place = tempfile::tempdir().unwrap();
    let path = place.path().join("model.gguf");
    let (mut chance, mut refused) = (Chance(3), 0);
    for round in 0..1500 {
        // Most damages into the head, where the keys and the table are.
        let head = [200, 2000, valid.len()][round % 3];
        let mut bytes = chance.damage(&valid[..head]);
        bytes.extend(&valid[head..]);
        fs::write(&path, bytes).unwrap();
        let read = ModelFolder::open(&path);
        let read = read.and_then(|folder| folder.tokenizer().map(|_| folder));
        let read = read.and_then(|folder| folder.load(&Device::flex()));
        refused += usize::from(read.is_err());
    }
    assert_eq!(refused, 1500, "the file has no weights");
}

#[test]
fn odd_configs_are_errors() {
    let mut chance = Chance(4);
    let mut valid: Vec<Value> = vec![json!({
        "d_model": 16, "n_layer": 2, "vocab_size": 40, "ssm_cfg": {"layer": "Mamba2", "headdim": 8}, "rms_norm": true,
    })];
    let starts: Vec<Value> = vec![
        json!({"dim": 16, "mixers": [{"name": "attention", "heads": 2, "rope_scaling": {"type": "yarn", "factor": 2.0, "length": 8}}]}),
        json!({"dim": 16, "mixers": [{"name": "local", "window": 4}]}),
        json!({"dim": 16, "mixers": [{"name": "gla"}, {"name": "attention"}]}),
        json!({"dim": 16, "mixers": [{"name": "mamba"}], "channel": {"name": "none"}}),
        json!({"dim": 16, "mixers": [{"name": "attention", "causal": false, "position": "none", "bias": true}], "channel": {"name": "mlp"},
            "wiring": "post_norm", "norm": "layer", "norm_eps": 1e-12, "positions": "learned", "embed_norm": true, "token_types": 2,
            "gives": {"class": {"classes": 3, "pool": "first", "hidden": 16}}, "head_activation": "tanh"}),
    ];
    for start in starts {
        let config = ModelConfig::from_json(&start).unwrap();
        valid.push(Family::fitting(&config).unwrap().1);
    }
    let mut refused = 0;
    for round in 0..6000 {
        let mut config = valid[round % valid.len()].clone();
        for _ in 0..1 + round % 3 {
            config = chance.replaced(&config);
        }
        let read = Family::of(&config).and_then(|family| family.config(&config));
        refused += usize::from(read.is_err());
    }
    assert!((500..6000).contains(&refused), "{refused}");
}

#[test]
fn odd_chat_templates_are_errors() {
    let valid = "{% for message in messages %}{% if loop.index0 == 0 and message['role'] == 'system' %}{{ bos_token }}{% endif %}\
        <|{{ message.role }}|>{{ message['content'] | trim }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}";
    let messages = [
        Message::new("system", "Be brief"),
        Message::new("user", "Hi"),
    ];
    let (mut chance, mut refused) = (Chance(5), 0);
    for _ in 0..3000 {
        let text = String::from_utf8_lossy(&chance.damage(valid.as_bytes())).into_owned();
        let made = ChatTemplate::new(&text, ["<s>".into(), "</s>".into()]);
        refused += match made {
            Ok(template) => usize::from(template.render(&messages, true).is_err()),
            Err(_) => 1,
        };
    }
    assert!((300..3000).contains(&refused), "{refused}");
    // Without end, and too deep.
    for text in [
        "{% for a in range(99999999) %}{% for b in range(99999999) %}x{% endfor %}{% endfor %}"
            .to_string(),
        format!(
            "{}x{}",
            "{% if true %}".repeat(2000),
            "{% endif %}".repeat(2000)
        ),
        format!("{{{{ {}1{} }}}}", "(".repeat(5000), ")".repeat(5000)),
    ] {
        if let Ok(template) = ChatTemplate::new(&text, [String::new(), String::new()]) {
            let _ = template.render(&messages, true);
        }
    }
}
