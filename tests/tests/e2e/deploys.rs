//! A web application that is deployed again and again under load, some of it broken: it sees pauses, not errors, and what
//! does not work goes back by itself.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::time::Duration;

use deadpool_postgres::{Manager, ManagerConfig, Pool, RecyclingMethod};
use ebb_tests::{Node, Ran, wait_for, within};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_postgres::NoTls;

/// How often it is deployed, unless `EBB_TEST_DEPLOYS` says otherwise.
const DEPLOYS: usize = 8;

/// At most so many transactions may be set aside by itself: more than the load begins while a probe fails.
const BOUND: usize = 100_000;

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

/// A directory to be released.
fn artifact(node: &Node, name: &str, file: &str, migrations: &[(String, String)]) -> PathBuf {
    let dir = node.scratch().join("releases").join(name);
    fs::create_dir_all(dir.join("migrations")).expect("a directory can be made");
    fs::write(dir.join("app.txt"), name).expect("a file can be written");
    if !file.is_empty() {
        fs::write(dir.join("ebb.toml"), file).expect("a file can be written");
    }
    for (file, sql) in migrations {
        fs::write(dir.join("migrations").join(file), sql).expect("a file can be written");
    }
    dir
}

fn migration(name: &str, sql: &str) -> (String, String) {
    (name.to_owned(), sql.to_owned())
}

fn release(node: &Node, dir: &Path) -> Ran {
    node.ebb(&["release", "create", "shop", "--artifact", text(dir)])
}

/// The application: a pool of connections, workers that take orders, and a page that tells how it is.
struct App {
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
    port: u16,
}

struct Shared {
    pool: Pool,
    current: PathBuf,
    stop: AtomicBool,
    next: AtomicI64,
    /// Orders that were acknowledged.
    taken: Mutex<BTreeSet<i64>>,
    /// Which deploy is under way.
    round: AtomicUsize,
    /// During which of them a client's work began, and ended with an error.
    errors: Mutex<Vec<(usize, usize, String)>>,
}

impl App {
    async fn start(node: &Node, current: &Path) -> Self {
        let config: tokio_postgres::Config = node.url("shop/prod").parse().expect("ebb prints URLs");
        let recycling = ManagerConfig { recycling_method: RecyclingMethod::Fast };
        let pool = Pool::builder(Manager::from_config(config, NoTls, recycling)).max_size(6);
        let shared = Arc::new(Shared {
            pool: pool.build().expect("a pool needs nothing"),
            current: current.to_owned(),
            stop: AtomicBool::new(false),
            next: AtomicI64::new(1),
            taken: Mutex::default(),
            round: AtomicUsize::new(0),
            errors: Mutex::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = listener.local_addr().expect("it is bound").port();
        let mut tasks = vec![tokio::spawn(serve(listener, shared.clone()))];
        tasks.extend((0..8).map(|_| tokio::spawn(work(shared.clone()))));
        Self { shared, tasks, port }
    }

    fn orders(&self) -> usize {
        self.shared.taken.lock().len()
    }

    /// Waits until so many more orders were taken.
    async fn progress(&self, orders: usize) {
        let goal = self.orders() + orders;
        ebb_tests::wait_until("the application to get on", || async { self.orders() >= goal }).await;
    }

    async fn stop(mut self) -> Vec<(usize, usize, String)> {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.tasks.remove(0).abort();
        for task in self.tasks {
            within("a worker to stop", task).await.expect("a worker does not panic");
        }
        std::mem::take(&mut *self.shared.errors.lock())
    }
}

/// Takes orders: each a transaction that moves money, so that the sum stays.
async fn work(shared: Arc<Shared>) {
    while !shared.stop.load(Ordering::SeqCst) {
        let id = shared.next.fetch_add(1, Ordering::SeqCst);
        let round = shared.round.load(Ordering::SeqCst);
        match order(&shared.pool, id).await {
            Ok(()) => drop(shared.taken.lock().insert(id)),
            Err(error) => shared.errors.lock().push((round, shared.round.load(Ordering::SeqCst), error)),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn order(pool: &Pool, id: i64) -> Result<(), String> {
    let mut client = pool.get().await.map_err(|error| error.to_string())?;
    let said = |error: tokio_postgres::Error| {
        error.as_db_error().map_or_else(|| error.to_string(), |db| format!("{} {}", db.code().code(), db.message()))
    };
    let transaction = client.transaction().await.map_err(said)?;
    transaction.execute("insert into orders (id, amount) values ($1, 1)", &[&id]).await.map_err(said)?;
    let moved = "update accounts set balance = balance + case name when 'shop' then 1 else -1 end where part = $1";
    transaction.execute(moved, &[&i32::try_from(id % 16).unwrap_or(0)]).await.map_err(said)?;
    transaction.commit().await.map_err(said)
}

/// Answers every request with the code that is in service, and whether the database answers.
async fn serve(listener: TcpListener, shared: Arc<Shared>) {
    while let Ok((mut stream, _)) = listener.accept().await {
        let shared = shared.clone();
        tokio::spawn(async move {
            let _ = stream.read(&mut [0; 4096]).await;
            let code = fs::read_to_string(shared.current.join("app.txt")).unwrap_or_default();
            let database = match shared.pool.get().await {
                Ok(client) => client.query_one("select 1", &[]).await.is_ok(),
                Err(_) => false,
            };
            let body = serde_json::json!({"code": code, "database": database}).to_string();
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            // Whoever asked may have gone away.
            let _ = stream.write_all(format!("{head}{body}").as_bytes()).await;
        });
    }
}

/// What is deployed, and how it is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Round {
    Good,
    BadSql,
    FailingProbe,
    SlowLock,
    PostgresKilled,
    ServerKilled,
}

const ROUNDS: [Round; 8] = [
    Round::Good,
    Round::BadSql,
    Round::Good,
    Round::FailingProbe,
    Round::SlowLock,
    Round::PostgresKilled,
    Round::ServerKilled,
    Round::Good,
];

/// The project, its application, and what is known of both.
struct Story {
    node: Node,
    app: App,
    current: PathBuf,
    /// Migrations of the releases that worked.
    migrations: Vec<(String, String)>,
    /// The code that must be in service.
    code: String,
    /// Orders that were set aside.
    lost: BTreeSet<i64>,
}

impl Story {
    fn file(&self, policy: &str, code: &str) -> String {
        format!(
            "[policy]\n{policy}\n[[probe]]\nsql = \"select sum(balance) from accounts\"\nexpect = \"0\"\n\
             [[probe]]\nhttp = \"http://127.0.0.1:{}/health\"\njson = \"/code\"\nexpect = \"{code}\"\nretries = 20\n\
             wait = \"50ms\"\n",
            self.app.port
        )
    }

    /// The directory of a release: what worked so far, and one more migration.
    fn artifact(&self, name: &str, file: &str, sql: &str) -> PathBuf {
        let own = (format!("{:03}_{name}.sql", self.migrations.len() + 1), sql.to_owned());
        artifact(&self.node, name, file, &[&self.migrations[..], &[own]].concat())
    }

    fn worked(&mut self, name: &str, sql: &str) {
        self.migrations.push((format!("{:03}_{name}.sql", self.migrations.len() + 1), sql.to_owned()));
        name.clone_into(&mut self.code);
    }

    fn good(&mut self, name: &str) {
        let sql = format!("alter table orders add column {name} int not null default 0");
        let dir = self.artifact(name, &self.file("fence = true\nrollback = \"data\"", name), &sql);
        let ran = release(&self.node, &dir);
        assert_eq!(ran.code, 0, "{name}: {ran:?}");
        self.worked(name, &sql);
        // The same twice is one release.
        let again = self.node.json(&["release", "create", "shop", "--artifact", text(&dir)]);
        assert_eq!(again["current"], true);
    }

    fn bad_sql(&mut self, name: &str) {
        let file = self.file("rollback = \"data\"", name);
        let dir = self.artifact(name, &file, "create table half (n int); insert into nowhere values (1)");
        let ran = release(&self.node, &dir);
        assert_ne!(ran.code, 0);
        assert!(ran.stderr.contains("the rehearsal failed") && ran.stderr.contains("42P01"), "{ran:?}");
    }

    fn failing_probe(&mut self, name: &str) {
        let policy = format!("fence = true\nrollback = \"data\"\nmax_lost_transactions = {BOUND}");
        let file = self.file(&policy, "another").replace("retries = 20", "retries = 2");
        let dir = self.artifact(name, &file, "update orders set amount = 2");
        let ran = release(&self.node, &dir);
        assert!(ran.code != 0 && ran.stderr.contains("/code"), "{ran:?}");
        let set_aside = self.set_aside();
        assert!(set_aside <= BOUND, "{set_aside} orders");
    }

    /// The last release was taken back: what its data lacks is on its rescue branch. Answers how many orders.
    fn set_aside(&mut self) -> usize {
        let shown = self.last_release();
        assert_eq!(shown["state"], "rolled_back", "{shown}");
        let rescue = format!("shop/{}", shown["rescue"].as_str().expect("its data was set aside"));
        let aside = ids(&self.node.psql(&rescue, "select id from orders"));
        let taken = self.app.shared.taken.lock().clone();
        let there = ids(&self.node.psql("shop/prod", "select id from orders"));
        let new: BTreeSet<i64> = taken.difference(&there).filter(|id| !self.lost.contains(id)).copied().collect();
        assert!(new.is_subset(&aside), "{} orders are nowhere", new.difference(&aside).count());
        let count = new.len();
        self.lost.extend(new);
        count
    }

    /// Somebody reads for long: the migration gives up, rather than to make everybody wait.
    fn slow_lock(&mut self, name: &str) {
        let mut reader = std::process::Command::new(ebb_tests::pg_bin().join("psql"))
            .args([
                "-XAtq",
                &self.node.url("shop/prod"),
                "-c",
                "begin; select 1 from orders limit 1; select pg_sleep(600)",
            ])
            .stdout(std::process::Stdio::null())
            .spawn()
            .expect("psql can be started");
        self.wait_active("pg_sleep(600)");
        let sql = format!("alter table orders add column {name} int");
        let file = self.file("rollback = \"data\"\nlock_timeout = \"200ms\"", name);
        let dir = self.artifact(name, &file, &sql);
        let ran = release(&self.node, &dir);
        assert!(ran.code != 0 && ran.stderr.contains("55P03"), "{ran:?}");
        self.superuser("select pg_terminate_backend(pid) from pg_stat_activity where query like '%pg_sleep(600)%' and pid <> pg_backend_pid()");
        reader.wait().expect("psql ends");
    }

    /// The first migration is in and the second one runs, when everything stops: prod comes back as it was, or goes on.
    fn interrupted(&mut self, name: &str, kill: impl FnOnce(&Node) + Send) {
        let (first, sql) = (format!("create table {name} (n int)"), "select pg_sleep(600)");
        let policy = format!("rehearse = false\nrollback = \"data\"\nmax_lost_transactions = {BOUND}");
        let file = self.file(&policy, name);
        let dir = self.artifact(name, &file, &first);
        fs::write(dir.join("migrations/999_slow.sql"), sql).expect("a file can be written");
        std::thread::scope(|scope| {
            let node = &self.node;
            let deploying = scope.spawn(|| release(node, &dir));
            self.wait_active("pg_sleep(600)");
            kill(node);
            let ran = deploying.join().expect("a command ends");
            assert_ne!(ran.code, 0, "{ran:?}");
        });
    }

    /// After an interruption: the release is over, and its first migration with it.
    fn came_back(&mut self, name: &str) {
        wait_for("the interrupted release to be over", || self.last_release()["state"] != "deploying");
        wait_for("its data to be back", || {
            let sql = format!("select to_regclass('{name}') is null");
            self.node.psql("shop/prod", &sql) == "t"
        });
        self.set_aside();
    }

    fn last_release(&self) -> Value {
        let list = self.node.json(&["release", "list", "shop"]);
        let name = list["releases"].as_array().and_then(|all| all.last()?["name"].as_str()).expect("there is one");
        self.node.json(&["release", "show", "shop", name])
    }

    fn superuser(&self, sql: &str) -> String {
        self.node.superuser_tool("shop/prod", "psql", &["-XAtq", "-d", "app", "-c", sql]).stdout.trim().to_owned()
    }

    /// Waits until a statement runs on prod.
    fn wait_active(&self, part: &str) {
        let sql = format!(
            "select count(*) > 0 from pg_stat_activity where state = 'active' and wait_event = 'PgSleep' and query like '%{part}%'"
        );
        wait_for("a statement to run on prod", || self.superuser(&sql) == "t");
    }

    /// Code, data and ledger are as they must be.
    fn check(&self, round: Round, name: &str) {
        let code = fs::read_to_string(self.current.join("app.txt")).expect("there is code");
        assert_eq!(code, self.code, "the code after {round:?} {name}");
        let taken = self.app.shared.taken.lock().clone();
        let there = ids(&self.node.psql("shop/prod", "select id from orders"));
        let missing: Vec<_> = taken.difference(&there).filter(|id| !self.lost.contains(id)).collect();
        assert!(missing.is_empty(), "{} acknowledged orders are lost after {round:?} {name}", missing.len());
        let sums = "select sum(balance) = 0, sum(balance) filter (where name = 'shop') = (select count(*) from orders) from accounts";
        assert_eq!(self.node.psql("shop/prod", "select count(*) from orders where amount <> 1"), "0");
        assert_eq!(self.node.psql("shop/prod", sums), "t|t", "the sums after {round:?} {name}");
        assert_eq!(self.node.json(&["ledger", "verify", "shop"])["ok"], true);
    }
}

fn ids(rows: &str) -> BTreeSet<i64> {
    rows.lines().map(|line| line.parse().expect("an order has a number")).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_application_under_load_is_deployed_again_and_again_and_what_is_broken_goes_back() {
    let node = Node::start();
    let current = node.scratch().join("current");
    node.ok(&["project", "create", "shop", "--current", text(&current)]);
    let tables = migration(
        "001_first.sql",
        "create table orders (id bigint primary key, amount int not null);
         create table accounts (part int, name text, balance bigint not null);
         insert into accounts select part, name, 0 from generate_series(0, 15) part, (values ('shop'), ('bank')) n (name)",
    );
    let first = artifact(&node, "first", "", std::slice::from_ref(&tables));
    node.ok(&["release", "create", "shop", "--artifact", text(&first)]);
    let app = App::start(&node, &current).await;
    app.progress(20).await;
    let (migrations, code) = (vec![tables], "first".to_owned());
    let mut story = Story { node, app, current, migrations, code, lost: BTreeSet::new() };

    let deploys = std::env::var("EBB_TEST_DEPLOYS").ok().and_then(|n| n.parse().ok()).unwrap_or(DEPLOYS);
    let mut may_see_errors = BTreeSet::new();
    for number in 1..=deploys {
        let round = ROUNDS[(number - 1) % ROUNDS.len()];
        let name = format!("r{number}");
        story.app.shared.round.store(number, Ordering::SeqCst);
        tokio::task::block_in_place(|| match round {
            Round::Good => story.good(&name),
            Round::BadSql => story.bad_sql(&name),
            Round::FailingProbe => story.failing_probe(&name),
            Round::SlowLock => story.slow_lock(&name),
            Round::PostgresKilled => {
                may_see_errors.insert(number);
                story.interrupted(&name, |node| node.kill_9(node.postmaster_pid("shop/prod")));
                story.came_back(&name);
            }
            Round::ServerKilled => {
                may_see_errors.insert(number);
                story.interrupted(&name, |node| ebb_tests::kill("KILL", node.server_pid()));
                story.node.kill_server();
                story.node.serve();
                story.came_back(&name);
            }
        });
        story.app.progress(20).await;
        tokio::task::block_in_place(|| story.check(round, &name));
    }
    let Story { node, app, .. } = story;
    let errors = app.stop().await;
    let allowed = |round| may_see_errors.contains(round);
    let unexpected: Vec<_> = errors.iter().filter(|(began, ended, _)| !allowed(began) && !allowed(ended)).collect();
    assert!(unexpected.is_empty(), "clients saw errors that no policy allowed: {unexpected:?}");
    assert_eq!(node.json(&["ledger", "verify", "shop"])["ok"], true);
}

#[test]
fn a_rehearsal_tells_what_a_release_would_lock_and_changes_nothing() {
    let node = Node::with_shop();
    let first = migration("001_t.sql", "create table t as select generate_series(1, 1000) as n");
    let v1 = artifact(&node, "one", "", std::slice::from_ref(&first));
    node.ok(&["release", "create", "shop", "--artifact", text(&v1)]);
    let more = [
        first,
        migration("002_wide.sql", "alter table t alter n type bigint"),
        migration("003_index.sql", "create index concurrently by_n on t (n)"),
    ];
    let file = "[[probe]]\nsql = \"select count(*) from t\"\nexpect = 1000\n";
    let v2 = artifact(&node, "two", file, &more);
    assert_eq!(node.ebb(&["release", "check", text(&v2)]).code, 0);
    let report = node.json(&["release", "create", "shop", "--artifact", text(&v2), "--rehearse-only"]);
    let runs = report["migrations"].as_array().expect("a list");
    assert_eq!(runs.len(), 2, "{report}");
    assert_eq!(runs[0]["locks"][0]["mode"], "AccessExclusiveLock", "{report}");
    assert_eq!((&runs[0]["rewritten"][0]["table"], &runs[1]["outside"]), (&"t".into(), &true.into()), "{report}");
    assert!(report["probes"][0]["fault"].is_null(), "{report}");
    let kind = "select data_type from information_schema.columns where table_name = 't'";
    assert_eq!(node.psql("shop/prod", kind), "integer");
    assert_eq!(node.json(&["release", "list", "shop"])["releases"].as_array().map(Vec::len), Some(1));

    let made = node.json(&["release", "create", "shop", "--artifact", text(&v2)]);
    assert_eq!((&made["state"], made["runs"].as_array().map(Vec::len)), (&"deployed".into(), Some(2)), "{made}");
    assert_eq!(node.psql("shop/prod", kind), "bigint");
    let shown = node.ok(&["release", "show", "shop", "v2"]);
    assert!(shown.contains("AccessExclusive on t") && shown.contains("select count(*) from t"), "{shown}");

    fs::write(v2.join("ebb.toml"), "[polcy]\n").expect("a file can be written");
    let ran = node.ebb(&["release", "check", text(&v2)]);
    assert!(ran.code == 2 && ran.stdout.contains("ebb.toml:1:2") && ran.stdout.contains("policy"), "{ran:?}");
    assert_eq!(release(&node, &v2).code, 2);
}

#[test]
fn a_rollback_counts_what_it_would_set_aside_and_code_or_data_can_go_back_alone() {
    let mut node = Node::with_shop();
    let first = migration(
        "001_t.sql",
        "create table t as select generate_series(1, 100) as id; alter table t add primary key (id)",
    );
    let v1 = artifact(&node, "one", "", std::slice::from_ref(&first));
    node.ok(&["release", "create", "shop", "--artifact", text(&v1)]);
    let more = [first, migration("002_u.sql", "create table u as select 1 as id")];
    let v2 = artifact(&node, "two", "[policy]\nfence = true\n", &more);
    node.ok(&["release", "create", "shop", "--artifact", text(&v2)]);
    node.psql("shop/prod", "insert into t values (101), (102); delete from t where id = 1");

    let plan = node.json(&["rollback", "shop", "--to", "v1", "--plan"]);
    let of = |name: &str| {
        let tables = plan["written"]["tables"].as_array().expect("a list");
        tables.iter().find(|table| table["table"] == name).unwrap_or_else(|| panic!("{name} is not in {plan}")).clone()
    };
    assert_eq!((&of("public.t")["added"], &of("public.t")["removed"]), (&2.into(), &1.into()), "{plan}");
    assert!(plan["set_aside"]["transactions"].as_u64() >= Some(2) && plan["set_aside"]["wal_bytes"].as_u64() > Some(0));
    let code = || fs::read_to_string(node.data().join("projects/shop/current/app.txt")).expect("there is code");
    assert_eq!(code(), "two", "a plan changes nothing");

    let back = node.json(&["rollback", "shop", "--to", "v1", "--code-only"]);
    assert!(back["rescue"].is_null() && code() == "one", "{back}");
    assert_eq!(node.psql("shop/prod", "select count(*) from t, u"), "101");
    node.ok(&["release", "create", "shop", "--artifact", text(&v2)]);
    let back = node.json(&["rollback", "shop", "--to", "v1", "--data-only"]);
    assert!(back["rescue"]["name"].is_string() && code() == "two", "{back}");
    assert_eq!(node.psql("shop/prod", "select count(*), to_regclass('u') is null from t"), "100|t");

    let found = node.json(&["ledger", "list", "shop", "--operation", "rollback", "--on", "v1"]);
    assert_eq!(found["entries"][0]["act"], "rollback", "{found}");
    let bucket = node.data().join("bucket");
    node.stop();
    let verdict = node.json(&["ledger", "verify", "--bucket", text(&bucket), "shop"]);
    assert_eq!(verdict["ok"], true);
    let lines = node.ok(&["ledger", "export", "--bucket", text(&bucket), "shop"]);
    assert_eq!(lines.lines().count() as u64, verdict["entries"].as_u64().expect("a number"));
    let last: Value = serde_json::from_str(lines.lines().last().expect("there is one")).expect("JSON Lines");
    assert_eq!(last["hash"], verdict["head_hash"]);
    let project = fs::read_dir(bucket.join("projects")).expect("a directory").next().expect("one").expect("one");
    let object =
        fs::read_dir(project.path().join("ledger")).expect("a directory").map(|entry| entry.expect("one").path());
    let fourth = object.into_iter().find(|path| text(path).ends_with("04")).expect("there are as many");
    let stored = fs::read_to_string(&fourth).expect("it can be read");
    fs::write(&fourth, stored.replacen("local", "loval", 1)).expect("it can be written");
    let ran = node.ebb(&["ledger", "verify", "--bucket", text(&bucket), "shop"]);
    assert!(ran.code == 1 && ran.stdout.contains("entry 4"), "{ran:?}");
}
