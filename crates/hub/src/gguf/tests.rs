//! Tests of the reader of GGUF files.

use super::*;

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

/// A file with one key, one list and one tensor of two rows of 32 values in the 34 bytes a row of Q8_0.
fn file(kind: u32) -> Vec<u8> {
    let mut bytes = b"GGUF\x03\0\0\0".to_vec();
    bytes.extend(1u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    text(&mut bytes, "a.name");
    bytes.extend(8u32.to_le_bytes());
    text(&mut bytes, "value");
    text(&mut bytes, "a.list");
    bytes.extend(9u32.to_le_bytes());
    bytes.extend(5u32.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend((-3i32).to_le_bytes());
    bytes.extend(4i32.to_le_bytes());
    text(&mut bytes, "t.weight");
    bytes.extend(2u32.to_le_bytes());
    bytes.extend(32u64.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    bytes.extend(kind.to_le_bytes());
    bytes.extend(0u64.to_le_bytes());
    bytes.resize(bytes.len().next_multiple_of(32), 0);
    bytes.extend([0; 68]);
    bytes
}

fn parsed(bytes: &[u8]) -> Result<Gguf, String> {
    parse(bytes, bytes.len() as u64)
}

#[test]
fn keys_and_tensors_come_out() {
    let gguf = parsed(&file(8)).expect("a file");
    assert_eq!(gguf.keys["a.name"], "value");
    assert_eq!(gguf.keys["a.list"], serde_json::json!([-3, 4]));
    assert_eq!(gguf.tensors, [("t.weight".to_string(), vec![2, 32], 8, 0)]);
}

#[test]
fn each_kind_of_damage_has_its_reason() {
    let whole = file(8);
    let with = |at: usize, bytes: &[u8]| {
        let mut broken = whole.clone();
        broken[at..at + bytes.len()].copy_from_slice(bytes);
        parsed(&broken).expect_err("damaged")
    };
    assert!(with(0, b"GGML").contains("begins with \"GGML\""));
    assert!(with(4, &[9]).contains("version 9"));
    assert!(with(8, &u64::MAX.to_le_bytes()).contains("tensors, which its"));
    assert!(with(16, &[0xff; 4]).contains("keys, which its"));
    assert!(with(24, &[0xff; 8]).contains("claims 18446744073709551615 bytes"));
    assert!(with(38, &[77]).contains("unknown type 77"));
    let rank = whole.len() - 128 + 40;
    let cut = parsed(&whole[..rank]).expect_err("cut");
    assert!(cut.contains("cut off") || cut.contains("are left"), "{cut}");
}

#[test]
fn offsets_beyond_the_file_and_unknown_types_are_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("m.gguf");
    let whole = file(8);
    let open = |bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("written");
        weights(&path, &read(&path)?)
    };
    assert_eq!(open(&whole).expect("fits").len(), 1);
    let error = open(&whole[..whole.len() - 1])
        .expect_err("cut")
        .to_string();
    assert!(
        error.contains("t.weight") && error.contains("m.gguf"),
        "{error}"
    );
    let problems = open(&file(99)).expect("opens").problems;
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(
        problems[0].1.to_string().contains("ggml type 99"),
        "{}",
        problems[0].1
    );
}

#[test]
fn no_bytes_make_the_reader_panic() {
    let whole = file(8);
    let mut state = 1u64;
    for _ in 0..4000 {
        let mut bytes = whole.clone();
        for _ in 0..3 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(99);
            let at = (state >> 33) as usize % bytes.len();
            bytes[at] = (state >> 20) as u8;
        }
        let end = (state >> 40) as usize % bytes.len();
        let _ = parsed(&bytes);
        let _ = parsed(&bytes[..end]);
    }
}

#[test]
fn blocks_stay_packed_and_stand_for_the_same_values() {
    use crate::families::names::Place;
    use anyformer_ops::{Builder, Device, Init};

    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("m.gguf");
    for (kind, size) in [(8, 34), (2, 18), (3, 20)] {
        let mut bytes = file(kind);
        let from = bytes.len() - 68;
        bytes.truncate(from + 2 * size);
        for (at, byte) in bytes[from..].iter_mut().enumerate() {
            *byte = (at * 73 + 19) as u8;
        }
        for block in 0..2 {
            // Finite scales and minima.
            bytes[from + block * size + 1] = 0x2c;
            if kind == 3 {
                bytes[from + block * size + 3] = 0x28;
            }
        }
        std::fs::write(&path, bytes).expect("written");
        let weights = weights(&path, &read(&path).expect("a file")).expect("fits");
        let stored = weights.get("t.weight").expect("there");
        let param =
            |name: &str| Builder::new(&Device::flex(), 0).matrix(name, &[2, 32], Init::Zeros);
        let (packed, widened) = (param("packed"), param("widened"));
        let place = Place::own("t.weight");
        assert_eq!(
            weights.fill_packed(&packed, stored, &place).expect("read"),
            None
        );
        assert_eq!(weights.fill(&widened, stored, &place).expect("read"), None);
        assert!(packed.packed().is_some() && widened.packed().is_none());
        let pairs = packed.values().into_iter().zip(widened.values());
        for (a, b) in pairs {
            assert!((a - b).abs() <= 1e-6 * b.abs().max(0.1), "{kind}: {a} {b}");
        }
        assert!(widened.values().iter().any(|value| *value != 0.0));
    }
}
