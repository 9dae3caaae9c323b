//! Every recipe runs: two steps of a small batch each.

use crate::harness::{anyformer, folder, root};

#[test]
fn every_recipe_trains() {
    let recipes = root().join("recipes");
    let mut count = 0;
    for entry in std::fs::read_dir(&recipes).expect("recipes/") {
        let path = entry.expect("an entry").path();
        if path.extension().is_none_or(|ending| ending != "toml") {
            continue;
        }
        count += 1;
        let place = folder();
        let file = path.to_string_lossy();
        let words = [
            "train",
            &file,
            "train.steps=2",
            "train.warmup=0",
            "train.batch=2",
            "train.accumulate=1",
            "train.eval_batches=1",
            "--out=run",
            "--json",
            "--quiet",
        ];
        let ran = anyformer(place.path(), &words).ok();
        assert_eq!(ran.json()["step"], 2, "{file}");
    }
    assert!(count >= 6, "{count} recipes");
}
