//! Who gets in at the proxy, as `ebb serve` can be told it.

use std::path::PathBuf;

use clap::Args as ClapArgs;
use ebb_proxy::{GivenFiles, ProxyConfig, Rate, Rates};
use ebb_types::parse_network;
use ipnet::IpNet;
use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use super::config::Sources;

/// The keys a settings file may have for it, each named as its option.
pub const KEYS: [&str; 12] = [
    "tls-cert",
    "tls-key",
    "client-ca",
    "proxy-protocol",
    "connections-per-endpoint",
    "connections-per-role",
    "unauthenticated-max",
    "unauthenticated-per-address",
    "logins-per-address",
    "logins-per-endpoint",
    "failed-logins-per-address",
    "failed-logins-per-endpoint",
];

/// LIMIT: the proxy has room for 60,000 connections; those that have logged in must have most of it.
const UNAUTHENTICATED_MAX: usize = 30_000;

/// LIMIT: of the descriptors that the system grants this process, strangers get one in so many; a session needs two.
const STRANGERS_SHARE: u64 = 3;

/// The options of `ebb serve` that say who gets in.
#[derive(Debug, Default, ClapArgs)]
#[command(next_help_heading = "Who gets in")]
pub struct AccessArgs {
    /// The certificate that clients are shown, with those that lead to its authority; PEM; read again when it changes
    /// [default: signed by an authority of this node's own]
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// Its key; PEM
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Authorities of client certificates; PEM; with it, clients from other machines must show one of their role, besides
    /// the password
    #[arg(long, value_name = "FILE")]
    pub client_ca: Option<PathBuf>,
    /// Load balancers that tell for whom they speak (PROXY protocol, version 2): networks, separated by commas [default: none]
    #[arg(long, value_name = "CIDR,...")]
    pub proxy_protocol: Option<String>,
    /// Connections that one branch takes, sleeping ones included [default: 10000]
    #[arg(long, value_name = "N")]
    pub connections_per_endpoint: Option<u64>,
    /// … and that one role takes at it [default: 10000]
    #[arg(long, value_name = "N")]
    pub connections_per_role: Option<u64>,
    /// Connections that have not logged in yet [default: 10000]
    #[arg(long, value_name = "N")]
    pub unauthenticated_max: Option<u64>,
    /// … of one address [default: 1000]
    #[arg(long, value_name = "N")]
    pub unauthenticated_per_address: Option<u64>,
    /// Connections of one address: so many a second (s; m or h), so many at once [default: 200/s,10000]
    #[arg(long, value_name = "RATE")]
    pub logins_per_address: Option<String>,
    /// Logins at one branch by addresses that have not logged in there for a day [default: 1000/s,20000]
    #[arg(long, value_name = "RATE")]
    pub logins_per_endpoint: Option<String>,
    /// Wrong passwords of one address [default: 5/s,300]
    #[arg(long, value_name = "RATE")]
    pub failed_logins_per_address: Option<String>,
    /// Wrong passwords at one branch by addresses that have not logged in there for a day [default: 20/s,2000]
    #[arg(long, value_name = "RATE")]
    pub failed_logins_per_endpoint: Option<String>,
}

/// Who gets in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Access {
    /// The certificate that clients are shown. Default: of the own authority.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_cert: Option<PathBuf>,
    /// Its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
    /// Authorities of client certificates. Default: none is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub client_ca: Option<PathBuf>,
    /// Load balancers that tell for whom they speak. Default: none.
    #[serde(serialize_with = "as_list", skip_serializing_if = "Vec::is_empty")]
    pub proxy_protocol: Vec<IpNet>,
    /// Connections per branch.
    pub connections_per_endpoint: usize,
    /// Connections per role and branch.
    pub connections_per_role: usize,
    /// Connections that have not logged in.
    pub unauthenticated_max: usize,
    /// … of one address.
    pub unauthenticated_per_address: usize,
    /// Connections of one address.
    #[serde(serialize_with = "as_text")]
    pub logins_per_address: Rate,
    /// Logins at one branch by strangers.
    #[serde(serialize_with = "as_text")]
    pub logins_per_endpoint: Rate,
    /// Wrong passwords of one address.
    #[serde(serialize_with = "as_text")]
    pub failed_logins_per_address: Rate,
    /// Wrong passwords at one branch by strangers.
    #[serde(serialize_with = "as_text")]
    pub failed_logins_per_endpoint: Rate,
}

fn as_text<S: serde::Serializer>(rate: &Rate, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(rate)
}

fn as_list<S: serde::Serializer>(networks: &[IpNet], to: S) -> Result<S::Ok, S::Error> {
    let texts: Vec<_> = networks.iter().map(ToString::to_string).collect();
    to.serialize_str(&texts.join(","))
}

impl Access {
    /// Puts together what was typed, what the file says, and the proxy's defaults; notes what is wrong.
    pub fn read(sources: &mut Sources<'_>, args: &AccessArgs) -> Self {
        let defaults = ProxyConfig::new(([127, 0, 0, 1], 0).into(), PathBuf::new());
        let Rates { address, endpoint, address_failures, endpoint_failures } = defaults.rates;
        let path = |sources: &mut Sources<'_>, key, given: &Option<PathBuf>| {
            let text = sources.text(key, given.as_ref().map(|path| path.display().to_string()));
            text.map(PathBuf::from)
        };
        let tls_cert = path(sources, "tls-cert", &args.tls_cert);
        let tls_key = path(sources, "tls-key", &args.tls_key);
        let client_ca = path(sources, "client-ca", &args.client_ca);
        if tls_cert.is_some() != tls_key.is_some() {
            sources.faults.push("tls-cert and tls-key: one is of no use without the other".to_owned());
        }
        let networks = sources.text("proxy-protocol", args.proxy_protocol.clone());
        let networks =
            networks.as_deref().unwrap_or_default().split(',').map(str::trim).filter(|text| !text.is_empty());
        let parsed = networks.filter_map(|text| match parse_network(text) {
            Ok(network) => Some(network),
            Err(fault) => {
                sources.faults.push(format!("proxy-protocol: {fault}"));
                None
            }
        });
        let proxy_protocol = parsed.collect();
        let mut count = |key, given, default| sources.count(key, given, default);
        let access = Self {
            tls_cert,
            tls_key,
            client_ca,
            proxy_protocol,
            connections_per_endpoint: count(
                "connections-per-endpoint",
                args.connections_per_endpoint,
                defaults.sessions_per_endpoint_max,
            ),
            connections_per_role: count(
                "connections-per-role",
                args.connections_per_role,
                defaults.sessions_per_role_max,
            ),
            unauthenticated_max: count("unauthenticated-max", args.unauthenticated_max, defaults.unauthenticated_max),
            unauthenticated_per_address: count(
                "unauthenticated-per-address",
                args.unauthenticated_per_address,
                defaults.unauthenticated_per_address_max,
            ),
            logins_per_address: rate(sources, "logins-per-address", &args.logins_per_address, address),
            logins_per_endpoint: rate(sources, "logins-per-endpoint", &args.logins_per_endpoint, endpoint),
            failed_logins_per_address: rate(
                sources,
                "failed-logins-per-address",
                &args.failed_logins_per_address,
                address_failures,
            ),
            failed_logins_per_endpoint: rate(
                sources,
                "failed-logins-per-endpoint",
                &args.failed_logins_per_endpoint,
                endpoint_failures,
            ),
        };
        if access.unauthenticated_max > UNAUTHENTICATED_MAX {
            sources
                .faults
                .push(format!("unauthenticated-max: at most {UNAUTHENTICATED_MAX}, so that others have room"));
        }
        access
    }

    /// Tells the proxy.
    pub fn apply(&self, config: &mut ProxyConfig) {
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let most = usize::try_from(descriptors / STRANGERS_SHARE).unwrap_or(usize::MAX).max(1);
        if self.unauthenticated_max > most {
            tracing::info!(descriptors, most, "fewer connections may be held that have not logged in");
        }
        let certificate = self.tls_cert.clone().zip(self.tls_key.clone());
        config.files = GivenFiles { certificate, client_ca: self.client_ca.clone() };
        config.proxy_protocol.clone_from(&self.proxy_protocol);
        config.sessions_per_endpoint_max = self.connections_per_endpoint;
        config.sessions_per_role_max = self.connections_per_role;
        config.unauthenticated_max = self.unauthenticated_max.min(most);
        config.unauthenticated_per_address_max = self.unauthenticated_per_address;
        config.rates = Rates {
            address: self.logins_per_address,
            endpoint: self.logins_per_endpoint,
            address_failures: self.failed_logins_per_address,
            endpoint_failures: self.failed_logins_per_endpoint,
        };
    }
}

fn rate(sources: &mut Sources<'_>, key: &str, given: &Option<String>, default: Rate) -> Rate {
    let Some(text) = sources.text(key, given.clone()) else { return default };
    text.parse().unwrap_or_else(|fault| {
        sources.faults.push(format!("{key}: {fault}"));
        default
    })
}
