use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use aws_config::profile::ProfileFileCredentialsProvider;
use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};
use aws_sdk_s3::config::SharedCredentialsProvider;
use ebb_test_s3::{ACCESS_KEY, BUCKET, Flaw, Mishap, Network, SECRET_KEY, Seaweed, StandIn};
use ebb_types::{ErrorKind, Hint};

use super::*;
use crate::object_store::conformance;
use crate::object_store::watched::Watched;

/// LIMIT: how long a test waits for what happens within milliseconds on an idle machine.
const PATIENCE_OF_TESTS: Duration = Duration::from_secs(30);

fn credentials(access_key: &str, secret_key: &str) -> SharedCredentialsProvider {
    let profile = format!("[default]\naws_access_key_id = {access_key}\naws_secret_access_key = {secret_key}\n");
    profile_credentials(profile)
}

fn profile_credentials(profile: String) -> SharedCredentialsProvider {
    let files = EnvConfigFiles::builder().with_contents(EnvConfigFileKind::Credentials, profile).build();
    let provider = ProfileFileCredentialsProvider::builder().profile_files(files).profile_name("default").build();
    SharedCredentialsProvider::new(provider)
}

fn at(endpoint: String) -> S3Options {
    S3Options { endpoint: Some(endpoint), region: Some("us-east-1".to_owned()), path_style: true }
}

async fn open(endpoint: String, location: &str) -> Result<S3> {
    open::open(location, &at(endpoint), Some(credentials(ACCESS_KEY, SECRET_KEY))).await
}

/// An opened bucket below a prefix of the test server's.
async fn store(endpoint: String, prefix: &str) -> S3 {
    open(endpoint, &format!("{BUCKET}/{prefix}")).await.unwrap_or_else(|error| panic!("{error} ({:?})", error.hint()))
}

/// All keys below the prefix, also those of the store's own.
async fn all_keys(store: &S3) -> Vec<String> {
    let mut keys = Vec::new();
    let take = |key: &str, _| {
        keys.push(key.to_owned());
        ControlFlow::Continue(())
    };
    store.walk("", None, take).await.unwrap();
    keys
}

async fn uploads(store: &S3) -> usize {
    let listed = store.client.list_multipart_uploads().bucket(BUCKET).send().await.unwrap();
    listed.uploads().len()
}

async fn wait_for<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE_OF_TESTS;
    while !holds().await {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A file of some parts, each different.
fn big_file(bytes: usize) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    let numbers: Vec<u8> = (0..bytes as u32 / 4).flat_map(u32::to_le_bytes).collect();
    file.write_all(&numbers).unwrap();
    file
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms_on_a_real_server() {
    let server = Seaweed::start();
    let store = store(server.endpoint(), "a/b").await;
    assert_eq!(all_keys(&store).await, [MARKER], "a probe leaves nothing");
    conformance::check(Arc::new(Watched::new(store)), 8).await;

    let again = self::store(server.endpoint(), "a/b/").await;
    assert_eq!(again.get("once/a").await.unwrap(), "third", "a bucket is found again");
    assert_eq!(uploads(&again).await, 0, "finished uploads leave nothing");
    let beside = self::store(server.endpoint(), "a/c").await;
    assert_eq!(beside.list("", None).await.unwrap(), [], "prefixes are apart");
}

#[tokio::test(flavor = "multi_thread")]
async fn conforms_through_a_network_that_fails() {
    let server = Seaweed::start();
    let network = Network::start(server.port(), 7, 0.04).await;
    let store = store(network.endpoint(), "faulty").await;
    conformance::check(Arc::new(Watched::new(store)), 8).await;
    let happened: BTreeSet<_> = network.happened().into_keys().collect();
    assert!(happened.len() >= 6, "the network hardly failed: {happened:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_does_not_make_a_put_untrue() {
    let server = Seaweed::start();
    let network = Network::start(server.port(), 0, 0.0).await;
    let store = store(network.endpoint(), "").await;
    let put = async |key: &str, mishaps: &[Mishap]| {
        mishaps.iter().for_each(|&mishap| network.plan("PUT", mishap));
        let put = store.put_if_absent(key, "the same bytes".into()).await.unwrap();
        assert_eq!(network.planned(), 0, "{mishaps:?} did not all happen");
        put
    };
    use Mishap::*;
    assert_eq!(put("lost", &[Lost]).await, Put::Created);
    assert_eq!(put("answer", &[AnswerLost]).await, Put::Created);
    assert_eq!(put("answers", &[AnswerLost, AnswerTorn, SlowDown, AnswerLost]).await, Put::Created);
    // Something in between repeated the request, and we never saw the first answer.
    assert_eq!(put("repeated", &[Repeated]).await, Put::Created);
    // Equal bytes are no proof of who wrote them.
    assert_eq!(put("answer", &[AnswerLost]).await, Put::Exists);
    assert_eq!(put("repeated", &[InternalError, Repeated]).await, Put::Exists);
    store.put("replaced", "the same bytes".into()).await.unwrap();
    assert_eq!(put("replaced", &[AnswerLost]).await, Put::Exists);

    // The same for a file in parts: the second completion finds no upload any more, or the same one.
    network.plan("POST", AnswerLost);
    network.plan("POST", AnswerLost);
    network.plan("PUT", AnswerTorn);
    let file = big_file(40 << 20);
    store.put_file("file", file.path()).await.unwrap();
    assert_eq!(network.planned(), 0);
    assert_eq!(store.get("file").await.unwrap(), std::fs::read(file.path()).unwrap());

    // Reads are made again, and what broke off is never taken for the whole.
    for mishap in [Lost, AnswerTorn, AnswerLost, SlowDown, InternalError, Silence] {
        network.plan("GET", mishap);
    }
    assert_eq!(store.get_range("file", 4..12).await.unwrap(), [1_u32.to_le_bytes(), 2_u32.to_le_bytes()].concat());
    assert_eq!(network.planned(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_upload_leaves_no_parts() {
    let server = Seaweed::start();
    let network = Network::start(server.port(), 0, 0.0).await;
    let store = Arc::new(store(network.endpoint(), "").await);
    network.plan("POST", Mishap::Repeated);
    let file = big_file(64 << 20);
    // The first part is never answered, so the upload is under way when it is dropped.
    network.plan("PUT", Mishap::Silence);
    let upload = tokio::spawn({
        let (store, path) = (store.clone(), file.path().to_owned());
        async move { store.put_file("big", &path).await }
    });
    wait_for("an upload that is under way", || async { network.planned() == 0 }).await;
    assert_eq!(uploads(&store).await, 2, "one, and one that was begun twice");
    upload.abort();
    wait_for("the abort", || async { uploads(&store).await == 1 }).await;
    assert_eq!(store.head("big").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_restarts_is_waited_for() {
    let mut server = Seaweed::start();
    let store = Arc::new(store(server.endpoint(), "").await);
    store.put("before", "1".into()).await.unwrap();
    server.kill();
    let puts: Vec<_> = (0..8)
        .map(|n| {
            let store = store.clone();
            tokio::spawn(async move { store.put_if_absent(&format!("during/{n}"), "2".into()).await })
        })
        .collect();
    server.restart();
    for put in puts {
        assert_eq!(put.await.unwrap().unwrap(), Put::Created);
    }
    assert_eq!(store.get("before").await.unwrap(), "1");
}

/// The failure to open, as a person sees it; never with a secret.
async fn refusal(location: &str, options: S3Options, access_key: &str, secret_key: &str) -> (ErrorKind, String) {
    let opened = open::open(location, &options, Some(credentials(access_key, secret_key))).await;
    let error = opened.expect_err("it was opened");
    let said = format!("{} ({})", fault::chain(&error), error.hint().unwrap_or_default());
    assert!(!said.contains(secret_key) && !format!("{error:?}").contains(secret_key), "{said}");
    (error.kind(), said)
}

fn told((kind, said): (ErrorKind, String), expect: ErrorKind, parts: &[&str]) {
    assert_eq!(kind, expect, "{said}");
    for part in parts {
        assert!(said.contains(part), "{part:?} is not in {said:?}");
    }
    assert!(!said.contains('\n'), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_a_bucket_from_being_opened_is_said() {
    let server = Seaweed::start();
    let options = || at(server.endpoint());
    let ours = |location| refusal(location, options(), ACCESS_KEY, SECRET_KEY);
    told(ours("no-such-bucket/x").await, ErrorKind::NotFound, &["there is no bucket \"no-such-bucket\"", "Make it"]);
    told(
        refusal(BUCKET, options(), ACCESS_KEY, "AnotherSecretOfTheTests").await,
        ErrorKind::Invalid,
        &["SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"],
    );
    told(
        refusal(BUCKET, options(), "stranger", SECRET_KEY).await,
        ErrorKind::Invalid,
        &["does not accept the credentials", "InvalidAccessKeyId"],
    );

    let began = Instant::now();
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    told(
        refusal(BUCKET, at(format!("http://{nobody}")), ACCESS_KEY, SECRET_KEY).await,
        ErrorKind::Unavailable,
        &["cannot be reached", "Connection refused", "--s3-endpoint"],
    );
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());

    let store = store(server.endpoint(), "used").await;
    store.put("a", Bytes::new()).await.unwrap();
    store.remove(MARKER).await.unwrap();
    told(ours("ebb-test/used").await, ErrorKind::Invalid, &["is not a bucket of Ebb's", "\"a\""]);
    let error = store.head("b").await.unwrap_err();
    assert!(fault::chain(&error).contains("has lost its object"), "a lost marker is not an empty bucket: {error}");

    store.write(MARKER, "ebb-bucket 99\n".into()).await.unwrap();
    told(ours("ebb-test/used").await, ErrorKind::Invalid, &["has format version 99; this build knows 1"]);
    store.write(MARKER, "other".into()).await.unwrap();
    assert_eq!(ours("ebb-test/used").await.0, ErrorKind::Corrupt);
}

#[tokio::test]
async fn without_credentials_it_is_said_where_they_may_come_from() {
    let options = at("http://127.0.0.1:1".to_owned());
    let nobody = profile_credentials("[default]\nregion = us-east-1\n".to_owned());
    let error = open::open(BUCKET, &options, Some(nobody)).await.unwrap_err();
    let said = format!("{error} ({})", error.hint().unwrap());
    told((error.kind(), said), ErrorKind::Invalid, &["there are no credentials", "AWS_ACCESS_KEY_ID"]);
}

async fn stand_in(flaw: Flaw) -> (StandIn, Result<S3>) {
    let server = StandIn::start(flaw).await;
    let opened = open(server.endpoint(), "any-bucket/x").await;
    (server, opened)
}

/// Not real servers: they show that the probe finds the flaw, and nothing but the flaw.
#[tokio::test(flavor = "multi_thread")]
async fn stores_that_do_not_keep_what_ebb_rests_on_are_refused() {
    let (server, opened) = stand_in(Flaw::None).await;
    opened.unwrap();
    assert_eq!(server.paths(), ["/any-bucket/x/ebb-bucket"]);

    for (flaw, why) in [
        (Flaw::IgnoresConditions, "replaced an object"),
        (Flaw::LooksThenWrites, "of 4 racing puts with `If-None-Match: *`, 4 were told that they won"),
        (Flaw::DropsMetadata, "lost its metadata"),
    ] {
        let (server, opened) = stand_in(flaw).await;
        let error = opened.expect_err("a dishonest store was opened");
        let said = format!("{error} ({})", error.hint().unwrap());
        told((error.kind(), said), ErrorKind::Invalid, &[&server.endpoint(), why, "bucket.md"]);
        assert_eq!(server.paths(), [""; 0], "a refused store is left as it was");
    }

    let (_server, opened) = stand_in(Flaw::ReadOnly).await;
    let error = opened.unwrap_err();
    told((error.kind(), format!("{error} {:?}", error.hint())), ErrorKind::Invalid, &["AccessDenied", "s3:PutObject"]);
    let (_server, opened) = stand_in(Flaw::Redirects).await;
    let error = opened.unwrap_err();
    told((error.kind(), format!("{error} {:?}", error.hint())), ErrorKind::Invalid, &["region", "--s3-region"]);
}

/// s3rver 3.7.1, a mock that ignores conditions, where somebody has it: `EBB_TEST_S3RVER=<path of its program>`.
#[tokio::test(flavor = "multi_thread")]
async fn s3rver_is_refused() {
    let Some(program) = std::env::var_os("EBB_TEST_S3RVER") else { return };
    let dir = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL"]).arg(program).args(["-a", "127.0.0.1", "-p", &port.to_string(), "-d"]);
    command.arg(dir.path()).args(["--configure-bucket", "any-bucket"]).stdout(Stdio::null()).stderr(Stdio::null());
    let _server = Killed(command.stdin(Stdio::null()).spawn().unwrap());
    wait_for("s3rver", || async { tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok() }).await;
    let options = at(format!("http://127.0.0.1:{port}"));
    let error = open::open("any-bucket", &options, Some(credentials("S3RVER", "S3RVER"))).await.unwrap_err();
    assert!(error.to_string().contains("does not keep what Ebb rests on"), "{error}");
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_listing_begins_where_no_order_leaves_anything_out() {
    let check = |prefix, after, expect: Option<&str>| assert_eq!(server_start(prefix, after), expect, "{after}");
    check("log/", "log/00000000000000000041", Some("log/0000000000000000004"));
    check("", "abc", Some("ab"));
    for after in ["", "log/", "log/a", "log/a-b", "log/a.b", "log/ab/c", "zzz", "other/x"] {
        check("log/", after, None);
    }
}

#[test]
fn a_range_is_what_was_asked_for() {
    let kind = |answered, range| check_range(answered, &range).map_err(|fault| fault.kind);
    assert_eq!(kind(Some("bytes 3-6/10"), 3..7), Ok(()));
    assert_eq!(kind(Some("bytes 5-9/10"), 5..11), Err(Kind::Range));
    for wrong in [None, Some(""), Some("bytes 0-3/10"), Some("bytes 3-7/10"), Some("bytes 3-6/*"), Some("bytes x")] {
        assert_eq!(kind(wrong, 3..7), Err(Kind::Refused), "{wrong:?}");
    }
}
