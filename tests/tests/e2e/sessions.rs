//! What becomes of each kind of session state when its branch is suspended, its Postgres is killed, or it is restored: the
//! matrix of `docs/guarantees.md`, row by row.

use ebb_tests::{Node, wait_until, within};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Error, NoTls, SimpleQueryMessage};

/// One kind of state.
struct Kind {
    name: &'static str,
    /// What makes it.
    made_by: &'static [&'static str],
    /// What shows it, and what that answers as long as it is there.
    shown_by: (&'static str, &'static str),
    suspend: Fate,
    killed: Fate,
    restore: Fate,
}

/// What becomes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// It is there, on the same connection.
    Kept,
    /// The connection goes on without it: what shows it answers this, or fails with this code.
    Lost(&'static str),
    /// The branch stays awake for it; where the branch's policy is not to, the session ends with this code.
    Pins(&'static str),
    /// The branch stays awake for it whatever the policy.
    Holds,
    /// The session ends with this code.
    Ends(&'static str),
}

use Fate::{Ends, Holds, Kept, Lost, Pins};

/// A client that has spoken and then sees its Postgres killed is told so; what it had set is not known any more.
const GONE: Fate = Ends("08006");

const KINDS: [Kind; 18] = [
    Kind::given_back("setting", &["set timezone = 'Asia/Tokyo'"], ("show timezone", "Asia/Tokyo")),
    Kind::given_back(
        "search path",
        &["set search_path = pg_catalog, public"],
        ("show search_path", "pg_catalog, public"),
    ),
    Kind::given_back("custom setting", &["set myapp.tenant = 'blue'"], ("show myapp.tenant", "blue")),
    Kind::given_back(
        "setting made by a function",
        &["select set_config('statement_timeout', '47s', false)"],
        ("show statement_timeout", "47s"),
    ),
    Kind::given_back(
        "isolation of the session",
        &["set session characteristics as transaction isolation level serializable"],
        ("show transaction_isolation", "serializable"),
    ),
    Kind::given_back("role", &["set role reader"], ("select current_user::text", "reader")),
    Kind::given_back("session user", &["set session authorization app"], ("select session_user::text", "app")),
    Kind::given_back("statement of SQL", &["prepare twice (int) as select $1 * 2"], ("execute twice(21)", "42")),
    Kind::given_back("parameter of the start-up", &["reset all"], ("show application_name", "matrix")),
    Kind::lost("position of a sequence", &["select nextval('s')"], ("select currval('s')", "1"), "55000"),
    Kind::lost("last value", &["select nextval('s')"], ("select lastval() is not null", "t"), "55000"),
    Kind::pinned("temporary table", &["create temp table scratch (n int)"], ("select count(*) from scratch", "0")),
    Kind::pinned(
        "advisory lock",
        &["select pg_advisory_lock(7)"],
        ("select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()", "1"),
    ),
    Kind::pinned("LISTEN", &["listen news"], ("select pg_listening_channels()", "news")),
    Kind::pinned("holdable cursor", &["declare c scroll cursor with hold for select 5"], ("fetch absolute 1 c", "5")),
    Kind::pinned(
        "statement made with others",
        &["set statement_timeout = 0; prepare p as select 6"],
        ("execute p", "6"),
    ),
    Kind {
        name: "open transaction",
        made_by: &["begin"],
        shown_by: ("select now() = transaction_timestamp()", "t"),
        suspend: Holds,
        killed: GONE,
        restore: Ends("57P01"),
    },
    Kind {
        name: "nothing at all",
        made_by: &[],
        shown_by: ("show application_name", "matrix"),
        suspend: Kept,
        killed: Kept,
        restore: Kept,
    },
];

impl Kind {
    const fn given_back(
        name: &'static str,
        made_by: &'static [&'static str],
        shown_by: (&'static str, &'static str),
    ) -> Self {
        Self { name, made_by, shown_by, suspend: Kept, killed: GONE, restore: Kept }
    }

    const fn lost(
        name: &'static str,
        made_by: &'static [&'static str],
        shown_by: (&'static str, &'static str),
        to: &'static str,
    ) -> Self {
        Self { name, made_by, shown_by, suspend: Lost(to), killed: GONE, restore: Lost(to) }
    }

    const fn pinned(
        name: &'static str,
        made_by: &'static [&'static str],
        shown_by: (&'static str, &'static str),
    ) -> Self {
        Self { name, made_by, shown_by, suspend: Pins("57P05"), killed: GONE, restore: Ends("57P01") }
    }
}

/// A connection that has some of it.
struct Session {
    kind: &'static Kind,
    client: Client,
    ended: JoinHandle<Result<(), Error>>,
}

impl Session {
    async fn open(node: &Node, kind: &'static Kind) -> Self {
        let url = format!("{}&application_name=matrix", node.url("shop/prod"));
        let (client, connection) = tokio_postgres::connect(&url, NoTls).await.expect("a client can connect");
        let session = Self { kind, client, ended: tokio::spawn(connection) };
        for sql in kind.made_by {
            session.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{}: {error:?}", kind.name));
        }
        if !kind.made_by.is_empty() {
            assert_eq!(session.show().await.as_deref(), Ok(kind.shown_by.1), "{}", kind.name);
        }
        session
    }

    async fn show(&self) -> Result<String, String> {
        let answer = self.client.simple_query(self.kind.shown_by.0).await;
        let messages =
            answer.map_err(|error| error.code().map_or_else(|| format!("{error:?}"), |c| c.code().to_owned()))?;
        let first = messages.into_iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or_default().to_owned()),
            _ => None,
        });
        Ok(first.unwrap_or_default())
    }

    async fn check(self, fate: Fate) {
        let (name, (_, there)) = (self.kind.name, self.kind.shown_by);
        match fate {
            Kept | Holds => assert_eq!(self.show().await.as_deref(), Ok(there), "{name}"),
            Lost(instead) => {
                let (Ok(shown) | Err(shown)) = self.show().await;
                assert_eq!(shown, instead, "{name}");
            }
            Ends(code) | Pins(code) => {
                let ended = within(name, self.ended).await.expect("a connection does not panic");
                let error = ended.expect_err("it ends with words");
                assert_eq!(error.code().map(|code| code.code()), Some(code), "{name}: {error:?}");
                let words = error.as_db_error().expect("it is told why");
                assert!(words.hint().is_some_and(|hint| hint.contains("Reconnect")), "{name}: {words:?}");
            }
        }
    }
}

async fn open_all(node: &Node, which: impl Fn(&Kind) -> bool) -> Vec<Session> {
    let mut sessions = Vec::new();
    for kind in KINDS.iter().filter(|kind| which(kind)) {
        sessions.push(Session::open(node, kind).await);
    }
    sessions
}

fn shop() -> Node {
    let node = Node::with_shop();
    node.psql("shop/prod", "create sequence s");
    let ran = node.superuser_tool("shop/prod", "psql", &["-Xqc", "create role reader; grant reader to app"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    node
}

#[tokio::test(flavor = "multi_thread")]
async fn session_state_after_a_suspend() {
    let node = shop();
    let stays = |kind: &Kind| matches!(kind.suspend, Kept | Lost(_));
    let sessions = open_all(&node, stays).await;
    // The same again: what was given back can be taken again.
    for _ in 0..2 {
        node.suspend("shop/prod");
        for session in &sessions {
            if session.kind.suspend == Kept {
                assert_eq!(session.show().await.as_deref(), Ok(session.kind.shown_by.1), "{}", session.kind.name);
            }
        }
    }
    for session in sessions {
        let fate = session.kind.suspend;
        session.check(fate).await;
    }
    for kind in KINDS.iter().filter(|kind| !stays(kind)) {
        node.ok(&["branch", "set", "shop/prod", "--pinned", "keep"]);
        let session = Session::open(&node, kind).await;
        let ran = node.ebb(&["compute", "suspend", "shop/prod"]);
        assert_ne!(ran.code, 0, "{} did not keep it awake", kind.name);
        assert_eq!(session.show().await.as_deref(), Ok(kind.shown_by.1), "{}", kind.name);
        node.ok(&["branch", "set", "shop/prod", "--pinned", "end"]);
        if kind.suspend == Holds {
            assert_ne!(node.ebb(&["compute", "suspend", "shop/prod"]).code, 0, "{} did not keep it awake", kind.name);
        } else {
            node.suspend("shop/prod");
        }
        session.check(kind.suspend).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn session_state_after_postgres_is_killed() {
    let node = shop();
    let sessions = open_all(&node, |_| true).await;
    node.kill_9(node.postmaster_pid("shop/prod"));
    for session in sessions {
        let fate = session.kind.killed;
        session.check(fate).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn session_state_after_a_restore() {
    let node = shop();
    node.ok(&["checkpoint", "create", "shop/prod", "before"]);
    let sessions = open_all(&node, |_| true).await;
    wait_until("no session works but the open transaction", || async {
        let rows = node.compute("shop/prod")["sessions"].as_array().cloned().unwrap_or_default();
        rows.iter().filter(|row| row["state"] == "active").count() <= 1
    })
    .await;
    node.ok(&["branch", "restore", "shop/prod", "--to", "before"]);
    for session in sessions {
        let fate = session.kind.restore;
        session.check(fate).await;
    }
}
