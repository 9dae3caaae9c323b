//! Model folders: what is saved is what is loaded, and whatever is damaged is refused with a reason.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use anyformer_hub::tensors::write_tensors;
use anyformer_hub::{
    Damage, Extra, FolderWriter, HubError, MODEL_FILE, ModelFolder, NamedTensor, Problem, load,
    parse_safetensors, read_safetensors, save, write_safetensors,
};
use anyformer_models::{Model, ModelConfig};
use anyformer_ops::Device;
use serde_json::json;

fn model(seed: u64) -> Model {
    let config = json!({
        "dim": 16, "layers": 2, "mixers": [{"name": "attention", "heads": 2}], "reads": {"tokens": {"vocab": 11}},
    });
    Model::new(
        &ModelConfig::from_json(&config).unwrap(),
        &Device::flex(),
        seed,
    )
    .unwrap()
}

fn bytes_of(tensors: &[NamedTensor]) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_tensors(&mut bytes, tensors, &BTreeMap::new()).unwrap();
    bytes
}

fn tensor(name: &str, shape: &[usize], values: &[f32]) -> NamedTensor {
    NamedTensor {
        name: name.into(),
        shape: shape.to_vec(),
        values: values.to_vec(),
    }
}

#[test]
fn saved_then_loaded_is_the_same_model_and_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (folder.path().join("a/one"), folder.path().join("two"));
    let model = model(3);
    let mut extra = Extra {
        tokenizer: Some("{\"bytes\": true}".into()),
        ..Extra::default()
    };
    extra.info.insert("task".into(), json!("induction_heads"));
    save(&one, &model, &extra).unwrap();
    let opened = ModelFolder::open(&one).unwrap();
    assert_eq!(opened.config, *model.config());
    assert_eq!(opened.info["task"], "induction_heads");
    assert_eq!(opened.tokenizer().unwrap(), extra.tokenizer);
    let again = load(&one, &Device::flex()).unwrap();
    assert_eq!(
        NamedTensor::of(again.params()),
        NamedTensor::of(model.params())
    );
    save(&two, &again, &extra).unwrap();
    for file in [MODEL_FILE, "config.json", "tokenizer.json", "SHA256SUMS"] {
        assert_eq!(
            fs::read(one.join(file)).unwrap(),
            fs::read(two.join(file)).unwrap(),
            "{file}"
        );
    }
    assert!(matches!(
        save(&two, &model, &extra),
        Err(HubError::Exists(_))
    ));
}

#[test]
fn the_reference_reader_reads_what_is_written() {
    let tensors = [
        tensor("b", &[2, 1], &[1.5, -2.0]),
        tensor("a", &[], &[7.0]),
        tensor("empty", &[0, 3], &[]),
    ];
    let bytes = bytes_of(&tensors);
    let read = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let b = read.tensor("b").unwrap();
    assert_eq!(b.shape(), [2, 1]);
    assert_eq!(
        b.data(),
        [1.5f32.to_le_bytes(), (-2.0f32).to_le_bytes()].concat()
    );
    assert_eq!(
        parse_safetensors(Path::new("x"), &bytes).unwrap().tensors,
        tensors
    );
}

#[test]
fn half_precision_is_widened_and_other_types_are_named() {
    let half: Vec<u8> = [0x3c00u16, 0xc000, 0x0001]
        .iter()
        .flat_map(|bits| bits.to_le_bytes())
        .collect();
    let brain: Vec<u8> = [0x3f80u16, 0xc000, 0x4049]
        .iter()
        .flat_map(|bits| bits.to_le_bytes())
        .collect();
    let header = |types: [&str; 2]| {
        let entry = |kind: &str, from: usize| json!({"dtype": kind, "shape": [3], "data_offsets": [from, from + 6]});
        json!({"h": entry(types[0], 0), "b": entry(types[1], 6)}).to_string()
    };
    let file = |header: String| {
        let length = (header.len() as u64).to_le_bytes();
        [&length[..], header.as_bytes(), &half, &brain].concat()
    };
    let read = parse_safetensors(Path::new("x"), &file(header(["F16", "BF16"]))).unwrap();
    assert_eq!(read.tensors[0].values, [1.0, -2.0, 2f32.powi(-24)]);
    assert_eq!(read.tensors[1].values, [1.0, -2.0, 3.140625]);
    let error = parse_safetensors(Path::new("x"), &file(header(["I16", "U16"])))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("h is I16") && error.contains("b is U16"),
        "{error}"
    );
}

#[test]
fn every_tensor_that_does_not_fit_is_in_one_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    let model = model(0);
    save(&path, &model, &Extra::default()).unwrap();
    let mut tensors = NamedTensor::of(model.params());
    let missing = tensors.remove(1).name;
    tensors[1].shape.push(1);
    let shaped = tensors[1].name.clone();
    tensors.push(tensor("stray", &[1], &[0.0]));
    fs::remove_file(path.join("SHA256SUMS")).unwrap();
    write_safetensors(&path.join(MODEL_FILE), &tensors, &BTreeMap::new()).unwrap();
    let error = load(&path, &Device::flex()).err().unwrap();
    let HubError::Mismatch { problems, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(problems.len(), 3);
    let text = error.to_string();
    for name in [missing.as_str(), &shaped, "stray", MODEL_FILE] {
        assert!(text.contains(name), "{name}: {text}");
    }
}

#[test]
fn weights_that_are_not_finite_are_neither_written_nor_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    let broken = model(0);
    let param = &broken.params().params()[2];
    param.update(|values| values[3] = f32::NAN);
    let error = save(&path, &broken, &Extra::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains(param.name()), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    save(&path, &model(0), &Extra::default()).unwrap();
    fs::remove_file(path.join("SHA256SUMS")).unwrap();
    write_safetensors(
        &path.join(MODEL_FILE),
        &NamedTensor::of(broken.params()),
        &BTreeMap::new(),
    )
    .unwrap();
    let Err(HubError::Mismatch { problems, .. }) = load(&path, &Device::flex()) else {
        panic!("loaded")
    };
    let name = param.name().to_string();
    assert_eq!(
        problems,
        [Problem::NotFinite {
            name,
            count: 1,
            first: 3
        }]
    );
}

#[test]
fn each_kind_of_damage_has_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.safetensors");
    let whole = bytes_of(&[tensor("a", &[4], &[1.0, 2.0, 3.0, 4.0])]);
    let damage = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        let error = read_safetensors(&path).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("x.safetensors"), "{text}");
        match error {
            HubError::Damaged { damage, .. } => damage,
            other => panic!("{other}"),
        }
    };
    assert_eq!(damage(&whole[..5]), Damage::NoHeader { bytes: 5 });
    assert!(matches!(
        damage(&whole[..20]),
        Damage::HeaderBeyondFile { bytes: 20, .. }
    ));
    assert_eq!(
        damage(&whole[..whole.len() - 3]),
        Damage::Length {
            expected: 16,
            got: 13
        }
    );
    assert_eq!(
        damage(&[&whole[..], &[0]].concat()),
        Damage::Length {
            expected: 16,
            got: 17
        }
    );
    let with_length = |length: u64| [&length.to_le_bytes()[..], &whole[8..]].concat();
    assert!(matches!(
        damage(&with_length(u64::MAX)),
        Damage::HeaderTooLarge {
            claimed: u64::MAX,
            ..
        }
    ));
    assert!(matches!(
        damage(&with_length(90_000_000)),
        Damage::HeaderBeyondFile { .. }
    ));
    let mut not_json = whole.clone();
    not_json[8] = b'[';
    assert!(matches!(damage(&not_json), Damage::HeaderNotJson(_)));
    not_json[9] = 0xff;
    assert!(matches!(damage(&not_json), Damage::HeaderNotJson(_)));
    let text = String::from_utf8_lossy(&whole).replace("[0,16]", "[4,20]");
    assert!(matches!(damage(text.as_bytes()), Damage::Layout(_)));
    let text = String::from_utf8_lossy(&whole).replace("[4]", "[5]");
    assert!(matches!(damage(text.as_bytes()), Damage::Layout(_)));
}

/// Splitmix64.
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn no_bytes_make_the_reader_panic() {
    let whole = bytes_of(&[
        tensor("a", &[2, 3], &[1.0; 6]),
        tensor("b.weight", &[5], &[0.5; 5]),
    ]);
    let path = Path::new("soup");
    for end in 0..whole.len() {
        assert!(
            parse_safetensors(path, &whole[..end]).is_err(),
            "cut at {end}"
        );
    }
    for bit in 0..8 * whole.len() {
        let mut flipped = whole.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let _ = parse_safetensors(path, &flipped);
    }
    let mut state = 1;
    for _ in 0..3000 {
        let size = (random(&mut state) % 200) as usize;
        let mut soup: Vec<u8> = (0..size).map(|_| random(&mut state) as u8).collect();
        if size > 8 {
            // A believable header length, so that the header is reached.
            soup[..8].copy_from_slice(&(random(&mut state) % size as u64).to_le_bytes());
        }
        let _ = parse_safetensors(path, &soup);
    }
}

#[test]
fn any_flipped_bit_or_cut_of_a_folder_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m");
    save(&path, &model(0), &Extra::default()).unwrap();
    for name in [MODEL_FILE, "config.json"] {
        let file = path.join(name);
        let whole = fs::read(&file).unwrap();
        let mut state = 7;
        for _ in 0..60 {
            let bit = random(&mut state) as usize % (8 * whole.len());
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            fs::write(&file, &flipped).unwrap();
            let error = load(&path, &Device::flex())
                .err()
                .unwrap_or_else(|| panic!("{name}: bit {bit} unnoticed"));
            assert!(error.to_string().contains(name), "{error}");
            fs::write(&file, &whole[..bit / 8]).unwrap();
            assert!(
                load(&path, &Device::flex()).is_err(),
                "{name} cut at {}",
                bit / 8
            );
        }
        fs::remove_file(&file).unwrap();
        let error = load(&path, &Device::flex()).err().unwrap().to_string();
        assert!(error.contains(name), "{error}");
        fs::write(&file, &whole).unwrap();
    }
    load(&path, &Device::flex()).unwrap();
}

#[test]
fn foreign_and_newer_configs_are_refused_with_a_reason() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let open = |config: &str| {
        fs::write(path.join("config.json"), config).unwrap();
        ModelFolder::open(path).unwrap_err().to_string()
    };
    assert!(
        ModelFolder::open(path)
            .unwrap_err()
            .to_string()
            .contains("no config.json")
    );
    fs::write(path.join(MODEL_FILE), "").unwrap();
    assert!(open("{").contains("not JSON"));
    assert!(open("{\"model_type\": \"t5\"}").contains("t5"));
    assert!(open("{\"anyformer\": {}, \"format_version\": 99}").contains("update anyformer"));
    assert!(
        open("{\"anyformer\": {\"layrs\": 1}, \"format_version\": 1}")
            .contains("did you mean \"layers\"")
    );
    let error = load(&path.join("nowhere"), &Device::flex())
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains("nowhere"), "{error}");
    let huge = "{\"anyformer\": {\"layers\": 1000000000000}, \"format_version\": 1}";
    fs::write(path.join("config.json"), huge).unwrap();
    fs::write(
        path.join(MODEL_FILE),
        bytes_of(&[tensor("a", &[1], &[0.0])]),
    )
    .unwrap();
    assert!(
        load(path, &Device::flex())
            .err()
            .unwrap()
            .to_string()
            .contains("asks for 1000000000000 layers")
    );
}

/// Fails after some bytes, as a full disk does.
struct Full<'a> {
    file: &'a mut dyn Write,
    left: usize,
}

impl Write for Full<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = bytes.len().min(self.left);
        if count == 0 && !bytes.is_empty() {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        self.left -= count;
        self.file.write(&bytes[..count])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[test]
fn a_writer_that_fails_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("m");
    let tensors = [tensor("a", &[100], &[1.0; 100])];
    for room in [0, 1, 8, 60, 300, 450] {
        let mut writer = FolderWriter::create(&target).unwrap();
        writer
            .file("config.json", |file| file.write_all(b"{}"))
            .unwrap();
        let outcome = writer.file(MODEL_FILE, |file| {
            write_tensors(&mut Full { file, left: room }, &tensors, &BTreeMap::new())
        });
        let error = outcome.unwrap_err();
        assert!(error.to_string().contains(MODEL_FILE), "{error}");
        drop(writer);
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            0,
            "room {room}"
        );
    }
}

/// A real file system of 64 KiB, where this process may mount one.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_and_leaves_the_old_folder() {
    use std::process::Command;
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let mount = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=64k", "tmpfs"])
        .arg(&disk)
        .output();
    if !mount.is_ok_and(|done| done.status.success()) {
        return;
    }
    struct Unmount<'a>(&'a Path);
    impl Drop for Unmount<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0).status();
        }
    }
    let _unmount = Unmount(&disk);
    let model = model(0);
    let mut saved = 0;
    let error = loop {
        match save(&disk.join(saved.to_string()), &model, &Extra::default()) {
            Ok(()) => saved += 1,
            Err(error) => break error,
        }
    };
    assert!(saved > 0, "{error}");
    assert!(matches!(error, HubError::Write { .. }), "{error}");
    assert_eq!(fs::read_dir(&disk).unwrap().count(), saved);
    load(&disk.join("0"), &Device::flex()).unwrap();
}
