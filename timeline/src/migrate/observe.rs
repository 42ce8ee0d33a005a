//! What a migration locks and writes, seen on a copy: by a second session that looks at its locks while it runs, and by
//! the transaction itself before it commits.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ebb_compute::postgres::{DATABASE, OWNER};
use parking_lot::Mutex;
use tokio_postgres::Transaction;

use super::{Session, lost};
use crate::Result;
use crate::deploy::{Lock, MigrationRun, NAMED_MAX, Rewritten, Touched};

/// How often locks are looked at.
const LOOK_EVERY: Duration = Duration::from_millis(4);

/// Weakest first (PostgreSQL 15, 13.3.1).
const MODES: &[&str] = &[
    "AccessShareLock",
    "RowShareLock",
    "RowExclusiveLock",
    "ShareUpdateExclusiveLock",
    "ShareLock",
    "ShareRowExclusiveLock",
    "ExclusiveLock",
    "AccessExclusiveLock",
];

/// Relations that are neither Postgres' own nor Ebb's.
const USERS: &str = "n.nspname !~ '^pg_' and n.nspname not in ('information_schema', 'ebb')";

/// For each relation and mode, since when it was held.
type Seen = Arc<Mutex<HashMap<(u32, String), Instant>>>;

/// A migration that is watched.
pub struct Watch {
    seen: Seen,
    looking: tokio::task::JoinHandle<()>,
    /// The files of tables before it began.
    files: HashMap<u32, u32>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.looking.abort();
    }
}

impl Watch {
    /// Begins to watch what a session does.
    pub async fn begin(session: &Session, socket: &Path) -> Result<Self> {
        let row = session.client.query_one("select pg_backend_pid()", &[]).await.map_err(lost)?;
        let pid: i32 = row.try_get(0).map_err(lost)?;
        let files = files(session).await?;
        let observer = Session::open_as(socket, OWNER, DATABASE, "ebb rehearsal").await?;
        let seen = Seen::default();
        let noted = seen.clone();
        let looking = tokio::spawn(async move {
            let sql = "select relation, mode from pg_locks where pid = $1 and granted and locktype = 'relation'";
            while let Ok(rows) = observer.client.query(sql, &[&pid]).await {
                let now = Instant::now();
                for row in rows {
                    if let (Ok(relation), Ok(mode)) = (row.try_get(0), row.try_get(1)) {
                        noted.lock().entry((relation, mode)).or_insert(now);
                    }
                }
                tokio::time::sleep(LOOK_EVERY).await;
            }
        });
        Ok(Self { seen, looking, files })
    }

    /// Notes what only the transaction itself can see: its locks, all of which it still holds, and the rows it wrote.
    pub async fn look_inside(
        &self,
        transaction: &Transaction<'_>,
        run: &mut MigrationRun,
    ) -> Result<(), tokio_postgres::Error> {
        let locks = format!(
            "select l.relation, c.oid::regclass::text, l.mode from pg_locks l join pg_class c on c.oid = l.relation \
             join pg_namespace n on n.oid = c.relnamespace \
             where l.pid = pg_backend_pid() and l.granted and l.locktype = 'relation' and {USERS}"
        );
        for row in transaction.query(&locks, &[]).await? {
            let (relation, name, mode): (u32, String, String) = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?);
            let since = self.seen.lock().get(&(relation, mode.clone())).copied();
            note(&mut run.locks, name, mode, since);
        }
        let rows = "select format('%I.%I', schemaname, relname), n_tup_ins, n_tup_upd, n_tup_del \
                    from pg_stat_xact_user_tables \
                    where n_tup_ins + n_tup_upd + n_tup_del > 0 and schemaname <> 'ebb' \
                    order by n_tup_ins + n_tup_upd + n_tup_del desc";
        for row in transaction.query(rows, &[]).await?.into_iter().take(NAMED_MAX) {
            let count = |at| row.try_get::<_, i64>(at).map(|count| u64::try_from(count).unwrap_or(0));
            let (inserted, updated, deleted) = (count(1)?, count(2)?, count(3)?);
            run.rows.push(Touched { table: row.try_get(0)?, inserted, updated, deleted });
        }
        Ok(())
    }

    /// Notes what can be seen after it has ended.
    pub async fn end(self, session: &Session, run: &mut MigrationRun) -> Result<()> {
        self.looking.abort();
        if run.locks.is_empty() {
            self.look_outside(session, run).await?;
        }
        run.locks.sort_by_key(|lock| std::cmp::Reverse((strength(&lock.mode), lock.held_ms)));
        run.locks.truncate(NAMED_MAX);
        let sql = format!(
            "select c.oid, c.relfilenode, c.oid::regclass::text, pg_relation_size(c.oid) \
             from pg_class c join pg_namespace n on n.oid = c.relnamespace where c.relkind in ('r', 'm') and {USERS}"
        );
        for row in session.client.query(&sql, &[]).await.map_err(lost)? {
            let (relation, file): (u32, u32) = (row.try_get(0).map_err(lost)?, row.try_get(1).map_err(lost)?);
            let is_other = self.files.get(&relation).is_some_and(|before| *before != file);
            if is_other && run.rewritten.len() < NAMED_MAX {
                let bytes = u64::try_from(row.try_get::<_, i64>(3).map_err(lost)?).unwrap_or(0);
                run.rewritten.push(Rewritten { table: row.try_get(2).map_err(lost)?, bytes });
            }
        }
        Ok(())
    }

    /// The locks of a statement that was no transaction of ours, as far as they were seen.
    async fn look_outside(&self, session: &Session, run: &mut MigrationRun) -> Result<()> {
        let seen: Vec<_> = self.seen.lock().iter().map(|(key, since)| (key.clone(), *since)).collect();
        let sql = format!(
            "select c.oid::regclass::text from pg_class c join pg_namespace n on n.oid = c.relnamespace \
             where c.oid = $1 and {USERS}"
        );
        for ((relation, mode), since) in seen {
            if let Some(row) = session.client.query_opt(&sql, &[&relation]).await.map_err(lost)? {
                note(&mut run.locks, row.try_get(0).map_err(lost)?, mode, Some(since));
            }
        }
        Ok(())
    }
}

/// Keeps the strongest lock of each relation.
fn note(locks: &mut Vec<Lock>, relation: String, mode: String, since: Option<Instant>) {
    let held_ms = since.map_or(0, |since| u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX));
    let lock = Lock { relation, mode, held_ms };
    match locks.iter_mut().find(|other| other.relation == lock.relation) {
        Some(other) if strength(&other.mode) >= strength(&lock.mode) => {}
        Some(other) => *other = lock,
        None => locks.push(lock),
    }
}

fn strength(mode: &str) -> usize {
    MODES.iter().position(|known| *known == mode).unwrap_or(MODES.len())
}

async fn files(session: &Session) -> Result<HashMap<u32, u32>> {
    let sql = "select oid, relfilenode from pg_class where relkind in ('r', 'm')";
    let rows = session.client.query(sql, &[]).await.map_err(lost)?;
    rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect::<Result<_, _>>().map_err(lost)
}
