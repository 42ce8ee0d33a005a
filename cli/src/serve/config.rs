//! What `ebb serve` can be told: options win over the file, the file wins over the defaults.
//!
//! Everything is read once, here; every fault is listed before the server refuses to start.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use ebb_storage::object_store::{self, S3Options};
use ebb_timeline::CollectPolicy;
use ebb_timeline::service::MIN_FREE_BYTES;
use ebb_types::{ErrorKind, ProjectName};
use serde::Serialize;

use super::access::{self, Access};
use crate::args::{ServeArgs, parse_duration};
use crate::failure::Failure;

/// The keys a settings file may have, each named as its option.
const KEYS: [&str; 22] = [
    "data",
    "bucket",
    "s3-endpoint",
    "s3-region",
    "s3-path-style",
    "listen",
    "api-listen",
    "public-host",
    "domain",
    "node-name",
    "node-listen",
    "node-ttl",
    "idle-suspend",
    "wake-budget",
    "answer-pings",
    "pool-size",
    "slow-wake",
    "min-free-bytes",
    "hydrate",
    "cache-limit",
    "collect-grace",
    "collect-interval",
];

/// LIMIT: every round asks the bucket for a listing and each ledger for news.
const COLLECT_INTERVAL_MIN: Duration = Duration::from_secs(1);

/// LIMIT: a record is renewed three times before it expires, and a bucket takes its time.
const NODE_TTL_MIN: Duration = Duration::from_millis(500);

/// Effective settings. Their serialized form is a settings file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// Everything this node keeps. Default `./.ebb`; made if it is not there.
    pub data: PathBuf,
    /// Everything that must outlive the node: an `s3://` or `file://` URL, or a directory path. Default `DATA/bucket`.
    pub bucket: String,
    /// Where S3 is, for a bucket in it. Default: Amazon's, or what `AWS_ENDPOINT_URL` says.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3_endpoint: Option<String>,
    /// The bucket's region in S3. Default: what the environment, a profile or the machine says; `us-east-1` at an endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s3_region: Option<String>,
    /// Whether requests to S3 name the bucket in their path rather than in their host name. Default no.
    pub s3_path_style: bool,
    /// Where Postgres clients connect. Default `127.0.0.1:6432`; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Where the API is served. Default `127.0.0.1:7432`. Loopback only: the API asks nobody who they are.
    pub api_listen: SocketAddr,
    /// The host that printed connection URLs name. Default: the address of `listen`, or loopback where that is any.
    pub public_host: String,
    /// Endpoints answer to `branch--project.<domain>` where a client sends a host name by TLS. Default `localhost`.
    pub domain: String,
    /// What people call this node. Default: the machine's host name.
    pub node_name: String,
    /// Where other nodes on the same bucket reach this one, by mutual TLS. Default: a free port of loopback. It must be an
    /// address that they can connect to; port 0 takes a free one.
    pub node_listen: SocketAddr,
    /// How long after this node last renewed its record in the bucket others may take over its projects. Default 10
    /// seconds; at least 500 ms.
    #[serde(serialize_with = "as_text")]
    pub node_ttl: Duration,
    /// How long a compute without work stays up, for branches without a value of their own. Default 5 minutes.
    #[serde(serialize_with = "as_text")]
    pub idle_suspend: Duration,
    /// How long a client is held while its branch wakes, or is restored; then it is told `57P03` and when to try again.
    /// Default 30 seconds.
    #[serde(serialize_with = "as_text")]
    pub wake_budget: Duration,
    /// Whether `SELECT 1` of a client whose branch sleeps is answered without a wake. Default no; a client may wish otherwise
    /// (`-c ebb.pings=on`). Empty queries always are.
    pub answer_pings: bool,
    /// A client that waits for its compute for longer is written to the log, with what it waited for. Default 2 seconds.
    #[serde(serialize_with = "as_text")]
    pub slow_wake: Duration,
    /// Bytes that must stay free on the disk of `data`; below, work is refused. Default 64 MiB.
    pub min_free_bytes: u64,
    /// Whether what an awake branch lacks on this node is fetched in the background. Default yes: the node gets independent
    /// of the bucket. Without it, only what is read is fetched.
    pub hydrate: bool,
    /// Backends of a branch that its clients in transaction mode share, where it does not say otherwise. Default: a quarter
    /// of the connections that its Postgres takes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool_size: Option<u64>,
    /// Bytes that layers may take on the disk of `data`; above, those used longest ago are given up, unless they are in use
    /// or nowhere else. Default: half of the file system.
    pub cache_limit: Option<u64>,
    /// How long an object that nothing needs stays in the bucket. Default 7 days: time to notice a mistake.
    #[serde(serialize_with = "as_text")]
    pub collect_grace: Duration,
    /// Time from one round of collection to the next. Default 1 hour; at least 1 second.
    #[serde(serialize_with = "as_text")]
    pub collect_interval: Duration,
    /// Who gets in at the proxy.
    #[serde(flatten)]
    pub access: Access,
    /// Makes this project if there is none at all.
    #[serde(skip)]
    pub first_project: Option<ProjectName>,
}

fn as_text<S: serde::Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{}ms", time.as_millis()))
}

impl Settings {
    /// Puts together what was typed, what the file says, and the defaults.
    ///
    /// # Errors
    /// `Invalid`, with one cause for every fault found.
    pub fn read(args: &ServeArgs) -> Result<Self, Failure> {
        let file = args.config.as_deref().map(load).transpose()?.unwrap_or_default();
        let mut faults = unknown_keys(&file);
        let mut sources = Sources { file: &file, faults: &mut faults };

        let data = sources.text("data", args.data.as_ref().map(|path| path.display().to_string()));
        let data = PathBuf::from(data.unwrap_or_else(|| ".ebb".to_owned()));
        let data = std::path::absolute(&data)
            .map_err(|error| Failure::internal(format!("cannot use the data directory {data:?}"), &error))?;
        let bucket = sources.text("bucket", args.bucket.clone());
        let bucket = bucket.unwrap_or_else(|| data.join("bucket").display().to_string());
        let s3_endpoint = sources.text("s3-endpoint", args.s3_endpoint.clone());
        let s3_region = sources.text("s3-region", args.s3_region.clone());
        let s3_path_style = sources.flag("s3-path-style", args.s3_path_style, false);
        let listen = sources.address("listen", args.listen.clone(), "127.0.0.1:6432");
        let api_listen = sources.address("api-listen", args.api_listen.clone(), "127.0.0.1:7432");
        let public_host = sources.text("public-host", args.public_host.clone());
        let domain = sources.text("domain", args.domain.clone());
        let node_name = sources.text("node-name", args.node_name.clone());
        let node_listen = sources.address("node-listen", args.node_listen.clone(), "127.0.0.1:0");
        let node_ttl = sources.time("node-ttl", args.node_ttl.clone(), Duration::from_secs(10));
        let idle_suspend = sources.text("idle-suspend", args.idle_suspend.clone());
        let wake_budget = sources.time("wake-budget", args.wake_budget.clone(), Duration::from_secs(30));
        let answer_pings = sources.flag("answer-pings", args.answer_pings, false);
        let slow_wake = sources.time("slow-wake", args.slow_wake.clone(), Duration::from_secs(2));
        let min_free_bytes = sources.number("min-free-bytes", args.min_free_bytes);
        let hydrate = sources.flag("hydrate", args.hydrate, true);
        let cache_limit = sources.number("cache-limit", args.cache_limit);
        let pool_size = sources.number("pool-size", args.pool_size);
        let CollectPolicy { grace, interval } = CollectPolicy::default();
        let collect_grace = sources.time("collect-grace", args.collect_grace.clone(), grace);
        let collect_interval = sources.time("collect-interval", args.collect_interval.clone(), interval);

        let access = Access::read(&mut sources, &args.access);

        let s3 = S3Options { endpoint: s3_endpoint, region: s3_region, path_style: s3_path_style };
        // Also so that nothing secret in them is shown or written down.
        faults.extend(object_store::check_url(&bucket, &s3).err().map(|error| error.to_string()));
        if !api_listen.ip().is_loopback() {
            faults.push(format!(
                "api-listen {api_listen} is reachable from other machines, and the API asks nobody who they are: \
                 use a loopback address, and a tunnel from elsewhere"
            ));
        }
        if collect_interval < COLLECT_INTERVAL_MIN {
            faults.push("collect-interval: at least 1s is wanted".to_owned());
        }
        if pool_size == Some(0) {
            faults.push("pool-size: at least 1 is wanted".to_owned());
        }
        if node_ttl < NODE_TTL_MIN {
            faults.push("node-ttl: at least 500ms is wanted".to_owned());
        }
        if node_listen.ip().is_unspecified() {
            faults.push(format!(
                "node-listen: {node_listen} names no machine, and other nodes are told to connect to it"
            ));
        }
        let idle_suspend = parse_duration(idle_suspend.as_deref().unwrap_or("5m")).unwrap_or_else(|fault| {
            faults.push(format!("idle-suspend: {fault}"));
            Duration::ZERO
        });
        if !faults.is_empty() {
            let failure = Failure::new(ErrorKind::Invalid, "the settings are wrong");
            return Err(Failure { causes: faults, ..failure });
        }
        Ok(Self {
            bucket,
            data,
            s3_endpoint: s3.endpoint,
            s3_region: s3.region,
            s3_path_style: s3.path_style,
            listen,
            api_listen,
            public_host: public_host.unwrap_or_else(|| reachable(listen.ip()).to_string()),
            domain: domain.unwrap_or_else(|| "localhost".to_owned()),
            node_name: node_name.unwrap_or_else(host_name),
            node_listen,
            node_ttl,
            idle_suspend,
            wake_budget,
            answer_pings,
            slow_wake,
            min_free_bytes: min_free_bytes.unwrap_or(MIN_FREE_BYTES),
            hydrate,
            pool_size,
            cache_limit,
            collect_grace,
            collect_interval,
            access,
            first_project: args.first_project.clone(),
        })
    }
}

impl Settings {
    /// Where S3 is, for the store.
    pub fn s3(&self) -> S3Options {
        S3Options { endpoint: self.s3_endpoint.clone(), region: self.s3_region.clone(), path_style: self.s3_path_style }
    }
}

fn host_name() -> String {
    let name = rustix::system::uname().nodename().to_string_lossy().into_owned();
    if name.is_empty() { "node".to_owned() } else { name }
}

/// An address a client on this machine can use where the server listens on all.
fn reachable(listen: IpAddr) -> IpAddr {
    match listen {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(std::net::Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(std::net::Ipv6Addr::LOCALHOST),
        ip => ip,
    }
}

fn load(path: &Path) -> Result<toml::Table, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::new(ErrorKind::Invalid, format!("cannot read the settings file {path:?}")).because(&error)
    })?;
    text.parse().map_err(|error: toml::de::Error| {
        let failure = Failure::new(ErrorKind::Invalid, format!("the settings file {path:?} is not TOML"));
        Failure { causes: error.to_string().lines().map(str::to_owned).collect(), ..failure }
    })
}

fn unknown_keys(file: &toml::Table) -> Vec<String> {
    let known = || KEYS.into_iter().chain(access::KEYS);
    let unknown = file.keys().filter(|key| known().all(|known| known != key.as_str()));
    unknown
        .map(|key| match ebb_types::nearest(key, known()).first() {
            Some(near) => format!("there is no setting {key:?}; did you mean {near:?}?"),
            None => format!("there is no setting {key:?}; there are {}", known().collect::<Vec<_>>().join(", ")),
        })
        .collect()
}

/// Looks a value up where it may come from, and notes what is wrong with it.
pub struct Sources<'a> {
    file: &'a toml::Table,
    pub faults: &'a mut Vec<String>,
}

impl Sources<'_> {
    pub fn text(&mut self, key: &str, option: Option<String>) -> Option<String> {
        match (option, self.file.get(key)) {
            (Some(typed), _) => Some(typed),
            (None, None) => None,
            (None, Some(toml::Value::String(text))) => Some(text.clone()),
            (None, Some(other)) => {
                self.faults.push(format!("{key}: want a text in quotes, not {other}"));
                None
            }
        }
    }

    fn time(&mut self, key: &str, option: Option<String>, default: Duration) -> Duration {
        let Some(text) = self.text(key, option) else { return default };
        parse_duration(&text).unwrap_or_else(|fault| {
            self.faults.push(format!("{key}: {fault}"));
            default
        })
    }

    fn number(&mut self, key: &str, option: Option<u64>) -> Option<u64> {
        match (option, self.file.get(key)) {
            (Some(typed), _) => Some(typed),
            (None, None) => None,
            (None, Some(value)) => {
                let number = value.as_integer().and_then(|n| u64::try_from(n).ok());
                if number.is_none() {
                    self.faults.push(format!("{key}: want a whole number, not {value}"));
                }
                number
            }
        }
    }

    /// How many of something; at least 1.
    pub fn count(&mut self, key: &str, option: Option<u64>, default: usize) -> usize {
        let told = match (option, self.file.get(key)) {
            (Some(typed), _) => Some(typed),
            (None, None) => return default,
            (None, Some(value)) => value.as_integer().and_then(|n| u64::try_from(n).ok()),
        };
        told.and_then(|n| usize::try_from(n).ok()).filter(|n| *n > 0).unwrap_or_else(|| {
            self.faults.push(format!("{key}: want a whole number, 1 or more"));
            default
        })
    }

    fn flag(&mut self, key: &str, option: Option<bool>, default: bool) -> bool {
        match (option, self.file.get(key)) {
            (Some(typed), _) => typed,
            (None, None) => default,
            (None, Some(toml::Value::Boolean(flag))) => *flag,
            (None, Some(other)) => {
                self.faults.push(format!("{key}: want true or false, not {other}"));
                default
            }
        }
    }

    fn address(&mut self, key: &str, option: Option<String>, default: &str) -> SocketAddr {
        let text = self.text(key, option).unwrap_or_else(|| default.to_owned());
        text.parse().unwrap_or_else(|_| {
            self.faults.push(format!("{key}: {text:?} is not an address with a port, like {default}"));
            default.parse().expect("the defaults are addresses")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(file: &str, args: ServeArgs) -> Result<Settings, Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ebb.toml");
        std::fs::write(&path, file).unwrap();
        Settings::read(&ServeArgs { config: Some(path), ..args }).map_err(|failure| failure.causes)
    }

    #[test]
    fn options_win_over_the_file_and_the_file_over_defaults() {
        let args = ServeArgs { listen: Some("0.0.0.0:1".into()), ..ServeArgs::default() };
        let settings =
            read("data = \"/d\"\nlisten = \"127.0.0.1:2\"\nidle-suspend = \"2s\"\nmin-free-bytes = 7", args).unwrap();
        assert_eq!(settings.data, Path::new("/d"));
        assert_eq!(settings.bucket, "/d/bucket");
        assert_eq!(settings.listen.to_string(), "0.0.0.0:1");
        assert_eq!(settings.public_host, "127.0.0.1");
        assert_eq!(settings.api_listen.to_string(), "127.0.0.1:7432");
        assert_eq!((settings.idle_suspend, settings.min_free_bytes), (Duration::from_secs(2), 7));
    }

    #[test]
    fn every_fault_is_listed() {
        let file = "dta = \"x\"\nbucket = \"gs://x\"\ns3-path-style = 1\nlisten = \"here\"\n\
                    api-listen = \"0.0.0.0:7432\"\nidle-suspend = 5\nmin-free-bytes = -1";
        let faults = read(file, ServeArgs::default()).unwrap_err();
        insta::assert_snapshot!(faults.join("\n"), @r#"
        there is no setting "dta"; did you mean "data"?
        s3-path-style: want true or false, not 1
        listen: "here" is not an address with a port, like 127.0.0.1:6432
        idle-suspend: want a text in quotes, not 5
        min-free-bytes: want a whole number, not -1
        the scheme "gs" of the bucket's URL is not known (want s3:// or file://)
        api-listen 0.0.0.0:7432 is reachable from other machines, and the API asks nobody who they are: use a loopback address, and a tunnel from elsewhere
        "#);
    }

    #[test]
    fn collection_is_weekly_and_hourly_unless_told_otherwise() {
        let day = Duration::from_secs(86_400);
        let settings = read("data = \"/d\"", ServeArgs::default()).unwrap();
        assert_eq!((settings.collect_grace, settings.collect_interval), (7 * day, day / 24));
        let args = ServeArgs { collect_grace: Some("0s".into()), ..ServeArgs::default() };
        let settings = read("collect-grace = \"48h\"\ncollect-interval = \"5m\"", args).unwrap();
        assert_eq!((settings.collect_grace, settings.collect_interval), (Duration::ZERO, Duration::from_secs(300)));
        let faults = read("collect-grace = \"soon\"\ncollect-interval = \"10ms\"", ServeArgs::default()).unwrap_err();
        insta::assert_snapshot!(faults.join("\n"), @r#"
        collect-grace: "soon" is not a length of time (want 30s, 5m or 1h)
        collect-interval: at least 1s is wanted
        "#);
    }

    #[test]
    fn credentials_in_a_url_are_refused_and_not_shown() {
        for file in ["bucket = \"s3://key:hunter2@backups\"", "s3-endpoint = \"https://key:hunter2@host\""] {
            let faults = read(file, ServeArgs::default()).unwrap_err().join("\n");
            assert!(faults.contains("credentials") && !faults.contains("hunter2"), "{faults}");
        }
    }

    #[test]
    fn printed_settings_are_a_settings_file() {
        let s3 = "bucket = \"s3://backups/ebb\"\ns3-endpoint = \"http://127.0.0.1:9000\"\ns3-path-style = true";
        let settings = read(s3, ServeArgs::default()).unwrap();
        assert_eq!(settings.s3().endpoint.as_deref(), Some("http://127.0.0.1:9000"));
        let printed = toml::to_string(&settings).unwrap();
        assert_eq!(read(&printed, ServeArgs::default()), Ok(settings));

        let settings = read("data = \"/d\"", ServeArgs::default()).unwrap();
        let printed = toml::to_string(&settings).unwrap();
        assert_eq!(read(&printed, ServeArgs::default()), Ok(settings));
    }
}
