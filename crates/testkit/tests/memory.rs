//! What loading a model needs beside the model itself.

use anyformer_hub::{Extra, ModelFolder, export, save};
use anyformer_kernels::memory::{Counting, allocated, peak, reset_peak};
use anyformer_models::{Model, ModelConfig};
use anyformer_ops::Device;
use serde_json::json;

#[global_allocator]
static ALLOCATOR: Counting<std::alloc::System> = Counting(std::alloc::System);

#[test]
fn loading_takes_a_tenth_more_than_the_weights_at_most() {
    let config = json!({"dim": 128, "layers": 2, "reads": {"tokens": {"vocab": 12_000}}, "gives": {"next_token": {"tied": false}}});
    let config = ModelConfig::from_json(&config).expect("a config");
    let place = tempfile::tempdir().expect("folder");
    let [own, theirs] = ["own", "theirs"].map(|name| place.path().join(name));
    let weights = {
        let model = Model::new(&config, &Device::flex(), 0).expect("built");
        save(&own, &model, &Extra::default()).expect("saved");
        4 * model.params().count()
    };
    export(&ModelFolder::open(&own).expect("opens"), &theirs).expect("exported");
    for folder in [own, theirs] {
        let opened = ModelFolder::open(&folder).expect("opens");
        let before = allocated();
        reset_peak();
        let model = opened.load(&Device::flex()).expect("loads");
        let most = peak() - before;
        assert!(
            most as f64 <= 1.1 * weights as f64,
            "{}: {most} bytes for {weights} of weights",
            folder.display()
        );
        assert_eq!(4 * model.params().count(), weights);
    }
}
