//! How long does a branch of a running database take, against the ways to branch that a file system offers?
//!
//! Each way begins at a source under pgbench and ends at the first row of a Postgres on the copy: Ebb's branch and wake,
//! through the proxy; a btrfs snapshot, which is atomic, so that the copy recovers as after a crash; and a copy by reflinks
//! on XFS, which is not, so that Postgres is told of a backup meanwhile (PostgreSQL 15, section 26.3.3). The file systems of
//! both rivals are in files, on the file system that Ebb's data is on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebb_measure::stats::{Samples, heading, report};
use serde_json::json;
use tokio_postgres::NoTls;

use crate::Common;
use crate::native::Native;
use crate::node::{Node, settings_of};
use crate::pgbench::{self, over_socket};
use crate::wake::first_row;

/// A way of a file system to copy a directory of a running cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Btrfs,
    Xfs,
}

/// A file system in a file, mounted. Unmounted when dropped.
struct Mounted {
    dir: PathBuf,
    _home: tempfile::TempDir,
}

impl Mounted {
    fn make(common: &Common, way: Way, gigabytes: u64) -> Result<Self> {
        let home = tempfile::Builder::new().prefix("ebb-rival-").tempdir_in(&common.dir)?;
        fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let image = home.path().join("image");
        fs::File::create(&image)?.set_len(gigabytes << 30)?;
        let dir = home.path().join("mnt");
        fs::create_dir(&dir)?;
        match way {
            Way::Btrfs => done(Command::new("mkfs.btrfs").arg("-q").arg(&image))?,
            Way::Xfs => done(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&image))?,
        }
        done(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&dir))?;
        Ok(Mounted { dir, _home: home })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = done(Command::new("umount").arg(&self.dir)) {
            eprintln!("cannot unmount {}: {error:#}", self.dir.display());
        }
    }
}

/// A cluster on such a file system, and its copies.
struct Rival {
    way: Way,
    settings: Vec<(String, String)>,
    source: Native,
    // Unmounted after the server has stopped.
    mounted: Mounted,
}

impl Rival {
    fn create(common: &Common, way: Way, settings: Vec<(String, String)>, scale: u32) -> Result<Self> {
        let mounted = Mounted::make(common, way, 4 + u64::from(scale) * 6 / 100)?;
        let home = mounted.dir.join("source");
        match way {
            Way::Btrfs => done(Command::new("btrfs").args(["-q", "subvolume", "create"]).arg(&home))?,
            Way::Xfs => fs::create_dir(&home)?,
        }
        let mut source = Native::create_in(common, settings.clone(), &home)?;
        source.start()?;
        pgbench::initialise(common, &over_socket(source.socket_dir(), "postgres"), scale)?;
        Ok(Rival { way, settings, source, mounted })
    }

    /// Copies, starts the copy and reads a row of it.
    async fn branch(&self, common: &Common, round: usize) -> Result<Duration> {
        let home = self.mounted.dir.join(format!("copy{round}"));
        let begun = Instant::now();
        match self.way {
            Way::Btrfs => {
                let mut command = Command::new("btrfs");
                command.args(["-q", "subvolume", "snapshot"]).arg(self.source.socket_dir()).arg(&home);
                done(&mut command)?;
            }
            Way::Xfs => self.copy_as_backup(&home).await?,
        }
        // The copy says that the source's server runs here.
        for file in ["data/postmaster.pid", ".s.PGSQL.5432.lock"] {
            fs::remove_file(home.join(file)).with_context(|| format!("the copy has no {file}"))?;
        }
        let mut copy = Native::at(common, self.settings.clone(), &home);
        copy.spawn()?;
        first_row(&conninfo(&home)).await?;
        let took = begun.elapsed();
        copy.stop()?;
        Ok(took)
    }

    async fn copy_as_backup(&self, home: &Path) -> Result<()> {
        let (client, connection) = tokio_postgres::connect(&conninfo(self.source.socket_dir()), NoTls).await?;
        let connection = tokio::spawn(connection);
        client.batch_execute("select pg_backup_start('copy', fast => true)").await?;
        done(Command::new("cp").args(["-a", "--reflink=always"]).arg(self.source.socket_dir()).arg(home))?;
        let label: String =
            client.query_one("select labelfile from pg_backup_stop(wait_for_archive => false)", &[]).await?.get(0);
        // Again, and last: recovery needs it up to the end of the backup.
        let wal = self.source.socket_dir().join("data/pg_wal");
        done(Command::new("cp").args(["-a", "--reflink=always"]).arg(wal).arg(home.join("data")))?;
        fs::write(home.join("data/backup_label"), label)?;
        done(Command::new("chown").arg("postgres").arg(home.join("data/backup_label")))?;
        drop(client);
        connection.await??;
        Ok(())
    }
}

/// Branches of each in turns, each source under load.
pub fn run(common: &Common) -> Result<()> {
    let rounds = common.rounds.unwrap_or(10);
    let scale = common.scale.unwrap_or(100);
    heading(
        "rival: from the wish for a branch to its first row, against a btrfs snapshot and a copy by XFS reflinks",
        &format!(
            "{rounds} rounds in turns, pgbench scale {scale} (about {} MB), every source under TPC-B at 200 tps",
            scale * 15
        ),
    );
    let node = Node::start(common)?;
    let socket = node.wake("prod")?;
    let settings = settings_of(&common.pg_bin, &socket)?;
    pgbench::initialise(common, &over_socket(&socket, "app"), scale)?;
    let btrfs = Rival::create(common, Way::Btrfs, settings.clone(), scale)?;
    let xfs = Rival::create(common, Way::Xfs, settings, scale)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut times: [Samples; 3] = Default::default();
    for round in 0..rounds {
        let load = Load::start(common, &over_socket(&socket, "app"))?;
        let begun = Instant::now();
        let name = format!("b{round}");
        node.post("/v1/projects/bench/branches", &json!({"name": name, "from": "bench/prod"}))?;
        runtime.block_on(first_row(&node.conninfo(&name)))?;
        times[0].add_time(begun.elapsed());
        node.suspend(&name)?;
        load.stop()?;
        for (side, rival) in [&btrfs, &xfs].into_iter().enumerate() {
            let load = Load::start(common, &over_socket(rival.source.socket_dir(), "postgres"))?;
            times[side + 1].add_time(runtime.block_on(rival.branch(common, round))?);
            load.stop()?;
        }
    }
    let [ours, snapshot, reflink] = times;
    report("branch to its first row, p50", "ms", ours.median(), "btrfs", snapshot.median(), "<= 1");
    report("branch to its first row, max", "ms", ours.max(), "btrfs", snapshot.max(), "-");
    report("branch to its first row, p50", "ms", ours.median(), "XFS", reflink.median(), "<= 1");
    report("branch to its first row, max", "ms", ours.max(), "XFS", reflink.max(), "-");
    Ok(())
}

/// pgbench in the background, at a rate that every side bears.
struct Load(Child);

impl Load {
    fn start(common: &Common, target: &[String]) -> Result<Self> {
        let mut command = Command::new(common.pg_bin.join("pgbench"));
        command.args(["-n", "-M", "prepared", "-T", "3600", "-c", "4", "-R", "200"]).args(target);
        let load = Load(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
        // So that the source is dirty as usual when the copy is made.
        std::thread::sleep(Duration::from_millis(700));
        Ok(load)
    }

    fn stop(mut self) -> Result<()> {
        ensure!(self.0.try_wait()?.is_none(), "pgbench ended before its time");
        done(Command::new("kill").args(["-INT", &self.0.id().to_string()]))?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = (self.0.kill(), self.0.wait());
    }
}

fn conninfo(socket_dir: &Path) -> String {
    format!("host={} user=postgres dbname=postgres", socket_dir.display())
}

fn done(command: &mut Command) -> Result<()> {
    let out = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {command:?}"))?;
    ensure!(out.status.success(), "{command:?}: {}", String::from_utf8_lossy(&out.stderr).trim());
    Ok(())
}
