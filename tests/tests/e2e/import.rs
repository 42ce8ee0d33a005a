//! Moving to Ebb, and away from it: data directories, running servers and dumps become branches; points become dumps.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use ebb_tests::{Authority, Node, Ran, Stock, Writer, wait_for};

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// What somebody has: an app's database that its superuser owns, a role of the app's own, things that must not run.
const SHOP: &str = "\
create role shopkeeper login password 'k3eper';
create role clerk superuser login;
create table items (id int primary key, name text not null);
insert into items select n, 'item ' || n from generate_series(1, 2000) as n;
create index items_name on items (name);
create table notes (id serial primary key, note text);
insert into notes (note) values ('kept');
grant select on items to shopkeeper;
create view dear as select * from items where id > 1990;
create type mood as enum ('fine', 'tired');
create function admin_of() returns text language sql security definer as 'select current_user::text';
create function on_ddl() returns event_trigger language plpgsql as 'begin raise notice ''ddl''; end';
create event trigger watches on ddl_command_end execute function on_ddl();";

/// A stock cluster with a database `shop` that holds that.
fn shop(superuser: &str, initdb: &[&str]) -> Stock {
    let stock = Stock::start(superuser, initdb);
    stock.psql(superuser, "postgres", "create database shop");
    stock.psql(superuser, "shop", SHOP);
    stock
}

/// Asks `ebb serve` itself, not the branch's own roles.
fn as_superuser(node: &Node, branch: &str, sql: &str) -> String {
    let ran = node.superuser_tool(branch, "psql", &["-XAtq", "-d", "app", "-c", sql]);
    assert_eq!(ran.code, 0, "{sql}: {}", ran.stderr);
    ran.stdout.trim().to_owned()
}

/// What must be true of an imported shop.
fn check_shop(node: &Node, branch: &str) {
    assert_eq!(node.psql(branch, "select count(*) || ' ' || min(name) from items"), "2000 item 1");
    assert_eq!(node.psql(branch, "select count(*) from dear"), "10");
    // The owner can do what an owner does.
    node.psql(branch, "insert into notes (note) values ('new'); alter table items add column price int default 1");
    node.psql(branch, "create table mine (m mood); drop view dear; analyze items");
    assert_eq!(node.psql(branch, "select admin_of()"), "app", "nothing runs as superuser");
    for (what, sql) in [
        (
            "nobody else is superuser, and can log in",
            "select count(*) from pg_roles where rolsuper and rolcanlogin and rolname <> 'postgres'",
        ),
        ("the owner is none", "select count(*) from pg_roles where rolname = 'app' and (rolsuper or rolreplication)"),
        (
            "nobody can become one",
            "select count(*) from pg_auth_members m join pg_roles r on r.oid = m.roleid where r.rolsuper",
        ),
        ("event triggers are off", "select count(*) from pg_event_trigger where evtenabled <> 'D'"),
        ("there are no slots but Ebb's", "select count(*) from pg_replication_slots where slot_name <> 'ebb_ship'"),
        ("subscriptions are off", "select count(*) from pg_subscription where subenabled"),
        ("amcheck was not left", "select count(*) from pg_extension where extname = 'amcheck'"),
    ] {
        assert_eq!(as_superuser(node, branch, sql), "0", "{what}");
    }
    assert_eq!(as_superuser(node, branch, "show data_checksums"), "on");
    let ran = node.superuser_tool(branch, "pg_amcheck", &["--install-missing", "--heapallindexed", "-d", "app"]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
}

/// Nothing of an import is on the node.
fn assert_nothing_left(node: &Node) {
    let stages = node.data().join("imports");
    let left: Vec<_> = fs::read_dir(&stages).map(|entries| entries.flatten().collect()).unwrap_or_default();
    assert!(left.is_empty(), "{left:?}");
    let layers = fs::read_dir(node.data().join("layers")).map(|entries| entries.flatten().collect::<Vec<_>>());
    let half: Vec<_> = layers.unwrap_or_default();
    assert!(half.iter().all(|entry| !entry.file_name().to_string_lossy().starts_with('.')), "{half:?}");
}

fn refused(node: &Node, args: &[&str], why: &str, hint: &str) -> Ran {
    let ran = node.ebb(args);
    assert_ne!(ran.code, 0, "{args:?} was not refused: {ran:?}");
    assert!(ran.stderr.contains(why) && ran.stderr.contains(hint), "{args:?}: {}", ran.stderr);
    ran
}

#[test]
fn a_data_directory_becomes_a_project_whatever_its_superuser_is_called() {
    let mut stock = shop("chef", &["--data-checksums"]);
    stock.psql("chef", "shop", "select pg_create_physical_replication_slot('theirs', true)");
    stock.end("fast");
    let before = listing(&stock.data());
    let node = Node::start();
    let done = node.json(&["import", "corner", "--from-dir", text(&stock.data())]);
    assert_eq!((done["state"].as_str(), done["branch"].as_str()), (Some("done"), Some("prod")), "{done}");
    assert_eq!(listing(&stock.data()), before, "the source is only read");
    check_shop(&node, "corner/prod");
    // The app's own role logs in with its own password, also before the branch has ever run.
    let url = node.url("corner/prod").replacen("app:", "shopkeeper:", 1);
    let (before, after) = url.split_once("shopkeeper:").expect("a role in the URL");
    let url = format!("{before}shopkeeper:k3eper@{}", after.split_once('@').expect("a host in the URL").1);
    let ran = node.tool("psql", &["-XAtq", &url, "-c", "select count(*) from items"]);
    assert_eq!(ran.stdout.trim(), "2000", "{ran:?}");
    // It is a project like any other.
    let branches = node.ok(&["branch", "list", "corner"]);
    assert!(branches.contains("dev"), "{branches}");
    assert_eq!(node.psql("corner/dev", "select count(*) from items"), "2000");
    let ledger = node.ok(&["ledger", "list", "corner"]);
    assert!(ledger.contains("import") && ledger.contains("settle"), "{ledger}");
    assert_eq!(node.json(&["ledger", "verify", "corner"])["ok"], true);
    assert_nothing_left(&node);
}

/// Names, sizes and times of what is in a directory.
fn listing(dir: &Path) -> String {
    let out = Command::new("find").arg(dir).args(["-type", "f", "-printf", "%P %s %T@\n"]).output();
    String::from_utf8_lossy(&out.expect("find can be started").stdout).into_owned()
}

#[test]
fn a_crashed_data_directory_without_checksums_becomes_a_branch() {
    let mut stock = shop("postgres", Stock::without_checksums());
    stock.psql("postgres", "shop", "create table late (n int); insert into late values (7)");
    stock.end("immediate");
    let node = Node::with_shop();
    let ran = node.ebb(&["import", "shop/crashed", "--from-dir", text(&stock.data())]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.stderr.contains("had no page checksums"), "{}", ran.stderr);
    assert_eq!(node.psql("shop/crashed", "select n from late"), "7", "what was committed before the crash");
    check_shop(&node, "shop/crashed");
    // Its own past can be gone back to, and it can be branched.
    node.ok(&["branch", "create", "shop/again", "--from", "shop/crashed"]);
    assert_eq!(node.psql("shop/again", "select n from late"), "7");
    refused(&node, &["import", "shop/crashed", "--from-dir", text(&stock.data())], "already exists", "another name");
}

#[test]
fn what_cannot_be_imported_is_refused_with_advice_before_anything_is_begun() {
    let mut stock = shop("postgres", &[]);
    let node = Node::with_shop();
    let dir = stock.data();
    let from_dir = |dir: &Path| ["import", "shop/x", "--from-dir", text(dir)].map(str::to_owned);
    let check = |dir: &Path, why: &str, hint: &str| {
        let args = from_dir(dir);
        refused(&node, &args.each_ref().map(String::as_str), why, hint);
    };
    check(&dir, "running Postgres", "Stop Postgres");
    check(&dir.join("nothing"), "is not there", "ebb serve sees it");
    check(&dir.join("base"), "no PG_VERSION", "--from-dump");
    let space = stock.scratch().join("space");
    fs::create_dir(&space).expect("a directory can be made");
    Command::new("chown").arg("postgres").arg(&space).status().expect("chown can be started");
    stock.psql("postgres", "postgres", &format!("create tablespace far location '{}'", text(&space)));
    refused(&node, &["import", "shop/x", "--from", &stock.url("postgres", "shop")], "tablespaces", "pg_default");
    stock.end("fast");
    check(&dir, "tablespaces", "pg_default");
    fs::remove_dir_all(dir.join("pg_tblspc")).expect("a directory can be removed");
    fs::create_dir(dir.join("pg_tblspc")).expect("a directory can be made");
    fs::write(dir.join("PG_VERSION"), "9.6\n").expect("a file can be written");
    check(&dir, "9.6", "14 to 18");
    refused(&node, &["import", "shop", "--from-dir", text(&dir)], "no branch of it was named", "shop/imported");
    refused(&node, &["import", "shop/x", "--from-dump", text(&dir)], "data directory", "--from-dir");
    refused(&node, &["import", "shop/x", "--from", "postgres://u:hidden@127.0.0.1:1/x"], "127.0.0.1:1", "reach it");
    refused(&node, &["import", "other/x", "--from-dump", "/nonexistent"], "no project", "");
    let ledger = node.ok(&["ledger", "list", "shop"]);
    assert!(!ledger.contains("hidden") && !node.server_log().contains("hidden"), "{ledger}");
    assert_nothing_left(&node);
}

#[test]
fn damaged_data_is_found_and_nothing_of_it_is_offered() {
    let mut stock = shop("postgres", &["--data-checksums"]);
    let file = stock.psql("postgres", "shop", "checkpoint; select pg_relation_filepath('items')");
    stock.end("fast");
    let path = stock.data().join(file.lines().last().expect("a path"));
    let mut bytes = fs::read(&path).expect("a table can be read");
    bytes[8192 + 4000] ^= 1;
    fs::write(&path, bytes).expect("a table can be written");
    let node = Node::start();
    let said = refused(&node, &["import", "shop", "--from-dir", text(&stock.data())], "damaged", "pg_dump");
    assert!(said.stderr.contains("checksum"), "{}", said.stderr);
    assert_eq!(node.ebb(&["project", "show", "shop"]).code, 3, "a project that came to nothing is gone");
    // Its name is free.
    node.ok(&["project", "create", "shop"]);
    assert_nothing_left(&node);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_postgres_is_followed_until_it_is_cut_over_and_no_row_is_missing() {
    let stock = shop("postgres", Stock::without_checksums());
    let node = Node::start();
    let url = stock.url("postgres", "shop");
    let writer = Writer::start(url.clone()).await;
    writer.progress(20).await;
    let mut import = Command::new(node.serve_command().get_program());
    import.args(["import", "shop", "--from", &stock.url("postgres", "postgres"), "--follow"]);
    import.env("EBB_API", format!("http://127.0.0.1:{}", node.api_port)).stdout(Stdio::piped()).stderr(Stdio::piped());
    let import = import.spawn().expect("ebb can be started");
    let api = format!("http://127.0.0.1:{}/v1/imports", node.api_port);
    wait_for("the import to follow", || {
        let list = ureq::get(&api).call().ok().and_then(|mut answer| answer.body_mut().read_to_string().ok());
        let list = list.unwrap_or_default();
        assert!(!list.contains("\"failed\""), "{list}\n{}", node.server_log());
        list.contains("\"can_cut_over\":true")
    });
    // More than a segment of WAL, a schema change, and rows, behind the base backup.
    stock.psql(
        "postgres",
        "shop",
        "create table bulk as select n, repeat('x', 500) as x from generate_series(1, 40000) as n",
    );
    writer.progress(200).await;
    let status = node.ok(&["import", "shop", "--status"]);
    assert!(status.contains("following"), "{status}");
    // Its connection breaks; another one goes on.
    stock.psql("postgres", "postgres", "select pg_terminate_backend(pid) from pg_stat_replication");
    writer.progress(50).await;
    let (last, errors) = writer.stop().await;
    assert_eq!(errors, Vec::<String>::new());
    let done = node.json(&["import", "shop", "--cut-over"]);
    assert_eq!(done["state"], "done", "{done}");
    let watched = import.wait_with_output().expect("ebb can be waited for");
    assert!(watched.status.success(), "{watched:?}");
    assert_eq!(
        node.psql("shop/prod", "select max(n) || ' of ' || count(*) from acknowledged"),
        format!("{last} of {last}"),
        "every row that was acknowledged before the cut-over, once"
    );
    assert_eq!(node.psql("shop/prod", "select count(*) from bulk"), "40000");
    check_shop(&node, "shop/prod");
    stock.until_nobody_replicates("postgres");
    assert_eq!(
        stock.psql("postgres", "shop", "select count(*) from pg_replication_slots"),
        "0",
        "no trace at the source"
    );
    assert!(!node.server_log().contains("s3cret"), "{}", node.server_log());
    assert_nothing_left(&node);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_following_what_was_committed_when_the_copy_was_made_is_there() {
    let stock = shop("postgres", &[]);
    let node = Node::with_shop();
    let writer = Writer::start(stock.url("postgres", "shop")).await;
    writer.progress(20).await;
    let before = writer.last();
    let ran = node.ebb(&["import", "shop/copy", "--from", &stock.url("postgres", "postgres")]);
    assert_eq!(ran.code, 0, "{ran:?}\n{}", node.server_log());
    let (after, _) = writer.stop().await;
    let count: i64 = node.psql("shop/copy", "select count(*) from acknowledged").parse().expect("a number");
    assert!((before..=after).contains(&count), "{before} <= {count} <= {after}");
    assert_eq!(node.psql("shop/copy", "select max(n) from acknowledged"), count.to_string());
    check_shop(&node, "shop/copy");
    assert_nothing_left(&node);
}

#[test]
fn a_role_that_may_not_replicate_is_told_what_it_lacks() {
    let stock = shop("postgres", &[]);
    let node = Node::with_shop();
    let url = stock.url("postgres", "shop");
    refused(&node, &["import", "shop/x", "--from", &url.replace("s3cret", "wrong")], "password", "password");
    stock.psql("postgres", "shop", "alter role shopkeeper password 's3cret'");
    refused(&node, &["import", "shop/x", "--from", &stock.url("shopkeeper", "shop")], "shopkeeper", "REPLICATION");
    refused(&node, &["import", "shop/x", "--from", &format!("{url}?sslmode=require")], "TLS", "ssl = on");
}

#[test]
fn a_running_postgres_is_reached_over_tls_verified_or_not() {
    let mut stock = shop("postgres", &[]);
    stock.end("fast");
    let authority = stock.only_with_tls();
    stock.begin();
    let node = Node::with_shop();
    let url = stock.url("postgres", "shop");
    refused(&node, &["import", "shop/x", "--from", &format!("{url}?sslmode=disable")], "pg_hba.conf", "hostssl");
    let other = node.data().join("tls/ca.pem");
    let verify = |roots: &Path| format!("{url}?sslmode=verify-full&sslrootcert={}", text(roots));
    refused(&node, &["import", "shop/x", "--from", &verify(&other)], "TLS failed", "sslrootcert");
    node.ok(&["import", "shop/preferred", "--from", &url]);
    node.ok(&["import", "shop/verified", "--from", &verify(&authority)]);
    for branch in ["shop/preferred", "shop/verified"] {
        assert_eq!(node.psql(branch, "select count(*) from items"), "2000");
    }
}

#[test]
fn both_sides_prove_who_they_are_by_certificates() {
    let mut stock = shop("postgres", &[]);
    stock.end("fast");
    let node = Node::with_shop();
    let dir = node.scratch();
    let authority = Authority::new(dir);
    authority.sign("server", "db", &["db.example.com"]);
    authority.sign("importer", "importer", &[]);
    stock.only_with_certificates(&authority);
    stock.begin();
    let url = |mode: &str| {
        let roots = authority.path("ca.pem");
        format!("{}?sslmode={mode}&sslrootcert={roots}", stock.url("postgres", "shop"))
    };
    let (crt, key) = (authority.path("importer.crt"), authority.path("importer.key"));
    let with = |mode: &str| format!("{}&sslcert={crt}&sslkey={key}", url(mode));
    refused(&node, &["import", "shop/x", "--from", &url("verify-ca")], "certificate", "pg_hba.conf");
    refused(&node, &["import", "shop/x", "--from", &with("verify-full")], "TLS failed", "sslrootcert");
    refused(&node, &["import", "shop/x", "--from", &format!("{}&sslcert={crt}", url("verify-ca"))], "key", "sslkey");
    node.ok(&["import", "shop/proven", "--from", &with("verify-ca")]);
    assert_eq!(node.psql("shop/proven", "select count(*) from items"), "2000");
}

#[test]
fn dumps_of_all_formats_are_restored_as_the_owner() {
    let stock = shop("postgres", &[]);
    stock.psql("postgres", "shop", "create extension hstore; create publication all_of_it for all tables");
    stock.psql(
        "postgres",
        "shop",
        "alter table notes owner to shopkeeper; create table \\\"O'Hara\\\" (h hstore)".replace("\\\"", "\"").as_str(),
    );
    let node = Node::with_shop();
    for (format, name) in [("custom", "a.dump"), ("directory", "b.dir"), ("tar", "c.tar"), ("plain", "d.sql")] {
        let path = stock.scratch().join(name);
        let made = stock.tool("pg_dump", "postgres", &["-d", "shop", "--format", format, "-f", text(&path)]);
        assert_eq!(made.code, 0, "{made:?}");
        let branch = format!("shop/{format}");
        let ran = node.ebb(&["import", &branch, "--from-dump", text(&path)]);
        assert_eq!(ran.code, 0, "{format}: {ran:?}\n{}", node.server_log());
        assert_eq!(node.psql(&branch, "select count(*) || ' ' || min(name) from items"), "2000 item 1", "{format}");
        assert_eq!(node.psql(&branch, "select note from notes"), "kept");
        let owners = "select string_agg(distinct tableowner, ',') from pg_tables where schemaname = 'public'";
        assert_eq!(node.psql(&branch, owners), "app", "{format}");
        assert_eq!(node.psql(&branch, "select 'a=>1'::hstore -> 'a'"), "1", "{format}");
        assert_eq!(node.psql(&branch, "select count(*) from pg_publication"), "0", "{format}");
        assert_eq!(node.psql(&branch, "insert into notes (note) values ('new') returning id"), "2", "{format}");
        node.ok(&["branch", "delete", &branch]);
    }
    let fresh = stock.scratch().join("a.dump");
    node.ok(&["import", "other", "--from-dump", text(&fresh)]);
    assert_eq!(node.psql("other/prod", "select count(*) from items"), "2000");
    assert_nothing_left(&node);
}

#[test]
fn a_dump_that_cannot_be_restored_leaves_nothing_and_runs_nothing() {
    let node = Node::with_shop();
    let file = node.scratch().join("bad.sql");
    let proof = node.scratch().join("proof");
    let import = |sql: &str| {
        fs::write(&file, sql).expect("a file can be written");
        node.ebb(&["import", "shop/bad", "--from-dump", text(&file)])
    };
    for sql in [
        "create table t (n int);\nselect nonsense;\n".to_owned(),
        format!("create table t (n int);\n\\! touch {}\n", proof.display()),
        format!("\\restrict abc\nselect 1;\n\\unrestrict abc\n\\! touch {}\n", proof.display()),
        format!("select 1 \\g | touch {}\n", proof.display()),
        "\\connect app postgres\ncreate role boss superuser;\n".to_owned(),
        format!("copy (select 1) to program 'touch {}';\n", proof.display()),
    ] {
        let ran = import(&sql);
        assert_ne!(ran.code, 0, "{sql:?}: {ran:?}");
        assert!(ran.stderr.contains("cannot be restored"), "{sql:?}: {}", ran.stderr);
        assert!(!proof.exists(), "{sql:?} ran a program");
        assert!(!node.ok(&["branch", "list", "shop"]).contains("bad"));
    }
    fs::write(&file, b"\x1f\x8b\x08\0").expect("a file can be written");
    refused(&node, &["import", "shop/bad", "--from-dump", text(&file)], "compressed", "gunzip");
    assert_nothing_left(&node);
}

#[test]
fn a_server_killed_in_the_middle_leaves_no_half_branch_and_no_leftovers() {
    let mut stock = shop("postgres", &[]);
    let sql =
        "create table bulk as select n, md5(n::text) || repeat('x', 200) as x from generate_series(1, 300000) as n";
    stock.psql("postgres", "shop", sql);
    let dump = stock.scratch().join("shop.dump");
    stock.tool("pg_dump", "postgres", &["-d", "shop", "--format", "custom", "-f", text(&dump)]);
    let url = stock.url("postgres", "postgres");
    let mut node = Node::with_shop();
    let sources: [(&str, Vec<&str>, &str); 3] = [
        ("shop/x", vec!["--from", &url, "--follow"], "following"),
        ("fresh", vec!["--from", &url], "checking"),
        ("shop/x", vec!["--from-dump", text(&dump)], "restoring"),
    ];
    for (to, from, until) in sources {
        let mut import = Command::new(node.serve_command().get_program());
        import.arg("import").arg(to).args(&from).env("EBB_API", format!("http://127.0.0.1:{}", node.api_port));
        let mut import = import.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("ebb can be started");
        wait_for("the import to get on", || {
            let status = node.ebb(&["import", to, "--status"]);
            assert!(!node.server_log().contains("import failed"), "{}", node.server_log());
            status.stdout.contains(until)
        });
        node.kill_server();
        import.kill().expect("a child can be killed");
        import.wait().expect("a child can be waited for");
        node.serve();
        wait_for("the import to be undone", || {
            !node.data().join("imports").read_dir().is_ok_and(|mut dir| dir.next().is_some())
        });
        assert_eq!(node.ebb(&["branch", "show", "shop/x"]).code, 3, "no half branch");
        wait_for("a project that came to nothing to go", || node.ebb(&["project", "show", "fresh"]).code == 3);
        let ledger = node.ok(&["ledger", "list", "shop"]);
        assert!(to == "fresh" || ledger.contains("undone"), "{ledger}");
        wait_for("what ran for it to end", || node.processes().is_empty());
        let branches = fs::read_dir(node.data().join("branches")).map_or(0, |entries| entries.count());
        assert_eq!(branches, 0, "no directory of it is left");
        assert_nothing_left(&node);
    }
    stock.until_nobody_replicates("postgres");
    assert_eq!(stock.psql("postgres", "shop", "select count(*) from pg_replication_slots"), "0");
    // It can be done again at once.
    stock.end("fast");
    node.ok(&["import", "shop/x", "--from-dir", text(&stock.data())]);
    assert_eq!(node.psql("shop/x", "select count(*) from bulk"), "300000");
    assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
}

#[test]
fn an_import_can_be_cancelled() {
    let stock = shop("postgres", &[]);
    let node = Node::with_shop();
    let mut import = Command::new(node.serve_command().get_program());
    import.args(["import", "shop/x", "--from", &stock.url("postgres", "postgres"), "--follow"]);
    import.env("EBB_API", format!("http://127.0.0.1:{}", node.api_port)).stdout(Stdio::null()).stderr(Stdio::piped());
    let import = import.spawn().expect("ebb can be started");
    wait_for("the import to follow", || node.ebb(&["import", "shop/x", "--status"]).stdout.contains("following"));
    assert!(node.ok(&["import", "shop/x", "--cancel"]).contains("cancelled"));
    let watched = import.wait_with_output().expect("ebb can be waited for");
    assert!(String::from_utf8_lossy(&watched.stderr).contains("cancelled"), "{watched:?}");
    assert_eq!(node.ebb(&["branch", "show", "shop/x"]).code, 3);
    stock.until_nobody_replicates("postgres");
    assert_nothing_left(&node);
}

#[tokio::test(flavor = "multi_thread")]
async fn any_point_is_exported_as_a_dump_that_stock_postgres_restores() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table history (n int primary key); insert into history values (1)");
    node.ok(&["checkpoint", "create", "shop/prod", "one"]);
    node.psql("shop/prod", "insert into history values (2)");
    let sql = "select to_char(clock_timestamp() at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
    let two = node.psql("shop/prod", sql);
    node.psql("shop/prod", "insert into history values (3)");
    let stock = Stock::start("postgres", &[]);
    stock.psql("postgres", "postgres", "create role app login");
    let at_two = format!("shop/prod@{two}");
    for (number, (from, format, rows)) in [
        ("shop/prod@one", "pg_dump", "1"),
        (at_two.as_str(), "pg_dump", "1,2"),
        ("shop/prod", "pg_dump", "1,2,3"),
        ("shop/prod@one", "pg_dump-directory", "1"),
        ("shop/prod@one", "pg_dump-tar", "1"),
        ("shop/prod", "pg_dump-plain", "1,2,3"),
    ]
    .into_iter()
    .enumerate()
    {
        let (path, database) = (node.scratch().join(format!("dump-{number}")), format!("restored_{number}"));
        node.ok(&["export", from, "--format", format, text(&path)]);
        stock.psql("postgres", "postgres", &format!("create database {database} owner app"));
        let ran = match format {
            "pg_dump-plain" => {
                stock.tool("psql", "postgres", &["-Xq", "-v", "ON_ERROR_STOP=1", "-d", &database, "-f", text(&path)])
            }
            _ => stock.tool("pg_restore", "postgres", &["--exit-on-error", "-d", &database, text(&path)]),
        };
        assert_eq!(ran.code, 0, "{from} as {format}: {ran:?}");
        let found = stock.psql("postgres", &database, "select string_agg(n::text, ',' order by n) from history");
        assert_eq!(found, rows, "{from} as {format}");
        let again = refused(&node, &["export", from, "--format", format, text(&path)], "exists already", "");
        assert_eq!(again.code, 2, "{again:?}");
    }
    refused(
        &node,
        &["export", "shop/prod", "--format", "pg_dump", "--database", "none", text(&node.scratch().join("x"))],
        "none",
        "--database",
    );
    assert!(!node.scratch().join("x.unfinished").exists() && !node.scratch().join("x").exists());
    // The branch itself was never asked, and goes on.
    node.psql("shop/prod", "insert into history values (4)");
    let branches = fs::read_dir(node.data().join("branches")).map_or(0, |entries| entries.count());
    assert_eq!(branches, 1, "what was used for it is gone");
}
