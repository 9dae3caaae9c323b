//! Random problems of the diagonal recurrence, against the naive twin.
#![no_main]

use anyformer_kernels::fuzzing::{Bytes, family};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| family("diagonal")(&mut Bytes::new(bytes)));
