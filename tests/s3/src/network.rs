//! A network between a client and an S3 server.

use std::collections::{BTreeMap, VecDeque};
use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::wire::{Request, read_request, refuse};

/// What may happen to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mishap {
    /// A server in between answers 503 SlowDown.
    SlowDown,
    /// A server in between answers 500 InternalError.
    InternalError,
    /// The connection is closed before the request reaches the server.
    Lost,
    /// The server answers, and the connection is closed without the answer.
    AnswerLost,
    /// The connection is closed within the answer.
    AnswerTorn,
    /// The request reaches the server twice; the client gets the second answer.
    Repeated,
    /// Nothing ever comes back, though the server has answered.
    Silence,
}

/// Those that are drawn at random: silence only costs time.
const DRAWN: [Mishap; 6] =
    [Mishap::SlowDown, Mishap::InternalError, Mishap::Lost, Mishap::AnswerLost, Mishap::AnswerTorn, Mishap::Repeated];

/// A port that leads to a server, when nothing happens. Closed when dropped.
#[derive(Debug)]
pub struct Network {
    port: u16,
    plan: Arc<Mutex<Plan>>,
    _connections: JoinSet<()>,
}

#[derive(Debug)]
struct Plan {
    rate: f64,
    /// How long every request is under way.
    delay: Duration,
    /// Nothing gets through, in either direction.
    cut: bool,
    dice: StdRng,
    /// What happens to the next requests of a method.
    scripted: VecDeque<(&'static str, Mishap)>,
    happened: BTreeMap<Mishap, u64>,
}

impl Network {
    /// Leads to a port; every request meets a mishap with probability `rate`, drawn from `seed`.
    pub async fn start(to: u16, seed: u64, rate: f64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = listener.local_addr().expect("a listener has an address").port();
        let dice = StdRng::seed_from_u64(seed);
        let plan = Plan {
            rate,
            delay: Duration::ZERO,
            cut: false,
            dice,
            scripted: VecDeque::new(),
            happened: BTreeMap::new(),
        };
        let plan = Arc::new(Mutex::new(plan));
        let mut connections = JoinSet::new();
        connections.spawn(accept(listener, to, plan.clone()));
        Self { port, plan, _connections: connections }
    }

    /// The URL of the near end.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Lets something happen to the next request of `method` that nothing is planned for.
    pub fn plan(&self, method: &'static str, mishap: Mishap) {
        self.plan.lock().scripted.push_back((method, mishap));
    }

    /// How many planned mishaps have not come to pass.
    pub fn planned(&self) -> usize {
        self.plan.lock().scripted.len()
    }

    /// From now on every request meets a mishap with probability `rate`; at 0, only what is planned.
    pub fn roughen(&self, rate: f64) {
        self.plan.lock().rate = rate;
    }

    /// From now on every request takes so much longer.
    pub fn delay(&self, delay: Duration) {
        self.plan.lock().delay = delay;
    }

    /// Lets nothing through, or all again. What the server was doing it goes on with; the answer does not come back.
    pub fn cut(&self, cut: bool) {
        self.plan.lock().cut = cut;
    }

    /// How often each mishap came to pass.
    pub fn happened(&self) -> BTreeMap<Mishap, u64> {
        self.plan.lock().happened.clone()
    }
}

impl Plan {
    fn mishap(&mut self, method: &str) -> Option<Mishap> {
        if self.cut {
            return Some(Mishap::Lost);
        }
        let scripted = self.scripted.iter().position(|(planned, _)| *planned == method);
        let mishap = match scripted {
            Some(at) => self.scripted.remove(at).map(|(_, mishap)| mishap),
            None if self.dice.random_bool(self.rate) => Some(DRAWN[self.dice.random_range(0..DRAWN.len())]),
            None => None,
        };
        if let Some(mishap) = mishap {
            *self.happened.entry(mishap).or_default() += 1;
        }
        mishap
    }
}

async fn accept(listener: TcpListener, to: u16, plan: Arc<Mutex<Plan>>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let plan = plan.clone();
        connections.spawn(async move {
            // How a connection ends is the test's business, not ours.
            let _ = carry(stream, to, plan).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

/// Carries one request and its answer.
async fn carry(mut client: TcpStream, to: u16, plan: Arc<Mutex<Plan>>) -> io::Result<()> {
    let Some(request) = read_request(&mut client).await? else { return Ok(()) };
    let (mishap, delay) = {
        let mut plan = plan.lock();
        (plan.mishap(request.method()), plan.delay)
    };
    tokio::time::sleep(delay).await;
    match mishap {
        Some(Mishap::SlowDown) => return refuse(&mut client, "503 Slow Down", "SlowDown").await,
        Some(Mishap::InternalError) => {
            return refuse(&mut client, "500 Internal Server Error", "InternalError").await;
        }
        Some(Mishap::Lost) => return Ok(()),
        Some(Mishap::Repeated) => drop(exchange(to, &request).await?),
        _ => {}
    }
    let answer = exchange(to, &request).await?;
    let mishap = if plan.lock().cut { Some(Mishap::AnswerLost) } else { mishap };
    match mishap {
        Some(Mishap::AnswerLost) => Ok(()),
        Some(Mishap::AnswerTorn) => client.write_all(&answer[..answer.len() / 2]).await,
        Some(Mishap::Silence) => pending().await,
        _ => {
            client.write_all(&answer).await?;
            client.shutdown().await
        }
    }
}

/// Sends a request to the server and reads its whole answer.
async fn exchange(to: u16, request: &Request) -> io::Result<Vec<u8>> {
    let mut server = TcpStream::connect(("127.0.0.1", to)).await?;
    server.write_all(&request.closing()).await?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer).await?;
    Ok(answer)
}
