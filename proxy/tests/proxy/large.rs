//! Messages far larger than any buffer pass through in pieces, and leave nothing behind.

use std::fs;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::Ebb;
use crate::wire::{Wire, execute, message, query, sync};

const LARGE: usize = 200 << 20;
/// What the proxy, and the client beside it, may need to move that much.
const GROWTH_MAX_KIB: usize = 8 << 10;

/// The most memory this process has had since the last call of [`forget_peak`], in KiB. Each test is a process of its own.
fn peak_kib() -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// proc(5): 5 resets the peak.
fn forget_peak() -> usize {
    fs::write("/proc/self/clear_refs", "5").unwrap();
    peak_kib()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_of_200_megabytes_goes_in_and_out_without_being_kept() {
    let ebb = Ebb::asleep().await;
    let mut wire = Wire::open(&ebb).await;
    wire.ask(&[message(b'P', b"s\0SELECT length($1::bytea)\0\0\0"), sync()].concat()).await;
    let before = forget_peak();

    // One `Bind` with one parameter, in binary, as a client sends that reads it from a file.
    let head = b"\0s\0\0\x01\0\x01\0\x01";
    let length = head.len() + 4 + LARGE + 2;
    let mut bind = vec![b'B'];
    bind.extend_from_slice(&(length as u32 + 4).to_be_bytes());
    bind.extend_from_slice(head);
    bind.extend_from_slice(&(LARGE as u32).to_be_bytes());
    wire.write(&bind).await;
    let chunk = vec![7; 64 << 10];
    for _ in 0..LARGE / chunk.len() {
        wire.stream.write_all(&chunk).await.unwrap();
    }
    let rest = [&[0, 0][..], &execute("", 0), &sync()].concat();
    let (tags, bodies) = wire.ask(&rest).await;
    assert_eq!(tags, "2DCZ");
    assert!(bodies.windows(9).any(|bytes| bytes == b"209715200"));
    let after = peak_kib();
    assert!(after < before + GROWTH_MAX_KIB, "in: {before} KiB before, {after} KiB at most");

    let before = forget_peak();
    wire.write(&query(&format!("SELECT repeat('x', {LARGE})"))).await;
    assert_eq!(wire.read().await.0, b'T');
    assert_eq!(wire.stream.read_u8().await.unwrap(), b'D');
    let mut left = wire.stream.read_u32().await.unwrap() as usize - 4;
    assert_eq!(left, LARGE + 6);
    let mut chunk = vec![0; 64 << 10];
    while left > 0 {
        let upto = left.min(chunk.len());
        left -= wire.stream.read(&mut chunk[..upto]).await.unwrap();
    }
    wire.read_until(b'Z').await;
    let after = peak_kib();
    assert!(after < before + GROWTH_MAX_KIB, "out: {before} KiB before, {after} KiB at most");
    // The session is as any other.
    ebb.suspend_when_idle().await;
    assert_eq!(wire.ask(&query("SELECT 1")).await.0, "TDCZ");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_longer_than_postgres_takes_is_refused_before_it_comes() {
    let ebb = Ebb::asleep().await;
    for tag in [b'Q', b'B', b'd'] {
        let mut wire = Wire::open(&ebb).await;
        wire.write(&[&[tag][..], &(1_u32 << 30).to_be_bytes()].concat()).await;
        assert_eq!(crate::raw::code(&wire.rest().await), "08P01");
    }
}
