//! Serving a language model: an engine that runs many sequences together, states that are kept and named, and the HTTP
//! server around them. Only this crate knows HTTP as a server.
//!
//! - [`engine`]: continuous batching on one thread, without HTTP.
//! - [`metrics`]: what is counted and timed.

pub mod engine;
pub mod metrics;

pub use engine::job::{
    ChannelSink, End, Event, Finish, Go, Job, JobError, Sink, SubmitError, Token,
};
pub use engine::states::{StateInfo, StatesConfig, StatesError};
pub use engine::{Engine, EngineConfig, EngineError};
pub use metrics::Metrics;
