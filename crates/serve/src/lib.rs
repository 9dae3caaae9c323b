//! Serving a language model: an engine that runs many sequences together, states that are kept and named, and the HTTP
//! server around them. Only this crate knows HTTP as a server.
//!
//! - [`engine`]: continuous batching on one thread, without HTTP.
//! - [`encoder`]: vectors of texts, packed.
//! - [`text`]: tokens as text while they come.
//! - [`http`]: the routes; [`server`]: the socket under them.
//! - [`load`]: a client that measures.
//! - [`metrics`]: what is counted and timed.

pub mod encoder;
pub mod engine;
pub mod http;
pub mod load;
pub mod metrics;
mod probe;
pub mod server;
mod stall;
pub mod text;

pub use encoder::{Encoder, EncoderConfig, Reply};
pub use engine::job::{
    ChannelSink, End, Event, Finish, Go, Job, JobError, Sink, SubmitError, Token,
};
pub use engine::states::{StateInfo, StatesConfig, StatesError};
pub use engine::{Engine, EngineConfig, EngineError};
pub use http::{App, Limits, Served};
pub use load::{LoadConfig, LoadError, LoadReport, Quantiles, run_load};
pub use metrics::Metrics;
pub use server::{Server, ServerConfig, ServerError, Stopper};
