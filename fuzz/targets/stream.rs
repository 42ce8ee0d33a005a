//! Bytes of both directions, cut in two ways.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ebb_proxy::fuzzing::stream(bytes));
