//! What the proxy allocates, counted by the allocator of this program, in which nothing else runs meanwhile: Postgres is
//! a process of its own, and the client a thread that writes from, and reads into, memory it had before.

#![allow(clippy::unwrap_used, reason = "a test that panics has failed")]

#[path = "../proxy/harness.rs"]
#[expect(dead_code, reason = "other tests use more of it")]
mod harness;
#[path = "../proxy/raw.rs"]
#[expect(dead_code, reason = "other tests use more of it")]
mod raw;

use std::alloc::System;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use harness::Ebb;
use raw::Session;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// One message up each, and what ends the answer.
const READY: [u8; 6] = [b'Z', 0, 0, 0, 5, b'I'];

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    [&[tag][..], &(body.len() as u32 + 4).to_be_bytes(), body].concat()
}

/// Sends a request so many times, and reads each answer to its end.
fn ask(socket: &mut TcpStream, scratch: &mut [u8], request: &[u8], times: usize) {
    for _ in 0..times {
        socket.write_all(request).unwrap();
        let mut tail = [0; 6];
        while tail != READY {
            let count = socket.read(scratch).unwrap();
            assert!(count > 0, "the proxy has closed");
            for byte in &scratch[count.saturating_sub(6)..count] {
                tail.rotate_left(1);
                tail[5] = *byte;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_passes_without_an_allocation() {
    let ebb = Ebb::asleep().await;
    let session = Session::open(&ebb).await;
    let mut socket = session.into_std();
    socket.set_nonblocking(false).unwrap();
    let run = [message(b'B', b"\0s\0\0\0\0\0\0\0"), message(b'D', b"P\0"), message(b'E', b"\0\0\0\0\0")].concat();
    let sync = message(b'S', b"");
    let parse = [&message(b'P', b"s\0select 1\0\0\0")[..], &sync].concat();
    let short = message(b'Q', b"select 1\0");
    let rows = message(b'Q', b"select repeat('x', 1000) from generate_series(1, 3000)\0");
    let (prepared, batch) = ([&run[..], &sync].concat(), [&run.repeat(20)[..], &sync].concat());
    let allocated = tokio::task::spawn_blocking(move || {
        let mut scratch = vec![0; 64 * 1024];
        ask(&mut socket, &mut scratch, &parse, 1);
        let mut counted = Vec::new();
        // Once to warm up: a thread keeps its blocks, a session the room for what it awaits.
        for (what, request, times) in
            [("simple", &short, 500), ("prepared", &prepared, 500), ("rows", &rows, 20), ("pipelined", &batch, 50)]
        {
            ask(&mut socket, &mut scratch, request, 20);
            let region = Region::new(ALLOCATOR);
            ask(&mut socket, &mut scratch, request, times);
            let change = region.change();
            counted.push((what, change.allocations + change.reallocations));
        }
        counted
    });
    assert_eq!(allocated.await.unwrap(), [("simple", 0), ("prepared", 0), ("rows", 0), ("pipelined", 0)]);
}
