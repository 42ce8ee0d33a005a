//! The known ways out of a branch, tried one by one: from a tenant's session, and by somebody who is already superuser of
//! a branch's Postgres. What stopped each is in `docs/security.md`, a line for each.

use std::fs;
use std::path::Path;

use ebb_tests::{Node, Ran};
use tokio_postgres::{Client, SimpleQueryMessage};

/// Permission denied.
const DENIED: &str = "42501";

/// How Postgres refuses a statement: its SQLSTATE.
async fn refusal(client: &Client, sql: &str) -> String {
    match client.batch_execute(sql).await {
        Ok(()) => panic!("{sql:?} was allowed"),
        Err(error) => error.code().unwrap_or_else(|| panic!("{sql:?}: {error:?}")).code().to_owned(),
    }
}

async fn value(client: &Client, sql: &str) -> String {
    let answer = client.simple_query(sql).await.unwrap_or_else(|error| panic!("{sql:?}: {error:?}"));
    let row = answer.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    });
    row.unwrap_or_else(|| panic!("{sql:?} answers nothing"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_finds_no_way_out_of_its_database() {
    let node = Node::with_shop();
    let client = node.connect("shop/prod").await;
    client.batch_execute("create table t (line text)").await.expect("a tenant has tables");
    for sql in [
        // Programs and files of the server.
        "copy (select 1) to program 'id'",
        "copy t from program 'id'",
        "copy t from '/etc/passwd'",
        "copy (select 1) to '/tmp/x'",
        "select lo_import('/etc/passwd')",
        "select lo_export(lo_create(0), '/tmp/x')",
        "select pg_read_file('/etc/passwd')",
        "select pg_read_file('postgresql.auto.conf')",
        "select pg_read_binary_file('global/pg_control')",
        "select pg_ls_dir('/')",
        "select pg_stat_file('/etc/passwd')",
        "select pg_ls_waldir()",
        "select pg_ls_logdir()",
        "create tablespace out location '/tmp'",
        // Code.
        "load '/tmp/evil.so'",
        "load 'dblink'",
        "load '$libdir/plugins/../dblink'",
        "create function evil() returns int language c as '/tmp/evil.so', 'evil'",
        "create function evil() returns int language internal as 'pg_backend_pid'",
        "create language evil handler plpgsql_call_handler",
        "create event trigger evil on ddl_command_start execute function pg_catalog.suppress_redundant_updates_trigger()",
        "create cast (text as int) without function",
        "create foreign data wrapper evil",
        // Other servers, and itself by another door.
        "create extension dblink",
        "create extension postgres_fdw",
        "create extension file_fdw",
        "create extension adminpack",
        "create subscription evil connection 'host=/mnt/run user=postgres' publication p with (connect = false)",
        "create publication evil for all tables",
        // Settings.
        "alter system set work_mem = '1GB'",
        "alter system set archive_command = 'id'",
        "set log_statement = 'all'",
        "set dynamic_library_path = '/tmp'",
        "set session_preload_libraries = 'dblink'",
        "set session_replication_role = 'replica'",
        "set allow_system_table_mods = on",
        "set zero_damaged_pages = on",
        "alter role app set session_preload_libraries = 'dblink'",
        "alter database app set session_preload_libraries = 'dblink'",
        "show hba_file",
        "show data_directory",
        "table pg_file_settings",
        "table pg_hba_file_rules",
        // Other roles, and limits of its own.
        "set role postgres",
        "set session authorization postgres",
        "alter role app superuser",
        "alter role app replication",
        "alter role app bypassrls",
        "alter role app connection limit 10000",
        "alter role postgres password 'x'",
        "create role evil superuser",
        "grant pg_execute_server_program to app",
        "grant pg_read_server_files to app",
        "grant pg_write_server_files to app",
        "grant pg_signal_backend to app",
        "table pg_authid",
        "table pg_shadow",
        "update pg_proc set prolang = 13",
        "update pg_authid set rolsuper = true",
        // The server as a whole.
        "checkpoint",
        "select pg_reload_conf()",
        "select pg_rotate_logfile()",
        "select pg_switch_wal()",
        "select pg_promote()",
        "select pg_create_restore_point('x')",
        "select pg_create_physical_replication_slot('x')",
        "select pg_log_backend_memory_contexts(pg_backend_pid())",
    ] {
        assert_eq!(refusal(&client, sql).await, DENIED, "{sql:?}");
    }
    // What no session may set, whoever it is of.
    for sql in ["set archive_command = 'id'", "set max_connections = 10000", "set shared_preload_libraries = 'dblink'"]
    {
        assert_eq!(refusal(&client, sql).await, "55P02", "{sql:?}");
    }
    // Languages that would be untrusted are not even there; if somebody installs one it needs a superuser.
    for language in ["plpython3u", "plperlu", "pltclu"] {
        let code = refusal(&client, &format!("create extension {language}")).await;
        assert!(["0A000", DENIED].contains(&code.as_str()), "{language}: {code}");
    }
    assert_eq!(value(&client, "select count(*) from pg_language where lanname like '%u'").await, "0");

    // Nobody but app gets in from outside, and app not as a replica.
    let url = node.url("shop/prod");
    let as_superuser = url.replacen("//app:", "//postgres:", 1);
    let error = node.try_connect(&as_superuser).await.expect_err("the superuser cannot log in");
    assert_eq!(error.code().map(|code| code.code()), Some("28P01"), "{error:?}");
    let ran = node.tool("psql", &["-XAtq", &format!("{url}&replication=database"), "-c", "identify_system"]);
    assert!(ran.stderr.contains("replication role") || ran.stderr.contains("REPLICATION"), "{}", ran.stderr);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tenant_neither_signals_nor_overhears_other_roles() {
    let node = Node::with_shop();
    let client = node.connect("shop/prod").await;
    let superuser = superuser(&node, "shop/prod").await;
    let pid = value(&superuser, "select /* whispered */ pg_backend_pid()").await;
    for act in ["terminate", "cancel"] {
        assert_eq!(refusal(&client, &format!("select pg_{act}_backend({pid})")).await, DENIED);
    }
    let seen =
        format!("select coalesce(query, '') || coalesce(application_name, '') from pg_stat_activity where pid = {pid}");
    let seen = value(&client, &seen).await;
    assert!(seen.starts_with("<insufficient privilege>") && !seen.contains("whispered"), "{seen}");
    assert_eq!(value(&superuser, "select 1").await, "1", "nobody ended it");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_extensions_that_a_tenant_may_install_are_those_that_are_listed() {
    let node = Node::with_shop();
    let client = node.connect("shop/prod").await;
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("it is in a directory").join("docs/security.md");
    let page = fs::read_to_string(page).expect("the page is there");
    let (_, listed) = page.split_once("## Extensions").expect("it has a list of extensions");
    let names = value(&client, "select string_agg(distinct name, ' ') from pg_available_extensions").await;
    let mut installed = 0;
    for name in names.split(' ') {
        let made = client.batch_execute(&format!("create extension if not exists \"{name}\" cascade")).await;
        let is_listed = listed.contains(&format!("`{name}`"));
        match made {
            Ok(()) => installed += 1,
            Err(error) => assert_eq!(error.code().map(|code| code.code()), Some(DENIED), "{name}: {error:?}"),
        }
        let is_there = value(&client, &format!("select count(*) from pg_extension where extname = '{name}'")).await;
        assert_eq!(is_there == "1", is_listed, "{name}");
    }
    assert!(installed > 15, "Debian's server comes with its trusted extensions: {installed}");
    assert_eq!(value(&client, "select 'a=>1'::hstore -> 'a'").await, "1");
}

/// A superuser's session on the private socket, where only root of this machine comes.
async fn superuser(node: &Node, branch: &str) -> Client {
    let mut config = tokio_postgres::Config::new();
    config.host_path(node.branch_dir(branch).join("run")).user("postgres").dbname("app");
    let (client, connection) = config.connect(tokio_postgres::NoTls).await.expect("root gets in");
    tokio::spawn(async move { drop(connection.await) });
    client
}

/// Somebody who has become superuser of a branch, and so may run programs as its Postgres does.
struct Intruder<'a> {
    node: &'a Node,
    branch: &'a str,
}

impl Intruder<'_> {
    /// What a shell command says on both its outputs.
    fn run(&self, command: &str) -> String {
        let command = format!("{{ {command} ; }} 2>&1 </dev/null; true").replace('\'', "''");
        let sql = format!(
            "set client_min_messages = error; create temp table said (line text); \
             copy said from program '{command}' with (format csv, quote e'\\x01', delimiter e'\\x02'); table said"
        );
        let ran: Ran = self.node.superuser_tool(self.branch, "psql", &["-XAtq", "-d", "app", "-c", &sql]);
        assert_eq!(ran.code, 0, "{command}: {}", ran.stderr);
        ran.stdout.trim().to_owned()
    }

    /// Asserts that a command fails with these words.
    fn fails(&self, command: &str, words: &str) {
        let said = self.run(&format!("{{ {command} ; }} && echo IT WORKED"));
        assert!(said.contains(words) && !said.contains("IT WORKED"), "{command}: {said}");
    }
}

/// Two projects whose `prod` branches are awake; the second has a secret.
fn two_tenants() -> Node {
    let node = Node::with_shop();
    node.ok(&["project", "create", "bank"]);
    node.psql("bank/prod", "create table secrets as select 'the combination is 1234' as secret");
    node.psql("shop/prod", "select 1");
    node
}

#[test]
fn a_superuser_of_a_branch_sees_no_process_and_no_file_of_anybody_else() {
    let node = two_tenants();
    let intruder = Intruder { node: &node, branch: "shop/prod" };
    let neighbour = Intruder { node: &node, branch: "bank/prod" };
    let id = |of: &Intruder<'_>| of.run("id -u; id -g; id -G");
    let (mine, other) = (id(&intruder), id(&neighbour));
    assert_ne!(mine, other, "each branch has a user of its own");
    let mut lines = mine.lines();
    let user = lines.next().expect("it has a number");
    assert!(lines.all(|group| group == user), "no group beside its own: {mine}");

    // Processes: its own, by its own numbers. Not even the unit's.
    assert_eq!(
        intruder.run("cat /proc/[0-9]*/comm | sort -u | grep -v -x -e cat -e sort -e grep -e sh -e postgres"),
        ""
    );
    intruder.fails("ls /proc/1", "No such file");
    intruder.fails("kill -9 1", "not permitted");
    intruder.fails(&format!("kill -0 {}", node.postmaster_pid("bank/prod")), "No such process");

    // Files: nothing of the machine but its programs.
    let root = intruder.run("ls -A /");
    let expected =
        ["bin", "dev", "etc", "lib", "lib32", "lib64", "libx32", "media", "mnt", "proc", "sbin", "srv", "tmp", "usr"];
    assert!(root.lines().all(|name| expected.contains(&name)), "{root}");
    assert_eq!(intruder.run("ls -A /etc /usr/local /tmp | grep -v : | grep ."), "ld.so.cache");
    for path in ["/etc/passwd", "/root", "/home", "/var", "/sys", "/proc/1/root"] {
        intruder.fails(&format!("ls {path}"), "No such file");
    }
    for path in [node.data(), &node.branch_dir("bank/prod"), &node.branch_dir("bank/prod").join("run")] {
        intruder.fails(&format!("ls {}", path.display()), "No such file");
    }
    for path in ["/x", "/usr/x", "/etc/x", "/dev/x", "/mnt/x", "/mnt/conf/x", "/mnt/conf/postgresql.conf"] {
        intruder.fails(&format!("touch {path}"), "");
    }
    assert_eq!(intruder.run("find / -xdev -user root -perm -4000 2>/dev/null; ls /dev/shm | grep -v PostgreSQL"), "");

    // Descriptors: of a backend, and of the postmaster, lead to nothing else.
    let open = intruder.run("ls -l /proc/[0-9]*/fd | sed -n 's/.* -> //p' | sort -u");
    for target in open.lines() {
        let own = [
            "/mnt/",
            "pipe:",
            "socket:",
            "anon_inode:[event",
            "anon_inode:[signalfd]",
            "/dev/null",
            "/dev/shm/",
            "/proc/",
        ];
        let lock = target.ends_with("/unit.lock") || target.contains("unreachable");
        assert!(own.iter().any(|own| target.starts_with(own)) || lock, "{target} is open in Postgres");
    }
    assert_eq!(node.psql("bank/prod", "select secret from secrets"), "the combination is 1234");
}

#[test]
fn a_superuser_of_a_branch_reaches_no_network_and_gains_no_rights() {
    let node = two_tenants();
    let intruder = Intruder { node: &node, branch: "shop/prod" };
    for port in [node.api_port, node.proxy_port] {
        std::net::TcpStream::connect(("127.0.0.1", port)).expect("it answers outside");
        intruder.fails(&format!("bash -c 'exec 3<>/dev/tcp/127.0.0.1/{port}'"), "Connection refused");
    }
    intruder.fails("bash -c 'exec 3<>/dev/tcp/192.0.2.1/80'", "Network is unreachable");
    assert_eq!(intruder.run("sed 1,2d /proc/net/dev | cut -d: -f1 | tr -d ' '"), "lo");
    assert_eq!(intruder.run("grep -c @ /proc/net/unix || true"), "0", "no abstract socket of the machine's");

    assert_eq!(
        intruder.run("grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\\t'"),
        "NoNewPrivs:1\nSeccomp:2"
    );
    let capabilities = intruder.run("grep ^Cap /proc/self/status");
    assert!(capabilities.lines().all(|line| line.ends_with("0000000000000000")), "{capabilities}");
    assert_eq!(intruder.run("bash -c 'ulimit -u'"), "1024");
    intruder.fails("su -c id", "");
    intruder.fails("mount -t tmpfs none /tmp", "");
    intruder.fails("unshare --user --map-root-user id", "not permitted");
    intruder.fails("unshare --mount id", "not permitted");
    intruder.fails("dmesg", "not permitted");
    // Numbers of system calls, on x86_64: ptrace (attach), process_vm_readv, bpf, socket (vsock), mount.
    for call in ["101, 16, getppid(), 0, 0", "310, getppid(), 0, 0, 0, 0, 0", "321, 0, 0, 0", "41, 40, 1, 0"] {
        intruder.fails(
            &format!("perl -e '$! = 0; exit(syscall({call}) >= 0 ? 0 : (print \"$!\\n\") * 3)'"),
            "not permitted",
        );
    }
    // Nothing that it can write can be executed, nor loaded.
    for dir in ["/tmp", "/mnt/data", "/mnt/wal", "/dev/shm"] {
        intruder.fails(&format!("cp /usr/bin/true {dir}/evil && {dir}/evil"), "Permission denied");
        intruder.run(&format!("rm -f {dir}/evil"));
    }
    intruder.run("cp $(ls /usr/lib/postgresql/*/lib/hstore.so | head -1) /mnt/data/evil.so");
    let ran = node.superuser_tool("shop/prod", "psql", &["-Xq", "-d", "app", "-c", "load '/mnt/data/evil.so'"]);
    assert!(ran.stderr.contains("failed to map"), "{}", ran.stderr);
    intruder.run("rm /mnt/data/evil.so");
}

#[test]
fn what_a_superuser_plants_in_its_files_leads_nobody_astray() {
    let node = two_tenants();
    let intruder = Intruder { node: &node, branch: "shop/prod" };
    let neighbour = node.branch_dir("bank/prod").join("run/.s.PGSQL.5432");
    // The socket's directory: another branch's socket in place of its own would get its clients.
    intruder.fails("rm /mnt/run/.s.PGSQL.5432", "Permission denied");
    intruder.fails("mv /mnt/run/.s.PGSQL.5432 /mnt/run/x", "Permission denied");
    intruder.fails(&format!("ln -s {} /mnt/run/x", neighbour.display()), "Permission denied");
    // Among WAL: what the unit, which is root, would read and hand on to branches.
    let secret = node.scratch().join("secret");
    fs::write(&secret, "only root may read this\n").expect("a file can be written");
    intruder.run(&format!("ln -s {} /mnt/wal/00000009.history; mkfifo /mnt/wal/0000000A.history", secret.display()));
    node.ok(&["checkpoint", "create", "shop/prod", "planted"]);
    node.ok(&["branch", "create", "shop/copy", "--from", "shop/prod"]);
    assert_eq!(node.psql("shop/copy", "select 1"), "1");
    let copy = Intruder { node: &node, branch: "shop/copy" };
    assert_eq!(copy.run("cat /mnt/wal/*.history 2>/dev/null"), "");
    // In the volume: a link leads nowhere outside, neither there nor in an export.
    intruder.run(&format!("ln -s {} /mnt/data/link", secret.display()));
    intruder.fails("cat /mnt/data/link", "No such file");
    node.suspend("shop/prod");
    assert_eq!(node.psql("shop/prod", "select 1"), "1", "and it goes on");
    assert_eq!(node.psql("bank/prod", "select count(*) from secrets"), "1");
}
