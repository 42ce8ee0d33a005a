//! Rows of which the position and the time of their commits are known.

use std::ops::RangeInclusive;

use tokio_postgres::Client;

/// A row as its writer knows it.
#[derive(Debug)]
pub struct Written {
    /// Its number.
    pub n: i64,
    /// The position after its commit.
    pub lsn: String,
    /// The server's time of it.
    pub at: String,
}

/// Commits numbered rows to table `history`, one by one, and learns after each where and when that was.
pub async fn write_history(client: &Client, rows: RangeInclusive<i64>) -> Vec<Written> {
    let mut written = Vec::new();
    for n in rows {
        client.execute("insert into history values ($1)", &[&n]).await.expect("a row can be written");
        // The flush position of a synchronous commit: nobody else writes.
        let row = client
            .query_one(
                "select pg_current_wal_flush_lsn()::text, \
                 to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')",
                &[],
            )
            .await
            .expect("positions can be read");
        written.push(Written { n, lsn: row.get(0), at: row.get(1) });
    }
    written
}
