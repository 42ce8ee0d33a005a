//! The committed inputs, and mutations of them, without a fuzzer: on any toolchain, in every run of the tests.

use std::fs;
use std::path::Path;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// LIMIT: mutations of each target; some seconds without optimisation. `EBB_FUZZ_ROUNDS` asks for others.
const ROUNDS: u64 = 20_000;
/// LIMIT: inputs are kept as long as a short session.
const INPUT_MAX: usize = 600;

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut paths: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    // The same order everywhere: a seed means the same inputs.
    paths.sort();
    assert!(!paths.is_empty(), "no inputs in {dir:?}");
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// Changes an input as fuzzers do: bits, bytes, lengths, pieces of others.
fn mutate(input: &mut Vec<u8>, others: &[Vec<u8>], random: &mut StdRng) {
    for _ in 0..random.random_range(1..5) {
        let at = random.random_range(0..=input.len());
        match random.random_range(0..6) {
            0 if at < input.len() => input[at] ^= 1 << random.random_range(0..8),
            1 if at < input.len() => input[at] = random.random(),
            2 => input.insert(at, random.random()),
            3 if at < input.len() => drop(input.drain(at..(at + random.random_range(1..9)).min(input.len()))),
            4 => input.truncate(at),
            _ => {
                let other = &others[random.random_range(0..others.len())];
                let from = random.random_range(0..=other.len());
                let piece = &other[from..(from + random.random_range(0..40)).min(other.len())];
                input.splice(at..at, piece.iter().copied());
            }
        }
    }
    input.truncate(INPUT_MAX);
}

fn check(target: &str, run: fn(&[u8])) {
    let corpus = corpus(target);
    corpus.iter().for_each(|input| run(input));
    let rounds = std::env::var("EBB_FUZZ_ROUNDS").map_or(ROUNDS, |text| text.parse().unwrap());
    for seed in 0..rounds {
        let mut random = StdRng::seed_from_u64(seed);
        let mut input = corpus[random.random_range(0..corpus.len())].clone();
        for _ in 0..random.random_range(1..8) {
            mutate(&mut input, &corpus, &mut random);
        }
        let result = std::panic::catch_unwind(|| run(&input));
        assert!(result.is_ok(), "{target} fails with seed {seed}: {:?}", input.escape_ascii().to_string());
    }
}

#[test]
fn headers_of_load_balancers() {
    check("proxy_header", super::proxy_header);
}

#[test]
fn first_packets() {
    check("startup", super::startup);
}

#[test]
fn scram_messages() {
    check("scram", super::scram);
}

#[test]
fn streams_in_pieces() {
    check("stream", super::stream);
}

#[test]
fn sessions_against_a_server() {
    check("session", super::session);
}

/// All short sessions there are, of messages that have to do with each other.
#[test]
fn every_short_session_against_a_server() {
    // A client sends Query, Execute, Sync, CopyData, CopyDone, CopyFail; the server reads, in each way that differs.
    let sent = [0, 3, 6, 9, 10, 11].map(|at| at << 1);
    let read = [0, 1, 3, 4, 5].map(|choice| (choice << 1) | 1);
    let steps: Vec<u8> = sent.into_iter().chain(read).collect();
    let mut input = [0; 5];
    for number in 0..steps.len().pow(input.len() as u32) {
        let mut number = number;
        for step in &mut input {
            *step = steps[number % steps.len()];
            number /= steps.len();
        }
        super::session(&input);
    }
}
