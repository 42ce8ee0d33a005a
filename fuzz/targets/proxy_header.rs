//! What a load balancer tells before its client speaks.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| ebb_proxy::fuzzing::proxy_header(bytes));
