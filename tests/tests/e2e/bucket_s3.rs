//! The bucket is in S3; the node that filled it is gone.

use std::process::Command;

use ebb_test_s3::{ACCESS_KEY, BUCKET, SECRET_KEY, Seaweed};
use ebb_tests::{Node, Ran};

#[test]
fn an_empty_node_serves_everything_from_s3() {
    let server = Seaweed::start();
    let node = || Node::prepare().s3_bucket(&server.endpoint(), "ebb/test");
    let mut first = node().env("EBB_LOG", "trace");
    first.serve();
    first.ok(&["project", "create", "shop"]);
    first.psql("shop/prod", "create table t as select generate_series(1, 50000) as n");
    first.ok(&["checkpoint", "create", "shop/prod", "full"]);
    first.psql("shop/prod", "delete from t where n > 10");
    first.ok(&["branch", "create", "shop/pr-1", "--from", "shop/prod"]);
    first.psql("shop/pr-1", "insert into t values (-1)");
    first.suspend("shop/prod");
    let urls = ["shop/prod", "shop/pr-1"].map(|branch| (branch, first.url(branch)));
    first.stop();
    let log = first.server_log();
    assert!(log.contains("TRACE"), "the log is not as talkative as this test wants it");
    assert!(!log.contains(SECRET_KEY) && !log.contains("AWS4-HMAC"), "the log shows what requests are signed with");

    let mut second = node();
    second.serve();
    let ask = |branch: &str, sql: &str| {
        // The passwords are the old ones; only the key that encrypts their copies stayed behind.
        let (_, url) = urls.iter().find(|(name, _)| *name == branch).expect("the branch has a URL");
        let url = url.replace(&first.proxy_port.to_string(), &second.proxy_port.to_string());
        let ran = second.tool("psql", &["-XAtq", &url, "-c", sql]);
        assert_eq!(ran.code, 0, "{branch}: {}", ran.stderr);
        ran.stdout.trim().to_owned()
    };
    assert_eq!(ask("shop/prod", "select count(*) from t"), "10");
    assert_eq!(ask("shop/pr-1", "select count(*), min(n) from t"), "11|-1");
    second.ok(&["branch", "create", "shop/whole", "--from", "shop/prod@full"]);
    second.ok(&["compute", "wake", "shop/whole"]);
    let ran = second.superuser_tool("shop/whole", "psql", &["-XAtq", "-d", "app", "-c", "select count(*) from t"]);
    assert_eq!(ran.stdout.trim(), "50000");
    second.ok(&["drill", "shop/prod@full", "--probe", "select count(*) from t=50000"]);
    assert_eq!(second.json(&["ledger", "verify", "shop"])["ok"], true);
}

/// Runs `ebb serve`, which must refuse to start.
fn refused(mut command: Command) -> Ran {
    let out = command.output().expect("ebb can be started");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    let ran = Ran { code: out.status.code().unwrap_or(-1), stdout: text(&out.stdout), stderr: text(&out.stderr) };
    assert!(!ran.stderr.contains(SECRET_KEY) && !ran.stdout.contains(SECRET_KEY), "{ran:?}");
    ran
}

#[test]
fn a_bucket_that_cannot_be_used_is_said_at_start() {
    let mut server = Seaweed::start();
    let node = Node::prepare().s3_bucket(&server.endpoint(), "x");
    let command = || {
        let mut command = node.serve_command();
        command.env("EBB_LOG", "error");
        command
    };

    let mut stranger = command();
    stranger.env("AWS_SECRET_ACCESS_KEY", "AnotherSecretOfTheTests");
    let ran = refused(stranger);
    assert_eq!(ran.code, 2, "{ran:?}");
    assert!(ran.stderr.contains("does not accept the credentials: S3 answered 403 SignatureDoesNotMatch"), "{ran:?}");
    assert!(ran.stderr.contains("hint: Check AWS_ACCESS_KEY_ID") && !ran.stderr.contains("AnotherSecret"), "{ran:?}");

    server.kill();
    let ran = refused(command());
    assert_eq!(ran.code, 5, "{ran:?}");
    assert!(ran.stderr.contains(&format!("{} cannot be reached", server.endpoint())), "{ran:?}");
    assert!(ran.stderr.contains(BUCKET) && !ran.stderr.contains(ACCESS_KEY), "{ran:?}");
}
