//! The engine: one thread that owns the model, and runs many sequences together, a step at a time.
//!
//! Sequences join and leave between steps. A prompt is read in pieces cut at multiples of `chunk` tokens from its
//! beginning, whatever else is running, so that an answer does not depend on its neighbours; pieces of several prompts
//! are packed end to end, with no padding in any operation (Zhai et al., ByteTransformer (2022), arXiv 2210.03052).
//! States come from and go to the kept ones of [`states`].

mod batch;
mod file;
pub mod job;
mod queue;
pub mod states;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyformer_models::{Gives, Model, ModelError, ModelState, Reads, Sampler};
use sha2::{Digest, Sha256};

use crate::metrics::Metrics;
use job::{Job, SubmitError};
use queue::{Command, Queue};
use states::{StateInfo, States, StatesConfig, StatesError, is_name};

/// How much the engine takes on.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Sequences that run together.
    pub batch: usize,
    /// Answers that may wait; with so many no further request is taken.
    pub queue: usize,
    /// Tokens of one sequence, prompt and answer together.
    pub context: usize,
    /// Prompts are read in pieces that end at multiples of this.
    pub chunk: usize,
    /// Prompt tokens between two decoding steps, at least one piece.
    pub prefill: usize,
    /// Where states are kept.
    pub states: StatesConfig,
    /// Tokens to guess ahead for each running sequence; 0: none.
    pub speculate: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            batch: 32,
            queue: 64,
            context: 8192,
            chunk: 256,
            prefill: 512,
            speculate: 0,
            states: StatesConfig::default(),
        }
    }
}

/// A model that the engine cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Not a language model, or one that cannot stream.
    #[error("serve the model: {0}")]
    Model(String),
    /// It does not run.
    #[error("{0}")]
    Run(#[from] ModelError),
    /// The folder of states.
    #[error("{0}")]
    States(#[from] StatesError),
    /// A limit of zero.
    #[error("serve: {0} must be at least 1")]
    Zero(&'static str),
    /// No thread.
    #[error("start the engine's thread: {0}")]
    Thread(std::io::Error),
}

/// The running engine; every part of the server holds it.
pub struct Engine {
    queue: Arc<Queue>,
    metrics: Metrics,
    context: usize,
    vocab: usize,
    ended: Arc<AtomicBool>,
    thread: std::sync::Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// Tokens that the model knows.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Starts the thread.
    pub fn start(
        model: Model,
        mut config: EngineConfig,
        metrics: Metrics,
    ) -> Result<Self, EngineError> {
        for (value, name) in [
            (config.batch, "the batch"),
            (config.queue, "the queue"),
            (config.context, "the context"),
            (config.chunk, "the chunk"),
        ] {
            if value == 0 {
                return Err(EngineError::Zero(name));
            }
        }
        let Reads::Tokens { vocab } = model.config().reads else {
            return Err(EngineError::Model("it reads pictures, not tokens".into()));
        };
        if !matches!(model.config().gives, Gives::NextToken { .. }) {
            return Err(EngineError::Model(
                "it is a classifier; `anyformer eval` scores it".into(),
            ));
        }
        config.context = config.context.min(model.config().longest());
        let like = sample_state(&model)?;
        let name = match config.states.folder {
            Some(_) => fingerprint(&model),
            None => String::new(),
        };
        let device = model.params().device();
        let states = States::open(config.states.clone(), name, like, device)?;
        let queue = Arc::new(Queue::new(config.queue));
        let ended = Arc::new(AtomicBool::new(false));
        let context = config.context;
        let worker = batch::Worker::new(model, config, queue.clone(), metrics.clone(), states);
        let over = ended.clone();
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || {
                worker.run();
                over.store(true, Ordering::Release);
            })
            .map_err(EngineError::Thread)?;
        Ok(Engine {
            queue,
            metrics,
            context,
            vocab,
            ended,
            thread: std::sync::Mutex::new(Some(thread)),
        })
    }

    /// Puts a job into the queue, or says why not; never waits.
    pub fn submit(&self, job: Job) -> Result<(), SubmitError> {
        self.submit_all(vec![job])
    }

    /// Puts all jobs of one request into the queue, or none.
    pub fn submit_all(&self, jobs: Vec<Job>) -> Result<(), SubmitError> {
        for job in &jobs {
            self.check(job)?;
        }
        let taken = self.queue.submit(jobs);
        if matches!(taken, Err(SubmitError::Full { .. })) {
            self.metrics.refused.inc();
        }
        self.metrics.waiting.set(self.queue.waiting() as i64);
        taken
    }

    fn check(&self, job: &Job) -> Result<(), SubmitError> {
        if job.ids.is_empty() && job.state.is_none() {
            return Err(SubmitError::Empty);
        }
        if !job.ids.is_empty() {
            check_ids(&job.ids, job.max_tokens, self.context, self.vocab)?;
        }
        if let Some(name) = job.save.as_ref().filter(|name| !is_name(name)) {
            return Err(SubmitError::Name(name.clone()));
        }
        let made = Sampler::new(job.options).map(|_| ());
        made.map_err(|error| SubmitError::Sample(error.to_string()))
    }

    /// Tokens of one sequence, prompt and answer together.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Whether a prompt and what is asked for fit into one sequence.
    pub fn fits(&self, prompt: usize, asked: usize) -> Result<(), SubmitError> {
        fits(prompt, asked, self.context)
    }

    /// The named states, in order of their names. `answer` is called on the engine's thread; false: it has stopped.
    pub fn list_states(&self, answer: impl FnOnce(Vec<StateInfo>) + Send + 'static) -> bool {
        self.queue.command(Command::List(Box::new(answer)))
    }

    /// Removes a named state and its file; true when there was one.
    pub fn delete_state(
        &self,
        name: String,
        answer: impl FnOnce(Result<bool, String>) + Send + 'static,
    ) -> bool {
        self.queue.command(Command::Delete(name, Box::new(answer)))
    }

    /// Copies a named state, or its first `tokens`, under another name (or its own: rolls it back). `None`: no such state.
    pub fn fork_state(
        &self,
        from: String,
        to: String,
        tokens: Option<usize>,
        answer: impl FnOnce(Result<Option<StateInfo>, String>) + Send + 'static,
    ) -> Result<bool, SubmitError> {
        if !is_name(&to) {
            return Err(SubmitError::Name(to));
        }
        Ok(self.queue.command(Command::Fork {
            from,
            to,
            tokens,
            answer: Box::new(answer),
        }))
    }

    /// Takes nothing more; what runs and waits is finished. `abort` ends that too.
    pub fn close(&self, abort: bool) {
        self.queue.close(abort);
    }

    /// True once the engine takes nothing more.
    pub fn is_closed(&self) -> bool {
        self.queue.is_closed()
    }

    /// True when the last sequence has ended and every state is on disk.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// Closes, and waits for the end.
    pub fn join(&self) {
        self.close(false);
        let thread = self.thread.lock().map(|mut thread| thread.take());
        if let Ok(Some(thread)) = thread {
            // A panic of the thread has been reported to every job.
            let _ = thread.join();
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.close(true);
        self.join();
    }
}

/// Whether a prompt and what is asked for fit into one sequence.
fn fits(prompt: usize, asked: usize, limit: usize) -> Result<(), SubmitError> {
    match prompt.saturating_add(asked) > limit {
        true => Err(SubmitError::TooLong {
            prompt,
            asked,
            limit,
        }),
        false => Ok(()),
    }
}

/// Whether the tokens of one sequence are some, not too many, and in the vocabulary.
pub(crate) fn check_ids(
    ids: &[u32],
    asked: usize,
    limit: usize,
    vocab: usize,
) -> Result<(), SubmitError> {
    if ids.is_empty() {
        return Err(SubmitError::Empty);
    }
    fits(ids.len(), asked, limit)?;
    match ids.iter().find(|id| **id as usize >= vocab) {
        Some(&id) => Err(SubmitError::Vocabulary { id, vocab }),
        None => Ok(()),
    }
}

/// A state of one sequence: what kept states are checked against. Fails where the model cannot stream.
fn sample_state(model: &Model) -> Result<ModelState, EngineError> {
    Ok(model.prefill(&[0], 1, None, None)?.1)
}

/// A name for the weights: a checksum of the config and every value.
fn fingerprint(model: &Model) -> String {
    let mut sum = Sha256::new();
    sum.update(serde_json::Value::Object(model.config().to_json()).to_string());
    for param in model.params().params() {
        sum.update(param.name());
        let bytes: Vec<u8> = param
            .values()
            .iter()
            .flat_map(|x| x.to_le_bytes())
            .collect();
        sum.update(bytes);
    }
    let bytes = sum.finalize();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
