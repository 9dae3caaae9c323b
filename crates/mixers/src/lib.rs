//! Token mixers and channel mixers, one file each.
//!
//! A mixer is a config, a [`Card`], a `forward`, where it can stream a carried state, and an exact cost. [`all`] lists
//! every registered mixer; names, the command line's list, docs, config errors and tests derive from that list.

pub mod all;
pub mod card;
pub mod mixer;
pub mod parts;

mod additive;
mod block_sparse;
mod gated;
mod groups;
mod short;

pub mod attention;
pub mod bigbird;
pub mod combiner;
pub mod compressive;
pub mod cosformer;
pub mod delta_net;
pub mod fnet;
pub mod gated_delta_net;
pub mod gla;
pub mod linear_attention;
pub mod linformer;
pub mod local;
pub mod longformer;
pub mod lru;
pub mod luna;
pub mod mamba;
pub mod mamba2;
pub mod mlp;
pub mod moe;
pub mod none;
pub mod nystromformer;
pub mod performer;
pub mod pool;
pub mod positions;
pub mod reformer;
pub mod retention;
pub mod rotary;
pub mod routing;
pub mod s4d;
pub mod sinkhorn;
pub mod sparse;
pub mod state;
pub mod swiglu;
pub mod synthesizer;
pub mod transformer_xl;

pub use all::{channel_mixer, channel_mixers, token_mixer, token_mixers};
pub use card::{
    Card, ChannelEntry, ConfigError, Direction, Entry, Knob, MixerSpec, Options, Preset, TokenEntry,
};
pub use mixer::{ChannelMixer, Context, Cost, Losses, RunError, TokenMixer, Training};
pub use state::{State, StateTensor};
