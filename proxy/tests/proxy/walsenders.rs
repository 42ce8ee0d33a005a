//! Replication connections, physical and logical: Postgres' own programs, and the copy in both directions by hand.

use std::path::Path;
use std::process::Command;

use crate::harness::{ENDPOINT, Ebb, PASSWORD, until, value};
use crate::wire::{Wire, connect, message, query, startup};

/// A compute that decodes WAL, and lets `app` replicate.
async fn ready_to_replicate() -> Ebb {
    let ebb = Ebb::asleep().await;
    let client = ebb.connect().await;
    let superuser = ebb.world.superuser().await.unwrap();
    superuser.batch_execute("ALTER ROLE app REPLICATION").await.unwrap();
    superuser.batch_execute("ALTER SYSTEM SET wal_level = 'logical'").await.unwrap();
    client.batch_execute("CREATE TABLE t (a int); INSERT INTO t SELECT generate_series(1, 10000)").await.unwrap();
    drop((client, superuser));
    ebb.suspend_when_idle().await;
    ebb
}

/// Runs one of Postgres' programs against the proxy; answers what it wrote.
async fn program(ebb: &Ebb, name: &str, arguments: &[&str]) -> String {
    let conninfo = format!(
        "hostaddr=127.0.0.1 port={} user=app password={PASSWORD} dbname=app options=endpoint={ENDPOINT}",
        ebb.addr.port()
    );
    let mut command = Command::new(Path::new("/usr/lib/postgresql/15/bin").join(name));
    command.arg("--no-password").arg("-d").arg(conninfo).args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_base_backup_with_its_wal_is_taken_through_the_proxy() {
    let ebb = ready_to_replicate().await;
    let dir = tempfile::tempdir().unwrap();
    let backup = dir.path().join("backup");
    let path = backup.to_str().unwrap();
    // Over TLS, as libpq prefers, with its WAL by a second connection beside.
    program(&ebb, "pg_basebackup", &["-D", path, "--wal-method=stream", "--checkpoint=fast", "--no-sync"]).await;
    let verified = Command::new("/usr/lib/postgresql/15/bin/pg_verifybackup").arg(&backup).output().unwrap();
    assert!(verified.status.success(), "{}", String::from_utf8_lossy(&verified.stderr));
    until("its sessions have left", || async { ebb.states().is_empty() }).await;
    assert_eq!(ebb.wakes(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_are_decoded_through_the_proxy() {
    let ebb = ready_to_replicate().await;
    program(&ebb, "pg_recvlogical", &["--slot=s", "--create-slot", "--plugin=test_decoding"]).await;
    let client = ebb.connect().await;
    client.batch_execute("INSERT INTO t VALUES (-1); DELETE FROM t WHERE a = 7").await.unwrap();
    let end = format!("--endpos={}", value(&client, "SELECT pg_current_wal_lsn()::text").await);
    // Something behind it, so that the end is reached.
    client.batch_execute("INSERT INTO t VALUES (-2)").await.unwrap();
    let arguments =
        ["--slot=s", "--start", "--no-loop", "--file=-", "--fsync-interval=0", &end, "-o", "skip-empty-xacts=1"];
    let changes = program(&ebb, "pg_recvlogical", &arguments).await;
    assert!(changes.contains("table public.t: INSERT: a[integer]:-1\n"), "{changes}");
    assert!(changes.contains("table public.t: DELETE: (no-tuple-data)\n"), "{changes}");
    assert!(!changes.contains("a[integer]:-2"), "{changes}");
    program(&ebb, "pg_recvlogical", &["--slot=s", "--drop-slot"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wal_is_received_through_the_proxy() {
    let ebb = ready_to_replicate().await;
    let client = ebb.connect().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    program(&ebb, "pg_receivewal", &["--slot=s", "--create-slot"]).await;
    client.batch_execute("INSERT INTO t SELECT generate_series(1, 100000)").await.unwrap();
    let end = value(&client, "SELECT pg_current_wal_lsn()::text").await;
    client.batch_execute("INSERT INTO t VALUES (-2)").await.unwrap();
    program(&ebb, "pg_receivewal", &["-D", path, "--slot=s", "--no-loop", "--no-sync", &format!("--endpos={end}")])
        .await;
    let received: u64 =
        std::fs::read_dir(dir.path()).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!(received >= 16 << 20, "a segment at least, not {received} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_in_both_directions_is_ended_by_the_client() {
    let ebb = ready_to_replicate().await;
    let mut wire = Wire::start(connect(&ebb).await, &startup(0, &[("replication", "database")])).await;
    assert_eq!(wire.ask(&query("IDENTIFY_SYSTEM")).await.0, "TDCZ");
    let (tags, _) = wire.ask(&query("CREATE_REPLICATION_SLOT s TEMPORARY LOGICAL test_decoding")).await;
    assert_eq!(tags, "TDCZ");
    wire.write(&query("START_REPLICATION SLOT s LOGICAL 0/0")).await;
    assert_eq!(wire.read().await.0, b'W');
    // A status that asks for an answer; and the end, byte by byte.
    let status = [&b"r"[..], &[0; 32], &[1]].concat();
    wire.write_in_pieces(&message(b'd', &status), 1).await;
    assert_eq!(wire.read_until(b'd').await.pop().unwrap().1[0], b'k');
    wire.write_in_pieces(&message(b'c', b""), 1).await;
    let tags: String = wire.read_until(b'Z').await.iter().map(|(tag, _)| char::from(*tag)).collect();
    assert_eq!(tags.replace('d', ""), "cCCZ");
    // Queries are answered after it.
    assert_eq!(wire.ask(&query("SELECT count(*) FROM t")).await.0, "TDCZ");
}
