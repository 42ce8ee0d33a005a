//! What clients send and what servers do, in any order.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ebb_proxy::fuzzing::session(bytes));
