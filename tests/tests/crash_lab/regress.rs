//! PostgreSQL's own regression suite, on a volume and on a branch of it. Long: only with `EBB_PG_REGRESS=1`.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use ebb_tests::{Node, run};

/// LIMIT: the suite takes about a minute on an idle machine, and its source has to be fetched once.
const SUITE_PATIENCE: Duration = Duration::from_secs(1200);

/// Runs `scripts/pg-regress` on an awake branch. Where it fails, the differences are printed.
fn regress(node: &Node, branch: &str, work: &Path) {
    node.ok(&["compute", "wake", branch]);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/pg-regress");
    let mut command = Command::new(script);
    command.arg(node.branch_dir(branch).join("run")).arg(work);
    let begun = Instant::now();
    let ran = run(command, SUITE_PATIENCE).unwrap_or_else(|why| panic!("the suite on {branch} {why}"));
    let summary = ran.stdout.lines().filter(|line| line.contains("tests passed") || line.contains("FAILED"));
    println!("{branch}, {} s: {}", begun.elapsed().as_secs(), summary.collect::<Vec<_>>().join("\n"));
    let diffs = std::fs::read_to_string(work.join("regression.diffs")).unwrap_or_default();
    assert_eq!(ran.code, 0, "{}\n{}\n{diffs}", ran.stdout, ran.stderr);
}

#[test]
fn the_regression_suite_of_postgres_passes_on_a_volume_and_on_its_branch() {
    if std::env::var_os("EBB_PG_REGRESS").is_none() {
        eprintln!("not run: EBB_PG_REGRESS is not set");
        return;
    }
    let node = Node::with_shop();
    node.ok(&["branch", "set", "shop/prod", "--idle-suspend", "1h"]);
    // The server must reach the suite's files, and write beside them.
    let work = tempfile::TempDir::with_prefix("ebb-regress-").expect("a temporary directory can be made");
    std::fs::set_permissions(work.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("it is ours");
    regress(&node, "shop/prod", &work.path().join("volume"));
    node.ok(&["branch", "create", "shop/again", "--from", "shop/prod"]);
    node.ok(&["branch", "set", "shop/again", "--idle-suspend", "1h"]);
    regress(&node, "shop/again", &work.path().join("branch"));
    for branch in ["shop/prod", "shop/again"] {
        let ran = node.superuser_tool(branch, "pg_amcheck", &["--install-missing", "--heapallindexed", "-a"]);
        assert_eq!(ran.code, 0, "{branch}: {}{}", ran.stdout, ran.stderr);
    }
}
