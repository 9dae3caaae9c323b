//! Whole commands: what is typed, what is printed, what is written, the exit code.

mod bad_input;
mod compare;
mod convert;
mod generate;
mod harness;
mod kill;
mod lra;
mod models;
mod pieces;
mod readme;
mod recipes;
mod runs;
mod serve;
mod shows;
mod switches;
