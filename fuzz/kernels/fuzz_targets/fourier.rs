//! Random problems of the Fourier transform of both dimensions, against the naive twin.
#![no_main]

use anyformer_kernels::fuzzing::{Bytes, family};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| family("fourier")(&mut Bytes::new(bytes)));
