//! What a pass of training adds to the plain one: another model's scores, and layers left out by chance.

use std::path::Path;

use anyformer_data::Batch;
use anyformer_hub::ModelFolder;
use anyformer_models::{Model, ModelConfig};
use anyformer_ops::{Device, tensor_values};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::config::TrainConfig;
use crate::error::TrainError;
use crate::evaluate::{input, target};
use crate::folder::latest_checkpoint;

/// A teacher that was opened: its weights stay as they are.
pub(crate) struct Tutor {
    model: Model,
    pub(crate) temperature: f64,
    pub(crate) mix: f64,
}

impl Tutor {
    /// The teacher of a run, where it has one and its part in the loss is not zero.
    pub(crate) fn open(
        config: &TrainConfig,
        student: &ModelConfig,
    ) -> Result<Option<Self>, TrainError> {
        let Some(path) = &config.teacher else {
            return Ok(None);
        };
        let wrong = |message: String| TrainError::Teacher {
            path: path.into(),
            message,
        };
        let path = Path::new(path);
        let folder = match path.join("run.toml").is_file() {
            true => latest_checkpoint(path)?
                .ok_or_else(|| wrong("the run has no checkpoint yet".into()))?,
            false => path.to_path_buf(),
        };
        let folder = ModelFolder::open(&folder)?;
        let (theirs, ours) = (&folder.config, student);
        if theirs.reads != ours.reads || theirs.scores() != ours.scores() {
            return Err(wrong(format!(
                "it reads {:?} and gives {:?}, the model reads {:?} and gives {:?}; both must read the same and give as many scores",
                theirs.reads, theirs.gives, ours.reads, ours.gives
            )));
        }
        if config.teacher_mix == 0.0 {
            return Ok(None);
        }
        Ok(Some(Tutor {
            model: folder.load(&Device::flex())?,
            temperature: config.temperature,
            mix: config.teacher_mix,
        }))
    }

    /// Its scores of the places of a batch that have a target.
    pub(crate) fn scores(&self, batch: &Batch) -> Result<Vec<f32>, TrainError> {
        let lengths = batch.lengths.as_deref();
        let scores = self.model.answers(input(batch), lengths, target(batch))?;
        Ok(tensor_values(scores))
    }
}

/// The layers that batch `number` of a run leaves out; empty where none are ever left out. The same for the same seed, so
/// that a resumed run goes on as it would have.
pub(crate) fn skipped(config: &TrainConfig, layers: usize, number: u64) -> Vec<bool> {
    if config.layer_drop == 0.0 {
        return Vec::new();
    }
    let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
    rng.set_stream(number);
    (0..layers)
        .map(|_| rng.random_bool(config.layer_drop))
        .collect()
}
