//! The model folder on disk: what training writes is what evaluation, conversion and serving read.
//!
//! ```text
//! MODEL/config.json          the model's config under "anyformer", with the version of the format
//! MODEL/model.safetensors    every parameter and buffer by name, f32
//! MODEL/tokenizer.json       optional
//! MODEL/SHA256SUMS           a checksum of each file, in the format of `sha256sum -c`
//! ```
//! A folder that transformers wrote, and a GGUF file, are read too, where their family is known ([`families`]), and such
//! folders are written ([`export`]).
//!
//! A folder is written beside its final name and renamed when it is whole, so that under the final name there is a
//! complete folder or none. Everything read is checked: a damaged file is an error that names it, never a panic and
//! never a model with other weights.

pub mod atomic;
pub mod chat;
mod encoding;
pub mod error;
pub mod export;
mod extra;
pub mod families;
pub mod folder;
mod gguf;
pub mod model;
pub mod prune;
mod quantise;
mod quantised;
pub mod sentence;
pub mod tensors;
mod weights;

pub use chat::{ChatTemplate, Message};
pub use error::{Damage, HubError, Problem};
pub use export::export;
pub use extra::Extra;
pub use families::Family;
pub use folder::{FolderWriter, Manifest, clean_temporaries};
pub use model::{
    CONFIG_FILE, FORMAT_VERSION, INDEX_FILE, MODEL_FILE, ModelFolder, TOKENIZER_FILE, load, save,
    write_model,
};
pub use quantise::{quantise, save_quantised, shifted};
pub use quantised::{Method, Quantisation};
pub use sentence::SentenceVectors;
pub use tensors::{
    NamedTensor, TensorFile, parse_safetensors, read_safetensors, write_safetensors,
};
