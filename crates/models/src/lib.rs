//! The block, its wirings, heads and the flat backbone; a checked config becomes a model.
//!
//! There is one block. A paper contributes a mixer, a wiring or a head, never a copy of a language model.

mod block;
mod class_head;
pub mod config;
mod depth;
mod embed;
mod exits;
mod first_conv;
mod head;
pub mod input;
pub mod model;
mod rows;
pub mod sample;
pub mod speculate;
mod state;
pub mod stop;
mod vectors;

pub use config::{
    Gives, ModelConfig, ModelError, NormKind, Pair, Pool, Positions, Precision, Reads, Wiring,
};
pub use input::Input;
pub use model::{Model, Pass, Scored, Target, Teacher};
pub use sample::{SampleError, SampleOptions, Sampler, likeliest, log_prob};
pub use speculate::{Guesses, Steps};
pub use state::ModelState;
pub use stop::Stops;
