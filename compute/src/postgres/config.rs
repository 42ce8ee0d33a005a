//! The configuration a branch's Postgres runs with: every setting that differs from stock, and why.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

use crate::control::Durability;
use crate::manager::{Recovery, Until};
use crate::shipper::STANDBY;

/// The port in the socket's name; nothing listens on the network.
pub(crate) const PORT: u16 = 5432;

/// Who may log in: everybody who reaches the socket, which is only Ebb. Clients prove their passwords to the proxy.
pub(crate) const HBA: &str = "\
# Written at each start. The socket's directory is private to Ebb; clients are authenticated by the proxy.
local  all          all       trust
local  replication  postgres  trust
";

/// How often a server that stays at a moment looks for more WAL, of which there is none.
const STANDBY_LOOKS_AGAIN: &str = "1h";

/// What a configuration depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Surroundings<'a> {
    /// Shown by `ps` and in `cluster_name`.
    pub name: &'a str,
    /// Where the socket is, as Postgres sees it.
    pub run: &'a Path,
    /// Where configuration and hba file are, which it only reads.
    pub conf: &'a Path,
    /// What commits wait for, where WAL is shipped.
    pub shipped: Option<Durability>,
}

/// One setting.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    name: &'static str,
    value: String,
    /// Also given on the command line, where neither `ALTER SYSTEM` nor a branch's own settings can change it.
    fixed: bool,
    why: &'static str,
}

fn settings(at: &Surroundings<'_>) -> Vec<Setting> {
    let fixed = |name, value: &str, why| Setting { name, value: value.to_owned(), fixed: true, why };
    let usual = |name, value: &str, why| Setting { name, value: value.to_owned(), fixed: false, why };
    let run = at.run.display().to_string();
    vec![
        fixed("listen_addresses", "", "No TCP: the proxy is the only way in."),
        fixed("port", &PORT.to_string(), "Part of the socket's name."),
        fixed("unix_socket_directories", &run, "A directory that only this branch's Postgres and Ebb see."),
        fixed("unix_socket_permissions", "0700", "For Ebb and Postgres' own user."),
        fixed(
            "hba_file",
            &at.conf.join("pg_hba.conf").display().to_string(),
            "Generated; the one in the data directory is not used.",
        ),
        fixed("ssl", "off", "TLS ends at the proxy."),
        fixed("logging_collector", "off", "The unit reads standard error, writes the log, and learns from it."),
        fixed("log_destination", "stderr", "See logging_collector."),
        fixed("lc_messages", "C", "The unit looks for \"ready to accept connections\"."),
        fixed("log_min_messages", "warning", "LOG lines must appear: they are above warning, and readiness is one."),
        fixed("log_min_error_statement", "panic", "No statement text in the log: it may hold a password."),
        fixed("log_line_prefix", "%m [%p] %q%u@%d/%a ", "Time, process, and for sessions role, database, application."),
        fixed("fsync", "on", "A commit that was acknowledged survives."),
        fixed("full_page_writes", "on", "A page can be torn between FUSE and the disk as on any filesystem."),
        fixed("wal_recycle", "off", "Sealing keeps hard links to old segments: they must not be written again."),
        fixed("wal_init_zero", "off", "A new segment starts as a hole and costs what is written into it."),
        fixed(
            "archive_mode",
            "off",
            "WAL leaves the branch through seals and the shipper, not through archive_command.",
        ),
        fixed(
            "recovery_init_sync_method",
            "syncfs",
            "After a crash, what was written but not synced must be on disk before replay trusts it. The volume has \
             synced itself when it was opened; WAL is left. fsync would walk every file of the cluster through FUSE; \
             syncfs is one call for the filesystem that pg_wal is on.",
        ),
        fixed(
            "restart_after_crash",
            "off",
            "If a backend crashes, Postgres ends and the unit starts it on a freshly opened volume: one way to \
             recover, and the condition of recovery_init_sync_method.",
        ),
        usual(
            "shared_buffers",
            "32MB",
            "Small: the kernel caches the volume's pages as well, and many branches share a node.",
        ),
        usual("max_connections", "120", "100 for clients, the rest for Ebb and for poolers' slack."),
        usual("dynamic_shared_memory_type", "posix", "In the unit's own /dev/shm, which ends with it."),
        usual("huge_pages", "off", "Not worth the look-up for so little memory."),
        usual("max_wal_size", "256MB", "Recovery reads at most about this much, and a sealed image carries it."),
        usual("min_wal_size", "32MB", "The smallest allowed; segments are not recycled anyway."),
        usual("checkpoint_timeout", "5min", "As stock."),
        usual("wal_level", "replica", "As stock: the shipper and base backups read WAL."),
        usual("max_wal_senders", "10", "As stock: one for the shipper, the rest for base backups and standbys."),
        usual("max_replication_slots", "10", "See max_wal_senders."),
        usual(
            "max_slot_wal_keep_size",
            "4GB",
            "What a slot may hold back while its reader is away (the shipper's: while the bucket is). Then WAL is given \
             up, and its reader has a gap: other branches need the disk, too.",
        ),
        usual("log_checkpoints", "off", "A sleeping branch's log should hold news only."),
        usual("jit", "off", "Compiling costs more than most queries of an app; SET jit = on where it pays."),
        usual("autovacuum", "on", "As stock; also guards against wrap-around."),
        usual("password_encryption", "scram-sha-256", "The proxy can check no other verifier."),
        usual("cluster_name", at.name, "So that ps tells whose process it is."),
        usual("timezone", "UTC", "initdb would take the machine's, which differs from node to node."),
        usual("log_timezone", "UTC", "See timezone."),
        usual("lc_monetary", "C.UTF-8", "As the template cluster's locale."),
        usual("lc_numeric", "C.UTF-8", "As the template cluster's locale."),
        usual("lc_time", "C.UTF-8", "As the template cluster's locale."),
        usual("default_text_search_config", "pg_catalog.english", "What initdb chooses for this locale."),
    ]
}

/// The text of `postgresql.conf`: the generated settings, each with its reason, then the branch's own.
pub(crate) fn file(at: &Surroundings<'_>, own: &[(String, String)]) -> String {
    let mut text = String::from("# Written at each start: changes here are lost.\n\n");
    for setting in settings(at) {
        let fixed = if setting.fixed { " Fixed." } else { "" };
        let _ = writeln!(text, "# {}{fixed}\n{} = {}\n", setting.why, setting.name, quoted(&setting.value));
    }
    if at.shipped.is_some() {
        text.push_str(
            "# The shipper connects just after the start, and finds the WAL from before it. As much as min_wal_size.\n\
             wal_keep_size = '32MB'\n\n",
        );
    }
    if !own.is_empty() {
        text.push_str("# This branch's own.\n");
    }
    for (name, value) in own {
        let _ = writeln!(text, "{name} = {}", quoted(value));
    }
    if let Some(durability) = at.shipped {
        text.push_str(durability_settings(durability));
    }
    text
}

/// What commits wait for. Behind the branch's own settings, and not fixed: it is changed while Postgres runs.
fn durability_settings(durability: Durability) -> &'static str {
    const _: () = assert!(matches!(STANDBY.as_bytes(), b"ebb_ship"), "the settings name the standby");
    match durability {
        Durability::Local => "\n# Commits wait for the node's disk.\nsynchronous_standby_names = ''\n",
        Durability::Bucket => {
            "\n# Commits wait for the shipper, which waits for the bucket. WAL that waits for it is never given up: a commit \
             in it may wait, too.\nsynchronous_standby_names = 'ebb_ship'\nsynchronous_commit = on\n\
             max_slot_wal_keep_size = -1\n"
        }
    }
}

/// The arguments of `postgres` that go with the file.
///
/// On a fork no worker of a subscription may start before the subscriptions are disabled, which takes a running server
/// (see `roles.rs`): so for this once there are none. They run again, if enabled, from the next wake on.
///
/// A recovery stops before the record that begins at its position: what a client saw as the position after its commit is
/// where the next record begins. The server lets nobody in before it has got there (`hot_standby`), unless it is to stay
/// there: then as soon as it is consistent.
pub(crate) fn arguments(at: &Surroundings<'_>, data: &Path, fork: bool, recovery: Option<&Recovery>) -> Vec<String> {
    let mut arguments = vec!["-D".to_owned(), data.display().to_string()];
    let mut set = |name: &str, value: &str| arguments.extend(["-c".to_owned(), format!("{name}={value}")]);
    set("config_file", &at.conf.join("postgresql.conf").display().to_string());
    for setting in settings(at).iter().filter(|setting| setting.fixed) {
        set(setting.name, &setting.value);
    }
    if fork {
        set("max_logical_replication_workers", "0");
    }
    if let Some(Recovery { wal, pg_timeline, until, stay }) = recovery {
        match pg_timeline {
            Some(pg_timeline) => set("recovery_target_timeline", &pg_timeline.to_string()),
            None if *stay => set("recovery_target_timeline", "current"),
            None => {}
        }
        if *stay {
            // It asks again and again for what does not come; the log is spared that.
            set("restore_command", &format!("test -e '{0}/%f' && cp '{0}/%f' '%p'", wal.display()));
            set("wal_retrieve_retry_interval", STANDBY_LOOKS_AGAIN);
            set("hot_standby", "on");
            set("recovery_target_action", "pause");
        } else {
            set("restore_command", &format!("cp '{}/%f' '%p'", wal.display()));
            set("hot_standby", "off");
            set("recovery_target_action", "promote");
        }
        match until {
            Some(Until::Lsn(lsn)) => {
                set("recovery_target_lsn", &lsn.to_string());
                set("recovery_target_inclusive", "off");
            }
            // Read before time zones have names.
            Some(Until::Time(time)) => {
                set("recovery_target_time", &time.strftime("%Y-%m-%d %H:%M:%S%.6f+00").to_string());
            }
            None => {}
        }
    }
    arguments
}

/// Whether a name can be a setting's (`work_mem`, `extension.option`): it goes unquoted into a file.
pub(crate) fn is_setting_name(name: &str) -> bool {
    let part = |part: &str| {
        part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    name.split('.').all(part) && name.matches('.').count() <= 1
}

/// Gives a server program a clean environment: nothing of Ebb's own (secrets, `PG…`) reaches Postgres.
pub(crate) fn environment(command: &mut Command) {
    // LD_LIBRARY_PATH: some builds of Postgres (those of language registries) do not find their libraries otherwise.
    let kept = std::env::var_os("LD_LIBRARY_PATH");
    command.env_clear().env("PATH", "/usr/bin:/bin").env("LC_ALL", "C.UTF-8");
    if let Some(path) = kept.as_deref().filter(|path| *path != OsStr::new("")) {
        command.env("LD_LIBRARY_PATH", path);
    }
}

/// Quotes a value for `postgresql.conf` (PostgreSQL 15 manual, 20.1.2).
fn quoted(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "''").replace('\n', "\\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at() -> Surroundings<'static> {
        Surroundings { name: "br_1", run: Path::new("/mnt/run"), conf: Path::new("/mnt/conf"), shipped: None }
    }

    #[test]
    fn what_recovery_rests_on_cannot_be_changed_from_inside() {
        let arguments = arguments(&at(), Path::new("/mnt/data"), false, None).join(" ");
        assert!(arguments.starts_with("-D /mnt/data -c config_file=/mnt/conf/postgresql.conf"), "{arguments}");
        for fixed in ["fsync=on", "full_page_writes=on", "listen_addresses=", "recovery_init_sync_method=syncfs"] {
            assert!(arguments.contains(&format!("-c {fixed}")), "{fixed} is missing in {arguments}");
        }
    }

    #[test]
    fn a_recovery_goes_on_or_stays() {
        let of = |stay| {
            let recovery = Recovery { wal: "pg_wal/replay".into(), pg_timeline: None, until: None, stay };
            arguments(&at(), Path::new("/mnt/data"), false, Some(&recovery)).join(" ")
        };
        assert!(of(false).contains("-c hot_standby=off -c recovery_target_action=promote"), "{}", of(false));
        assert!(of(true).contains("-c hot_standby=on -c recovery_target_action=pause"), "{}", of(true));
        assert!(of(true).contains("-c recovery_target_timeline=current"), "{}", of(true));
    }

    #[test]
    fn the_branch_s_own_settings_come_last_and_are_quoted() {
        let text = file(&at(), &[("work_mem".into(), "8MB".into()), ("app.note".into(), "it's\\\nhere".into())]);
        assert!(text.ends_with("work_mem = '8MB'\napp.note = 'it''s\\\\\\nhere'\n"), "{text}");
    }

    #[test]
    fn the_durability_has_the_last_word() {
        let own = [("synchronous_standby_names".into(), "mine".into())];
        let text = |shipped| file(&Surroundings { shipped, ..at() }, &own);
        assert!(text(None).ends_with("synchronous_standby_names = 'mine'\n"));
        assert!(text(Some(Durability::Local)).ends_with("\nsynchronous_standby_names = ''\n"));
        let bucket = text(Some(Durability::Bucket));
        assert!(bucket.contains("\nsynchronous_standby_names = 'ebb_ship'\nsynchronous_commit = on\n"), "{bucket}");
        assert!(bucket.ends_with("\nmax_slot_wal_keep_size = -1\n"), "{bucket}");
    }

    #[test]
    fn setting_names() {
        for good in ["work_mem", "app.note", "_x"] {
            assert!(is_setting_name(good), "{good:?} was refused");
        }
        for bad in ["", "a b", "a=1", "a.b.c", "a\n", "1a", "a.", "include '/etc/passwd'"] {
            assert!(!is_setting_name(bad), "{bad:?} was taken");
        }
    }
}
