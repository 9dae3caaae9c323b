//! A pass in bf16 reaches the attention of every mixer whose weights can be dropped: the same kernel.

use anyformer_mixers::token_mixers;
use anyformer_ops::Precision;
use anyformer_testkit::stirred;

use super::*;

#[test]
fn exact_attention_rounds_what_the_pass_says() {
    let device = Device::flex();
    let mut seen = 0;
    for entry in token_mixers() {
        if !entry.card.knobs.iter().any(|knob| knob.name == "dropout") {
            continue;
        }
        let (mixer, _) = stirred(entry, 64, &Options::new(), &device).expect("a mixer");
        let outputs = [Precision::F32, Precision::Bf16].map(|precision| {
            let context = Context {
                precision,
                ..Context::default()
            };
            let (y, _) = mixer
                .forward(uniform(1, [1, 64, 64], &device), &context, None)
                .expect("runs");
            tensor_values(y)
        });
        assert!(outputs[0] != outputs[1], "{}", entry.card.name);
        seen += 1;
    }
    assert!(seen >= 9, "{seen} mixers");
}
