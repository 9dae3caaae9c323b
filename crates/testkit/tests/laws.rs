//! Every law over every registered token mixer, in each of its directions.

use anyformer_testkit::cases::cases;
use anyformer_testkit::laws::LAWS;

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
