//! Layers left out by chance, values dropped and teachers: at their neutral values no bit changes.

mod common;

use std::fs;
use std::path::Path;

use anyformer_hub::{Extra, save};
use anyformer_train::{Event, NoEvents, RunFolder, StopFlag, TrainConfig, TrainError, Trainer};
use common::{Successor, config, model_with, tiny_model};
use serde_json::json;

/// The parameters after a run.
fn trained(task: &Successor, config: &TrainConfig) -> Vec<Vec<f32>> {
    let mut trainer = Trainer::new(tiny_model(config), task, config.clone()).expect("a run");
    trainer
        .run(&mut NoEvents, &StopFlag::default())
        .expect("runs");
    let params = trainer.model().params().params().iter();
    params.map(|param| param.values()).collect()
}

#[test]
fn no_drop_and_no_part_of_a_teacher_are_the_plain_run() {
    let task = Successor::default();
    let plain = TrainConfig {
        steps: 6,
        warmup: 0,
        ..config()
    };
    let want = trained(&task, &plain);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("teacher");
    save(&path, &tiny_model(&plain), &Extra::default()).expect("saved");
    let with = |mix: f64| TrainConfig {
        teacher: Some(path.display().to_string()),
        teacher_mix: mix,
        layer_drop: 0.0,
        ..plain.clone()
    };
    assert_eq!(trained(&task, &with(0.0)), want);
    assert_ne!(trained(&task, &with(0.5)), want);
    let dropped = TrainConfig {
        layer_drop: 0.5,
        ..plain.clone()
    };
    let got = trained(&task, &dropped);
    assert_ne!(got, want);
    assert_eq!(trained(&task, &dropped), got);
}

#[test]
fn a_teacher_that_is_not_there_is_named() {
    let task = Successor::default();
    let config = TrainConfig {
        teacher: Some("nowhere/at/all".into()),
        ..config()
    };
    let error = Trainer::new(tiny_model(&config), &task, config.clone()).err();
    let error = error.expect("no such folder");
    assert!(matches!(error, TrainError::Hub(_)), "{error}");
    assert!(error.to_string().contains("nowhere/at/all"), "{error}");
}

/// The folder of a run with dropout, stopped after `stop_at` updates and gone on with, or unbroken.
fn dropping(task: &Successor, path: &Path, stop_at: &[u64]) -> Vec<u8> {
    let config = TrainConfig {
        steps: 9,
        accumulate: 2,
        log_every: 1,
        ..config()
    };
    for stop_at in stop_at.iter().map(|step| Some(*step)).chain([None]) {
        let model = model_with(&config, json!({"dropout": 0.2}));
        let trainer = Trainer::new(model, task, config.clone()).expect("a run");
        let folder = match path.join("run.toml").exists() {
            true => RunFolder::open(path).expect("there").0,
            false => RunFolder::create(path, &trainer.options()).expect("made"),
        };
        let mut trainer = trainer.with_folder(folder).expect("goes on");
        let stop = StopFlag::default();
        let mut watch = |event: &Event| {
            if matches!(event, Event::Step { step, .. } if Some(*step) == stop_at) {
                stop.request();
            }
            Ok(())
        };
        trainer.run(&mut watch, &stop).expect("runs");
    }
    fs::read(path.join("checkpoints/00000009/model.safetensors")).expect("a checkpoint")
}

#[test]
fn a_run_with_dropout_that_was_stopped_has_the_bits_of_an_unbroken_one() {
    let task = Successor::default();
    let folder = tempfile::tempdir().expect("a folder");
    let unbroken = dropping(&task, &folder.path().join("one"), &[]);
    assert_eq!(
        dropping(&task, &folder.path().join("two"), &[2, 5]),
        unbroken
    );
    let plain = TrainConfig {
        steps: 9,
        accumulate: 2,
        ..config()
    };
    let without = folder.path().join("three");
    let mut trainer = Trainer::new(tiny_model(&plain), &task, plain.clone()).expect("a run");
    let made = RunFolder::create(&without, &trainer.options()).expect("made");
    trainer = trainer.with_folder(made).expect("begins");
    trainer
        .run(&mut NoEvents, &StopFlag::default())
        .expect("runs");
    let path = without.join("checkpoints/00000009/model.safetensors");
    assert_ne!(fs::read(path).expect("a checkpoint"), unbroken);
}
