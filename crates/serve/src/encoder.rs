//! Vectors of texts from an encoder: texts that come within a short time are packed end to end into one pass, with no
//! operation on padding (Zhai et al., ByteTransformer (2022), arXiv 2210.03052).

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyformer_models::{Model, Pool, Reads};
use anyformer_ops::tensor_values;
use tokio::sync::oneshot;

use crate::engine::job::{JobError, SubmitError};
use crate::engine::{EngineError, check_ids};
use crate::metrics::Metrics;

/// How much the encoder takes on.
#[derive(Clone, Debug)]
pub struct EncoderConfig {
    /// Tokens of one pass; a longer text runs alone.
    pub tokens: usize,
    /// A text waits so long, at most, for others to join it.
    pub wait: Duration,
    /// Texts that may wait; with so many no further request is taken.
    pub queue: usize,
    /// Tokens of one text.
    pub context: usize,
    /// What is read off the last block; `None`: as the model's own head does, else the mean.
    pub pool: Option<Pool>,
    /// Vectors are brought to length 1.
    pub unit: bool,
}

impl Default for EncoderConfig {
    fn default() -> Self {
        EncoderConfig {
            tokens: 4096,
            wait: Duration::from_millis(2),
            queue: 256,
            context: 8192,
            pool: None,
            unit: true,
        }
    }
}

/// Where the vector of a text goes.
pub trait Reply: Send {
    /// The only call with the vector, on the encoder's thread: it must not wait.
    fn give(self: Box<Self>, vector: Result<Vec<f32>, JobError>);
    /// True when nobody waits for it any more; the text is then dropped.
    fn is_gone(&self) -> bool;
}

impl Reply for oneshot::Sender<Result<Vec<f32>, JobError>> {
    fn give(self: Box<Self>, vector: Result<Vec<f32>, JobError>) {
        // Who asked may have gone.
        let _ = self.send(vector);
    }

    fn is_gone(&self) -> bool {
        self.is_closed()
    }
}

struct Waiting {
    ids: Vec<u32>,
    since: Instant,
    reply: Box<dyn Reply>,
}

#[derive(Default)]
struct Inner {
    texts: VecDeque<Waiting>,
    closed: bool,
    abort: bool,
}

#[derive(Default)]
struct Shared {
    inner: Mutex<Inner>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running encoder: one thread that owns the model.
pub struct Encoder {
    shared: Arc<Shared>,
    config: EncoderConfig,
    metrics: Metrics,
    vocab: usize,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Encoder {
    /// Starts the thread.
    pub fn start(
        model: Model,
        mut config: EncoderConfig,
        metrics: Metrics,
    ) -> Result<Self, EngineError> {
        for (value, name) in [
            (config.queue, "the queue"),
            (config.context, "the context"),
            (config.tokens, "the batch"),
        ] {
            if value == 0 {
                return Err(EngineError::Zero(name));
            }
        }
        let Reads::Tokens { vocab } = model.config().reads else {
            return Err(EngineError::Model("it reads pictures, not tokens".into()));
        };
        config.context = config.context.min(model.config().longest());
        let pool = config.pool.unwrap_or_else(|| model.config().gives.pool());
        // First, or products would pack these weights for themselves and keep the room for it.
        model.panel();
        // A mixer that is made for one length is found here.
        model.vectors(&[&[0]], pool)?;
        let shared = Arc::new(Shared::default());
        let (queue, limits, counts) = (shared.clone(), config.clone(), metrics.clone());
        let thread = std::thread::Builder::new()
            .name("encoder".into())
            .spawn(move || run(&model, pool, &queue, &limits, &counts))
            .map_err(EngineError::Thread)?;
        Ok(Encoder {
            shared,
            config,
            metrics,
            vocab,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Puts the texts of one request into the queue, all or none; never waits.
    pub fn submit(&self, texts: Vec<(Vec<u32>, Box<dyn Reply>)>) -> Result<(), SubmitError> {
        for (ids, _) in &texts {
            check_ids(ids, 0, self.config.context, self.vocab)?;
        }
        let mut inner = self.shared.lock();
        if inner.closed {
            return Err(SubmitError::Closed);
        }
        let queued = inner.texts.len();
        // What matters is how many wait already: a request for more texts than may wait would otherwise never be taken.
        if queued >= self.config.queue {
            self.metrics.refused.inc();
            return Err(SubmitError::Full { queued });
        }
        let since = Instant::now();
        let waiting = |(ids, reply)| Waiting { ids, since, reply };
        inner.texts.extend(texts.into_iter().map(waiting));
        self.metrics.waiting.set(inner.texts.len() as i64);
        self.shared.wake.notify_one();
        Ok(())
    }

    /// Takes nothing more; what waits is finished, with `abort` refused.
    pub fn close(&self, abort: bool) {
        let mut inner = self.shared.lock();
        inner.closed = true;
        inner.abort |= abort;
        self.shared.wake.notify_one();
    }

    /// True once nothing more is taken.
    pub fn is_closed(&self) -> bool {
        self.shared.lock().closed
    }

    /// Closes, and waits for the end.
    pub fn join(&self) {
        self.close(false);
        let thread = self.thread.lock().map(|mut thread| thread.take());
        if let Ok(Some(thread)) = thread {
            // A panic has been told to those who waited.
            let _ = thread.join();
        }
    }
}

impl Drop for Encoder {
    fn drop(&mut self) {
        self.close(true);
        self.join();
    }
}

/// The texts of the next pass: those that have come when the first has waited long enough, up to the limit of tokens.
fn next(
    shared: &Shared,
    config: &EncoderConfig,
    metrics: &Metrics,
) -> Option<(Vec<Waiting>, bool)> {
    let mut inner = shared.lock();
    loop {
        let before = inner.texts.len();
        inner.texts.retain(|text| !text.reply.is_gone());
        let cancelled = metrics.finished.with_label_values(&["cancelled"]);
        cancelled.inc_by((before - inner.texts.len()) as u64);
        let tokens: usize = inner.texts.iter().map(|text| text.ids.len()).sum();
        let Some(first) = inner.texts.front() else {
            if inner.closed {
                return None;
            }
            inner = shared
                .wake
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        let left = config.wait.saturating_sub(first.since.elapsed());
        if left.is_zero() || tokens >= config.tokens || inner.closed {
            break;
        }
        let waited = shared.wake.wait_timeout(inner, left);
        inner = waited.unwrap_or_else(PoisonError::into_inner).0;
    }
    let mut batch: Vec<Waiting> = Vec::new();
    let mut tokens = 0;
    while let Some(text) = inner.texts.front() {
        tokens += text.ids.len();
        if !batch.is_empty() && tokens > config.tokens {
            break;
        }
        batch.extend(inner.texts.pop_front());
    }
    Some((batch, inner.abort))
}

fn run(model: &Model, pool: Pool, shared: &Shared, config: &EncoderConfig, metrics: &Metrics) {
    while let Some((batch, abort)) = next(shared, config, metrics) {
        metrics.waiting.set(shared.lock().texts.len() as i64);
        metrics.running.set(batch.len() as i64);
        metrics.batch_size.observe(batch.len() as f64);
        let rows: Vec<&[u32]> = batch.iter().map(|text| text.ids.as_slice()).collect();
        for text in &batch {
            metrics.queue.observe(text.since.elapsed().as_secs_f64());
            metrics.prompt_tokens.inc_by(text.ids.len() as u64);
        }
        let vectors = || model.vectors(&rows, pool).map(tensor_values);
        let made = match abort {
            true => Err(JobError::Stopping),
            false => match catch_unwind(AssertUnwindSafe(vectors)) {
                Ok(made) => made.map_err(|error| JobError::Model(error.to_string())),
                Err(_) => Err(JobError::Model("it panicked; this is a bug".into())),
            },
        };
        let reason = if made.is_ok() { "stop" } else { "error" };
        let width = model.config().dim;
        for (index, text) in batch.into_iter().enumerate() {
            metrics.finished.with_label_values(&[reason]).inc();
            metrics.total.observe(text.since.elapsed().as_secs_f64());
            let vector = made.as_ref().map_err(JobError::clone);
            text.reply.give(vector.map(|all| {
                let own = &all[index * width..(index + 1) * width];
                match config.unit {
                    true => unit(own),
                    false => own.to_vec(),
                }
            }));
        }
        metrics.running.set(0);
    }
}

/// The vector at length 1; zeros stay zeros.
fn unit(vector: &[f32]) -> Vec<f32> {
    let square: f64 = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    let scale = square.sqrt().max(1e-12);
    vector
        .iter()
        .map(|x| (f64::from(*x) / scale) as f32)
        .collect()
}
