//! How long does it take to have a database back, and what do thirty days of it weigh, against pgBackRest?
//!
//! Both keep what they keep in a directory on the same disk. A day updates one account in a hundred, spread evenly: the
//! worst case for whoever stores pages. Expected beforehand: a restore that reads pages when they are asked for does not
//! depend on size; stored bytes are alike, as both compress the pages that changed (pgBackRest with its block incrementals
//! off, as Debian's version has none).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ebb_measure::stats::{Samples, heading, report};
use ebb_measure::wait_for;
use serde_json::json;

use crate::Common;
use crate::native::Native;
use crate::node::{Node, settings_of};
use crate::pgbench::{self, over_socket, psql};

const DAYS: usize = 30;
const PROBE: &str = "select sum(abalance) from pgbench_accounts where aid < 1000";
const STANZA: &str = "bench";

/// Restores of a cluster of two sizes, and thirty days of a changing one.
pub fn run(common: &Common) -> Result<()> {
    let rounds = common.rounds.unwrap_or(3);
    let scale = common.scale.unwrap_or(100);
    heading(
        "backup: a restore to its first row, and what thirty days weigh, against pgBackRest",
        &format!(
            "{rounds} restores of each size in turns, pgbench scale {scale} and {}; {DAYS} days on the smaller",
            scale / 10
        ),
    );
    for scale in [scale, (scale / 10).max(1)] {
        let mut sides = Sides::start(common, scale)?;
        sides.checkpoint("full", true)?;
        let (mut ebb, mut peer) = (Samples::default(), Samples::default());
        for round in 0..rounds {
            ebb.add_time(sides.restore_ebb(round)?);
            peer.add_time(sides.restore_peer(round)?);
        }
        report(
            &format!("restore of {} MB to its first row, p50", scale * 15),
            "ms",
            ebb.median(),
            "pgBackRest",
            peer.median(),
            "<= 1",
        );
        if scale < common.scale.unwrap_or(100) {
            sides.days(scale)?;
        }
    }
    Ok(())
}

/// A branch, and a plain cluster that pgBackRest backs up; the same data in both.
struct Sides {
    common: Common,
    node: Node,
    socket: PathBuf,
    native: Native,
    settings: Vec<(String, String)>,
    repository: tempfile::TempDir,
    made: usize,
}

impl Sides {
    fn start(common: &Common, scale: u32) -> Result<Self> {
        let node = Node::start(common)?;
        let socket = node.wake("prod")?;
        let repository = tempfile::Builder::new().prefix("ebb-pgbackrest-").tempdir_in(&common.dir)?;
        chown(repository.path())?;
        let mut settings = settings_of(&common.pg_bin, &socket)?;
        let config = repository.path().join("pgbackrest.conf");
        settings.push(("archive_mode".to_owned(), "on".to_owned()));
        let archive = format!("pgbackrest --config={} --stanza={STANZA} archive-push %p", config.display());
        settings.push(("archive_command".to_owned(), archive));
        let mut native = Native::create(common, settings.clone())?;
        let text = format!(
            "[global]\nrepo1-path={0}/repo\nlog-path={0}/log\nspool-path={0}/spool\nlock-path={0}/lock\ncompress-type=zst\n\
             process-max=2\nstart-fast=y\nlog-level-console=off\n\n[{STANZA}]\npg1-path={1}\npg1-socket-path={2}\npg1-user=postgres\n",
            repository.path().display(),
            native.data().display(),
            native.socket_dir().display(),
        );
        fs::write(&config, text)?;
        native.start()?;
        pgbench::initialise(common, &over_socket(&socket, "app"), scale)?;
        pgbench::initialise(common, &over_socket(native.socket_dir(), "postgres"), scale)?;
        let sides = Self { common: common.clone(), node, socket, native, settings, repository, made: 0 };
        sides.pgbackrest(&["stanza-create"])?;
        Ok(sides)
    }

    fn pgbackrest(&self, args: &[&str]) -> Result<()> {
        let config = self.repository.path().join("pgbackrest.conf");
        let out = Command::new("setpriv")
            .args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "pgbackrest"])
            .arg(format!("--config={}", config.display()))
            .arg(format!("--stanza={STANZA}"))
            .args(args)
            .stdin(Stdio::null())
            .output()?;
        ensure!(out.status.success(), "pgbackrest {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        Ok(())
    }

    /// A checkpoint on one side, a backup on the other.
    fn checkpoint(&mut self, name: &str, full: bool) -> Result<()> {
        self.node.post("/v1/projects/bench/branches/prod/checkpoints", &json!({"name": name}))?;
        self.made += 1;
        self.pgbackrest(&["backup", if full { "--type=full" } else { "--type=incr" }])
    }

    fn restore_ebb(&self, round: usize) -> Result<Duration> {
        let begun = Instant::now();
        let name = format!("restored-{round}");
        self.node.post("/v1/projects/bench/branches", &json!({"name": name, "from": "bench/prod@full"}))?;
        let socket = self.node.wake(&name)?;
        psql(&self.common, &over_socket(&socket, "app"), PROBE)?;
        let took = begun.elapsed();
        self.node.suspend(&name)?;
        Ok(took)
    }

    fn restore_peer(&self, round: usize) -> Result<Duration> {
        let dir = tempfile::Builder::new().prefix(&format!("ebb-restored-{round}-")).tempdir_in(&self.common.dir)?;
        chown(dir.path())?;
        let begun = Instant::now();
        let data = dir.path().join("data");
        self.pgbackrest(&[
            "restore",
            &format!("--pg1-path={}", data.display()),
            "--type=immediate",
            "--target-action=promote",
        ])?;
        // What a server that replays must have as much of as its source had; and its WAL is its own.
        let settings = [&self.settings[..], &[("archive_mode".to_owned(), "off".to_owned())]].concat();
        let mut restored = Native::at(&self.common, settings, dir.path());
        restored.start()?;
        psql(&self.common, &over_socket(restored.socket_dir(), "postgres"), PROBE)?;
        let took = begun.elapsed();
        restored.stop()?;
        Ok(took)
    }

    fn days(&mut self, scale: u32) -> Result<()> {
        let before = self.stored()?;
        for day in 0..DAYS {
            let sql = format!("update pgbench_accounts set abalance = abalance + 1 where aid % 100 = {day}");
            psql(&self.common, &over_socket(&self.socket, "app"), &sql)?;
            psql(&self.common, &over_socket(self.native.socket_dir(), "postgres"), &sql)?;
            self.checkpoint(&format!("day-{day}"), false)?;
        }
        let after = self.stored()?;
        let unit = 1e6;
        report(
            &format!("first backup of {} MB", scale * 15),
            "MB",
            before.0 / unit,
            "pgBackRest",
            before.1 / unit,
            "-",
        );
        report(
            &format!("{DAYS} more, of a changing hundredth"),
            "MB",
            (after.0 - before.0) / unit,
            "pgBackRest",
            (after.1 - before.1) / unit,
            "<= 1",
        );
        Ok(())
    }

    /// Bytes that either side has stored, WAL with them, once Ebb has uploaded all its layers.
    fn stored(&self) -> Result<(f64, f64)> {
        let metrics = || self.node.text("/metrics").unwrap_or_default();
        let pending = |text: &str| {
            text.lines().find_map(|line| line.strip_prefix("ebb_timeline_uploads_pending ")?.parse::<f64>().ok())
        };
        wait_for("the uploads", || {
            let uploaded = fs::read_dir(self.node.data.join("bucket/layers")).map_or(0, |layers| layers.count());
            pending(&metrics()) == Some(0.0) && uploaded > self.made
        })?;
        Ok((bytes_below(&self.node.data.join("bucket"))?, bytes_below(&self.repository.path().join("repo"))?))
    }
}

fn chown(dir: &Path) -> Result<()> {
    let status = Command::new("chown").arg("postgres").arg(dir).status()?;
    ensure!(status.success(), "chown failed");
    Ok(())
}

fn bytes_below(dir: &Path) -> Result<f64> {
    let out = Command::new("du").args(["-sb"]).arg(dir).output()?;
    let text = String::from_utf8(out.stdout)?;
    Ok(text.split_whitespace().next().context("du says nothing")?.parse()?)
}
