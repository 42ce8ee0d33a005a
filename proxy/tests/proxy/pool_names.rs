//! What clients in transaction mode are answered to random batches, message by message, against what Postgres answers each
//! of them directly.

use std::fmt::Write as _;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::harness::{ENDPOINT, Ebb, PATIENCE};
use crate::raw::{Session, packet};

/// Small and repeatable (xorshift64*).
struct Lots(u64);

impl Lots {
    fn draw(&mut self, below: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % below
    }

    fn of<'a>(&mut self, choices: &[&'a str]) -> &'a str {
        choices[self.draw(choices.len())]
    }
}

/// A connection that is told bytes and answers messages.
struct Talk<S> {
    stream: S,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Talk<S> {
    async fn tell(&mut self, bytes: &[u8], turns: usize) -> Vec<String> {
        let talking = async {
            self.stream.write_all(bytes).await.unwrap();
            let (mut answers, mut left) = (Vec::new(), turns);
            while left > 0 {
                let tag = self.stream.read_u8().await.unwrap();
                let mut body = vec![0; self.stream.read_u32().await.unwrap() as usize - 4];
                self.stream.read_exact(&mut body).await.unwrap();
                left -= usize::from(tag == b'Z');
                answers.push(format!("{} {}", tag as char, without_place(tag, &body)));
            }
            answers
        };
        tokio::time::timeout(PATIENCE, talking).await.expect("an answer comes")
    }
}

/// Which message of its own batch Postgres was at when it refused shows in the place in its source that an error names (a
/// statement that has to be prepared first is refused there). Code and text are the same.
fn without_place(tag: u8, body: &[u8]) -> String {
    let fields = String::from_utf8_lossy(body).into_owned();
    if tag != b'E' {
        return fields;
    }
    fields.split('\0').filter(|field| !field.starts_with(['F', 'L', 'R'])).collect::<Vec<_>>().join("\0")
}

async fn directly(ebb: &Ebb) -> Talk<UnixStream> {
    let mut stream = UnixStream::connect(ebb.world.socket()).await.unwrap();
    stream.write_all(&packet(3 << 16, b"user\0app\0database\0app\0\0")).await.unwrap();
    let mut talk = Talk { stream };
    talk.tell(b"", 1).await;
    talk
}

const NAMES: [&str; 4] = ["", "a", "b", "S_1"];
const TEXTS: [&str; 7] = [
    "SELECT 1 AS one",
    "SELECT 'two'",
    "SELECT broken",
    "SELEC",
    "SELECT 1 / (now() IS NULL)::int",
    "",
    "SELECT n FROM generate_series(1, 3) n",
];
const QUERIES: [&str; 9] = [
    "SELECT 'simple'",
    "SELECT broken",
    "BEGIN",
    "BEGIN",
    "COMMIT",
    "ROLLBACK",
    "DEALLOCATE a",
    "DEALLOCATE ALL",
    "SELECT 1; SELECT 2",
];

fn message(out: &mut Vec<u8>, tag: u8, body: &[&[u8]]) {
    let body = body.concat();
    out.push(tag);
    out.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
    out.extend_from_slice(&body);
}

/// One turn or some that are sent at once: bytes, how many `ReadyForQuery` they ask for, and what to show of it.
fn batch(lots: &mut Lots) -> (Vec<u8>, usize, String) {
    let (mut out, mut told) = (Vec::new(), String::new());
    let turns = 1 + lots.draw(3);
    for _ in 0..turns {
        if lots.draw(3) == 0 {
            let text = lots.of(&QUERIES);
            message(&mut out, b'Q', &[text.as_bytes(), b"\0"]);
            let _ = write!(told, "Q({text}) ");
            continue;
        }
        let mut unnamed = false;
        for _ in 0..1 + lots.draw(6) {
            let name = lots.of(&NAMES);
            let body = [name.as_bytes(), b"\0"].concat();
            match lots.draw(7) {
                0 | 1 => {
                    let text = lots.of(&TEXTS);
                    message(&mut out, b'P', &[&body, text.as_bytes(), b"\0\0\0"]);
                    let _ = write!(told, "P({name}: {text}) ");
                    unnamed |= name.is_empty();
                }
                // The unnamed statement, once skipped, is another matter: see the documentation.
                2..=4 if name.is_empty() && !unnamed => {}
                2 | 3 => {
                    message(&mut out, b'B', &[b"\0", &body, &[0; 6]]);
                    message(&mut out, b'E', &[&[0; 5]]);
                    let _ = write!(told, "BE({name}) ");
                }
                4 => {
                    message(&mut out, b'D', &[b"S", &body]);
                    let _ = write!(told, "D({name}) ");
                }
                5 => {
                    message(&mut out, b'C', &[b"S", &body]);
                    let _ = write!(told, "C({name}) ");
                }
                _ => message(&mut out, b'H', &[]),
            }
        }
        message(&mut out, b'S', &[]);
        told.push_str("S ");
    }
    (out, turns, told)
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_through_a_pool_are_those_of_postgres() {
    let seed = std::env::var("EBB_TEST_SEED").map_or_else(|_| rand::random::<u64>() | 1, |seed| seed.parse().unwrap());
    println!("EBB_TEST_SEED={seed}");
    let cases = std::env::var("EBB_TEST_CASES").map_or(1500, |cases| cases.parse().unwrap());
    let mut lots = Lots(seed);
    let ebb = Ebb::with(|config| config.pool_size = Some(2)).await;
    let pooler = format!("{ENDPOINT}-pooler");
    let holder = ebb.connect_pooled().await;
    let mut pooled = Vec::new();
    let mut direct = Vec::new();
    for _ in 0..2 {
        pooled.push(Talk { stream: Session::open_at(&ebb, &pooler).await.into_stream() });
        direct.push(directly(&ebb).await);
    }
    let mut open = [false; 2];
    let mut history = Vec::new();
    for case in 0..cases {
        let who = lots.draw(2);
        // A third client turns the backends round; but two transactions fill the pool.
        let turns_round = lots.draw(2) == 0 && !open.iter().any(|open| *open);
        if turns_round {
            holder.batch_execute("BEGIN").await.unwrap();
        }
        let (bytes, turns, told) = batch(&mut lots);
        history.push(format!("{who}: {told}"));
        let seen = pooled[who].tell(&bytes, turns).await;
        let expect = direct[who].tell(&bytes, turns).await;
        let recent = &history[history.len().saturating_sub(8)..];
        assert_eq!(seen, expect, "case {case} of seed {seed}: {recent:#?}");
        open[who] = expect.last().is_some_and(|last| last != "Z I");
        if turns_round {
            holder.batch_execute("COMMIT").await.unwrap();
        }
    }
}
