//! A cluster, a proxy in front of it, and the means to put the cluster to sleep.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use ebb_proxy::{
    Awake, Blocked, Endpoint, EndpointError, Endpoints, Proxy, ProxyConfig, ProxyHandle, SessionState, Unreplayable,
};
use ebb_types::{AllowList, BranchId, EndpointName, Point, SqlState};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config, NoTls, SimpleQueryMessage};
use tokio_util::sync::CancellationToken;

/// Far above what anything here takes; reached only when something hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);
pub const BRANCH: BranchId = BranchId::for_test(1);
/// The moment `v1` of that branch.
pub const VISIT: BranchId = BranchId::for_test(2);
pub const ENDPOINT: &str = "prod--shop";
pub const PASSWORD: &str = "secret";
const BIN: &str = "/usr/lib/postgresql/15/bin";

/// What [`World`] does when it is asked to wake.
#[derive(Debug, Clone, Default)]
pub enum OnWake {
    #[default]
    Start,
    /// Answers this.
    Fail(EndpointError),
    /// Never answers.
    Hang,
}

/// Stands in for the rest of Ebb: one endpoint, whose compute is a plain cluster.
#[derive(Debug)]
pub struct World {
    dir: TempDir,
    postgres: Mutex<Option<Child>>,
    pub verifier: Mutex<Option<String>>,
    /// From where clients may connect.
    pub allowed: Mutex<AllowList>,
    pub on_wake: Mutex<OnWake>,
    pub delay: Mutex<Duration>,
    generation: AtomicU64,
    /// Calls of `wake`, and how many of them overlapped another.
    pub wakes: AtomicUsize,
    pub waking: AtomicUsize,
    pub overlaps: AtomicUsize,
    /// Calls of `visit`.
    pub visits: AtomicUsize,
    /// At the moment that is visited no role could log in.
    pub nobody_then: AtomicBool,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("ebb-proxy-").tempdir().unwrap();
        own(dir.path());
        run(Command::new("cp").arg("-a").arg(template()).arg(dir.path().join("data")));
        Self {
            dir,
            postgres: Mutex::default(),
            verifier: Mutex::default(),
            allowed: Mutex::default(),
            on_wake: Mutex::default(),
            delay: Mutex::default(),
            generation: AtomicU64::new(0),
            wakes: AtomicUsize::new(0),
            waking: AtomicUsize::new(0),
            overlaps: AtomicUsize::new(0),
            visits: AtomicUsize::new(0),
            nobody_then: AtomicBool::new(false),
        }
    }

    /// Where Postgres listens, beside the proxy.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join(".s.PGSQL.5432")
    }

    pub fn is_running(&self) -> bool {
        self.postgres.lock().unwrap().is_some()
    }

    async fn start(&self) {
        if self.is_running() {
            return;
        }
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.path().join("log")).unwrap();
        let mut command = as_postgres(&format!("{BIN}/postgres"));
        command.arg("-D").arg(self.dir.path().join("data")).arg("-k").arg(self.dir.path());
        for setting in
            ["listen_addresses=", "fsync=off", "max_connections=300", "shared_buffers=16MB", "wal_level=logical"]
        {
            command.arg("-c").arg(setting);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        *self.postgres.lock().unwrap() = Some(child);
        until("Postgres answers", || async { self.superuser().await.is_ok() }).await;
    }

    /// Connects beside the proxy.
    pub async fn superuser(&self) -> Result<Client, tokio_postgres::Error> {
        let mut config = Config::new();
        config.host_path(self.dir.path()).user("postgres").dbname("app");
        let (client, connection) = config.connect(NoTls).await?;
        tokio::spawn(connection);
        Ok(client)
    }

    /// Ends Postgres: `INT` cleanly, `KILL` not.
    pub fn stop(&self, signal: &str) {
        if let Some(mut child) = self.postgres.lock().unwrap().take() {
            let pid = child.id();
            run(Command::new("kill").arg(format!("-{signal}")).arg(pid.to_string()));
            child.wait().unwrap();
            // After a kill the backends notice by themselves; the next start has to find them gone.
            let socket_lock = self.dir.path().join(".s.PGSQL.5432.lock");
            let _ = fs::remove_file(socket_lock);
        }
    }

    /// Puts another cluster in the place of the one that sleeps.
    pub fn replace(&self) {
        fs::remove_dir_all(self.data()).unwrap();
        run(as_postgres(&format!("{BIN}/initdb")).args(["-A", "trust", "-U", "postgres", "-N", "-D"]).arg(self.data()));
        let sql = "CREATE ROLE app LOGIN REPLICATION\nCREATE DATABASE app OWNER app\n";
        let path = self.dir.path().join("sql");
        fs::write(&path, sql).unwrap();
        let mut single = as_postgres(&format!("{BIN}/postgres"));
        run(single.args(["--single", "-D"]).arg(self.data()).arg("postgres").stdin(fs::File::open(&path).unwrap()));
    }

    pub fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop("INT");
    }
}

#[async_trait]
impl Endpoints for World {
    async fn find(&self, name: &EndpointName) -> Result<Endpoint, EndpointError> {
        if name.to_string() == ENDPOINT {
            return Ok(Endpoint {
                branch: BRANCH,
                name: name.clone(),
                default_database: "app".to_owned(),
                pool_size: None,
            });
        }
        Err(EndpointError {
            sqlstate: SqlState::INVALID_CATALOG_NAME,
            message: format!("endpoint \"{name}\" does not exist"),
            detail: None,
            hint: Some(format!("Did you mean {ENDPOINT}?")),
        })
    }

    async fn allowed(&self, branch: BranchId) -> Result<AllowList, EndpointError> {
        assert_eq!(branch, BRANCH);
        Ok(self.allowed.lock().unwrap().clone())
    }

    fn mock_secret(&self) -> Option<[u8; 32]> {
        None
    }

    async fn verifier(&self, branch: BranchId, role: &str) -> Result<Option<String>, EndpointError> {
        assert_eq!(branch, BRANCH);
        Ok(self.verifier.lock().unwrap().clone().filter(|_| role == "app"))
    }

    async fn visit(&self, branch: BranchId, point: &Point) -> Result<BranchId, EndpointError> {
        assert_eq!(branch, BRANCH);
        self.visits.fetch_add(1, Ordering::SeqCst);
        match point.to_string().as_str() {
            "v1" => Ok(VISIT),
            _ => Err(EndpointError {
                sqlstate: SqlState::INVALID_CATALOG_NAME,
                message: format!("branch \"prod\" has no checkpoint \"{point}\""),
                detail: None,
                hint: Some("Did you mean v1?".to_owned()),
            }),
        }
    }

    fn may_answer(&self) -> bool {
        true
    }

    async fn wake(&self, branch: BranchId) -> Result<Awake, EndpointError> {
        assert!(branch == BRANCH || branch == VISIT);
        self.wakes.fetch_add(1, Ordering::SeqCst);
        if self.waking.fetch_add(1, Ordering::SeqCst) > 0 {
            self.overlaps.fetch_add(1, Ordering::SeqCst);
        }
        let delay = *self.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
        let on_wake = self.on_wake.lock().unwrap().clone();
        let result = match on_wake {
            OnWake::Start => {
                if !self.is_running() {
                    self.start().await;
                    self.generation.fetch_add(1, Ordering::SeqCst);
                }
                let roles = if self.nobody_then.load(Ordering::SeqCst) { None } else { Some("app".to_owned()) };
                let admits = (branch == VISIT).then(|| Arc::new(roles.into_iter().collect()));
                Ok(Awake { generation: self.generation.load(Ordering::SeqCst), socket: self.socket(), admits })
            }
            OnWake::Fail(error) => Err(error),
            OnWake::Hang => std::future::pending().await,
        };
        self.waking.fetch_sub(1, Ordering::SeqCst);
        result
    }
}

/// A proxy before a [`World`]; both end with it.
pub struct Ebb {
    pub world: Arc<World>,
    pub addr: SocketAddr,
    pub handle: ProxyHandle,
    pub ca_pem: PathBuf,
    pub shutdown: CancellationToken,
    task: Option<JoinHandle<()>>,
    /// Where its certificate authority is.
    pub tls: TempDir,
}

impl Ebb {
    /// The compute is asleep, and nothing has woken it.
    pub async fn asleep() -> Self {
        Self::with(|_| {}).await
    }

    /// The same with other settings.
    pub async fn with(change: impl FnOnce(&mut ProxyConfig)) -> Self {
        let _ = tracing_subscriber::fmt().with_env_filter("ebb_proxy=debug").with_test_writer().try_init();
        let world = World::new();
        world.start().await;
        let row = world
            .superuser()
            .await
            .unwrap()
            .query_one("SELECT rolpassword FROM pg_authid WHERE rolname = 'app'", &[])
            .await
            .unwrap();
        *world.verifier.lock().unwrap() = Some(row.get(0));
        world.stop("INT");

        let tls = tempfile::tempdir().unwrap();
        let mut config = ProxyConfig::new("127.0.0.1:0".parse().unwrap(), tls.path());
        change(&mut config);
        let world = Arc::new(world);
        let proxy = Proxy::bind(config, world.clone()).unwrap();
        let shutdown = CancellationToken::new();
        Self {
            world,
            addr: proxy.local_addr(),
            handle: proxy.handle(),
            ca_pem: proxy.ca_pem_path().to_owned(),
            task: Some(tokio::spawn(proxy.run(shutdown.clone()))),
            shutdown,
            tls,
        }
    }

    /// A configuration that leads to the endpoint.
    pub fn config(&self) -> Config {
        let mut config = Config::new();
        config
            .host("127.0.0.1")
            .port(self.addr.port())
            .user("app")
            .password(PASSWORD)
            .dbname("app")
            .options(format!("endpoint={ENDPOINT}"));
        config
    }

    /// A configuration that leads to it in transaction mode.
    pub fn pooled(&self) -> Config {
        let mut config = self.config();
        config.options(format!("endpoint={ENDPOINT}-pooler"));
        config
    }

    pub async fn connect_pooled(&self) -> Client {
        connect(&self.pooled()).await.unwrap()
    }

    pub async fn connect(&self) -> Client {
        connect(&self.config()).await.unwrap()
    }

    /// Suspends as the timeline does: hold everyone, stop Postgres, let go.
    pub async fn suspend(&self) -> Result<(), Blocked> {
        self.handle.fence(BRANCH, PATIENCE, Unreplayable::Refuse).await?;
        self.world.stop("INT");
        self.handle.release(BRANCH);
        Ok(())
    }

    /// Suspends as soon as the sessions have come to rest.
    pub async fn suspend_when_idle(&self) {
        until("the sessions are at rest", || async { self.suspend().await.is_ok() }).await;
    }

    pub fn states(&self) -> Vec<SessionState> {
        self.handle.sessions(BRANCH).into_iter().map(|session| session.state).collect()
    }

    pub fn wakes(&self) -> usize {
        self.world.wakes.load(Ordering::SeqCst)
    }

    /// Runs psql on a URI's parameters; answers its standard output, or its standard error.
    pub async fn psql(&self, parameters: &str, sql: &str) -> Result<String, String> {
        self.psql_at(self.addr, parameters, sql).await
    }

    /// The same, through something else that leads to the proxy.
    pub async fn psql_at(&self, addr: SocketAddr, parameters: &str, sql: &str) -> Result<String, String> {
        let conninfo = format!(
            "hostaddr={} port={} user=app password={PASSWORD} dbname=app sslrootcert={} {parameters}",
            addr.ip(),
            addr.port(),
            self.ca_pem.display()
        );
        let sql = sql.to_owned();
        let run = move || {
            Command::new("psql").arg(conninfo).args(["-X", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c"]).arg(sql).output()
        };
        let output = tokio::task::spawn_blocking(run).await.unwrap().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().trim_end().to_owned();
        if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
    }

    /// Drains the proxy and waits for its end.
    pub async fn stop(mut self) {
        self.shutdown.cancel();
        self.task.take().unwrap().await.unwrap();
    }
}

impl Drop for Ebb {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

pub async fn connect(config: &Config) -> Result<Client, tokio_postgres::Error> {
    let (client, connection) = config.connect(NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// The SQLSTATE an error carries.
pub fn code(error: &tokio_postgres::Error) -> &str {
    error.as_db_error().unwrap_or_else(|| panic!("no answer of the server: {error:?}")).code().code()
}

/// One value as text. By a simple query: for others the driver sends a `Close` at a moment of its own choosing.
pub async fn value(client: &Client, sql: &str) -> String {
    let messages = client.simple_query(sql).await.unwrap();
    let row = messages.into_iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(0).expect("it is not null").to_owned()),
        _ => None,
    });
    row.unwrap_or_else(|| panic!("no row from {sql}"))
}

/// Waits for a condition.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let waiting = async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("never: {what}"));
}

/// A cluster with role and database `app`, made once per build directory.
fn template() -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("proxy-cluster-15");
    if path.exists() {
        return path;
    }
    let dir = tempfile::Builder::new().prefix("ebb-proxy-template-").tempdir().unwrap();
    own(dir.path());
    let data = dir.path().join("data");
    run(as_postgres(&format!("{BIN}/initdb")).args(["-A", "trust", "-U", "postgres", "-N", "-D"]).arg(&data));
    let sql = dir.path().join("sql");
    fs::write(
        &sql,
        format!(
            "CREATE ROLE app LOGIN PASSWORD '{PASSWORD}'\nCREATE ROLE reader\nGRANT reader TO app\n\
             CREATE DATABASE app OWNER app\n"
        ),
    )
    .unwrap();
    run(as_postgres(&format!("{BIN}/postgres"))
        .args(["--single", "-D"])
        .arg(&data)
        .arg("postgres")
        .stdin(fs::File::open(&sql).unwrap()));
    // Another test may be at it, too: whoever renames first wins.
    let made = path.with_extension(std::process::id().to_string());
    run(Command::new("cp").arg("-a").arg(&data).arg(&made));
    if fs::rename(&made, &path).is_err() {
        fs::remove_dir_all(&made).unwrap();
    }
    path
}

fn is_root() -> bool {
    Command::new("id").arg("-u").output().unwrap().stdout == b"0\n"
}

/// Postgres does not run as root.
fn as_postgres(program: &str) -> Command {
    if !is_root() {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--clear-groups", "--pdeathsig=QUIT", "--"]).arg(program);
    command
}

fn own(dir: &Path) {
    if is_root() {
        let id = |which| {
            let output = Command::new("id").args([which, "postgres"]).output().unwrap().stdout;
            String::from_utf8(output).unwrap().trim().parse().unwrap()
        };
        chown(dir, Some(id("-u")), Some(id("-g"))).unwrap();
    }
}

fn run(command: &mut Command) {
    let output = command.stdout(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
