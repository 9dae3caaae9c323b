//! The law of the server: an answer is the same alone, beside others, after a kept prefix, and after a restart.

use std::time::{Duration, Instant};

use anyformer_models::ModelState;
use anyformer_ops::tensor_values;
use anyformer_serve::{EngineConfig, Finish, JobError, StatesConfig, SubmitError};

use crate::models::{ask, collect, config, greedy, kinds, model, prompt, start};

const TOKENS: usize = 24;

/// Prompts of these lengths, one and again, `count` in all.
fn prompts(count: usize) -> Vec<Vec<u32>> {
    let lengths = [1, 2, 3, 7, 31, 32, 33, 64, 100, 130, 200, 5];
    let prompts = lengths.iter().cycle().take(count).enumerate();
    prompts
        .map(|(seed, length)| prompt(seed, *length))
        .collect()
}

fn with_states(folder: Option<&std::path::Path>) -> EngineConfig {
    EngineConfig {
        states: StatesConfig {
            folder: folder.map(Into::into),
            ..StatesConfig::default()
        },
        ..config()
    }
}

#[test]
fn scores_beside_others_are_the_scores_alone() {
    for (name, mixers) in kinds() {
        let model = model(&mixers);
        let mut alone = Vec::new();
        for ids in prompts(12) {
            let (_, state) = model.prefill(&ids, 1, None, None).unwrap();
            let (scores, state) = model.step(&[ids[0]], &state).unwrap();
            let (again, _) = model.step(&[ids[0]], &state).unwrap();
            alone.push((tensor_values(scores), tensor_values(again), ids));
        }
        let states: Vec<ModelState> = alone
            .iter()
            .map(|(_, _, ids)| model.prefill(ids, 1, None, None).unwrap().1)
            .collect();
        let joined = ModelState::join(&states.iter().collect::<Vec<_>>());
        let ids: Vec<u32> = alone.iter().map(|(_, _, ids)| ids[0]).collect();
        let (first, joined) = model.step(&ids, &joined).unwrap();
        let (second, _) = model.step(&ids, &joined).unwrap();
        let rows = tensor_values(first);
        let more = tensor_values(second);
        for (index, (scores, again, _)) in alone.iter().enumerate() {
            let at = index * 256..(index + 1) * 256;
            // A matrix product sums one row and many rows in different orders: close, not equal in every bit.
            let close = |got: &[f32], want: &[f32]| {
                let apart = got
                    .iter()
                    .zip(want)
                    .map(|(a, b)| (a - b).abs() / (1.0 + b.abs()));
                let most = apart.fold(0.0, f32::max);
                assert!(most < 1e-5, "{name}, sequence {index}: {most}");
            };
            close(&rows[at.clone()], scores);
            close(&more[at], again);
        }
    }
}

#[test]
fn an_answer_is_the_same_alone_and_beside_others() {
    for (name, mixers) in kinds() {
        let together = EngineConfig {
            batch: 33,
            ..config()
        };
        let (engine, metrics) = start(&mixers, together.clone());
        // One and 32 others.
        let prompts = prompts(33);
        let alone: Vec<Vec<u32>> = prompts
            .iter()
            .map(|ids| ask(&engine, ids, TOKENS).0)
            .collect();
        let beside = |engine: &anyformer_serve::Engine| {
            let ask = |ids: &Vec<u32>| {
                let (job, events) = greedy(ids.clone(), TOKENS);
                engine.submit(job).unwrap();
                events
            };
            let asked: Vec<_> = prompts.iter().map(ask).collect();
            for (index, events) in asked.into_iter().enumerate() {
                let (made, end) = collect(events);
                assert_eq!(made, alone[index], "{name}, prompt {index}");
                assert_eq!(end.unwrap().finish, Finish::Length);
            }
        };
        let steps = || {
            let size = &metrics.batch_size;
            [size.get_sample_sum(), size.get_sample_count() as f64]
        };
        let before = steps();
        beside(&engine);
        // Prompts are read in pieces, so they do not all run at once, but the last do beside many.
        let [sum, count] = steps();
        let mean = (sum - before[0]) / (count - before[1]);
        assert!(mean > 8.0, "{name}: {mean} at a time");
        // The same with states that are kept: the second time prompts begin behind them.
        let kept = EngineConfig {
            states: StatesConfig::default(),
            ..together.clone()
        };
        let (engine, again) = start(&mixers, kept);
        beside(&engine);
        let before = again.cache_hits.get();
        beside(&engine);
        // A recurrent state can be used whole only: of prompts longer than a piece.
        let longer = prompts
            .iter()
            .filter(|ids| ids.len() > together.chunk)
            .count();
        let hits = again.cache_hits.get() - before;
        assert!(hits >= longer as u64, "{name}: {hits} of {longer}");
        let distinct: std::collections::HashSet<_> = alone.iter().collect();
        assert!(
            distinct.len() > 16,
            "{name}: {} answers to 33 prompts",
            distinct.len()
        );
    }
}

#[test]
fn guessing_ahead_changes_no_token() {
    let (mut guessed, mut accepted) = (0, 0);
    for (name, mixers) in kinds() {
        let (plain, _) = start(&mixers, config());
        let ahead = EngineConfig {
            speculate: 5,
            ..with_states(None)
        };
        let (engine, metrics) = start(&mixers, ahead);
        // A text that repeats itself, so that there is something to guess.
        let text: Vec<u32> = prompt(3, 12).into_iter().cycle().take(50).collect();
        let (want, _) = ask(&plain, &text, 60);
        let (got, end) = ask(&engine, &text, 60);
        assert_eq!(got, want, "{name}");
        assert_eq!((end.completion_tokens, end.finish), (60, Finish::Length));
        guessed += metrics.guessed_tokens.get();
        accepted += metrics.accepted_tokens.get();
        // The state that is kept is the one after these tokens.
        let longer = [text, got].concat();
        let more = |engine: &anyformer_serve::Engine| ask(engine, &longer, 10).0;
        assert_eq!(more(&engine), more(&plain), "{name}");
    }
    assert!(
        0 < accepted && accepted < guessed,
        "{accepted} of {guessed}"
    );
}

#[test]
fn guessing_ahead_beside_others_changes_no_token() {
    let (mut guessed, mut accepted) = (0, 0);
    for (name, mixers) in kinds() {
        let (plain, _) = start(&mixers, config());
        let ahead = EngineConfig {
            speculate: 5,
            ..with_states(None)
        };
        let (engine, metrics) = start(&mixers, ahead);
        // Texts that repeat themselves, and some that do not.
        let texts: Vec<Vec<u32>> = (0..9)
            .map(|seed| match seed % 3 {
                2 => prompt(seed, 40),
                _ => prompt(seed, 7 + seed)
                    .into_iter()
                    .cycle()
                    .take(40)
                    .collect(),
            })
            .collect();
        let asked: Vec<_> = texts
            .iter()
            .map(|text| {
                let (job, events) = greedy(text.clone(), 60);
                engine.submit(job).unwrap();
                events
            })
            .collect();
        let mut longer = Vec::new();
        for (text, events) in texts.iter().zip(asked) {
            let (got, end) = collect(events);
            assert_eq!(end.unwrap().completion_tokens, 60);
            assert_eq!(got, ask(&plain, text, 60).0, "{name}");
            longer.push([&text[..], &got].concat());
        }
        guessed += metrics.guessed_tokens.get();
        accepted += metrics.accepted_tokens.get();
        let sizes =
            metrics.batch_size.get_sample_sum() / metrics.batch_size.get_sample_count() as f64;
        assert!(sizes > 2.0, "{name}: {sizes} at a time");
        // The states that are kept are those after these tokens.
        for text in &longer {
            let (got, end) = ask(&engine, text, 10);
            assert_eq!(got, ask(&plain, text, 10).0, "{name}");
            assert!(end.cached_tokens > 64, "{name}");
        }
    }
    assert!(
        0 < accepted && accepted < guessed,
        "{accepted} of {guessed}"
    );
}

#[test]
fn a_kept_prefix_changes_no_token_and_is_not_read_again() {
    for (name, mixers) in kinds() {
        let (plain, _) = start(&mixers, config());
        let (engine, metrics) = start(&mixers, with_states(None));
        // A conversation: every turn goes on from the last one with its answer.
        let mut text = prompt(1, 90);
        for turn in 0..4 {
            let (want, _) = ask(&plain, &text, TOKENS);
            let (got, end) = ask(&engine, &text, TOKENS);
            assert_eq!(got, want, "{name}, turn {turn}");
            let cached = if turn == 0 { 0 } else { text.len() - 11 };
            assert_eq!(end.cached_tokens, cached, "{name}, turn {turn}");
            text.extend(got);
            text.extend(prompt(turn + 10, 10));
        }
        // Another text with the same first piece, and the same text again.
        let mut other = prompt(1, 90);
        other[70] ^= 1;
        let (got, end) = ask(&engine, &other, TOKENS);
        assert_eq!(got, ask(&plain, &other, TOKENS).0, "{name}");
        let shared = if name == "attention" { 70 } else { 64 };
        assert_eq!(end.cached_tokens, shared, "{name}");
        assert_eq!(metrics.cache_hits.get(), 4);
        assert_eq!(metrics.cache_misses.get(), 1);
    }
}

#[test]
fn named_states_fork_roll_back_and_survive_a_restart() {
    for (name, mixers) in kinds() {
        let folder = tempfile::tempdir().unwrap();
        let (plain, _) = start(&mixers, config());
        let text = prompt(3, 75);
        let more = prompt(4, 9);
        let whole = {
            let (engine, _) = start(&mixers, with_states(Some(folder.path())));
            let (mut job, events) = greedy(text.clone(), TOKENS);
            job.save = Some("one".into());
            engine.submit(job).unwrap();
            let (made, end) = collect(events);
            end.unwrap();
            engine.join();
            [text.clone(), made].concat()
        };
        let (engine, _) = start(&mixers, with_states(Some(folder.path())));
        let (give, take) = std::sync::mpsc::channel();
        let again = give.clone();
        engine
            .fork_state("one".into(), "two".into(), Some(70), move |info| {
                again.send(info.unwrap().unwrap()).unwrap();
            })
            .unwrap();
        let two = take.recv().unwrap();
        assert_eq!(two.tokens, 70);
        assert!(two.kept_tokens >= 64 && two.on_disk, "{name}: {two:?}");
        engine.list_states(move |all| all.into_iter().for_each(|info| give.send(info).unwrap()));
        let names: Vec<String> = take.iter().map(|info| info.name).collect();
        assert_eq!(names, ["one", "two"]);
        for (state, start, least) in [("one", &whole[..], 98), ("two", &whole[..70], 64)] {
            let (mut job, events) = greedy(more.clone(), TOKENS);
            job.state = Some(state.into());
            engine.submit(job).unwrap();
            let (made, end) = collect(events);
            let end = end.unwrap();
            assert_eq!(end.prompt_tokens, start.len() + more.len());
            assert!(end.cached_tokens >= least, "{name}, {state}: {end:?}");
            let want = ask(&plain, &[start, &more].concat(), TOKENS).0;
            assert_eq!(made, want, "{name}, {state}");
        }
    }
}

#[test]
fn damaged_files_cost_time_and_no_answer() {
    let (_, mixers) = kinds().swap_remove(1);
    let folder = tempfile::tempdir().unwrap();
    let text = prompt(5, 50);
    let (engine, _) = start(&mixers, with_states(Some(folder.path())));
    let (mut job, events) = greedy(text.clone(), 0);
    job.save = Some("it".into());
    engine.submit(job).unwrap();
    collect(events).1.unwrap();
    drop(engine);
    let path = folder.path().join("named/it.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 0x40;
    std::fs::write(&path, bytes).unwrap();
    let _ = std::fs::remove_dir_all(folder.path().join("kept"));
    let (engine, _) = start(&mixers, with_states(Some(folder.path())));
    let (mut job, events) = greedy(vec![9], TOKENS);
    job.state = Some("it".into());
    engine.submit(job).unwrap();
    let (made, end) = collect(events);
    assert_eq!(end.unwrap().cached_tokens, 0);
    let (plain, _) = start(&mixers, config());
    assert_eq!(made, ask(&plain, &[&text[..], &[9]].concat(), TOKENS).0);
    // A file of another model is not taken up.
    let (_, other) = kinds().swap_remove(2);
    drop(engine);
    let (engine, _) = start(&other, with_states(Some(folder.path())));
    let (mut job, events) = greedy(vec![9], 1);
    job.state = Some("it".into());
    engine.submit(job).unwrap();
    assert_eq!(collect(events).1, Err(JobError::NoState("it".into())));
}

#[test]
fn memory_has_a_budget_and_files_take_what_leaves_it() {
    let (_, mixers) = kinds().swap_remove(1);
    let folder = tempfile::tempdir().unwrap();
    for disk in [true, false] {
        let mut config = with_states(disk.then_some(folder.path()));
        config.states.memory = 5_000;
        config.states.disk = 15_000;
        let (engine, metrics) = start(&mixers, config);
        for seed in 0..20 {
            ask(&engine, &prompt(seed, 20), 4);
            // The gauge is set after the end was told: ask twice.
            ask(&engine, &[1], 1);
            assert!(metrics.state_bytes.get() <= 5_000);
        }
        let (_, end) = ask(&engine, &[&prompt(19, 20)[..], &[1, 2]].concat(), 1);
        assert_eq!(end.cached_tokens, 20);
        let kept = std::fs::read_dir(folder.path().join("kept")).unwrap();
        let bytes: u64 = kept
            .map(|file| file.unwrap().metadata().unwrap().len())
            .sum();
        assert!((1000..40_000).contains(&bytes), "{bytes}");
    }
}

#[test]
fn a_full_queue_refuses_and_a_gone_reader_frees_its_place() {
    let (_, mixers) = kinds().swap_remove(2);
    let config = EngineConfig {
        batch: 1,
        queue: 2,
        ..config()
    };
    let (engine, metrics) = start(&mixers, config);
    let mut kept = Vec::new();
    let refused = loop {
        let (job, events) = greedy(prompt(1, 4), 4000);
        match engine.submit(job) {
            Ok(()) => kept.push(events),
            Err(error) => break error,
        }
    };
    assert_eq!(refused, SubmitError::Full { queued: 2 });
    assert!(kept.len() <= 3);
    assert_eq!(metrics.refused.get(), 1);
    drop(kept);
    let began = Instant::now();
    while engine.submit(greedy(vec![1], 1).0).is_err() {
        assert!(began.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn jobs_that_cannot_run_are_told_why() {
    let (_, mixers) = kinds().swap_remove(0);
    let (engine, _) = start(&mixers, config());
    let refused = |ids: Vec<u32>, max| engine.submit(greedy(ids, max).0).unwrap_err();
    assert_eq!(refused(vec![], 1), SubmitError::Empty);
    assert!(matches!(
        refused(vec![300], 1),
        SubmitError::Vocabulary {
            id: 300,
            vocab: 256
        }
    ));
    assert!(matches!(
        refused(vec![1; 9000], 1),
        SubmitError::TooLong { limit: 8192, .. }
    ));
    assert!(matches!(
        refused(vec![1], usize::MAX),
        SubmitError::TooLong { .. }
    ));
    let (mut job, _events) = greedy(vec![1], 1);
    job.save = Some("../x".into());
    assert!(matches!(engine.submit(job), Err(SubmitError::Name(_))));
    let (mut job, _events) = greedy(vec![1], 1);
    job.options.temperature = f32::NAN;
    assert!(matches!(engine.submit(job), Err(SubmitError::Sample(_))));
    let (mut job, events) = greedy(vec![1], 4000);
    job.deadline = Some(Instant::now() + Duration::from_millis(30));
    engine.submit(job).unwrap();
    assert_eq!(collect(events).1, Err(JobError::Timeout));
    let (mut job, events) = greedy(prompt(1, 5), 10);
    job.stop_ids = std::sync::Arc::new(vec![ask(&engine, &prompt(1, 5), 10).0[3]]);
    engine.submit(job).unwrap();
    let (made, end) = collect(events);
    assert_eq!((made.len(), end.unwrap().finish), (3, Finish::Stop));
    engine.close(true);
    assert_eq!(
        engine.submit(greedy(vec![1], 1).0),
        Err(SubmitError::Closed)
    );
}
