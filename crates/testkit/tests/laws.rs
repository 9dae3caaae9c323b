//! Every law over every registered token mixer, in each of its directions.

use anyformer_testkit::cases::cases;
use anyformer_testkit::laws::LAWS;
use anyformer_testkit::model_laws;

#[test]
fn every_mixer_keeps_every_law() {
    let cases = cases();
    assert!(cases.len() >= anyformer_mixers::token_mixers().len());
    let mut broken = Vec::new();
    for case in &cases {
        for (name, law) in LAWS {
            if let Err(what) = law(case) {
                broken.push(format!("{}: {name}: {what}", case.label()));
            }
        }
    }
    assert!(
        broken.is_empty(),
        "{} broken:\n{}",
        broken.len(),
        broken.join("\n")
    );
}

#[test]
fn a_model_around_every_mixer_keeps_every_law() {
    let mut broken = Vec::new();
    for entry in anyformer_mixers::token_mixers() {
        for (name, law) in model_laws::LAWS {
            if let Err(what) = law(entry) {
                broken.push(format!("{}: {name}: {what}", entry.card.name));
            }
        }
    }
    assert!(
        broken.is_empty(),
        "{} broken:\n{}",
        broken.len(),
        broken.join("\n")
    );
}
