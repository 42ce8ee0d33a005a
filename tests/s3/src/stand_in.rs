//! What stands in for stores that must be refused. It is no S3 server, only what a client sees of one.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use crate::wire::{Request, answer, read_request, refuse};

/// How long a store that looks first takes until it writes.
const LOOK_TO_WRITE: Duration = Duration::from_millis(50);

/// In what a store is not as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// In nothing: it shows that the others are refused for their flaw.
    None,
    /// Conditions of writes are silently ignored.
    IgnoresConditions,
    /// It looks whether there is an object, and then writes, in two steps.
    LooksThenWrites,
    /// Metadata are not kept.
    DropsMetadata,
    /// Nobody may write.
    ReadOnly,
    /// The bucket is elsewhere.
    Redirects,
}

/// A dishonest store with any bucket one asks for, in memory; it checks no signatures. Closed when dropped.
#[derive(Debug)]
pub struct StandIn {
    port: u16,
    objects: Objects,
    _connections: JoinSet<()>,
}

#[derive(Debug, Clone)]
struct Object {
    body: Vec<u8>,
    put_id: Option<String>,
}

type Objects = Arc<Mutex<BTreeMap<String, Object>>>;

impl StandIn {
    /// Listens on a free port.
    pub async fn start(flaw: Flaw) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let port = listener.local_addr().expect("a listener has an address").port();
        let objects = Objects::default();
        let mut connections = JoinSet::new();
        connections.spawn(accept(listener, flaw, objects.clone()));
        Self { port, objects, _connections: connections }
    }

    /// Its URL.
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The paths of all objects: `/<bucket>/<key>`.
    pub fn paths(&self) -> Vec<String> {
        self.objects.lock().keys().cloned().collect()
    }
}

async fn accept(listener: TcpListener, flaw: Flaw, objects: Objects) {
    let mut connections = JoinSet::new();
    while let Ok((mut stream, _)) = listener.accept().await {
        let objects = objects.clone();
        connections.spawn(async move {
            if let Ok(Some(request)) = read_request(&mut stream).await {
                let _ = serve(&mut stream, &request, flaw, &objects).await;
            }
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(stream: &mut TcpStream, request: &Request, flaw: Flaw, objects: &Objects) -> io::Result<()> {
    if flaw == Flaw::Redirects {
        return refuse(stream, "301 Moved Permanently", "PermanentRedirect").await;
    }
    let (path, query) = request.target().split_once('?').unwrap_or((request.target(), ""));
    match request.method() {
        "GET" if query.contains("list-type=2") => list(stream, path, query, objects).await,
        "GET" => read(stream, path, objects).await,
        "HEAD" => look(stream, path, objects).await,
        "PUT" => write(stream, request, path, flaw, objects).await,
        "DELETE" => {
            objects.lock().remove(path);
            answer(stream, "204 No Content", "", b"").await
        }
        _ => refuse(stream, "501 Not Implemented", "NotImplemented").await,
    }
}

async fn read(stream: &mut TcpStream, path: &str, objects: &Objects) -> io::Result<()> {
    let found = objects.lock().get(path).cloned();
    match found {
        Some(object) => answer(stream, "200 OK", "", &object.body).await,
        None => refuse(stream, "404 Not Found", "NoSuchKey").await,
    }
}

/// Answers to HEAD have no body, whatever they are about. Nobody here asks for a size.
async fn look(stream: &mut TcpStream, path: &str, objects: &Objects) -> io::Result<()> {
    let found = objects.lock().get(path).cloned();
    match found {
        Some(object) => {
            let metadata = object.put_id.map(|id| format!("x-amz-meta-ebb-put: {id}\r\n")).unwrap_or_default();
            answer(stream, "200 OK", &metadata, b"").await
        }
        None => answer(stream, "404 Not Found", "", b"").await,
    }
}

async fn write(stream: &mut TcpStream, request: &Request, path: &str, flaw: Flaw, objects: &Objects) -> io::Result<()> {
    if flaw == Flaw::ReadOnly {
        return refuse(stream, "403 Forbidden", "AccessDenied").await;
    }
    let conditional = request.header("if-none-match") == Some("*") && flaw != Flaw::IgnoresConditions;
    let put_id = request.header("x-amz-meta-ebb-put").filter(|_| flaw != Flaw::DropsMetadata).map(str::to_owned);
    let object = Object { body: request.body.clone(), put_id };
    if flaw == Flaw::LooksThenWrites && !objects.lock().contains_key(path) {
        tokio::time::sleep(LOOK_TO_WRITE).await;
        objects.lock().insert(path.to_owned(), object);
        return answer(stream, "200 OK", "", b"").await;
    }
    let exists = {
        let mut objects = objects.lock();
        let exists = conditional && objects.contains_key(path);
        if !exists {
            objects.insert(path.to_owned(), object);
        }
        exists
    };
    match exists {
        true => refuse(stream, "412 Precondition Failed", "PreconditionFailed").await,
        false => answer(stream, "200 OK", "", b"").await,
    }
}

/// One page of everything: a probe finds or leaves little.
async fn list(stream: &mut TcpStream, path: &str, query: &str, objects: &Objects) -> io::Result<()> {
    let bucket = format!("{}/", path.trim_end_matches('/'));
    let prefix = query.split('&').find_map(|part| part.strip_prefix("prefix=")).unwrap_or_default().replace("%2F", "/");
    let rows: String = (objects.lock().iter())
        .filter_map(|(path, object)| Some((path.strip_prefix(&bucket)?, object.body.len())))
        .filter(|(key, _)| key.starts_with(&prefix))
        .map(|(key, size)| format!("<Contents><Key>{key}</Key><Size>{size}</Size></Contents>"))
        .collect();
    let body =
        format!("<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>");
    answer(stream, "200 OK", "Content-Type: application/xml\r\n", body.as_bytes()).await
}
