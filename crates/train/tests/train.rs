//! Runs of a tiny model: they learn, stop, go on with the same bits, and refuse what cannot be.

mod common;

use std::cell::RefCell;
use std::fs;
use std::io;
use std::path::Path;

use anyformer_data::{Split, Task};
use anyformer_hub::NamedTensor;
use anyformer_models::Model;
use anyformer_train::{
    Evaluation, Event, Fan, JsonlSink, NoEvents, Outcome, RunFolder, Schedule, StopFlag,
    TensorBoardSink, TrainConfig, TrainError, Trainer, evaluate, score, training_device,
};
use common::{Successor, config, tiny_model};
use serde_json::json;

fn trainer<'a>(task: &'a Successor, config: &TrainConfig) -> Trainer<'a> {
    Trainer::new(tiny_model(config), task, config.clone()).unwrap()
}

fn in_folder<'a>(task: &'a Successor, config: &TrainConfig, path: &Path) -> Trainer<'a> {
    let trainer = trainer(task, config);
    let folder = match path.join("run.toml").exists() {
        true => RunFolder::open(path).unwrap().0,
        false => RunFolder::create(path, &trainer.options()).unwrap(),
    };
    trainer.with_folder(folder).unwrap()
}

/// Runs until done, or asks to stop when `stop_at` updates are done.
fn run(trainer: &mut Trainer, path: &Path, stop_at: Option<u64>) -> (Outcome, Vec<Event>) {
    let seen = RefCell::new(Vec::new());
    let stop = StopFlag::default();
    let watch = |event: &Event| {
        if matches!(event, Event::Step { step, .. } if Some(*step) == stop_at) {
            stop.request();
        }
        seen.borrow_mut().push(event.clone());
        Ok(())
    };
    let step = trainer.step();
    let jsonl = JsonlSink::open(&path.join("metrics.jsonl"), step).unwrap();
    let board = TensorBoardSink::open(path, step).unwrap();
    let mut events = Fan::default().and(jsonl).and(board).and(watch);
    let outcome = trainer.run(&mut events, &stop).unwrap();
    drop(events);
    (outcome, seen.into_inner())
}

fn losses(path: &Path) -> Vec<(u64, f64)> {
    let text = fs::read_to_string(path.join("metrics.jsonl")).unwrap();
    let events = text
        .lines()
        .map(|line| serde_json::from_str::<Event>(line).unwrap());
    let step = |event| match event {
        Event::Step { step, loss, .. } => Some((step, loss)),
        _ => None,
    };
    events.filter_map(step).collect()
}

fn same_checkpoints(one: &Path, two: &Path) {
    for name in ["model.safetensors", "optimizer.safetensors", "config.json"] {
        assert!(
            fs::read(one.join(name)).unwrap() == fs::read(two.join(name)).unwrap(),
            "{name}"
        );
    }
}

#[test]
fn the_loss_goes_down_and_evaluation_agrees() {
    let task = Successor::default();
    let config = TrainConfig {
        steps: 60,
        eval_every: 30,
        ..config()
    };
    let mut trainer = trainer(&task, &config);
    let mut events = Vec::new();
    let mut sink = |event: &Event| {
        events.push(event.clone());
        io::Result::Ok(())
    };
    assert_eq!(
        trainer.run(&mut sink, &StopFlag::default()).unwrap(),
        Outcome::Finished
    );
    let evaluations: Vec<(f64, f64)> = events
        .iter()
        .filter_map(|event| match event {
            Event::Evaluated {
                loss,
                accuracy,
                perplexity,
                ..
            } => {
                assert_eq!(*perplexity, Some(loss.exp()));
                Some((*loss, *accuracy))
            }
            _ => None,
        })
        .collect();
    assert_eq!(evaluations.len(), 2);
    let (loss, accuracy) = evaluations[1];
    assert!(
        loss < 0.3 && accuracy > 0.95,
        "loss {loss}, accuracy {accuracy}"
    );
    assert_eq!(trainer.best().unwrap().loss, loss);
    assert!(matches!(
        events[0],
        Event::Started {
            step: 0,
            steps: 60,
            ..
        }
    ));
    assert!(matches!(
        events.last(),
        Some(Event::Finished { step: 60, .. })
    ));
    let again = evaluate(
        trainer.model(),
        &task,
        Split::Validation,
        config.batch,
        config.eval_batches,
    )
    .unwrap();
    let counted = config.batch * config.eval_batches * common::TIME;
    assert!(again.constant > 0.0 && again.constant < 0.5);
    assert_eq!(
        again,
        Evaluation {
            loss,
            accuracy,
            constant: again.constant,
            counted
        }
    );
    assert!(
        trainer.model().params().device().is_autodiff(),
        "tracking is on again"
    );
}

#[test]
fn every_parameter_gets_a_gradient_and_moves() {
    let task = Successor::default();
    let config = TrainConfig {
        steps: 1,
        warmup: 0,
        ..config()
    };
    let model = tiny_model(&config);
    let batch = task
        .loader(Split::Train, 4, 0)
        .unwrap()
        .next_batch()
        .unwrap();
    let mut gradients = score(&model, &batch).unwrap().loss.backward();
    for param in model.params().params() {
        let gradient = param
            .gradient(&mut gradients)
            .unwrap_or_else(|| panic!("{} has none", param.name()));
        assert!(
            gradient.iter().any(|value| *value != 0.0),
            "{} has a zero gradient",
            param.name()
        );
    }
    let before = NamedTensor::of(model.params());
    let mut trainer = Trainer::new(model, &task, config).unwrap();
    trainer.run(&mut NoEvents, &StopFlag::default()).unwrap();
    for (before, after) in before.iter().zip(NamedTensor::of(trainer.model().params())) {
        assert_ne!(before.values, after.values, "{} did not move", before.name);
    }
}

#[test]
fn a_stopped_run_goes_on_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let task = Successor::default();
    for schedule in [Schedule::Cosine, Schedule::Wsd { decay: 0.5 }] {
        let config = TrainConfig {
            steps: 12,
            accumulate: 2,
            warmup: 3,
            log_every: 1,
            eval_every: 4,
            schedule,
            ..config()
        };
        let name = |part: &str| {
            folder
                .path()
                .join(format!("{part}-{schedule:?}").replace(' ', ""))
        };
        let (whole, parts) = (name("whole"), name("parts"));
        let mut unbroken = in_folder(&task, &config, &whole);
        assert_eq!(run(&mut unbroken, &whole, None).0, Outcome::Finished);
        let mut first = in_folder(&task, &config, &parts);
        let (outcome, events) = run(&mut first, &parts, Some(5));
        assert_eq!(outcome, Outcome::Stopped);
        assert_eq!(events.last(), Some(&Event::Stopped { step: 5 }));
        drop(first);
        let mut second = in_folder(&task, &config, &parts);
        assert_eq!(second.step(), 5);
        assert_eq!(run(&mut second, &parts, None).0, Outcome::Finished);
        same_checkpoints(
            &whole.join("checkpoints/00000012"),
            &parts.join("checkpoints/00000012"),
        );
        assert_eq!(losses(&whole), losses(&parts));
        assert_eq!(losses(&whole).len(), 12);
        assert_eq!(unbroken.best(), second.best());
    }
}

/// A kill: the process is gone after the update it was making, without a last checkpoint.
#[test]
fn a_killed_run_goes_on_from_its_last_checkpoint_with_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let task = Successor::default();
    let config = TrainConfig {
        steps: 11,
        log_every: 1,
        checkpoint_every: 3,
        ..config()
    };
    let (whole, parts) = (folder.path().join("whole"), folder.path().join("parts"));
    run(&mut in_folder(&task, &config, &whole), &whole, None);
    for (start, kill) in [(0, 2), (0, 5), (3, 8), (6, 10)] {
        let mut trainer = in_folder(&task, &config, &parts);
        assert_eq!(trainer.step(), start, "killed after {kill}");
        let mut jsonl = JsonlSink::open(&parts.join("metrics.jsonl"), start).unwrap();
        let mut die = |event: &Event| {
            anyformer_train::Events::event(&mut jsonl, event)?;
            match event {
                Event::Step { step, .. } if *step == kill => Err(io::Error::other("killed")),
                _ => Ok(()),
            }
        };
        let error = trainer.run(&mut die, &StopFlag::default()).unwrap_err();
        assert!(matches!(error, TrainError::Event(_)), "{error}");
        drop(trainer);
        let leftover = parts.join("checkpoints/.00000099.1.0.tmp");
        fs::create_dir_all(&leftover).unwrap();
        fs::write(leftover.join("model.safetensors"), "half").unwrap();
        fs::create_dir_all(parts.join("checkpoints/00000098")).unwrap();
    }
    let mut last = in_folder(&task, &config, &parts);
    assert_eq!(last.step(), 9);
    run(&mut last, &parts, None);
    same_checkpoints(
        &whole.join("checkpoints/00000011"),
        &parts.join("checkpoints/00000011"),
    );
    assert_eq!(losses(&whole), losses(&parts));
    assert!(!parts.join("checkpoints/.00000099.1.0.tmp").exists());
    // A finished run that is resumed finishes at once.
    drop(last);
    let mut done = in_folder(&task, &config, &parts);
    assert_eq!(run(&mut done, &parts, None).0, Outcome::Finished);
    assert_eq!(losses(&whole), losses(&parts));
}

#[test]
fn only_the_newest_checkpoints_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let task = Successor::default();
    let config = TrainConfig {
        steps: 10,
        checkpoint_every: 2,
        keep: 2,
        ..config()
    };
    let (_, events) = run(&mut in_folder(&task, &config, &path), &path, None);
    let written = events
        .iter()
        .filter(|event| matches!(event, Event::Checkpoint { .. }))
        .count();
    assert_eq!(written, 5);
    let mut names: Vec<String> = fs::read_dir(path.join("checkpoints"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["00000008", "00000010"]);
    let loaded = anyformer_hub::load(
        &path.join("checkpoints/00000010"),
        &anyformer_ops::Device::flex(),
    )
    .unwrap();
    let evaluation = evaluate(&loaded, &task, Split::Test, 4, 2).unwrap();
    assert!(evaluation.loss.is_finite());
}

#[test]
fn another_config_is_refused_by_key_and_some_keys_may_change() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let task = Successor::default();
    let config = TrainConfig {
        steps: 4,
        ..config()
    };
    run(&mut in_folder(&task, &config, &path), &path, None);
    let other = TrainConfig {
        lr: 2e-3,
        seed: 9,
        ..config.clone()
    };
    let before = fs::read(path.join("run.toml")).unwrap();
    let error = trainer(&task, &other)
        .with_folder(RunFolder::open(&path).unwrap().0)
        .err()
        .unwrap();
    let text = error.to_string();
    assert!(matches!(error, TrainError::OtherConfig { .. }), "{text}");
    assert!(
        text.contains("train.lr was 0.01, is 0.002") && text.contains("train.seed"),
        "{text}"
    );
    assert_eq!(fs::read(path.join("run.toml")).unwrap(), before);
    let longer_task = Successor::new(99);
    let error = trainer(&longer_task, &config)
        .with_folder(RunFolder::open(&path).unwrap().0)
        .err()
        .unwrap();
    assert!(
        error.to_string().contains("task.options.examples"),
        "{error}"
    );
    let allowed = TrainConfig {
        keep: 7,
        log_every: 3,
        eval_every: 5,
        checkpoint_every: 1,
        ..config
    };
    let trainer = trainer(&task, &allowed)
        .with_folder(RunFolder::open(&path).unwrap().0)
        .unwrap();
    assert_eq!(trainer.step(), 4);
}

#[test]
fn a_damaged_checkpoint_is_named_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let task = Successor::default();
    let config = TrainConfig {
        steps: 4,
        ..config()
    };
    run(&mut in_folder(&task, &config, &path), &path, None);
    let checkpoint = path.join("checkpoints/00000004");
    for name in ["model.safetensors", "optimizer.safetensors", "trainer.json"] {
        let file = checkpoint.join(name);
        let whole = fs::read(&file).unwrap();
        let mut flipped = whole.clone();
        let middle = whole.len() - 9;
        flipped[middle] ^= 1;
        fs::write(&file, &flipped).unwrap();
        let folder = RunFolder::open(&path).unwrap().0;
        let error = trainer(&task, &config)
            .with_folder(folder)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains(name), "{error}");
        fs::write(&file, &whole).unwrap();
    }
}

#[test]
fn a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let task = Successor::default();
    let config = TrainConfig {
        steps: 9,
        checkpoint_every: 2,
        ..config()
    };
    let mut trainer = in_folder(&task, &config, &path);
    let weights: Vec<_> = trainer.model().params().params().to_vec();
    let mut poison = |event: &Event| {
        if matches!(event, Event::Checkpoint { step: 4, .. }) {
            weights
                .iter()
                .for_each(|param| param.update(|values| values[0] = f32::INFINITY));
        }
        Ok(())
    };
    let error = trainer.run(&mut poison, &StopFlag::default()).unwrap_err();
    let TrainError::NotFinite {
        step: 5,
        loss,
        parameter: Some(name),
    } = &error
    else {
        panic!("{error}")
    };
    assert!(!loss.is_finite());
    assert_eq!(name, weights[0].name());
    assert!(error.to_string().contains("take step 5"), "{error}");
    drop(trainer);
    let mut again = in_folder(&task, &config, &path);
    assert_eq!(again.step(), 4);
    assert_eq!(run(&mut again, &path, None).0, Outcome::Finished);
}

#[test]
fn accumulated_batches_are_one_large_batch() {
    let task = Successor::default();
    let losses = |batch, accumulate| {
        let config = TrainConfig {
            steps: 3,
            batch,
            accumulate,
            ..config()
        };
        let mut trainer = trainer(&task, &config);
        trainer.run(&mut NoEvents, &StopFlag::default()).unwrap();
        NamedTensor::of(trainer.model().params())
    };
    for (one, many) in losses(8, 1).iter().zip(losses(2, 4)) {
        for (one, many) in one.values.iter().zip(many.values) {
            assert!((one - many).abs() < 2e-4, "{one} {many}");
        }
    }
}

#[test]
fn gradient_checkpointing_changes_memory_not_numbers() {
    let task = Successor::default();
    let weights = |gradient_checkpointing| {
        let config = TrainConfig {
            steps: 3,
            gradient_checkpointing,
            ..config()
        };
        let mut trainer = trainer(&task, &config);
        trainer.run(&mut NoEvents, &StopFlag::default()).unwrap();
        let device = trainer.model().params().params()[0].tensor::<2>().device();
        (
            NamedTensor::of(trainer.model().params()),
            device.gradient_checkpointing_strategy(),
        )
    };
    let ((plain, without), (checkpointed, with)) = (weights(false), weights(true));
    assert_eq!(plain, checkpointed);
    assert_ne!(
        without, with,
        "the option reaches the parameters after updates"
    );
}

#[test]
fn a_run_without_a_folder_trains_and_writes_nothing() {
    let task = Successor::default();
    let config = TrainConfig {
        steps: 2,
        ..config()
    };
    let mut trainer = trainer(&task, &config);
    let mut sink = |event: &Event| {
        assert!(!matches!(event, Event::Checkpoint { .. }));
        io::Result::Ok(())
    };
    trainer.run(&mut sink, &StopFlag::default()).unwrap();
    let model: Model = trainer.into_model();
    assert!(model.params().count() > 0);
}

#[test]
fn the_resolved_options_build_the_run_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("run");
    let task = Successor::default();
    let config = TrainConfig {
        schedule: Schedule::Wsd { decay: 0.3 },
        ..config()
    };
    drop(in_folder(&task, &config, &path));
    let (_folder, options) = RunFolder::open(&path).unwrap();
    assert_eq!(TrainConfig::from_json(&options["train"]).unwrap(), config);
    let model = anyformer_models::ModelConfig::from_json(&options["model"]).unwrap();
    assert_eq!(model, *tiny_model(&config).config());
    assert_eq!(options["task"]["options"], json!({"examples": 40}));
    let _ = training_device(&anyformer_ops::Device::flex(), &config);
}
