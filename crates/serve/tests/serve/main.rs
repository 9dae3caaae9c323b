//! The engine and the server around small models with random weights.

mod engine;
mod models;
