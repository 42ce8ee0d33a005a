//! Who gets in: passwords changed in SQL, allow lists, certificates, clients behind load balancers.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};

use ebb_tests::{Authority, Node, Ran, python, wait_for};
use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpListener, TcpSocket};

/// The address that the proxy takes for a load balancer's.
const BALANCER: &str = "127.0.0.2";

/// A server whose clients may come through a load balancer at [`BALANCER`].
fn behind_balancer(args: &[&str]) -> Node {
    let mut node = Node::prepare().arg("--proxy-protocol").arg(BALANCER);
    for arg in args {
        node = node.arg(arg);
    }
    node.serve();
    node.ok(&["project", "create", "shop"]);
    node
}

/// A load balancer that speaks for one client at this address; the port it is to be reached at.
async fn balancer(node: &Node, client: Ipv4Addr) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let port = listener.local_addr().expect("it is bound").port();
    let to = SocketAddr::from((Ipv4Addr::LOCALHOST, node.proxy_port));
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".to_vec();
    header.extend_from_slice(&client.octets());
    header.extend_from_slice(&[127, 0, 0, 1, 0x1f, 0x90, 0x15, 0x38]);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let header = header.clone();
            tokio::spawn(async move {
                let socket = TcpSocket::new_v4()?;
                socket.bind(SocketAddr::new(BALANCER.parse().expect("it is an address"), 0))?;
                let mut proxy = socket.connect(to).await?;
                proxy.write_all(&header).await?;
                tokio::io::copy_bidirectional(&mut client, &mut proxy).await
            });
        }
    });
    port
}

/// libpq parameters of role `app` on a branch, at a port of loopback.
fn conninfo(node: &Node, branch: &str, port: u16) -> String {
    let url = node.url(branch);
    let password = url.split(':').nth(2).and_then(|rest| rest.split('@').next()).expect("the URL has a password");
    let (project, branch) = branch.split_once('/').expect("it is PROJECT/BRANCH");
    format!(
        "hostaddr=127.0.0.1 host=localhost port={port} user=app password={password} dbname=app \
         options=endpoint={branch}--{project} connect_timeout=60"
    )
}

fn query(node: &Node, conninfo: &str, sql: &str) -> Ran {
    node.tool("psql", &["-XAtq", "-v", "ON_ERROR_STOP=1", conninfo, "-c", sql])
}

fn gets_in(node: &Node, conninfo: &str) {
    let ran = query(node, conninfo, "select 1");
    assert_eq!((ran.code, ran.stdout.trim()), (0, "1"), "{conninfo}: {}", ran.stderr);
}

fn is_refused(node: &Node, conninfo: &str, why: &str) {
    let ran = query(node, conninfo, "select 1");
    assert_ne!(ran.code, 0, "{conninfo} got in");
    assert!(ran.stderr.contains(why), "{conninfo}: {}", ran.stderr);
}

#[test]
fn a_password_changed_in_sql_counts_at_the_next_login_awake_and_asleep() {
    let node = Node::with_shop();
    let first = conninfo(&node, "shop/prod", node.proxy_port);
    let with = |password: &str| format!("{first} password={password}");
    // Awake: each change counts at once, and what was before does not.
    gets_in(&node, &first);
    let mut before = first.clone();
    for password in ["one", "two", "three"] {
        let ran = query(&node, &before, &format!("alter role app password '{password}'"));
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        is_refused(&node, &before, "password authentication failed");
        before = with(password);
        gets_in(&node, &before);
    }
    // Asleep: changed, and suspended at once.
    query(&node, &before, "alter role app password 'four'");
    node.suspend("shop/prod");
    let wakes = node.wakes("shop/prod");
    is_refused(&node, &before, "password authentication failed");
    assert_eq!(node.wakes("shop/prod"), wakes, "the old password wakes nothing");
    gets_in(&node, &with("four"));
    assert_eq!(node.wakes("shop/prod"), wakes + 1);

    // A role that never was.
    let made = "create role bob login password 'secret'; create role eve password 'secret'";
    let ran = node.superuser_tool("shop/prod", "psql", &["-Xq", "-d", "app", "-c", made]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let bob = format!("{first} user=bob password=secret");
    gets_in(&node, &bob);
    node.superuser_tool("shop/prod", "psql", &["-Xq", "-d", "app", "-c", "create role ann login password 'secret'"]);
    node.suspend("shop/prod");
    for (role, gets) in [("bob", true), ("ann", true), ("eve", false), ("nobody", false)] {
        let conninfo = format!("{first} user={role} password=secret");
        if gets { gets_in(&node, &conninfo) } else { is_refused(&node, &conninfo, "password authentication failed") }
    }
}

#[test]
fn a_password_that_is_stored_as_md5_is_refused_with_a_hint_that_all_get() {
    let node = Node::with_shop();
    let app = conninfo(&node, "shop/prod", node.proxy_port);
    let ran = query(&node, &app, "set password_encryption = 'md5'; alter role app password 'weak'");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let heard = |conninfo: String| query(&node, &conninfo, "select 1").stderr;
    let weak = heard(format!("{app} password=weak"));
    assert!(weak.contains("password authentication failed") && weak.contains("scram-sha-256"), "{weak}");
    let unknown = heard(format!("{app} user=nobody password=weak"));
    assert_eq!(unknown.replace("nobody", "app"), weak, "nothing tells that the role exists");
    let log = fs::read_to_string(node.branch_dir("shop/prod").join("unit.log")).expect("a unit has a log");
    assert!(log.contains("stored as md5") && log.contains("app"), "the operator is told: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_allow_list_is_of_the_branch_and_of_what_is_made_from_it() {
    let node = behind_balancer(&[]);
    let inside = balancer(&node, [192, 0, 2, 7].into()).await;
    let outside = balancer(&node, [198, 51, 100, 7].into()).await;
    let at = |branch: &str, port| format!("{} sslmode=require", conninfo(&node, branch, port));
    gets_in(&node, &at("shop/prod", outside));
    node.suspend("shop/prod");
    let wakes = node.wakes("shop/prod");

    node.ok(&["branch", "allow", "shop/prod", "192.0.2.1/24", "2001:db8::/32"]);
    let shown = node.json(&["branch", "show", "shop/prod"]);
    assert_eq!(shown["allow"], serde_json::json!(["192.0.2.0/24", "2001:db8::/32"]));
    is_refused(&node, &at("shop/prod", outside), "does not take connections from address 198.51.100.7");
    is_refused(&node, &format!("{} user=nobody", at("shop/prod", outside)), "does not take connections from");
    assert_eq!(node.wakes("shop/prod"), wakes, "it was refused before anything woke");
    gets_in(&node, &at("shop/prod", inside));
    // `ebb psql` and whatever else is on the machine.
    assert_eq!(node.psql("shop/prod", "select 1"), "1");
    gets_in(&node, &at("shop/dev", outside));

    // What is made from it has the same data; so has what a restore sets aside.
    node.ok(&["branch", "create", "shop/copy", "--from", "shop/prod"]);
    is_refused(&node, &at("shop/copy", outside), "does not take connections");
    node.ok(&["checkpoint", "create", "shop/prod", "here"]);
    let restored = node.json(&["branch", "restore", "shop/prod", "--to", "here"]);
    let rescue = format!("shop/{}", restored["rescue"]["name"].as_str().expect("a rescue branch has a name"));
    is_refused(&node, &at(&rescue, outside), "does not take connections");
    is_refused(&node, &at("shop/prod", outside), "does not take connections");

    node.ok(&["branch", "allow", "shop/prod", "--any"]);
    gets_in(&node, &at("shop/prod", outside));
    is_refused(&node, &at("shop/copy", outside), "does not take connections");
    assert!(node.json(&["branch", "show", "shop/prod"]).get("allow").is_none());
    assert_ne!(node.ebb(&["branch", "allow", "shop/prod", "192.0.2.0/33"]).code, 0);
    assert_ne!(node.ebb(&["branch", "allow", "shop/prod"]).code, 0, "nothing is not `any`");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_on_both_sides_with_psql_and_psycopg() {
    let dir = tempfile::tempdir().expect("a directory can be made");
    let authority = Authority::new(dir.path());
    authority.sign("server", "db", &["db.example.com"]);
    authority.sign("app", "app", &[]);
    authority.sign("eve", "eve", &[]);
    let path = |name: &str| authority.path(name);
    let node = behind_balancer(&[
        "--tls-cert",
        &path("server.crt"),
        "--tls-key",
        &path("server.key"),
        "--client-ca",
        &path("ca.pem"),
    ]);
    let afar = balancer(&node, [192, 0, 2, 7].into()).await;
    let base = format!(
        "{} host=db.example.com sslmode=verify-full sslrootcert={} channel_binding=require",
        conninfo(&node, "shop/prod", afar),
        path("ca.pem")
    );
    let with =
        |name: &str| format!("{base} sslcert={} sslkey={}", path(&format!("{name}.crt")), path(&format!("{name}.key")));
    is_refused(&node, &format!("{base} sslcert=none"), "connection requires a valid client certificate");
    is_refused(&node, &with("eve"), "certificate authentication failed for user \"app\"");
    is_refused(&node, &format!("{} password=wrong", with("app")), "password authentication failed");
    assert_eq!(node.wakes("shop/prod"), 0);
    gets_in(&node, &with("app"));
    let program = "import psycopg, sys\n\
        with psycopg.connect(sys.argv[1]) as conn: print(conn.execute('select current_user').fetchone()[0])";
    assert_eq!(python(program, &[&with("app")]).trim(), "app");
    // The URLs that are printed name no authority of this node's own.
    let urls = node.json(&["url", "shop/prod"]);
    assert!(!urls["url_sni"].as_str().expect("there is one").contains("sslrootcert"), "{urls}");
    assert_eq!(node.psql("shop/prod", "select 1"), "1", "on the machine itself the password is enough");
}

/// A HAProxy that sends version 2 to a server; stopped when dropped.
struct HaProxy {
    process: Child,
    port: u16,
    _dir: tempfile::TempDir,
}

impl HaProxy {
    fn start(to: u16) -> Self {
        let dir = tempfile::tempdir().expect("a directory can be made");
        let port = ebb_test_s3::free_port();
        let config = dir.path().join("haproxy.cfg");
        let text = format!(
            "defaults\n mode tcp\n timeout connect 5s\n timeout client 60s\n timeout server 60s\n\
             listen ebb\n bind 127.0.0.1:{port}\n source {BALANCER}\n \
             server ebb 127.0.0.1:{to} send-proxy-v2 proxy-v2-options crc32c,unique-id check check-send-proxy\n"
        );
        fs::write(&config, text).expect("a file can be written");
        let process = Command::new("/usr/sbin/haproxy").arg("-db").arg("-f").arg(&config).stdin(Stdio::null()).spawn();
        let process = process.expect("haproxy runs: scripts/setup test installs it");
        let started = Self { process, port, _dir: dir };
        wait_for("haproxy", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
        started
    }
}

impl Drop for HaProxy {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn haproxy_tells_where_clients_are() {
    let node = behind_balancer(&[]);
    let haproxy = HaProxy::start(node.proxy_port);
    let through = conninfo(&node, "shop/prod", haproxy.port);
    gets_in(&node, &format!("{through} sslmode=require"));
    // It speaks for a client of 127.0.0.1; that this is the proxy's own machine is not on its word.
    is_refused(&node, &format!("{through} sslmode=disable"), "must be encrypted");
    node.ok(&["branch", "allow", "shop/prod", "192.0.2.0/24"]);
    is_refused(&node, &format!("{through} sslmode=require"), "does not take connections from address 127.0.0.1");
    node.ok(&["branch", "allow", "shop/prod", "127.0.0.1"]);
    gets_in(&node, &format!("{through} sslmode=require"));
}
