//! The first packet of a connection.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ebb_proxy::fuzzing::startup(bytes));
