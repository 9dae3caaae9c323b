//! The engine and the server around small models with random weights.

mod asked;
mod client;
mod described;
mod encoder;
mod engine;
mod faults;
mod http;
mod models;
