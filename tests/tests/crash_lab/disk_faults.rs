//! The disk is full, or cannot sync: clients are told, and what they were told stays true.

use ebb_test_disk::{Fault, On};
use ebb_tests::{Writer, wait_until, within};
use rustix::io::Errno;

use crate::lab::{self, BRANCH, Run};
use crate::power::Machine;

fn checkpoint(machine: &Machine) -> bool {
    machine.node.superuser_tool(BRANCH, "psql", &["-XAtqd", "app", "-c", "checkpoint"]).code == 0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_to_clients_and_nothing_acknowledged_is_lost() {
    let seed = lab::seed();
    let mut machine = Machine::new(seed);
    let mut run = Run::new(&machine.node, seed, 1);
    machine.node.psql(BRANCH, "create table filler (t text)");
    machine.node.psql(BRANCH, "alter table filler alter t set storage external");
    let writer = Writer::start(machine.node.url(BRANCH)).await;
    writer.progress(20).await;
    let room = |machine: &Machine, bytes: u64| machine.disk.set_capacity(Some(machine.disk.used() + bytes));
    for round in 0..=1 {
        room(&machine, 24 << 20);
        run.round(round);
        run.step("a full disk");
        let client = within("a client to connect", machine.node.connect(BRANCH)).await;
        let (mut rows, insert) = (0, "insert into filler select repeat('x', 100000) from generate_series(1, 20)");
        let error = loop {
            match within("rows to be taken or refused", client.batch_execute(insert)).await {
                Ok(()) => rows += 20,
                Err(error) => break error,
            }
            assert!(rows < 2000, "the disk is full, and nobody says so");
        };
        // Out of room for data Postgres says so; out of room for WAL it cannot go on, and the connection ends.
        let told = error.as_db_error().map(|db| db.code().code().to_owned());
        println!("after {rows} rows of 100 kB: {}", told.as_deref().unwrap_or("the connection ended"));
        assert!(
            told.as_deref().is_none_or(|code| ["53100", "57P01", "57P02", "57P03", "08006"].contains(&code)),
            "{error:?}"
        );
        run.step("a disk with room again");
        machine.disk.set_capacity(None);
        writer.progress(20).await;
        if round == 0 {
            machine.cut_power();
            writer.progress(20).await;
        }
        let there: i64 = machine.node.psql(BRANCH, "select count(*) from filler").parse().expect("a number");
        assert!(there >= rows, "{there} of {rows} acknowledged rows");
        machine.node.psql(BRANCH, "truncate filler");
    }
    let (last, _) = writer.stop().await;
    lab::assert_all_there(&machine.node, last);
    lab::assert_sound(&machine.node);
    lab::assert_checksums(&machine.node);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_cannot_sync_loses_nothing_acknowledged() {
    let seed = lab::seed();
    let mut machine = Machine::new(seed);
    let mut run = Run::new(&machine.node, seed, 2);
    let ran = machine.node.tool("pgbench", &["-i", "-q", "-s", "1", &machine.node.url(BRANCH)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let writer = Writer::start(machine.node.url(BRANCH)).await;
    // WAL, data files of the volume, its journal: each fails once, under load.
    for (round, path_has) in ["/wal/", "/data/", "/journal"].into_iter().enumerate() {
        run.round(round as u64);
        run.step("work");
        writer.progress(20).await;
        machine.node.psql(BRANCH, &format!("create table made{round} as select 1 as n"));
        machine.node.psql(BRANCH, "update pgbench_accounts set filler = 'x' where aid % 10 = 0");
        machine.disk.fail(Fault { on: On::Sync, path_has: path_has.to_owned(), errno: Errno::IO, times: 1 });
        run.step("a sync that fails");
        // Postgres finds out at the latest when it writes a checkpoint, ends at once, and is started anew.
        let _ = checkpoint(&machine);
        wait_until("the disk to have failed", || std::future::ready(machine.disk.failed() > 0)).await;
        run.step("a disk that is mended");
        machine.disk.mend();
        writer.progress(20).await;
        assert!(checkpoint(&machine), "after a failure of {path_has} everything works again");
        let last = writer.last();
        run.step("power cut");
        machine.cut_power();
        writer.progress(20).await;
        run.step("a look at every page");
        lab::assert_all_there(&machine.node, last);
        lab::assert_sound(&machine.node);
    }
    let (last, _) = writer.stop().await;
    lab::assert_all_there(&machine.node, last);
    lab::assert_checksums(&machine.node);
}
