//! A client that writes numbered rows and remembers which of them were acknowledged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_postgres::{Client, NoTls};

use crate::within;

/// Writes rows 1, 2, 3 … into table `acknowledged`, each in its own transaction, connecting again whenever it must.
#[derive(Debug)]
pub struct Writer {
    stop: Arc<AtomicBool>,
    last: Arc<AtomicI64>,
    task: JoinHandle<Vec<String>>,
}

impl Writer {
    /// Makes the table and begins.
    pub async fn start(url: String) -> Self {
        Self::start_after(url, 0).await
    }

    /// Goes on after a row that another writer was told is there.
    pub async fn start_after(url: String, row: i64) -> Self {
        let client = within("a writer to connect", open(&url)).await.expect("a writer can connect");
        let made = client.batch_execute("create table if not exists acknowledged (n bigint primary key)");
        within("a writer to make its table", made).await.expect("a writer can make its table");
        let (stop, last) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(row)));
        let task = tokio::spawn(write(url, client, stop.clone(), last.clone()));
        Self { stop, last, task }
    }

    /// The highest row that was acknowledged so far.
    pub fn last(&self) -> i64 {
        self.last.load(Ordering::SeqCst)
    }

    /// Waits until `rows` more rows have been acknowledged.
    pub async fn progress(&self, rows: i64) {
        let goal = self.last() + rows;
        crate::wait_until("the writer to get on", || async { self.last() >= goal }).await;
    }

    /// Stops; answers the highest acknowledged row, and the errors it was given on the way.
    pub async fn stop(self) -> (i64, Vec<String>) {
        self.stop.store(true, Ordering::SeqCst);
        let errors = within("the writer to stop", self.task).await.expect("a writer does not panic");
        (self.last.load(Ordering::SeqCst), errors)
    }
}

async fn open(url: &str) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(client)
}

async fn write(url: String, mut client: Client, stop: Arc<AtomicBool>, last: Arc<AtomicI64>) -> Vec<String> {
    let mut errors = Vec::new();
    let mut n = last.load(Ordering::SeqCst) + 1;
    while !stop.load(Ordering::SeqCst) {
        // A row whose acknowledgement was lost may be there already: writing it again is no fault.
        let insert = "insert into acknowledged values ($1) on conflict do nothing";
        match client.execute(insert, &[&n]).await {
            Ok(_) => {
                last.store(n, Ordering::SeqCst);
                n += 1;
            }
            Err(error) => {
                let told = error.as_db_error().map(|db| format!("{} {}", db.code().code(), db.message()));
                errors.push(told.unwrap_or_else(|| error.to_string()));
                if client.is_closed() {
                    match open(&url).await {
                        Ok(fresh) => client = fresh,
                        Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
                    }
                }
            }
        }
    }
    errors
}
