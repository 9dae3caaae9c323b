//! The loop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyformer_data::{Batch, Loader, Split, Task};
use anyformer_hub::Extra;
use anyformer_mixers::Training;
use anyformer_models::{Gives, Model, Pass};
use anyformer_ops::Device;
use serde_json::{Value, json};

use crate::checkpoint::{self, Saved};
use crate::config::TrainConfig;
use crate::error::TrainError;
use crate::evaluate::{Evaluation, evaluate, number, score_with, value};
use crate::events::{Best, Event, Events};
use crate::folder::RunFolder;
use crate::optimizer::AdamW;
use crate::teacher::{Tutor, skipped};

/// A request to stop, shared with whoever may make it: a signal handler, another thread.
#[derive(Clone, Debug, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Asks the run to stop after the update that it is making.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All updates were made.
    Finished,
    /// It was asked to stop; it can go on from its last checkpoint.
    Stopped,
}

/// The device on which a model is built that is trained with these options, given the one on which it runs.
pub fn training_device(device: &Device, config: &TrainConfig) -> Device {
    let device = device.clone().autodiff();
    match config.gradient_checkpointing {
        true => device.gradient_checkpointing(),
        false => device,
    }
}

/// What one update measured.
struct Update {
    loss: f64,
    extra: Option<f64>,
    grad_norm: f64,
    rate: f64,
}

/// A model in training.
pub struct Trainer<'a> {
    model: Model,
    task: &'a dyn Task,
    config: TrainConfig,
    extra: Extra,
    folder: Option<RunFolder>,
    loader: Box<dyn Loader + 'a>,
    optimizer: AdamW,
    tutor: Option<Tutor>,
    step: u64,
    tokens: u64,
    seconds: f64,
    best: Option<Best>,
    saved_at: Option<u64>,
    warning: Option<String>,
}

impl<'a> Trainer<'a> {
    /// Trains `model`, built on a [`training_device`], on the training split of `task`; a teacher is opened where the options
    /// name one.
    pub fn new(model: Model, task: &'a dyn Task, config: TrainConfig) -> Result<Self, TrainError> {
        config.check()?;
        let mut params = model.params().params().iter();
        if let Some(param) = params.find(|param| param.packed().is_some()) {
            return Err(TrainError::Quantised(param.name().to_string()));
        }
        let loader = task.loader(Split::Train, config.batch, config.seed)?;
        let optimizer = AdamW::new(model.params());
        let tutor = Tutor::open(&config, model.config())?;
        Ok(Trainer {
            model,
            task,
            config,
            extra: Extra::default(),
            folder: None,
            loader,
            optimizer,
            tutor,
            step: 0,
            tokens: 0,
            seconds: 0.0,
            best: None,
            saved_at: None,
            warning: None,
        })
    }

    /// Adds a tokenizer and facts to every model folder that is written.
    pub fn with_extra(mut self, extra: Extra) -> Self {
        self.extra = extra;
        self
    }

    /// Writes checkpoints into a run folder, and goes on from the newest one in it, where there is one.
    pub fn with_folder(mut self, folder: RunFolder) -> Result<Self, TrainError> {
        if let Some(path) = folder.latest()? {
            self.resume(&path)?;
        }
        self.folder = Some(folder);
        Ok(self)
    }

    fn resume(&mut self, path: &Path) -> Result<(), TrainError> {
        let saved = checkpoint::load(path, &self.options(), &self.model, &mut self.optimizer)?;
        self.loader.seek(&saved.position)?;
        self.step = saved.step;
        self.tokens = saved.tokens;
        self.seconds = saved.seconds;
        self.best = saved.best;
        self.saved_at = Some(saved.step);
        let threads = rayon::current_num_threads();
        self.warning = (saved.threads != threads).then(|| {
            let before = saved.threads;
            format!("the checkpoint was written with {before} threads, this process has {threads}: sums may round otherwise")
        });
        Ok(())
    }

    /// The resolved options of the run: `model`, `task`, `train`.
    pub fn options(&self) -> Value {
        json!({
            "model": self.model.config().to_json(),
            "task": self.task.spec(),
            "train": self.config.to_json(),
        })
    }

    /// Updates done: what sinks are opened with.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// The model as it stands.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The model; the training ends.
    pub fn into_model(self) -> Model {
        self.model
    }

    /// The lowest loss of an evaluation so far.
    pub fn best(&self) -> Option<Best> {
        self.best
    }

    /// Trains to the last step or until asked to stop.
    pub fn run(&mut self, events: &mut dyn Events, stop: &StopFlag) -> Result<Outcome, TrainError> {
        let mut emit = |event: Event| events.event(&event).map_err(TrainError::Event);
        emit(Event::Started {
            step: self.step,
            steps: self.config.steps,
            params: self.model.params().count(),
            threads: rayon::current_num_threads(),
        })?;
        if let Some(message) = self.warning.take() {
            emit(Event::Warning {
                step: self.step,
                message,
            })?;
        }
        let begun = Instant::now();
        let before = self.seconds;
        let (mut read, mut busy) = (0, 0.0);
        while self.step < self.config.steps {
            if stop.requested() {
                if let Some(event) = self.checkpoint()? {
                    emit(event)?;
                }
                emit(Event::Stopped { step: self.step })?;
                return Ok(Outcome::Stopped);
            }
            let (clock, tokens) = (Instant::now(), self.tokens);
            let update = self.update()?;
            busy += clock.elapsed().as_secs_f64();
            read += self.tokens - tokens;
            self.seconds = before + begun.elapsed().as_secs_f64();
            let due = |every: u64| {
                self.step == self.config.steps || every > 0 && self.step.is_multiple_of(every)
            };
            let (log, eval, save) = (
                due(self.config.log_every),
                due(self.config.eval_every),
                due(self.config.checkpoint_every),
            );
            if log {
                emit(Event::Step {
                    step: self.step,
                    loss: update.loss,
                    extra: update.extra,
                    lr: update.rate,
                    grad_norm: update.grad_norm,
                    tokens: self.tokens,
                    tokens_per_second: read as f64 / f64::max(busy, 1e-9),
                    seconds: self.seconds,
                })?;
                (read, busy) = (0, 0.0);
            }
            if eval {
                emit(self.evaluate()?)?;
            }
            if save && let Some(event) = self.checkpoint()? {
                emit(event)?;
            }
        }
        self.seconds = before + begun.elapsed().as_secs_f64();
        emit(Event::Finished {
            step: self.step,
            tokens: self.tokens,
            seconds: self.seconds,
            best: self.best,
        })?;
        Ok(Outcome::Finished)
    }

    /// One update: the batches, their gradients, the check that all is finite, the optimiser.
    fn update(&mut self) -> Result<Update, TrainError> {
        let mut gradient = self.optimizer.gradient();
        let (mut loss, mut weights, mut tokens) = (0.0, 0.0, 0);
        let mut extra = None;
        for part in 0..self.config.accumulate as u64 {
            let batch = self.loader.next_batch()?;
            let layers = self.model.config().layers;
            let nth = self.step * self.config.accumulate as u64 + part;
            let skip = skipped(&self.config, layers, nth);
            let taught = self.tutor.as_ref().map(|tutor| tutor.scores(&batch));
            let taught = taught.transpose()?;
            let pass = Pass {
                skip: &skip,
                recompute: self.config.gradient_checkpointing,
                teacher: self
                    .tutor
                    .as_ref()
                    .zip(taught.as_ref())
                    .map(|(tutor, scores)| anyformer_models::Teacher {
                        scores,
                        temperature: tutor.temperature,
                        mix: tutor.mix,
                    }),
                training: Some(Training {
                    seed: self.config.seed,
                    nth,
                }),
            };
            let scored = score_with(&self.model, &batch, &pass)?;
            let weight = match self.config.accumulate {
                1 => 1.0,
                _ => scored.counted as f64,
            };
            loss += weight * f64::from(value(&scored));
            weights += weight;
            let total = match scored.extra {
                Some(more) => {
                    *extra.get_or_insert(0.0) += weight * f64::from(number(&more));
                    scored.loss + more
                }
                None => scored.loss,
            };
            let mut gradients = total.backward();
            self.optimizer
                .accumulate(&mut gradient, &mut gradients, weight);
            tokens += self.positions(&batch);
        }
        let extra = extra.map(|extra| extra / weights);
        let loss = loss / weights;
        let grad_norm = gradient.norm();
        if !loss.is_finite() || !grad_norm.is_finite() {
            return Err(TrainError::NotFinite {
                step: self.step + 1,
                loss,
                parameter: self
                    .optimizer
                    .first_not_finite(&gradient)
                    .map(str::to_string),
            });
        }
        let rate = self.config.rate(self.step);
        self.optimizer
            .update(&gradient, grad_norm, rate, &self.config);
        self.step += 1;
        self.tokens += tokens;
        Ok(Update {
            loss,
            extra,
            grad_norm,
            rate,
        })
    }

    /// Input positions of a batch that are not padding; of pictures, patches.
    fn positions(&self, batch: &Batch) -> u64 {
        let count = match (&batch.lengths, self.model.config().grid()) {
            (_, Some([rows, columns])) => batch.batch * rows * columns,
            (Some(lengths), None) => lengths.iter().sum(),
            (None, None) => batch.batch * batch.time,
        };
        count as u64
    }

    fn evaluate(&mut self) -> Result<Event, TrainError> {
        let (batch, batches) = (self.config.batch, self.config.eval_batches);
        let Evaluation {
            loss,
            accuracy,
            counted,
            ..
        } = evaluate(&self.model, self.task, Split::Validation, batch, batches)?;
        let step = self.step;
        if self.best.is_none_or(|best| loss < best.loss) {
            self.best = Some(Best {
                step,
                loss,
                accuracy,
            });
        }
        let tokens = matches!(self.model.config().gives, Gives::NextToken { .. });
        Ok(Event::Evaluated {
            step,
            loss,
            accuracy,
            perplexity: tokens.then(|| loss.exp()),
            counted,
        })
    }

    /// Writes a checkpoint, unless there is no folder or one of this step stands there already.
    fn checkpoint(&mut self) -> Result<Option<Event>, TrainError> {
        let step = self.step;
        let Some(folder) = &self.folder else {
            return Ok(None);
        };
        if step == 0 || self.saved_at == Some(step) {
            return Ok(None);
        }
        let saved = Saved {
            step,
            tokens: self.tokens,
            seconds: self.seconds,
            best: self.best,
            threads: rayon::current_num_threads(),
            position: self.loader.position(),
            options: self.options(),
        };
        let mut extra = self.extra.clone();
        extra.info.insert("step".into(), json!(step));
        let checkpoints = folder.checkpoints();
        let path: PathBuf =
            checkpoint::save(&checkpoints, &self.model, &self.optimizer, &extra, &saved)?;
        checkpoint::prune(&checkpoints, self.config.keep)?;
        self.saved_at = Some(step);
        Ok(Some(Event::Checkpoint { step, path }))
    }
}
