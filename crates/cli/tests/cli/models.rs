//! Model folders that go out and come in: export, chat, info of a folder, the ends of a text.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;

use crate::harness::{anyformer, command, folder, trained};

/// The trained run as a folder of another program, with a template; every word of it is a byte.
fn exported(place: &Path) -> PathBuf {
    let to = place.join("out");
    let (run, out) = (trained().to_string_lossy(), to.to_string_lossy());
    let ran = anyformer(place, &["export", &run, "--to", &out, "--json"]).ok();
    assert_eq!(ran.json()["model_type"], "gla");
    fs::remove_file(to.join("SHA256SUMS")).expect("removed");
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    fs::write(to.join("chat_template.jinja"), template).expect("written");
    to
}

fn chat(model: &Path, turns: &str, more: &[&str]) -> Vec<Value> {
    let mut words = vec!["chat", ".", "--json", "--threads=1", "--temperature", "0"];
    words.extend(more);
    let mut child = command(model, &words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut input = child.stdin.take().expect("piped");
    input.write_all(turns.as_bytes()).expect("read");
    drop(input);
    let output = child.wait_with_output().expect("ends");
    assert!(output.status.success());
    let answers = serde_json::Deserializer::from_slice(&output.stdout).into_iter();
    answers.map(|answer| answer.expect("JSON")).collect()
}

#[test]
fn operands_rounded_to_bf16_change_what_is_foreseen_by_little() {
    let place = folder();
    let text = "To be, or not to be: that is the question.\n".repeat(8);
    fs::write(place.path().join("text"), &text).expect("written");
    let run = trained().to_string_lossy();
    let loss = |more: &[&str]| {
        let words = ["eval", &run, "--text=text", "--time=64", "--json"];
        let found = anyformer(place.path(), &[&words[..], more].concat()).ok();
        found.json()["loss"].as_f64().expect("a number")
    };
    let (whole, said, rounded) = (
        loss(&[]),
        loss(&["--precision=f32"]),
        loss(&["--precision=bf16"]),
    );
    assert_eq!(whole, said);
    assert_ne!(whole, rounded);
    assert!((rounded / whole - 1.0).abs() < 0.01, "{whole} {rounded}");
    let words = ["generate", &run, "--prompt=To", "--precision=bf16"];
    anyformer(place.path(), &words).ok();
    let words = ["generate", &run, "--prompt=To", "--precision=f16"];
    anyformer(place.path(), &words).bad(&["f32, bf16"]);
}

#[test]
fn a_text_is_foreseen_as_well_as_the_scores_of_its_tokens_say() {
    let place = folder();
    let text = "To be, or not to be: that is the question. Grüße!\n".repeat(4);
    fs::write(place.path().join("text"), &text).expect("written");
    let run = trained().to_string_lossy();
    let eval = |model: &str, more: &[&str]| {
        let words = ["eval", model, "--text", "text", "--json", "--threads=1"];
        anyformer(place.path(), &[&words[..], more].concat())
    };
    let found = eval(&run, &["--time", "50"]).ok().json();
    let newest = anyformer_train::latest_checkpoint(trained()).expect("read");
    let opened = anyformer_hub::ModelFolder::open(&newest.expect("one")).expect("a model");
    let model = opened.load(&anyformer_ops::Device::flex()).expect("loads");
    let (mut loss, mut counted) = (0.0, 0);
    let ids: Vec<u32> = text.bytes().map(u32::from).collect();
    for window in ids.chunks(50) {
        for at in 1..window.len() {
            let (scores, _) = model.prefill(&window[..at], 1, None, None).expect("runs");
            let scores = anyformer_ops::tensor_values(scores);
            loss -= f64::from(anyformer_models::log_prob(&scores, window[at]));
            counted += 1;
        }
    }
    assert_eq!(found["counted"], counted);
    let got = found["loss"].as_f64().expect("a number");
    let want = loss / f64::from(counted);
    assert!((got - want).abs() < 1e-4 * want, "{got} {want}");
    let perplexity = found["perplexity"].as_f64().expect("a number");
    assert!((perplexity - got.exp()).abs() < 1e-9 * perplexity);
    // A folder of another program says no task, and is foreseen the same.
    let out = exported(place.path());
    eval(&out.to_string_lossy(), &["--time", "50", "--quiet"]).ok();
    anyformer(place.path(), &["eval", "out"]).bad(&["--text FILE"]);
    eval(&run, &["task.time=20"]).bad(&["task.time=20"]);
    eval(&run, &["--task", "text"]).bad(&["--task"]);
    fs::write(place.path().join("text"), "x").expect("written");
    eval(&run, &[]).bad(&["1 tokens are too few"]);
    fs::write(place.path().join("text"), b"\xff\xff").expect("written");
    eval(&run, &[]).bad(&["UTF-8"]);
}

#[test]
fn an_exported_run_says_the_same() {
    let place = folder();
    let out = exported(place.path());
    let say = |model: &Path| {
        let model = model.to_string_lossy();
        let words = [
            "generate",
            &model,
            "--prompt",
            "To be",
            "--temperature=0",
            "--json",
            "--threads=1",
        ];
        let json = anyformer(place.path(), &words).ok().json();
        (json["tokens"].clone(), json["text"].clone())
    };
    assert_eq!(say(&out), say(trained()));
    let again = anyformer(place.path(), &["export", "out", "--to", "out"]);
    again.bad(&["out", "not empty"]);
}

#[test]
fn a_chat_reads_only_what_is_new() {
    let place = folder();
    let out = exported(place.path());
    let answers = chat(
        &out,
        "Hello\n\nAnd?\n/new\nHello\n",
        &["--max-tokens", "5", "--system", "Be kind"],
    );
    assert_eq!(answers.len(), 3);
    let [first, second, third] = [&answers[0], &answers[1], &answers[2]];
    assert_eq!(first["finish"], "length");
    let read = |answer: &Value| answer["read_tokens"].as_u64().expect("a number");
    let begun = "<system>Be kind</system><user>Hello</user><assistant>".len() as u64;
    assert_eq!(read(first), begun);
    // The last byte of the answer, its end, the next turn.
    assert_eq!(
        read(second),
        1 + "</assistant><user>And?</user><assistant>".len() as u64
    );
    assert_eq!((read(third), &third["answer"]), (begun, &first["answer"]));
    // What was carried is what a model that reads all of it anew would have.
    let text = format!(
        "<system>Be kind</system><user>Hello</user><assistant>{}</assistant><user>And?</user><assistant>",
        first["answer"].as_str().expect("a text")
    );
    let words = [
        "generate",
        "out",
        "--prompt",
        &text,
        "--temperature=0",
        "--max-tokens=5",
        "--json",
        "--threads=1",
    ];
    let whole = anyformer(place.path(), &words).ok().json();
    assert_eq!(whole["tokens"], second["tokens"]);
    let run = trained().to_string_lossy();
    anyformer(place.path(), &["chat", &run]).bad(&["no chat template"]);
    fs::write(out.join("chat_template.jinja"), "{% for %}").expect("written");
    anyformer(place.path(), &["chat", "out"]).bad(&["chat template"]);
}

#[test]
fn a_text_ends_where_it_is_told_to() {
    let place = folder();
    let out = exported(place.path());
    let say = |more: &[&str]| {
        let mut words = vec![
            "generate",
            "out",
            "--prompt",
            "To be",
            "--temperature=0",
            "--max-tokens=12",
            "--json",
            "--threads=1",
        ];
        words.extend(more);
        anyformer(place.path(), &words).ok().json()
    };
    let all = say(&["--logprobs", "2"]);
    assert_eq!(all["finish"], "length");
    let (tokens, probs) = (&all["tokens"], &all["logprobs"]);
    assert_eq!(probs.as_array().map(Vec::len), Some(12));
    for (token, prob) in tokens
        .as_array()
        .into_iter()
        .flatten()
        .zip(probs.as_array().into_iter().flatten())
    {
        assert_eq!((&prob["id"], &prob["top"][0]["id"]), (token, token));
        let of = |value: &Value| value["logprob"].as_f64().expect("a number");
        assert!(of(prob) <= 0.0 && of(&prob["top"][0]) >= of(&prob["top"][1]));
    }
    let text = all["text"].as_str().expect("a text");
    let stop: String = text.chars().skip(3).take(1).collect();
    let cut = say(&["--stop", &stop]);
    assert_eq!(cut["finish"], "stop");
    assert_eq!(cut["text"].as_str(), text.split(&stop).next());
    // The folder's own end token.
    let end = &tokens[0];
    fs::write(
        out.join("generation_config.json"),
        format!("{{\"eos_token_id\": [{end}]}}"),
    )
    .expect("written");
    let none = say(&[]);
    assert_eq!(
        (&none["finish"], &none["text"]),
        (&Value::from("end"), &Value::from(""))
    );
    let repeats = say(&["--repetition-penalty", "1000"]);
    assert_ne!(repeats["tokens"], all["tokens"]);
    for wrong in [["--min-p", "2"], ["--repetition-penalty", "0"]] {
        let mut words = vec!["generate", "out", "--prompt", "a"];
        words.extend(wrong);
        anyformer(place.path(), &words).bad(&[&wrong[0][2..].replace('-', "_")]);
    }
}

#[test]
fn info_tells_of_a_folder() {
    let place = folder();
    let out = exported(place.path());
    let out = out.to_string_lossy();
    let json = anyformer(place.path(), &["info", &out, "--json", "--time", "64"])
        .ok()
        .json();
    assert_eq!(
        (&json["model_type"], &json["chat_template"]),
        (&Value::from("gla"), &Value::from(true))
    );
    let run = trained().to_string_lossy();
    let own = anyformer(place.path(), &["info", &run, "--json", "--time", "64"])
        .ok()
        .json();
    for key in ["parameters", "flops_per_token", "state_bytes"] {
        assert_eq!(own[key], json[key]);
    }
    let text = anyformer(place.path(), &["info", &out]).ok().out;
    assert!(text.contains("1 layers of gla + swiglu"), "{text}");
    anyformer(place.path(), &["info", &out, "--set", "dim=8"]).bad(&["cannot be changed"]);
    fs::write(place.path().join("m.gguf"), b"GGUFxxxx").expect("written");
    anyformer(place.path(), &["info", "m.gguf"]).bad(&["m.gguf", "version"]);
}
