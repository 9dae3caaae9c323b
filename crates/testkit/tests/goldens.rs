//! Every golden against our mixers, and every mixer against at least one golden.

use anyformer_testkit::{golden, import, quantise, whole};

#[test]
fn every_mixer_equals_an_implementation_that_is_not_ours() {
    let goldens = golden::all().expect("goldens can be read");
    let mut broken = Vec::new();
    for golden in &goldens {
        let checked = match golden.mixer.as_str() {
            "model" => whole::check(golden),
            "import" => import::check(golden),
            "quantise" => quantise::check(golden),
            _ => golden.check_mixer(),
        };
        if let Err(what) = checked {
            broken.push(what);
        }
    }
    let token = anyformer_mixers::token_mixers()
        .iter()
        .map(|entry| entry.card.name);
    let channel = anyformer_mixers::channel_mixers()
        .iter()
        .map(|entry| entry.card.name);
    for name in token.chain(channel).filter(|name| *name != "none") {
        if !goldens.iter().any(|golden| golden.mixer == name) {
            broken.push(format!("{name} has no golden"));
        }
    }
    assert!(
        broken.is_empty(),
        "{} broken:\n{}",
        broken.len(),
        broken.join("\n")
    );
}
