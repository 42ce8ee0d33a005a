//! A verifier, and both messages of a client.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ebb_proxy::fuzzing::scram(bytes));
