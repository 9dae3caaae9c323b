//! Random problems of pooling, against the naive twin.
#![no_main]

use anyformer_kernels::fuzzing::{Bytes, family};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| family("pool")(&mut Bytes::new(bytes)));
