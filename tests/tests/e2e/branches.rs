//! Branches: taken from anything, isolated both ways, consistent in the middle of a load.

use std::process::{Child, Stdio};

use ebb_tests::{Node, pg_bin};

/// pgbench running beside a test.
struct Load(Child);

impl Load {
    fn start(node: &Node, branch: &str, clients: u32) -> Self {
        let child = std::process::Command::new(pg_bin().join("pgbench"))
            .args(["-n", "-T", "600", "-M", "prepared", "-c", &clients.to_string(), &node.url(branch)])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self(child.expect("pgbench can be started"))
    }

    fn assert_running(&mut self) {
        assert!(self.0.try_wait().expect("a child can be asked").is_none(), "pgbench ended early");
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// TPC-B's invariant: every balance tells the same sum.
fn assert_balanced(node: &Node, branch: &str) {
    let sums = node.psql(
        branch,
        "select (select sum(abalance) from pgbench_accounts) = (select coalesce(sum(delta), 0) from pgbench_history), \
                (select sum(bbalance) from pgbench_branches) = (select coalesce(sum(delta), 0) from pgbench_history), \
                (select sum(tbalance) from pgbench_tellers) = (select coalesce(sum(delta), 0) from pgbench_history)",
    );
    assert_eq!(sums, "t|t|t", "the balances of {branch} do not agree");
}

fn assert_amcheck_clean(node: &Node, branch: &str) {
    let ran = node.superuser_tool(branch, "pg_amcheck", &["--install-missing", "--heapallindexed", "-d", "app"]);
    assert_eq!(ran.code, 0, "pg_amcheck on {branch}: {}{}", ran.stdout, ran.stderr);
}

fn history(node: &Node, branch: &str) -> i64 {
    node.psql(branch, "select count(*) from pgbench_history").parse().expect("a count is a number")
}

fn initialise(node: &Node, branch: &str, scale: &str) {
    let ran = node.tool("pgbench", &["-q", "-i", "-s", scale, &node.url(branch)]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
}

#[test]
fn a_branch_taken_in_the_middle_of_pgbench_is_consistent_and_isolated_both_ways() {
    let node = Node::with_shop();
    initialise(&node, "shop/prod", "2");
    let mut load = Load::start(&node, "shop/prod", 4);
    ebb_tests::wait_for("some transactions", || history(&node, "shop/prod") > 200);
    for name in ["shop/mid-1", "shop/mid-2", "shop/mid-3"] {
        node.ok(&["branch", "create", name, "--from", "shop/prod"]);
        load.assert_running();
    }
    for name in ["shop/mid-1", "shop/mid-2", "shop/mid-3"] {
        assert_balanced(&node, name);
        assert_amcheck_clean(&node, name);
    }
    let frozen = history(&node, "shop/mid-1");
    assert!(frozen > 0 && frozen <= history(&node, "shop/mid-3"), "a later branch has no less");
    // The parent goes on; the branch does not see it, nor the parent the branch's writes.
    let before = history(&node, "shop/prod");
    ebb_tests::wait_for("the parent to go on", || history(&node, "shop/prod") > before + 100);
    assert_eq!(history(&node, "shop/mid-1"), frozen);
    node.psql("shop/mid-1", "truncate pgbench_accounts; drop table pgbench_tellers");
    node.psql("shop/mid-1", "vacuum full pgbench_branches");
    load.assert_running();
    drop(load);
    assert_balanced(&node, "shop/prod");
    assert_amcheck_clean(&node, "shop/prod");
    assert_eq!(node.psql("shop/prod", "select count(*) from pgbench_accounts"), "200000");
}

#[test]
fn branches_come_from_suspended_sources_from_checkpoints_and_from_branches() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table t as select 1 as n");
    node.ok(&["checkpoint", "create", "shop/prod", "one"]);
    node.psql("shop/prod", "update t set n = 2");
    node.suspend("shop/prod");
    node.ok(&["branch", "create", "shop/from-suspended", "--from", "shop/prod"]);
    node.ok(&["branch", "create", "shop/from-checkpoint", "--from", "shop/prod@one"]);
    assert_eq!(node.compute("shop/prod")["state"], "suspended", "the source was not woken");
    assert_eq!(node.psql("shop/from-suspended", "select n from t"), "2");
    assert_eq!(node.psql("shop/from-checkpoint", "select n from t"), "1");
    let mut source = "shop/from-checkpoint".to_owned();
    for depth in 0..5 {
        node.psql(&source, &format!("update t set n = {}", 10 + depth));
        let next = format!("shop/deep-{depth}");
        node.ok(&["branch", "create", &next, "--from", &source]);
        source = next;
    }
    assert_eq!(node.psql(&source, "select n from t"), "14");
    assert_eq!(node.psql("shop/deep-2", "select n from t"), "13", "a parent has what was written to it after");
    let names = node.ok(&["branch", "list", "shop"]);
    assert!(names.contains("from-suspended") && names.contains("deep-4"));
    node.ok(&["branch", "delete", "shop/from-checkpoint"]);
    assert_eq!(node.psql("shop/deep-0", "select n from t"), "11", "a child outlives its parent");
    let ran = node.ebb(&["branch", "create", "shop/x", "--from", "shop/prod@oen"]);
    assert_eq!(ran.code, 3, "{ran:?}");
    assert!(ran.stderr.contains("one"), "a near checkpoint is suggested: {}", ran.stderr);
}

#[test]
fn a_checkpoint_can_be_listed_and_dropped() {
    let node = Node::with_shop();
    node.psql("shop/prod", "create table t as select 1 as n");
    node.ok(&["checkpoint", "create", "shop/prod", "one"]);
    assert_eq!(node.ebb(&["checkpoint", "create", "shop/prod", "one"]).code, 4);
    assert!(node.ok(&["checkpoint", "list", "shop/prod"]).contains("one"));
    node.ok(&["checkpoint", "delete", "shop/prod", "one"]);
    assert!(!node.ok(&["checkpoint", "list", "shop/prod"]).contains("one"));
}
