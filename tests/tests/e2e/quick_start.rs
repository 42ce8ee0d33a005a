//! What a newcomer types, right and wrong.

use std::process::Command;

use ebb_tests::{Node, python, wait_for};

#[test]
fn a_project_is_made_used_and_found_again_by_a_second_start() {
    let mut node = Node::start();
    let made = node.json(&["project", "create", "shop"]);
    let password = made["password"].as_str().expect("the password is shown once").to_owned();
    assert!(password.len() >= 24, "a generated password is long");
    assert_eq!(made["role"], "app");
    assert_eq!(node.psql("shop/prod", "select current_user, current_database()"), "app|app");
    node.psql("shop/prod", "create table t as select 42 as n");
    assert_eq!(node.psql("shop/dev", "select count(*) from pg_tables where tablename = 't'"), "0");
    assert!(node.ok(&["psql", "shop/prod", "--", "-Atc", "select n from t"]).contains("42"));

    node.stop();
    assert_eq!(node.processes(), [], "Ctrl-C leaves nothing running");
    node.serve();
    assert_eq!(node.psql("shop/prod", "select n from t"), "42");
    assert!(node.url("shop/prod").contains(&password));
    let verified = node.json(&["ledger", "verify", "shop"]);
    assert_eq!(verified["ok"], true);
    for secret_free in [node.server_log(), node.ok(&["ledger", "list", "shop", "--json"])] {
        assert!(!secret_free.contains(&password), "a secret leaked");
    }
}

#[test]
fn the_owner_is_not_a_superuser() {
    let node = Node::with_shop();
    assert_eq!(node.psql("shop/prod", "select rolsuper from pg_roles where rolname = current_user"), "f");
    let url = node.url("shop/prod");
    for sql in ["copy (select 1) to program 'true'", "select pg_read_file('/etc/passwd')", "create role x superuser"] {
        let ran = node.tool("psql", &["-XAtq", &url, "-c", sql]);
        assert_ne!(ran.code, 0, "{sql:?} was allowed");
        assert!(ran.stderr.contains("permission denied") || ran.stderr.contains("must be"), "{}", ran.stderr);
    }
}

#[test]
fn typing_errors_are_answered_with_advice() {
    let node = Node::with_shop();
    let ran = node.ebb(&["branch", "show", "shop/prdo"]);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(ran.stderr.contains("prod"), "a near name is suggested: {}", ran.stderr);
    let ran = node.ebb(&["project", "show", "shpo"]);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(ran.stderr.contains("shop"), "a near name is suggested: {}", ran.stderr);
    let ran = node.ebb(&["project", "create", "Shop!"]);
    assert_eq!(ran.code, 2, "{ran:?}");
    let ran = node.ebb(&["project", "create", "shop"]);
    assert_eq!(ran.code, 4, "a taken name is a conflict: {ran:?}");
    let ran = node.ebb(&["project", "delete", "shop", "--confirm", "other"]);
    assert_ne!(ran.code, 0);
    assert_eq!(node.json(&["project", "list"])["projects"].as_array().map(Vec::len), Some(1));
    // The same words from the proxy, with the SQLSTATE that belongs to them.
    let url = node.url("shop/prod").replace("prod--shop", "prdo--shop");
    let ran = node.tool("psql", &["-XAtq", "-v", "VERBOSITY=verbose", &url, "-c", "select 1"]);
    assert!(ran.stderr.contains("prod"), "a near name is suggested: {}", ran.stderr);
}

#[test]
fn a_repeated_request_is_answered_with_the_first_result() {
    let node = Node::start();
    let first = node.json(&["project", "create", "shop", "--idempotency-key", "k1"]);
    let again = node.json(&["project", "create", "shop", "--idempotency-key", "k1"]);
    assert_eq!(first["project"]["id"], again["project"]["id"]);
    assert_eq!(first["password"], again["password"]);
    let branch = ["branch", "create", "shop/pr-1", "--idempotency-key", "k2"];
    assert_eq!(node.json(&branch)["id"], node.json(&branch)["id"]);
    assert_eq!(node.ebb(&["branch", "create", "shop/pr-1"]).code, 4);
}

#[test]
fn a_project_is_deleted_with_everything_it_ran() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table t (n int)");
    node.ok(&["project", "delete", "shop", "--confirm", "shop"]);
    assert_eq!(node.ebb(&["project", "show", "shop"]).code, 3);
    assert_eq!(node.processes(), []);
    node.ok(&["project", "create", "shop"]);
    assert_eq!(node.psql("shop/prod", "select count(*) from pg_tables where tablename = 't'"), "0");
}

#[test]
fn a_second_server_on_the_same_data_says_who_holds_it() {
    let node = Node::start();
    let out = Command::new(node.serve_command().get_program())
        .args(["serve", "--listen", "127.0.0.1:0", "--api-listen", "127.0.0.1:0", "--data"])
        .arg(node.data())
        .output()
        .expect("ebb can be started");
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(!out.status.success());
    assert_eq!(out.status.code(), Some(4), "{said}");
    assert!(said.contains("in use") && said.contains(&node.server_pid().to_string()), "{said}");
}

/// `ebb serve` with something of the machine hidden by `hide`, in a mount namespace of its own; it must not start.
fn refused_start(node: &Node, hide: &str) -> String {
    let serve = node.serve_command();
    let out = Command::new("unshare")
        .args(["--mount", "sh", "-c", &format!("{hide} && exec \"$0\" \"$@\"")])
        .arg(serve.get_program())
        .args(serve.get_args())
        .output()
        .expect("unshare can be started");
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    String::from_utf8_lossy(&out.stderr).into_owned()
}

#[test]
fn what_a_machine_lacks_is_said_at_start_with_what_to_do() {
    let said = refused_start(&Node::prepare(), "mount -t tmpfs none /usr/lib/postgresql");
    assert!(said.contains("no Postgres server") && said.contains("postgresql-15"), "{said}");
    let said = refused_start(&Node::prepare(), "mount -t tmpfs none /dev");
    assert!(said.contains("/dev/fuse") && said.contains("fuse3"), "{said}");
    let node = Node::prepare();
    let read_only = format!("mount -t tmpfs -o ro none '{}'", node.scratch().display());
    let said = refused_start(&node, &read_only);
    assert!(said.contains("cannot be written") && said.contains("--data"), "{said}");
}

#[test]
fn a_taken_port_is_said_at_start() {
    let node = Node::start();
    for option in ["--listen", "--api-listen"] {
        let taken = if option == "--listen" { node.proxy_port } else { node.api_port };
        let other = if option == "--listen" { "--api-listen" } else { "--listen" };
        let out = Command::new(node.serve_command().get_program())
            .args(["serve", option, &format!("127.0.0.1:{taken}"), other, "127.0.0.1:0", "--data"])
            .arg(node.scratch().join("other"))
            .output()
            .expect("ebb can be started");
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && said.contains(&taken.to_string()) && said.contains(option), "{said}");
    }
}

#[test]
fn a_full_disk_refuses_work_and_loses_nothing() {
    let node = Node::prepare();
    let disk = node.scratch().join("disk");
    std::fs::create_dir(&disk).expect("a directory can be made");
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=400m", "none"]).arg(&disk).status();
    assert!(mount.expect("mount can be started").success());
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
    let _unmount = Unmount(disk.clone());
    {
        let mut node = node.data_dir(&disk.join("data"));
        node.serve();
        node.ok(&["project", "create", "shop"]);
        node.psql("shop/prod", "create table t as select generate_series(1, 1000) as n");
        node.suspend("shop/prod");
        let url = node.url("shop/prod");
        let ballast = disk.join("ballast");
        let fill = Command::new("dd").args(["if=/dev/zero", "bs=1M"]).arg(format!("of={}", ballast.display())).output();
        assert!(fill.is_ok());
        let ran = node.ebb(&["branch", "create", "shop/pr-1"]);
        assert_eq!(ran.code, 5, "{ran:?}");
        assert!(ran.stderr.contains("free") || ran.stderr.contains("space"), "{}", ran.stderr);
        let ran = node.tool("psql", &["-XAtq", "-v", "VERBOSITY=verbose", &url, "-c", "select 1"]);
        assert_ne!(ran.code, 0, "a wake on a full disk is refused");
        std::fs::remove_file(&ballast).expect("the ballast can be removed");
        wait_for("the branch to come back", || node.tool("psql", &["-XAtq", &url, "-c", "select 1"]).code == 0);
        assert_eq!(node.psql("shop/prod", "select count(*) from t"), "1000");
        node.ok(&["branch", "create", "shop/pr-1"]);
    }
}

#[test]
fn psycopg_connects_by_url() {
    let node = Node::with_shop();
    let program = "import sys, psycopg\nwith psycopg.connect(sys.argv[1]) as c:\n    print(c.execute('select 6 * 7').fetchone()[0])";
    assert_eq!(python(program, &[&node.url("shop/prod")]).trim(), "42");
}
