//! Drivers, pools and frameworks as they are: what they remember of a connection is still true after its branch has slept.
//! Their programs are in `tests/drivers`; `scripts/setup test` installs what they need.

use std::path::{Path, PathBuf};
use std::process::Command;

use ebb_tests::{COMMAND_PATIENCE, Node, run};

/// Where `scripts/setup` puts drivers: `EBB_TEST_DRIVERS`, or `.cache/tools/drivers` of this repository.
fn installed() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/tools/drivers");
    std::env::var_os("EBB_TEST_DRIVERS").map_or(here, PathBuf::from)
}

fn program(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("drivers").join(name)
}

/// Runs a program with the branch's URL and the API's, which must end well.
fn check(mut command: Command, url: impl FnOnce(&Node) -> String) {
    let node = Node::with_shop();
    command.arg(url(&node)).arg(format!("http://127.0.0.1:{}", node.api_port));
    let ran = run(command, COMMAND_PATIENCE).expect("scripts/setup test installs what the program needs");
    assert_eq!((ran.code, ran.stdout.trim()), (0, "ok"), "{}", ran.stderr);
}

fn shop(node: &Node) -> String {
    node.url("shop/prod")
}

fn check_python(name: &str) {
    let mut command = Command::new(installed().join("python/bin/python"));
    command.arg("-B").arg(program(name));
    check(command, shop);
}

#[test]
fn asyncpg_keeps_its_statement_cache_and_its_pool() {
    check_python("with_asyncpg.py");
}

#[test]
fn psycopg_keeps_statements_that_it_prepares_at_once() {
    check_python("with_psycopg.py");
}

#[test]
fn pools_of_sqlalchemy_find_no_broken_connection() {
    check_python("with_sqlalchemy.py");
}

#[test]
fn the_settings_and_statements_of_rails_are_kept() {
    check_python("with_rails_settings.py");
}

#[test]
fn node_postgres_keeps_named_statements() {
    let mut command = Command::new("node");
    command.arg(program("with_node_postgres.js")).env("NODE_PATH", installed().join("node/node_modules"));
    check(command, shop);
}

#[test]
fn pgjdbc_keeps_its_server_prepared_statements_and_its_validity_check_wakes_nothing() {
    let mut command = Command::new("java");
    command.args(["-cp", "/usr/share/java/postgresql.jar"]).arg(program("WithJdbc.java"));
    check(command, |node| {
        let url = shop(node);
        let rest = url.strip_prefix("postgres://").expect("a URL of Postgres");
        let (user, rest) = rest.split_once('@').expect("with a user");
        let (role, password) = user.split_once(':').expect("and a password");
        format!("jdbc:postgresql://{rest}&user={role}&password={password}")
    });
}
