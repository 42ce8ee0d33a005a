//! What can be typed.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand};
use ebb_compute::control::Durability;
use ebb_compute::import::DumpFormat;
use ebb_timeline::clients::Pinned;
use ebb_timeline::drill::Probe;
use ebb_timeline::upkeep::Schedule;
use ebb_types::{BranchRef, CheckpointName, Point, PointRef, ProjectName};

mod release;

pub use release::{LedgerCommand, LedgerSearch, ReleaseCommand, RollbackHow};

/// Where the API is unless told otherwise.
pub const DEFAULT_API: &str = "http://127.0.0.1:7432";

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed
  2  the command, or a name in it, is wrong
  3  there is no such thing
  4  something stands in the way (a taken name, a busy branch)
  5  not available now; the same command may work later

Data goes to stdout, everything else to stderr.";

/// Postgres that sleeps while idle, branches like git, and can be taken back.
#[derive(Debug, Parser)]
#[command(name = "ebb", version, after_help = EXIT_CODES, disable_help_subcommand = true)]
pub struct Args {
    /// Where the API of `ebb serve` is
    #[arg(long, global = true, env = "EBB_API", default_value = DEFAULT_API, value_name = "URL", hide_env_values = true)]
    pub api: String,
    /// Print JSON, as the API answered it
    #[arg(long, global = true)]
    pub json: bool,
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the proxy, the timeline service and the API; start and stop computes
    Serve(Box<ServeArgs>),
    /// Show settings
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Make, list, show and delete projects
    #[command(subcommand)]
    Project(ProjectCommand),
    /// Make, list, show, set, restore and delete branches
    #[command(subcommand)]
    Branch(BranchCommand),
    /// Name moments of a branch
    #[command(subcommand)]
    Checkpoint(CheckpointCommand),
    /// Print the connection URL of a branch, password included, alone on stdout
    #[command(after_help = "Example:\n  psql \"$(ebb url shop/prod)\"")]
    Url {
        /// PROJECT/BRANCH[@POINT]; a point is opened for reading only
        place: PointRef,
    },
    /// Run psql on a branch
    #[command(after_help = "\
Examples:
  ebb psql shop/prod
  ebb psql shop/prod -- -c 'select now()'
  ebb psql shop/prod@2026-11-21T06:00:00Z")]
    Psql {
        /// PROJECT/BRANCH[@POINT]; a point is opened for reading only
        place: PointRef,
        /// Arguments for psql
        #[arg(last = true, value_name = "ARGS")]
        args: Vec<std::ffi::OsString>,
    },
    /// Look at, suspend and wake the Postgres of a branch; move those of a project to another node
    Compute(ComputeCommand),
    /// Look at the nodes that share the bucket
    #[command(subcommand)]
    Node(NodeCommand),
    /// Deploy code and migrations together
    #[command(subcommand)]
    Release(ReleaseCommand),
    /// Take code and data back to the moment before the releases that followed RELEASE
    #[command(after_help = "\
Examples:
  ebb rollback shop --to v1 --plan
  ebb rollback shop --to v1
  ebb rollback shop --to v1 --code-only")]
    Rollback {
        /// The project
        project: ProjectName,
        /// The release to go back to (`v1`)
        #[arg(long, value_name = "RELEASE")]
        to: String,
        #[command(flatten)]
        how: RollbackHow,
        #[command(flatten)]
        key: IdempotencyKey,
    },
    /// Show and check who did what
    #[command(subcommand)]
    Ledger(LedgerCommand),
    /// Write a branch, at its head or at a point, as a plain data directory that stock Postgres starts, or as pg_dump does
    #[command(after_help = "\
Examples:
  ebb export shop/prod@before-release /tmp/shop
  ebb export shop/prod@2026-11-21T06:00:00Z --format pg_dump /tmp/shop.dump")]
    Export {
        /// PROJECT/BRANCH[@POINT]
        from: PointRef,
        /// Where to write it: must not exist, or be an empty directory for a data directory
        #[arg(value_name = "PATH")]
        dir: PathBuf,
        /// As a data directory (directory), or as pg_dump writes it: pg_dump (its custom format), pg_dump-directory,
        /// pg_dump-tar, pg_dump-plain
        #[arg(long, value_name = "FORMAT", default_value = "directory", value_parser = parse_format)]
        format: ExportFormat,
        /// For a dump: the database
        #[arg(long, value_name = "NAME", default_value = ebb_compute::postgres::DATABASE)]
        database: String,
        #[command(flatten)]
        key: IdempotencyKey,
    },
    /// Make a branch, or a project, of a running Postgres, of a data directory, or of what pg_dump wrote
    #[command(after_help = "\
Examples:
  ebb import shop --from postgres://replicator@db.example.com:5432
  ebb import shop/legacy --from postgres://replicator@db.example.com:5432 --follow
  ebb import shop/legacy --cut-over
  ebb import shop --from-dir /var/lib/postgresql/15/main
  ebb import shop/loaded --from-dump shop.dump")]
    Import(Box<ImportArgs>),
    /// Restore a point out of the bucket alone, beside everything else, and check it; nothing of the branch is touched
    #[command(after_help = DRILL_HELP)]
    Drill {
        /// PROJECT/BRANCH[@POINT], a point being a checkpoint, a time or an LSN
        from: PointRef,
        /// Also ask this, besides what the branch's own probes ask; what follows the last = is the right answer
        #[arg(long = "probe", value_name = "SQL=ANSWER")]
        probes: Vec<Probe>,
        #[command(flatten)]
        key: IdempotencyKey,
    },
    /// List the newest drills of a branch
    #[command(after_help = "Example:\n  ebb drills shop/prod --json")]
    Drills {
        /// PROJECT/BRANCH
        branch: BranchRef,
    },
    /// Show what differs between two moments of a project: definitions, and rows by their primary keys
    #[command(after_help = "\
Examples:
  ebb diff shop/prod@before-v2                       with what is there now
  ebb diff shop/prod@v1 shop/pr-42 --table items --samples 10
  ebb diff shop/prod@2026-11-21T06:00:00Z shop/prod@2026-11-21T07:00:00Z --json")]
    Diff(DiffArgs),
    /// List who is connected to a branch, on whatever node, and who of them keeps it awake
    #[command(after_help = "Examples:\n  ebb who shop/prod\n  ebb who shop/prod --json")]
    Who {
        /// PROJECT/BRANCH
        branch: BranchRef,
    },
    /// Tell what keeps an object of the bucket, or which rule lets it go
    #[command(after_help = "\
Examples:
  ebb why ly_01a1fd5db455746c8a608f5495f9f539
  ebb why layers/ly_01a1fd5db455746c8a608f5495f9f539 --json")]
    Why {
        /// The key of an object, the identifier of a layer, or the hash of an artifact
        object: String,
    },
    /// Delete what nothing needs any more, and has not for the grace period; `ebb serve` does so by itself
    #[command(after_help = "\
Examples:
  ebb collect --dry-run
  ebb collect")]
    Collect {
        /// Only tell what would be done, and why
        #[arg(long)]
        dry_run: bool,
    },
    /// Check a bucket, or the data directory of a stopped node, or both against each other; needs no server
    #[command(after_help = FSCK_HELP)]
    Fsck(FsckArgs),
}

const DRILL_HELP: &str = "\
Examples:
  ebb drill shop/prod
  ebb drill shop/prod@before-import --probe 'select count(*) from orders=42'
  ebb branch set shop/prod --drill-every 1d

It needs room for the whole database on the node's disk, and reads all of it from the bucket. It fails with exit code 1 if
what the bucket has is damaged or not what it should be, and names the object; the drill is in the ledger either way.";

const FSCK_HELP: &str = "\
Examples:
  ebb fsck --bucket /mnt/bucket
  ebb fsck --data .ebb --bucket .ebb/bucket --repair

A bucket is only read, and may be in use; a data directory must not be.

Exit codes:
  0  nothing was found, or all of it was repaired
  1  something was found
  2  it could not be checked";

/// `ebb fsck …`
#[derive(Debug, ClapArgs)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true))]
pub struct FsckArgs {
    /// The bucket: a directory path, or a URL as `ebb serve` takes it
    #[arg(long, value_name = "URL", group = "what")]
    pub bucket: Option<String>,
    /// The data directory of a node whose server does not run
    #[arg(long, value_name = "DIR", group = "what")]
    pub data: Option<PathBuf>,
    /// Do what is safe: delete leftovers, fetch again or upload layers of which one side has a whole copy
    #[arg(long)]
    pub repair: bool,
}

/// `ebb import …`
#[derive(Debug, ClapArgs)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["from", "from_dir", "from_dump", "status", "cut_over", "cancel"]))]
pub struct ImportArgs {
    /// PROJECT/BRANCH, or a PROJECT that does not exist yet and whose prod it becomes
    #[arg(value_parser = crate::commands::import::parse_target)]
    pub to: ImportTarget,
    /// A running Postgres, by the URL of a role that may replicate; its password may be in PGPASSWORD
    #[arg(long, value_name = "URL")]
    pub from: Option<String>,
    /// A data directory on which no Postgres runs, on the machine of ebb serve
    #[arg(long, value_name = "DIR")]
    pub from_dir: Option<PathBuf>,
    /// What pg_dump wrote, in any format, on the machine of ebb serve
    #[arg(long, value_name = "FILE")]
    pub from_dump: Option<PathBuf>,
    /// Go on receiving what the running Postgres writes, until --cut-over
    #[arg(long, requires = "from")]
    pub follow: bool,
    /// The imported database that URLs and releases name (`app`) [default: the only one there is]
    #[arg(long, value_name = "NAME", conflicts_with_all = ["from_dump", "status", "cut_over", "cancel"])]
    pub database: Option<String>,
    /// Show how far an import is
    #[arg(long)]
    pub status: bool,
    /// End an import that follows, with what its source has committed by now: stop writing there first
    #[arg(long)]
    pub cut_over: bool,
    /// Give an import up; nothing of it stays
    #[arg(long)]
    pub cancel: bool,
    #[command(flatten)]
    pub key: IdempotencyKey,
}

/// Where an import goes.
#[derive(Debug, Clone)]
pub struct ImportTarget {
    /// The project.
    pub project: ProjectName,
    /// The new branch; `None`: the project is to be made.
    pub branch: Option<ebb_types::BranchName>,
}

/// A key under which a repeated request answers the first result again.
#[derive(Debug, Default, ClapArgs)]
pub struct IdempotencyKey {
    /// Repeating a command under the same KEY answers the first result again
    #[arg(long, value_name = "KEY")]
    pub idempotency_key: Option<String>,
}

impl IdempotencyKey {
    /// The key, if one was given.
    pub fn as_deref(&self) -> Option<&str> {
        self.idempotency_key.as_deref()
    }
}

/// `ebb config …`
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the settings `ebb serve` would use with the same options
    #[command(after_help = "Example:\n  ebb config print --config ebb-serve.toml")]
    Print(Box<ServeArgs>),
}

/// `ebb serve …`
#[derive(Debug, Default, ClapArgs)]
#[command(after_help = "\
Examples:
  ebb serve
  ebb serve --data /var/lib/ebb --bucket file:///mnt/bucket --idle-suspend 10m
  ebb serve --bucket s3://backups/ebb --s3-region eu-central-1
  ebb serve --bucket s3://backups/ebb --s3-endpoint https://s3.example.com --s3-path-style

Credentials for S3 come from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, a web identity token or the
machine's role; never from an option or a settings file.

Ctrl-C or SIGTERM drains the clients, suspends every compute and exits; a second one exits at once.")]
pub struct ServeArgs {
    /// Directory for everything this node keeps [default: ./.ebb]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// The bucket: s3://NAME/PREFIX, a directory path, or file:// and an absolute path [default: DATA/bucket]
    #[arg(long, value_name = "URL")]
    pub bucket: Option<String>,
    /// Where the bucket's S3 is [default: Amazon's, or what AWS_ENDPOINT_URL says]
    #[arg(long, value_name = "URL", env = "EBB_S3_ENDPOINT", hide_env_values = true)]
    pub s3_endpoint: Option<String>,
    /// The region of the bucket in S3 [default: AWS_REGION, the profile's, this machine's; us-east-1 with --s3-endpoint]
    #[arg(long, value_name = "REGION", env = "EBB_S3_REGION", hide_env_values = true)]
    pub s3_region: Option<String>,
    /// Name the S3 bucket in the path of requests rather than in their host name [default: false]
    #[arg(
        long, value_name = "BOOL", env = "EBB_S3_PATH_STYLE", hide_env_values = true,
        num_args = 0..=1, require_equals = true, default_missing_value = "true"
    )]
    pub s3_path_style: Option<bool>,
    /// Where Postgres clients connect [default: 127.0.0.1:6432]
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<String>,
    /// Where the HTTP API is served; loopback only [default: 127.0.0.1:7432]
    #[arg(long, value_name = "ADDR")]
    pub api_listen: Option<String>,
    /// The host that printed connection URLs name [default: the address of --listen]
    #[arg(long, value_name = "HOST")]
    pub public_host: Option<String>,
    /// Endpoints answer to branch--project.DOMAIN where a client sends a host name by TLS [default: localhost]
    #[arg(long, value_name = "DOMAIN")]
    pub domain: Option<String>,
    /// What people call this node [default: the host name]
    #[arg(long, value_name = "NAME", env = "EBB_NODE_NAME", hide_env_values = true)]
    pub node_name: Option<String>,
    /// Where other nodes on the same bucket reach this one, by mutual TLS [default: a free port of loopback]
    #[arg(long, value_name = "ADDR")]
    pub node_listen: Option<String>,
    /// How long after its last sign of life other nodes may take over what this one owns [default: 10s]
    #[arg(long, value_name = "TIME", env = "EBB_NODE_TTL", hide_env_values = true)]
    pub node_ttl: Option<String>,
    /// How long a compute without work stays up, where its branch does not say otherwise [default: 5m]
    #[arg(long, value_name = "TIME")]
    pub idle_suspend: Option<String>,
    /// How many backends of a branch its clients in transaction mode share, where it does not say otherwise [default: a
    /// quarter of the connections that its Postgres takes]
    #[arg(long, value_name = "COUNT", env = "EBB_POOL_SIZE", hide_env_values = true)]
    pub pool_size: Option<u64>,
    /// Log what a client waited for, if it waited for its compute for longer than this [default: 2s]
    #[arg(long, value_name = "TIME")]
    pub slow_wake: Option<String>,
    /// Bytes that must stay free on the disk of DATA; work is refused below [default: 64 MiB]
    #[arg(long, value_name = "N", env = "EBB_MIN_FREE_BYTES", hide_env_values = true)]
    pub min_free_bytes: Option<u64>,
    /// Fetch in the background what an awake branch lacks on this node [default: true]
    #[arg(
        long, value_name = "BOOL", env = "EBB_HYDRATE", hide_env_values = true,
        num_args = 0..=1, require_equals = true, default_missing_value = "true"
    )]
    pub hydrate: Option<bool>,
    /// How long a client is held while its branch wakes, or is restored [default: 30s]
    #[arg(long, value_name = "TIME", env = "EBB_WAKE_BUDGET", hide_env_values = true)]
    pub wake_budget: Option<String>,
    /// Answer SELECT 1 of a client whose branch sleeps, rather than wake it [default: false]
    #[arg(
        long, value_name = "BOOL", env = "EBB_ANSWER_PINGS", hide_env_values = true,
        num_args = 0..=1, require_equals = true, default_missing_value = "true"
    )]
    pub answer_pings: Option<bool>,
    /// Bytes that layers may take on the disk of DATA [default: half of the file system]
    #[arg(long, value_name = "N", env = "EBB_CACHE_LIMIT", hide_env_values = true)]
    pub cache_limit: Option<u64>,
    /// How long an object that nothing needs any more stays in the bucket [default: 7 days]
    #[arg(long, value_name = "TIME", env = "EBB_COLLECT_GRACE", hide_env_values = true)]
    pub collect_grace: Option<String>,
    /// Time between two rounds of deleting such objects [default: 1h]
    #[arg(long, value_name = "TIME", env = "EBB_COLLECT_INTERVAL", hide_env_values = true)]
    pub collect_interval: Option<String>,
    #[command(flatten)]
    pub access: crate::serve::access::AccessArgs,
    /// Settings in a TOML file; options given here win over it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Follow the server that runs on the data directory: it hands its ports over, ends its clients' transactions and exits;
    /// nobody who connects meanwhile is refused, and computes go on. Starts as usual if none runs
    #[arg(long)]
    pub take_over: bool,
    /// Make this project at start if there is none at all, and print URLs ready to paste
    #[arg(long, value_name = "NAME")]
    pub first_project: Option<ProjectName>,
}

/// `ebb project …`
#[derive(Debug, Subcommand)]
pub enum ProjectCommand {
    /// Make a project with the branches prod and dev; its password is shown once
    #[command(after_help = "Example:\n  ebb project create shop --current /srv/shop/current")]
    Create {
        /// Its name
        name: ProjectName,
        /// The symlink that a release switches to its code
        #[arg(long, value_name = "PATH")]
        current: Option<PathBuf>,
        /// Postgres major version; the newest installed one unless given
        #[arg(long, value_name = "N")]
        pg_major: Option<u32>,
        #[command(flatten)]
        key: IdempotencyKey,
    },
    /// List all projects
    #[command(after_help = "Example:\n  ebb project list --json")]
    List,
    /// Show one project and its branches
    #[command(after_help = "Example:\n  ebb project show shop")]
    Show {
        /// Its name
        name: ProjectName,
    },
    /// Delete a project and all its branches
    #[command(after_help = "Example:\n  ebb project delete shop --confirm shop")]
    Delete {
        /// Its name
        name: ProjectName,
        /// Its name again
        #[arg(long, value_name = "NAME")]
        confirm: ProjectName,
    },
}

/// `ebb branch …`
#[derive(Debug, Subcommand)]
pub enum BranchCommand {
    /// Make a branch; its source goes on undisturbed
    #[command(after_help = "\
Examples:
  ebb branch create shop/pr-42 --from shop/prod
  ebb branch create shop/look --from shop/prod@before-release
  ebb branch create shop/then --from shop/prod@2026-11-21T06:00:00Z")]
    Create {
        /// PROJECT/BRANCH
        branch: BranchRef,
        /// Where it starts: PROJECT/BRANCH[@POINT], a point being a checkpoint, a time or an LSN; the head of prod unless given
        #[arg(long, value_name = "FROM")]
        from: Option<PointRef>,
        #[command(flatten)]
        key: IdempotencyKey,
    },
    /// List a project's branches
    #[command(after_help = "Example:\n  ebb branch list shop")]
    List {
        /// The project
        project: ProjectName,
    },
    /// Show one branch
    #[command(after_help = "Example:\n  ebb branch show shop/prod")]
    Show {
        /// PROJECT/BRANCH
        branch: BranchRef,
    },
    /// Change a branch's settings
    #[command(
        after_help = "\
Examples:
  ebb branch set shop/prod --idle-suspend 30m --window 14d
  ebb branch set shop/prod --checkpoints hourly=24,daily=7,weekly=4 --drill-every 1d
  ebb branch set shop/prod --probe 'select count(*) > 0 from orders=t'",
        group = clap::ArgGroup::new("setting").required(true).multiple(true).args([
            "idle_suspend", "window", "durability", "pinned", "checkpoints", "drill_every", "probes", "no_probes",
            "pool_size",
        ])
    )]
    Set {
        /// PROJECT/BRANCH
        branch: BranchRef,
        /// How long its compute stays up without work: 30s, 5m, 1h
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        idle_suspend: Option<Duration>,
        /// How long its past can be gone back to: 12h, 14d
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        window: Option<Duration>,
        /// What a commit waits for: the disk of the node (local), or the bucket
        #[arg(long, value_name = "WHAT", value_parser = parse_durability)]
        durability: Option<Durability>,
        /// What idle sessions with state that cannot be given back do (temporary tables, advisory locks, LISTEN …): keep
        /// the branch awake (keep), or end when it would be asleep but for them (end)
        #[arg(long, value_name = "WHAT", value_parser = parse_pinned)]
        pinned: Option<Pinned>,
        /// How many automatic checkpoints are kept: hourly=24,daily=7,weekly=4, any part of it, or off
        #[arg(long, value_name = "KEEP")]
        checkpoints: Option<Schedule>,
        /// How often it is drilled: 1d, 12h; or off
        #[arg(long, value_name = "TIME", value_parser = parse_interval)]
        drill_every: Option<Duration>,
        /// What each of its drills asks, instead of what they asked until now; what follows the last = is the right answer
        #[arg(long = "probe", value_name = "SQL=ANSWER")]
        probes: Vec<Probe>,
        /// Its drills ask nothing any more
        #[arg(long, conflicts_with = "probes")]
        no_probes: bool,
        /// How many backends its clients in transaction mode share; 0: a quarter of what its Postgres takes
        #[arg(long, value_name = "COUNT")]
        pool_size: Option<u32>,
    },
    /// Set from where clients may connect to a branch; others are refused before they can try a password
    #[command(after_help = "\
Examples:
  ebb branch allow shop/prod 192.0.2.0/24 2001:db8::/32
  ebb branch allow shop/prod --any

It replaces the list the branch has. Branches made from it begin with its list. What is on the machine of ebb serve can always
connect. Connections that are open stay.")]
    Allow {
        /// PROJECT/BRANCH
        branch: BranchRef,
        /// All networks, and single addresses, that may connect
        #[arg(value_name = "CIDR", value_parser = ebb_types::parse_network, required_unless_present = "any")]
        networks: Vec<ipnet::IpNet>,
        /// Let clients connect from anywhere again
        #[arg(long, conflicts_with = "networks")]
        any: bool,
    },
    /// Delete a branch
    #[command(after_help = "Example:\n  ebb branch delete shop/pr-42")]
    Delete {
        /// PROJECT/BRANCH
        branch: BranchRef,
    },
    /// Take a branch back to a point; what it holds now is kept as a rescue branch
    #[command(after_help = "Example:\n  ebb branch restore shop/prod --to before-release")]
    Restore {
        /// PROJECT/BRANCH
        branch: BranchRef,
        /// A checkpoint's name, a time (2026-11-21T06:00:00Z) or an LSN
        #[arg(long, value_name = "POINT")]
        to: Point,
        #[command(flatten)]
        key: IdempotencyKey,
    },
}

/// `ebb checkpoint …`
#[derive(Debug, Subcommand)]
pub enum CheckpointCommand {
    /// Name this moment of a branch
    #[command(after_help = "Example:\n  ebb checkpoint create shop/prod before-import")]
    Create {
        /// PROJECT/BRANCH
        branch: BranchRef,
        /// The checkpoint's name
        name: CheckpointName,
        #[command(flatten)]
        key: IdempotencyKey,
    },
    /// List a branch's checkpoints
    #[command(after_help = "Example:\n  ebb checkpoint list shop/prod")]
    List {
        /// PROJECT/BRANCH
        branch: BranchRef,
    },
    /// Delete a checkpoint
    #[command(after_help = "Example:\n  ebb checkpoint delete shop/prod before-import")]
    Delete {
        /// PROJECT/BRANCH
        branch: BranchRef,
        /// The checkpoint's name
        name: CheckpointName,
    },
}

/// `ebb compute …`; with `--branch-dir` it is not a command for people but the unit process itself.
#[derive(Debug, ClapArgs)]
#[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
pub struct ComputeCommand {
    /// Run the unit of a branch directory (`ebb serve` does this)
    #[arg(long, hide = true, value_name = "DIR")]
    pub branch_dir: Option<PathBuf>,
    /// What to do
    #[command(subcommand)]
    pub act: Option<ComputeAct>,
}

/// `ebb node …`
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the nodes on the bucket that are alive, and what they own; the one that answers comes first
    #[command(after_help = "Example:\n  ebb node list")]
    List,
}

/// `ebb compute suspend|wake|move|status|wakes`
#[derive(Debug, Subcommand)]
pub enum ComputeAct {
    /// Stop the Postgres of a branch; its clients stay connected
    #[command(after_help = "Example:\n  ebb compute suspend shop/prod")]
    Suspend {
        /// PROJECT/BRANCH
        branch: BranchRef,
    },
    /// Start the Postgres of a branch and wait until it answers
    #[command(after_help = "Example:\n  ebb compute wake shop/prod")]
    Wake {
        /// PROJECT/BRANCH
        branch: BranchRef,
    },
    /// Hand a project, with all its computes, over to another node; its clients stay connected
    #[command(after_help = "Example:\n  ebb compute move shop --to node-b")]
    Move {
        /// The project
        project: ProjectName,
        /// The node's name or identifier: see `ebb node list`
        #[arg(long, value_name = "NODE")]
        to: String,
    },
    /// Show the newest wakes on this node, and how long each stage of them took
    #[command(after_help = "Examples:\n  ebb compute wakes\n  ebb compute wakes shop/prod")]
    Wakes {
        /// PROJECT/BRANCH; all branches without it
        branch: Option<BranchRef>,
    },
    /// Show whether a branch is awake, who is connected, and what keeps it awake
    #[command(after_help = "Example:\n  ebb compute status shop/prod")]
    Status {
        /// PROJECT/BRANCH
        branch: BranchRef,
    },
}

/// What `ebb export` writes: a data directory, or a dump in a format of pg_dump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportFormat(pub Option<DumpFormat>);

/// Reads what `ebb export` writes.
pub fn parse_format(text: &str) -> Result<ExportFormat, String> {
    Ok(ExportFormat(match text {
        "directory" => None,
        "pg_dump" | "pg_dump-custom" => Some(DumpFormat::Custom),
        "pg_dump-directory" => Some(DumpFormat::Directory),
        "pg_dump-tar" => Some(DumpFormat::Tar),
        "pg_dump-plain" => Some(DumpFormat::Plain),
        _ => return Err("want directory, pg_dump, pg_dump-directory, pg_dump-tar or pg_dump-plain".to_owned()),
    }))
}

/// Reads what a commit waits for.
pub fn parse_durability(text: &str) -> Result<Durability, String> {
    match text {
        "local" => Ok(Durability::Local),
        "bucket" => Ok(Durability::Bucket),
        _ => Err("want local or bucket".to_owned()),
    }
}

/// Reads what becomes of pinned sessions.
pub fn parse_pinned(text: &str) -> Result<Pinned, String> {
    match text {
        "keep" => Ok(Pinned::Keep),
        "end" => Ok(Pinned::End),
        _ => Err("want keep or end".to_owned()),
    }
}

/// Reads a length of time, or `off` as none.
pub fn parse_interval(text: &str) -> Result<Duration, String> {
    if text == "off" { Ok(Duration::ZERO) } else { parse_duration(text) }
}

/// Reads `30s`, `5m`, `1h 30m`, `14d`.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a length of time (want 30s, 5m or 1h)");
    let days = text.strip_suffix('d').and_then(|days| days.parse::<u32>().ok());
    let span: jiff::SignedDuration = match days {
        Some(days) => jiff::SignedDuration::from_hours(24 * i64::from(days)),
        None => text.parse().map_err(|_| wrong())?,
    };
    Duration::try_from(span).map_err(|_| wrong())
}

/// What `ebb diff` compares.
#[derive(Debug, ClapArgs)]
pub struct DiffArgs {
    /// The older side: PROJECT/BRANCH[@POINT]
    pub from: PointRef,
    /// The younger side: PROJECT/BRANCH[@POINT]; the head of the same branch where none is named
    pub to: Option<PointRef>,
    /// Only this table: NAME or SCHEMA.NAME
    #[arg(long)]
    pub table: Option<String>,
    /// How many rows of each kind are shown per table
    #[arg(long, default_value_t = 3)]
    pub samples: usize,
    /// Which database
    #[arg(long, default_value = "app")]
    pub database: String,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_commands_are_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example() {
        fn walk(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            if command.has_subcommands() {
                command.get_subcommands().for_each(|child| walk(child, &path));
            } else {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Example"), "`{path}` has no example");
            }
        }
        walk(&Args::command(), "");
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("1h 30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("2s"), Ok(Duration::from_secs(2)));
        for bad in ["", "5", "-5m", "soon"] {
            assert!(parse_duration(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn what_is_done_for_a_branch_by_itself_is_set_with_the_rest_of_its_policy() {
        let line =
            "ebb branch set shop/prod --checkpoints hourly=24,weekly=4 --drill-every off --probe a=1 --probe b>=0=t";
        let args = Args::try_parse_from(line.split(' ')).unwrap();
        let Command::Branch(BranchCommand::Set { checkpoints, drill_every, probes, no_probes, .. }) = args.command
        else {
            panic!("another command")
        };
        assert_eq!(checkpoints.map(|schedule| schedule.to_string()).as_deref(), Some("hourly=24,weekly=4"));
        assert_eq!((drill_every, no_probes), (Some(Duration::ZERO), false));
        let expect = [("a", "1"), ("b>=0", "t")];
        assert_eq!(probes.iter().map(|probe| (probe.sql.as_str(), probe.expect.as_str())).collect::<Vec<_>>(), expect);
        for bad in ["--checkpoints monthly=1", "--drill-every soon", "--probe a", "--probe a=1 --no-probes"] {
            let line = format!("ebb branch set shop/prod {bad}");
            assert!(Args::try_parse_from(line.split(' ')).is_err(), "{bad} was taken");
        }
    }

    #[test]
    fn a_unit_is_not_a_command_for_people() {
        let unit = Args::try_parse_from(["ebb", "compute", "--branch-dir", "/x"]).unwrap();
        assert!(matches!(unit.command, Command::Compute(ComputeCommand { branch_dir: Some(_), act: None })));
        let status = Args::try_parse_from(["ebb", "compute", "status", "shop/prod", "--json"]).unwrap();
        assert!(status.json);
    }
}
