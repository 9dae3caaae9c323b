//! Random problems of loops over values or rows, against their naive twins.
#![no_main]

use anyformer_kernels::fuzzing::{Bytes, family};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| family("plain")(&mut Bytes::new(bytes)));
