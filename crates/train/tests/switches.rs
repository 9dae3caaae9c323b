//! Layers left out by chance and teachers: at their neutral values no bit changes.

mod common;

use anyformer_hub::{Extra, save};
use anyformer_train::{NoEvents, StopFlag, TrainConfig, TrainError, Trainer};
use common::{Successor, config, tiny_model};

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
