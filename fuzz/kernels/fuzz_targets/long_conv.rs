//! Random problems of convolutions as long as the sequences, against the naive twin.
#![no_main]

use anyformer_kernels::fuzzing::{Bytes, family};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| family("long_conv")(&mut Bytes::new(bytes)));
