//! Writing a model as a folder that transformers (or fla) loads.

use std::collections::BTreeMap;
use std::path::Path;

use anyformer_ops::Device;
use serde_json::{Map, Value, json};

use crate::chat::{ChatTemplate, TOKENIZER_CONFIG_FILE};
use crate::error::HubError;
use crate::families::Family;
use crate::folder::FolderWriter;
use crate::model::{CONFIG_FILE, GENERATION_FILE, MODEL_FILE, ModelFolder, TOKENIZER_FILE};
use crate::tensors::write_tensors;

/// Files that are taken along as they are.
const COPIED: &[&str] = &[
    GENERATION_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
];

/// Writes the model of `folder` to `dir`, which must not exist or be empty. The family is the folder's own, else the first
/// that has such a model; where none has, the error tells why not. Weights are written as f32.
pub fn export(folder: &ModelFolder, dir: &Path) -> Result<Family, HubError> {
    let refused = |reason: String| HubError::NoFamily {
        path: folder.path.clone(),
        reason,
    };
    let own = folder
        .family
        .and_then(|family| Family::named(family.kind()));
    let (family, mut config) = match own {
        Some(family) => (family, family.export(&folder.config).map_err(refused)?),
        None => Family::fitting(&folder.config).map_err(refused)?,
    };
    for key in ["bos_token_id", "eos_token_id", "pad_token_id"] {
        if let Some(id) = folder.raw.get(key) {
            config[key] = id.clone();
        }
    }
    config["dtype"] = json!("float32");
    let mut writer = FolderWriter::create(dir)?;
    let model = folder.load(&Device::flex())?;
    let tensors = family.tensors(&folder.config, model.params());
    let tensors = tensors.map_err(refused)?;
    drop(model);
    let config = format!("{config:#}\n");
    writer.file(CONFIG_FILE, |file| file.write_all(config.as_bytes()))?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    writer.file(MODEL_FILE, |file| write_tensors(file, &tensors, &metadata))?;
    let mut texts = Map::new();
    if let Some(text) = folder.tokenizer()? {
        let bytes = text == BYTES.trim();
        let text = if bytes { bytes_tokenizer() } else { text };
        texts.insert(TOKENIZER_FILE.into(), json!(text));
        let class = json!({"tokenizer_class": "PreTrainedTokenizerFast"});
        texts.insert(TOKENIZER_CONFIG_FILE.into(), json!(format!("{class:#}\n")));
    }
    for name in COPIED {
        if let Some(text) = folder.text(name)? {
            texts.insert(name.to_string(), json!(text));
        }
    }
    for (name, text) in folder.sentence_files()? {
        texts.insert(name, json!(text));
    }
    if let Some(template) = ChatTemplate::of(folder)? {
        texts.insert("chat_template.jinja".into(), json!(template.source()));
    }
    for (name, text) in &texts {
        let text = text.as_str().unwrap_or_default();
        writer.file(name, |file| file.write_all(text.as_bytes()))?;
    }
    writer.commit()?;
    Ok(family)
}

/// The tokenizer of a model that reads bytes, as our folders hold it.
const BYTES: &str = "{\"anyformer\":\"bytes\"}";

/// The same in the format of the `tokenizers` library: a token per byte, no merges.
fn bytes_tokenizer() -> String {
    let level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let mut others = 0x100..;
    let letter = |byte: u32| match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => char::from_u32(byte),
        _ => others.next().and_then(char::from_u32),
    };
    let letters = (0..256).filter_map(letter).enumerate();
    let vocab: Map<String, Value> = letters
        .map(|(id, letter)| (letter.to_string(), json!(id)))
        .collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [],
        },
    });
    tokenizer.to_string()
}
