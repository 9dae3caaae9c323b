//! What a run tells the outside: it emits events and never prints.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Something that happened. Steps count finished updates.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// The run begins or goes on.
    Started {
        /// Updates done before: 0 for a new run.
        step: u64,
        /// Updates of the whole run.
        steps: u64,
        /// Trainable parameters.
        params: usize,
        /// Worker threads.
        threads: usize,
    },
    /// An update was made.
    Step {
        /// Updates done.
        step: u64,
        /// Mean loss of its batches in nats per scored place.
        loss: f64,
        /// What mixers and exits added to it: the balance of experts, the exits' own losses.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        extra: Option<f64>,
        /// Learning rate.
        lr: f64,
        /// Norm of the whole gradient before clipping.
        grad_norm: f64,
        /// Input positions read since the run began.
        tokens: u64,
        /// Input positions per second since the last such event.
        tokens_per_second: f64,
        /// Seconds of training since the run began, all sittings together.
        seconds: f64,
    },
    /// The model was evaluated on held-out data.
    Evaluated {
        /// Updates done.
        step: u64,
        /// Mean loss in nats per scored place.
        loss: f64,
        /// Part of the scored places that were right.
        accuracy: f64,
        /// `exp(loss)`, of models that give tokens.
        perplexity: Option<f64>,
        /// Scored places.
        counted: usize,
    },
    /// A checkpoint stands complete on disk.
    Checkpoint {
        /// Updates done.
        step: u64,
        /// Its folder.
        path: PathBuf,
    },
    /// Something to know that stops nothing.
    Warning {
        /// Updates done.
        step: u64,
        /// What.
        message: String,
    },
    /// The run was asked to stop and did.
    Stopped {
        /// Updates done.
        step: u64,
    },
    /// The last update was made.
    Finished {
        /// Updates done.
        step: u64,
        /// Input positions read.
        tokens: u64,
        /// Seconds of training, all sittings together.
        seconds: f64,
        /// The lowest loss of an evaluation, and its step.
        best: Option<Best>,
    },
}

impl Event {
    /// Updates done when it happened.
    pub fn step(&self) -> u64 {
        match self {
            Event::Started { step, .. }
            | Event::Step { step, .. }
            | Event::Evaluated { step, .. }
            | Event::Checkpoint { step, .. }
            | Event::Warning { step, .. }
            | Event::Stopped { step }
            | Event::Finished { step, .. } => *step,
        }
    }
}

/// The best evaluation of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Updates done.
    pub step: u64,
    /// Mean loss in nats.
    pub loss: f64,
    /// Part of the scored places that were right.
    pub accuracy: f64,
}

/// Receives events. An error ends the run.
pub trait Events {
    /// Takes one event.
    fn event(&mut self, event: &Event) -> io::Result<()>;
}

impl<F: FnMut(&Event) -> io::Result<()>> Events for F {
    fn event(&mut self, event: &Event) -> io::Result<()> {
        self(event)
    }
}

/// Drops every event.
pub struct NoEvents;

impl Events for NoEvents {
    fn event(&mut self, _: &Event) -> io::Result<()> {
        Ok(())
    }
}

/// Hands every event to several receivers in turn.
#[derive(Default)]
pub struct Fan<'a> {
    receivers: Vec<Box<dyn Events + 'a>>,
}

impl<'a> Fan<'a> {
    /// One more receiver.
    pub fn and(mut self, receiver: impl Events + 'a) -> Self {
        self.receivers.push(Box::new(receiver));
        self
    }
}

impl Events for Fan<'_> {
    fn event(&mut self, event: &Event) -> io::Result<()> {
        self.receivers
            .iter_mut()
            .try_for_each(|receiver| receiver.event(event))
    }
}
