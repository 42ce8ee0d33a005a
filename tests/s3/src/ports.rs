//! Ports that a server of a test can listen on, and listen on again.

use std::fs;
use std::net::TcpListener;

use rand::RngExt as _;

/// The lowest that is given out.
const FIRST: u16 = 12_000;

/// Where the kernel's own choices begin, if it does not tell (`ip_local_port_range` of ip(7)).
const KERNELS_FROM: u16 = 32_768;

/// LIMIT: others listen on some of them, too.
const TRIES: usize = 1000;

/// A port of loopback that nobody listens on. The kernel gives none like it to an outgoing connection, as it may give
/// away one that it chose itself while the server that listens there is being killed and started again.
///
/// # Panics
/// If there is none.
pub fn free_port() -> u16 {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let end = range.split_whitespace().next().and_then(|from| from.parse().ok()).unwrap_or(KERNELS_FROM);
    let mut rng = rand::rng();
    let mut ports = (0..TRIES).map(|_| rng.random_range(FIRST..end.max(FIRST + 1)));
    ports.find(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok()).expect("a port is free")
}
