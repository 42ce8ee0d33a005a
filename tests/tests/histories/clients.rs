//! The clients: each goes in by any node's door, and writes down what it sent and what it was told.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio_postgres::{Client, NoTls};

use crate::checker::{Append, Read};

/// LIMIT: a client that waits longer gives up, and counts what it sent as unknown. A node is taken over sooner.
const PATIENCE: Duration = Duration::from_secs(20);

/// LIMIT: clients go on after any fault: the record of a lost node expires, another takes over, and recovers.
const PROGRESS_WITHIN: Duration = Duration::from_secs(120);

/// The money.
pub struct Accounts;

impl Accounts {
    pub const COUNT: i64 = 8;
    pub const TOTAL: i64 = Self::COUNT * 100;
}

/// Where clients go in, and what they saw.
#[derive(Debug)]
pub struct Recorder {
    doors: Vec<String>,
    begun: Instant,
    stop: AtomicBool,
    next: AtomicU64,
    acknowledged: AtomicU64,
    transfers: AtomicU64,
    appends: Mutex<Vec<Append>>,
    reads: Mutex<Vec<Read>>,
}

impl Recorder {
    pub fn new(doors: Vec<String>) -> Self {
        Self {
            doors,
            begun: Instant::now(),
            stop: AtomicBool::new(false),
            next: AtomicU64::new(1),
            acknowledged: AtomicU64::new(0),
            transfers: AtomicU64::new(0),
            appends: Mutex::default(),
            reads: Mutex::default(),
        }
    }

    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }

    pub fn transfers(&self) -> u64 {
        self.transfers.load(Ordering::SeqCst)
    }

    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    pub fn take(&self) -> (Vec<Append>, Vec<Read>) {
        (
            std::mem::take(&mut self.appends.lock().expect("no client panics")),
            std::mem::take(&mut self.reads.lock().expect("no client panics")),
        )
    }

    /// Waits until so much was acknowledged; `false` if clients are stuck.
    pub async fn progress(&self, wanted: u64) -> bool {
        let deadline = Instant::now() + PROGRESS_WITHIN;
        while self.acknowledged() < wanted && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.acknowledged() >= wanted
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).expect("a run is short")
    }

    /// Appends and reads until told to stop.
    pub async fn append(self: Arc<Self>, client: u64, lists: i64, seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed ^ (client + 1));
        while !self.stop.load(Ordering::SeqCst) {
            let Some(session) = self.connect(&mut rng).await else { continue };
            while !self.stop.load(Ordering::SeqCst) {
                let list = rng.random_range(0..lists);
                let went_well = match rng.random_bool(0.5) {
                    true => self.append_one(&session, list).await,
                    false => self.read_one(&session, list).await,
                };
                if !went_well || rng.random_bool(0.02) {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..20))).await;
            }
        }
    }

    async fn append_one(&self, session: &Client, list: i64) -> bool {
        let value = i64::try_from(self.next.fetch_add(1, Ordering::SeqCst)).expect("a run is short");
        let begun = self.now();
        let sql = "update lists set items = items || $1::bigint where list = $2";
        let told = tokio::time::timeout(PATIENCE, session.execute(sql, &[&value, &list])).await;
        let done = matches!(told, Ok(Ok(1)));
        let acknowledged = done.then(|| self.now());
        self.appends.lock().expect("no client panics").push(Append { list, value, begun, acknowledged });
        self.acknowledged.fetch_add(u64::from(done), Ordering::SeqCst);
        done
    }

    async fn read_one(&self, session: &Client, list: i64) -> bool {
        let begun = self.now();
        let sql = "select items from lists where list = $1";
        let told = tokio::time::timeout(PATIENCE, session.query_one(sql, &[&list])).await;
        let Ok(Ok(row)) = told else { return false };
        self.reads.lock().expect("no client panics").push(Read { list, values: row.get(0), begun });
        true
    }

    /// Moves money and counts it until told to stop: there is never more or less of it.
    pub async fn transfer(self: Arc<Self>, client: u64, seed: u64) {
        let mut rng = StdRng::seed_from_u64(seed ^ (client + 1000));
        while !self.stop.load(Ordering::SeqCst) {
            let Some(session) = self.connect(&mut rng).await else { continue };
            while !self.stop.load(Ordering::SeqCst) {
                let (from, to) = (rng.random_range(0..Accounts::COUNT), rng.random_range(0..Accounts::COUNT));
                let sql = format!(
                    "begin isolation level repeatable read; \
                     update accounts set money = money - 1 where account = {from}; \
                     update accounts set money = money + 1 where account = {to}; commit"
                );
                let moved = tokio::time::timeout(PATIENCE, session.batch_execute(&sql)).await;
                // Two that move the same account's money at once: one of them is told to try again.
                let clashed =
                    matches!(&moved, Ok(Err(error)) if error.code().is_some_and(|code| code.code() == "40001"));
                if clashed && session.batch_execute("rollback").await.is_ok() {
                    continue;
                }
                if !matches!(moved, Ok(Ok(()))) {
                    break;
                }
                self.transfers.fetch_add(1, Ordering::SeqCst);
                let counted = session.query_one("select sum(money)::bigint from accounts", &[]);
                let Ok(Ok(row)) = tokio::time::timeout(PATIENCE, counted).await else { break };
                assert_eq!(row.get::<_, i64>(0), Accounts::TOTAL, "money was made or lost");
                tokio::time::sleep(Duration::from_millis(rng.random_range(0..40))).await;
            }
        }
    }

    /// By any door; closed ones are tried again.
    async fn connect(&self, rng: &mut StdRng) -> Option<Client> {
        let door = &self.doors[rng.random_range(0..self.doors.len())];
        let connected = tokio::time::timeout(PATIENCE, tokio_postgres::connect(door, NoTls)).await;
        let Ok(Ok((client, connection))) = connected else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            return None;
        };
        tokio::spawn(connection);
        Some(client)
    }
}

/// Lists as the judge reads them in the end.
pub type Finals = BTreeMap<i64, Vec<i64>>;
