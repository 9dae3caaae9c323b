//! Folders of other programs, written from the goldens with their names, are read by path and give their logits; written
//! again they do so still.

use std::path::Path;

use anyformer_hub::{ModelFolder, export};
use anyformer_models::{Gives, Input, Model, Pool};
use anyformer_ops::{Device, tensor_values};
use anyformer_testkit::golden::{self, Golden};
use anyformer_testkit::import::{load, ragged, rows, tensors, write};
use anyformer_testkit::tolerance::{OUTPUT, check};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

fn goldens(kind: &str) -> Vec<Golden> {
    let all = golden::all().expect("goldens");
    all.into_iter()
        .filter(|golden| golden.mixer == kind)
        .collect()
}

fn named(name: &str) -> Golden {
    let all = golden::all().expect("goldens");
    all.into_iter()
        .find(|golden| golden.name == name)
        .expect(name)
}

fn written(golden: &Golden, files: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("folder");
    write(golden, folder.path(), files).expect("written");
    folder
}

fn logits(golden: &Golden, folder: &Path) -> Vec<f32> {
    let model = load(folder).expect("loads");
    let (shape, ids) = golden.get("ids").expect("ids");
    let ids: Vec<u32> = ids.iter().map(|id| *id as u32).collect();
    let batch = shape[0];
    let whole = tensor_values(
        model
            .forward(Input::Tokens { ids: &ids, batch }, None)
            .expect("runs"),
    );
    // Token by token, every row at once.
    let time = shape[1];
    let vocab = whole.len() / (batch * time);
    let want: Vec<f32> = (0..batch)
        .flat_map(|row| &whole[((row + 1) * time - 1) * vocab..(row + 1) * time * vocab])
        .copied()
        .collect();
    let column = |at: usize| -> Vec<u32> { (0..batch).map(|row| ids[row * time + at]).collect() };
    let last = streamed(&model, (0..time).map(column));
    check("streamed", &last, &want, OUTPUT).expect("streamed equals whole");
    whole
}

/// The scores after the last of some tokens that come one by one, each for every sequence.
fn streamed(model: &Model, tokens: impl Iterator<Item = Vec<u32>>) -> Vec<f32> {
    let mut state = None;
    let mut last = Vec::new();
    for ids in tokens {
        let (scores, next) = model
            .prefill(&ids, ids.len(), None, state.as_ref())
            .expect("runs");
        (last, state) = (tensor_values(scores), Some(next));
    }
    last
}

#[test]
fn folders_of_transformers_give_its_logits() {
    let all = goldens("model");
    assert_eq!(all.len(), 3);
    for golden in &all {
        let want = golden.get("y").expect("y").1;
        for files in [1, 2] {
            let folder = written(golden, files);
            check(&golden.name, &logits(golden, folder.path()), want, OUTPUT).expect("files");
        }
    }
}

/// A family: in a ragged batch of seven, each row alone, token by token, and after an export.
#[test]
fn every_family_gives_the_logits_of_its_reference() {
    let all = goldens("import");
    assert!(all.len() >= 32, "{} goldens", all.len());
    for golden in &all {
        let name = &golden.name;
        let want = golden.get("y").expect("y").1;
        let folder = written(golden, 2);
        let model = load(folder.path()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let y = ragged(golden, &model).expect("runs");
        check(name, &y, want, OUTPUT).expect("ragged");

        let rows = rows(golden).expect("rows");
        assert_eq!(rows.len(), 7);
        let class = matches!(model.config().gives, Gives::Class { .. });
        let count = |ids: &Vec<u32>| if class { 1 } else { ids.len() };
        let width = want.len() / rows.iter().map(count).sum::<usize>();
        let mut start = 0;
        for ids in &rows {
            let want = &want[start * width..(start + count(ids)) * width];
            start += count(ids);
            if golden.get("types").is_ok() {
                continue;
            }
            let y = model
                .forward(Input::Tokens { ids, batch: 1 }, None)
                .expect("runs");
            check(name, &tensor_values(y), want, OUTPUT).expect("alone");
            if class || !model.config().streams() {
                continue;
            }
            // Where positions depend on the length at hand, the reference's own steps differ from its whole.
            let want = match golden.get("stream") {
                Ok((_, stream)) if ids.len() == 12 => stream,
                Ok(_) => continue,
                Err(_) => &want[want.len() - width..],
            };
            let last = streamed(&model, ids.iter().map(|id| vec![*id]));
            check(name, &last, want, OUTPUT).expect("token by token");
        }

        let place = tempfile::tempdir().expect("folder");
        let to = place.path().join("out");
        let opened = ModelFolder::open(folder.path()).expect("opens");
        export(&opened, &to).unwrap_or_else(|error| panic!("{name}: {error}"));
        let again = load(&to).unwrap_or_else(|error| panic!("{name}: {error}"));
        let back = ragged(golden, &again).expect("runs");
        assert_eq!(back, y, "{name} after an export");
        let names = |folder: &Path, file: &str| -> Vec<(String, Vec<usize>)> {
            let file = anyformer_hub::read_safetensors(&folder.join(file)).expect("reads");
            let mut names: Vec<_> = file
                .tensors
                .into_iter()
                .map(|tensor| (tensor.name, tensor.shape))
                .filter(|(name, _)| class || !name.contains("pooler"))
                .collect();
            names.sort();
            names
        };
        let mut theirs = names(folder.path(), "model-0.safetensors");
        theirs.extend(names(folder.path(), "model-1.safetensors"));
        theirs.sort();
        assert_eq!(names(&to, "model.safetensors"), theirs, "{name}");
    }
}

#[test]
fn everything_that_does_not_fit_is_in_one_error_under_its_own_name() {
    let golden = named("model_llama");
    let folder = written(&golden, 1);
    let mut all = tensors(&golden);
    let [first, second] = [all[0].name.clone(), all[1].name.clone()];
    all[0].name = "model.unknown".into();
    all[1].shape = vec![all[1].values.len()];
    let path = folder.path().join("model.safetensors");
    anyformer_hub::write_safetensors(&path, &all, &Default::default()).expect("writes");
    let error = load(folder.path()).err().expect("refused");
    for name in ["model.unknown", first.as_str(), second.as_str()] {
        assert!(error.contains(name), "{name}: {error}");
    }
    assert!(error.contains("3 tensors"), "{error}");
}

#[test]
fn in_several_files_the_error_names_the_file_of_each() {
    let golden = named("import_gpt2");
    let folder = written(&golden, 2);
    let path = folder.path().join("model-1.safetensors");
    let mut part = anyformer_hub::read_safetensors(&path)
        .expect("reads")
        .tensors;
    let gone = part.remove(0).name;
    part[0].shape.push(1);
    let shaped = part[0].name.clone();
    // It stands in the first file, too.
    let first = folder.path().join("model-0.safetensors");
    part.push(
        anyformer_hub::read_safetensors(&first)
            .expect("reads")
            .tensors[0]
            .clone(),
    );
    anyformer_hub::write_safetensors(&path, &part, &Default::default()).expect("writes");
    let error = load(folder.path()).err().expect("refused");
    for words in [
        format!("{gone} in model-1.safetensors"),
        format!("{shaped} in model-1.safetensors should be"),
        "model-0.safetensors and again in model-1.safetensors".to_string(),
    ] {
        assert!(error.contains(&words), "{words}: {error}");
    }
    assert!(error.contains("3 tensors"), "{error}");
}

#[test]
fn buffers_that_nobody_needs_may_be_of_any_type() {
    let golden = named("import_bert_hidden");
    let folder = written(&golden, 1);
    let path = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&path).expect("reads");
    let file = SafeTensors::deserialize(&bytes).expect("reads");
    let mut all = file.tensors();
    let ids: Vec<u8> = (0..16i64).flat_map(i64::to_le_bytes).collect();
    let ids = TensorView::new(Dtype::I64, vec![1, 16], &ids).expect("a tensor");
    all.push(("embeddings.position_ids".into(), ids.clone()));
    std::fs::write(
        &path,
        safetensors::serialize(all.clone(), None).expect("bytes"),
    )
    .expect("writes");
    load(folder.path()).expect("loads");
    all.push(("encoder.other".into(), ids));
    std::fs::write(&path, safetensors::serialize(all, None).expect("bytes")).expect("writes");
    let error = load(folder.path()).err().expect("refused");
    assert!(error.contains("encoder.other is I64"), "{error}");
}

#[test]
fn more_layers_than_tensors_are_refused_before_any_is_made() {
    let golden = named("model_llama");
    let folder = written(&golden, 1);
    let mut config = golden.config.clone();
    config.insert("num_hidden_layers".into(), json!(2_000_000_000));
    let text = Value::Object(config).to_string();
    std::fs::write(folder.path().join("config.json"), text).expect("writes");
    let error = load(folder.path()).err().expect("refused");
    assert!(error.contains("2000000000 layers"), "{error}");
}

#[test]
fn a_model_of_ours_that_no_family_has_is_not_exported() {
    let config = json!({"dim": 16, "layers": 1, "mixers": [{"name": "performer"}]});
    let config = anyformer_models::ModelConfig::from_json(&config).expect("a config");
    let model = Model::new(&config, &Device::flex(), 0).expect("built");
    let place = tempfile::tempdir().expect("folder");
    let from = place.path().join("from");
    anyformer_hub::save(&from, &model, &Default::default()).expect("saved");
    let opened = ModelFolder::open(&from).expect("opens");
    let error = export(&opened, &place.path().join("to")).expect_err("refused");
    assert!(error.to_string().contains("made of attention"), "{error}");
    assert!(!place.path().join("to").exists());
}

#[test]
fn a_folder_of_sentence_transformers_says_how_vectors_are_made() {
    let golden = named("import_bert_hidden");
    let folder = written(&golden, 1);
    let put = |name: &str, value: Value| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
        std::fs::write(path, value.to_string()).expect("written");
    };
    let open = || {
        ModelFolder::open(folder.path())
            .expect("opens")
            .sentence_vectors()
    };
    assert_eq!(open().expect("reads"), None);
    let module = |kind: &str, path: &str| json!({"type": format!("sentence_transformers.models.{kind}"), "path": path});
    let three = |last: &str| {
        json!([
            module("Transformer", ""),
            module("Pooling", "1_Pooling"),
            module(last, "2_Last")
        ])
    };
    put("modules.json", three("Normalize"));
    let error = open().expect_err("no pooling").to_string();
    assert!(error.contains("1_Pooling/config.json"), "{error}");
    put(
        "1_Pooling/config.json",
        json!({"pooling_mode_max_tokens": true}),
    );
    put(
        "sentence_bert_config.json",
        json!({"max_seq_length": 12, "do_lower_case": false}),
    );
    let found = open().expect("reads").expect("is one");
    assert_eq!(
        (found.pool, found.unit, found.tokens),
        (Pool::Max, true, Some(12))
    );
    // What is written of it is read the same.
    let place = tempfile::tempdir().expect("a folder");
    let opened = ModelFolder::open(folder.path()).expect("opens");
    let to = place.path().join("out");
    export(&opened, &to).expect("written");
    let vectors = |folder: &Path| ModelFolder::open(folder).expect("opens").sentence_vectors();
    assert_eq!(vectors(&to).expect("reads"), Some(found));
    let config = std::fs::read_to_string(to.join("1_Pooling/config.json")).expect("there");
    assert!(config.contains("pooling_mode_max_tokens"), "{config}");
    put("modules.json", three("Dense"));
    let error = open().expect_err("a dense layer").to_string();
    assert!(error.contains("Dense"), "{error}");
    put(
        "modules.json",
        json!([module("Transformer", ""), module("Pooling", "../x")]),
    );
    assert!(open().is_err());

    // The largest value of each feature, of each sequence by itself.
    let model = load(folder.path()).expect("loads");
    let rows = rows(&golden).expect("rows");
    let slices: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    let vectors = tensor_values(model.vectors(&slices, found.pool).expect("runs"));
    let hidden = golden.get("y").expect("y").1;
    let dim = vectors.len() / rows.len();
    let mut places = hidden.chunks(dim);
    let mut want = Vec::new();
    for row in &rows {
        let own: Vec<&[f32]> = places.by_ref().take(row.len()).collect();
        want.extend((0..dim).map(|at| own.iter().map(|place| place[at]).fold(f32::MIN, f32::max)));
    }
    check("largest", &vectors, &want, OUTPUT).expect("pooled");
}
