//! From a URL to a bucket that may be used: whom to ask, as whom, and whether it is one of ours.
//!
//! What can be wrong is said here, once, with what to change: the calls that follow only know that the bucket did not
//! answer. No message holds a credential, nor what was signed with one.

use std::ops::ControlFlow;
use std::time::Duration;

use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::{BehaviorVersion, SdkConfig};
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{ProvideCredentials, Region, SharedCredentialsProvider, StalledStreamProtectionConfig};
use aws_sdk_s3::{Client, config};
use ebb_types::ErrorKind;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::fault::{Fault, Kind, Passing, chain};
use super::retry::Retries;
use super::{PATIENCE, S3, probe};
use crate::error::{Error, Result};
use crate::object_store::{MARKER, Put, check_key, check_marker, marker_text};

/// LIMIT: while somebody waits for a start, a store that does not answer is given up sooner.
const OPEN_PATIENCE: Duration = Duration::from_secs(3);
const CONNECT_WITHIN: Duration = Duration::from_secs(3);

/// LIMIT: asking a machine's metadata service, or exchanging a token, takes one or two requests.
const CREDENTIALS_WITHIN: Duration = Duration::from_secs(15);

/// The region that stores other than Amazon's expect unless they are told another one.
const ANY_REGION: &str = "us-east-1";

/// The store's own keys: beside the marker, what a probe leaves for a moment.
pub(super) const PROBE: &str = ".probe/";

/// Where an S3 bucket is. Who asks is never said here: credentials come from the environment (`AWS_ACCESS_KEY_ID` …),
/// a profile, a web identity token, or the machine's metadata service.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct S3Options {
    /// URL of the store. `None`: Amazon's, or what `AWS_ENDPOINT_URL` says.
    pub endpoint: Option<String>,
    /// The bucket's region. `None`: `AWS_REGION`, the profile's, this machine's; with an endpoint, `us-east-1`.
    pub region: Option<String>,
    /// Whether the bucket's name goes into the path of a request rather than into its host name.
    pub path_style: bool,
}

impl S3Options {
    /// Refuses what makes no sense, without repeating what may be a password.
    pub(in crate::object_store) fn check(&self) -> Result<()> {
        if let Some(endpoint) = &self.endpoint {
            check_endpoint(endpoint)?;
        }
        match &self.region {
            Some(region) if region.is_empty() => Err(invalid("the S3 region is empty")),
            _ => Ok(()),
        }
    }
}

fn invalid(why: impl Into<String>) -> Error {
    Error::Invalid(why.into())
}

fn check_endpoint(endpoint: &str) -> Result<()> {
    let rest = endpoint.strip_prefix("https://").or_else(|| endpoint.strip_prefix("http://"));
    if endpoint.contains('@') {
        return Err(invalid("the S3 endpoint holds credentials: they come from the environment or a profile instead"));
    }
    let host = rest.unwrap_or_default().split('/').next().unwrap_or_default();
    if host.is_empty() || endpoint.contains(['?', '#', ' ']) {
        return Err(invalid(format!("the S3 endpoint {endpoint:?} is not a URL like https://s3.example.com")));
    }
    Ok(())
}

/// Whether `name/prefix` may be where a bucket is.
pub(in crate::object_store) fn check_location(location: &str) -> Result<()> {
    parse(location).map(drop)
}

/// Splits `name/prefix`; the prefix is empty or ends in a slash.
///
/// # Errors
/// `Invalid`, without repeating what may be a password.
fn parse(location: &str) -> Result<(String, String)> {
    if location.contains('@') {
        return Err(invalid("the bucket's URL holds credentials: they come from the environment or a profile instead"));
    }
    let (name, prefix) = location.split_once('/').unwrap_or((location, ""));
    let is_name = (3..=63).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        && !name.starts_with('.');
    if !is_name {
        return Err(invalid(format!(
            "{name:?} cannot be the name of a bucket in S3 (want s3://name or s3://name/prefix)"
        )));
    }
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    if prefix.is_empty() {
        return Ok((name.to_owned(), String::new()));
    }
    check_key(prefix).map_err(|_| {
        invalid(format!(
            "{prefix:?} cannot be a prefix in S3 (want names of letters, digits, '.', '_', '-' and slashes)"
        ))
    })?;
    Ok((name.to_owned(), format!("{prefix}/")))
}

/// See [`S3::open`]. `credentials` stand in for the usual chain.
pub(super) async fn open(
    location: &str,
    options: &S3Options,
    credentials: Option<SharedCredentialsProvider>,
) -> Result<S3> {
    let (mut store, sdk) = name(location, options, credentials).await?;
    check_credentials(&sdk, &store.place).await?;
    store.patience = OPEN_PATIENCE;
    let marked = store.is_marked().await?;
    if !marked {
        store.refuse_if_used().await?;
    }
    probe::run(&store).await?;
    if !marked {
        store.mark().await?;
    }
    store.patience = PATIENCE;
    Ok(store)
}

/// See [`S3::attach`].
pub(super) async fn attach(location: &str, options: &S3Options) -> Result<S3> {
    name(location, options, None).await.map(|(store, _)| store)
}

/// The store as it is named; nothing is asked of it.
async fn name(
    location: &str,
    options: &S3Options,
    credentials: Option<SharedCredentialsProvider>,
) -> Result<(S3, SdkConfig)> {
    let (bucket, root) = parse(location)?;
    options.check()?;
    let sdk = load(options, credentials).await;
    let place = place(options, &sdk)?;
    let client = client(&sdk, options);
    Ok((S3 { client, place, bucket, root, patience: PATIENCE, retries: Retries::new() }, sdk))
}

async fn load(options: &S3Options, credentials: Option<SharedCredentialsProvider>) -> SdkConfig {
    let loader = aws_config::defaults(BehaviorVersion::latest());
    let loader = match credentials {
        Some(credentials) => loader.credentials_provider(credentials),
        None => loader,
    };
    if let Some(region) = &options.region {
        return loader.region(Region::new(region.clone())).load().await;
    }
    if options.endpoint.is_none() {
        return loader.load().await;
    }
    // Not the machine's metadata service: where there is none, asking it takes seconds.
    let chain = RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new());
    let chain = chain.or_else(ProfileFileRegionProvider::new()).or_else(ANY_REGION);
    loader.region(chain).load().await
}

/// Where the store is, for people.
fn place(options: &S3Options, sdk: &SdkConfig) -> Result<String> {
    let Some(region) = sdk.region() else {
        return Err(Error::Unusable {
            kind: ErrorKind::Invalid,
            what: "the bucket's region is not known".to_owned(),
            hint: "Name it with --s3-region, AWS_REGION or a profile; or name another store with --s3-endpoint."
                .to_owned(),
        });
    };
    match options.endpoint.as_deref().or(sdk.endpoint_url()) {
        Some(endpoint) => check_endpoint(endpoint).map(|()| endpoint.to_owned()),
        None => Ok(format!("Amazon S3 in region {region}")),
    }
}

async fn check_credentials(sdk: &SdkConfig, place: &str) -> Result<()> {
    let asked = async {
        match sdk.credentials_provider() {
            Some(provider) => provider.provide_credentials().await.map(drop).map_err(|error| chain(&error)),
            None => Err("there is nowhere to look for them".to_owned()),
        }
    };
    let found = timeout(CREDENTIALS_WITHIN, asked).await;
    let why = match found.unwrap_or_else(|_| Err(format!("no answer within {CREDENTIALS_WITHIN:?}"))) {
        Ok(()) => return Ok(()),
        Err(why) => why,
    };
    Err(Error::Unusable {
        kind: ErrorKind::Invalid,
        what: format!("there are no credentials for {place}: {why}"),
        hint: "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give this machine a role."
            .to_owned(),
    })
}

fn client(sdk: &SdkConfig, options: &S3Options) -> Client {
    // Retries and deadlines are ours: the SDK's would not know which puts may have been answered.
    let config = config::Builder::from(sdk)
        .force_path_style(options.path_style)
        .retry_config(RetryConfig::disabled())
        .timeout_config(TimeoutConfig::builder().connect_timeout(CONNECT_WITHIN).build())
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled());
    let config = match &options.endpoint {
        Some(endpoint) => config.endpoint_url(endpoint),
        None => config,
    };
    Client::from_conf(config.build())
}

impl S3 {
    async fn is_marked(&self) -> Result<bool> {
        match self.read(MARKER, None).await {
            Ok(marker) => check_marker(&self.url(), &String::from_utf8_lossy(&marker)).map(|()| true),
            Err(fault) if fault.kind == Kind::NoSuchKey => Ok(false),
            Err(fault) => Err(self.unusable(fault)),
        }
    }

    /// Below a prefix without our marker there may be nothing, but for a probe's leavings and what a console makes to show
    /// a prefix as a folder.
    async fn refuse_if_used(&self) -> Result<()> {
        let mut other = None;
        let look = |key: &str, _| {
            if key.is_empty() || key.starts_with(PROBE) {
                return ControlFlow::Continue(());
            }
            other = Some(key.to_owned());
            ControlFlow::Break(())
        };
        self.walk("", None, look).await.map_err(|fault| self.unusable(fault))?;
        let Some(other) = other else { return Ok(()) };
        // Another node may have made the bucket since we looked for the marker.
        if self.is_marked().await? {
            return Ok(());
        }
        Err(Error::Invalid(format!(
            "{} at {} is not a bucket of Ebb's (it has no object {MARKER:?}) and not empty (it has {other:?})",
            self.url(),
            self.place
        )))
    }

    async fn mark(&self) -> Result<()> {
        match self.create(MARKER, marker_text().into()).await.map_err(|fault| self.unusable(fault))? {
            Put::Created => Ok(()),
            // Another node was first: is its format ours?
            Put::Exists => self.is_marked().await.map(drop),
        }
    }

    /// What a fault means to whoever wants to open the bucket.
    pub(super) fn unusable(&self, fault: Fault) -> Error {
        let (place, bucket, why) = (&self.place, &self.bucket, &fault.message);
        let (kind, what, hint) = match fault.kind {
            Kind::NoSuchBucket => (
                ErrorKind::NotFound,
                format!("there is no bucket {bucket:?} at {place}"),
                "Make it first; or is its name, --s3-endpoint or --s3-region another one?",
            ),
            Kind::Credentials => (
                ErrorKind::Invalid,
                format!("{place} does not accept the credentials: {why}"),
                "Check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or the profile in AWS_PROFILE, and this machine's clock.",
            ),
            Kind::Denied => (
                ErrorKind::Invalid,
                format!("{place} does not allow the use of bucket {bucket:?}: {why}"),
                "Allow s3:ListBucket on the bucket, and on its objects s3:GetObject, s3:PutObject, s3:DeleteObject and \
                 s3:AbortMultipartUpload (docs/formats/bucket.md).",
            ),
            Kind::Region => (
                ErrorKind::Invalid,
                format!("bucket {bucket:?} is not in the region that was asked: {why}"),
                "Name the bucket's own region with --s3-region.",
            ),
            Kind::Passing(Passing::Connection | Passing::Timeout) => (
                ErrorKind::Unavailable,
                format!("{place} cannot be reached: {why}"),
                "Is the server up, and --s3-endpoint right? A store without a host name per bucket needs --s3-path-style.",
            ),
            Kind::Passing(_) => {
                (ErrorKind::Unavailable, format!("{place} does not serve now: {why}"), "Try again when it does.")
            }
            _ => (
                ErrorKind::Invalid,
                format!("{place} does not work as a bucket: {why}"),
                "docs/formats/bucket.md says what a store must do, and which ones do.",
            ),
        };
        Error::Unusable { kind, what, hint: hint.to_owned() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations() {
        let check = |location, name: &str, root: &str| assert_eq!(parse(location).unwrap(), (name.into(), root.into()));
        check("bucket", "bucket", "");
        check("bucket/", "bucket", "");
        check("bucket/ebb", "bucket", "ebb/");
        check("my.bucket-1/a/b/", "my.bucket-1", "a/b/");
        for bad in ["", "/x", "ab", "b?x", "bucket//x", "bucket/../x", "bucket/a b", "bucket/x?y=1", "bucket/.hidden"] {
            assert!(parse(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn a_password_in_a_url_is_refused_and_not_repeated() {
        let mut said = parse("key:hunter2@bucket/x").unwrap_err().to_string();
        let options = S3Options { endpoint: Some("https://key:hunter2@host".into()), ..S3Options::default() };
        said.push_str(&options.check().unwrap_err().to_string());
        assert!(said.contains("credentials") && !said.contains("hunter2"), "{said}");
    }

    #[test]
    fn endpoints() {
        for good in ["http://127.0.0.1:9000", "https://s3.example.com", "https://host/base/"] {
            assert!(check_endpoint(good).is_ok(), "{good}");
        }
        for bad in ["", "host", "ftp://host", "https://", "https:///x", "https://host?x", "http://a b"] {
            assert!(check_endpoint(bad).is_err(), "{bad:?} was taken");
        }
    }
}
