use std::sync::atomic::{AtomicU32, Ordering};

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;

use super::*;

fn probe(question: Question, timeout_ms: u64, retries: u32) -> Probe {
    Probe { name: "p".to_owned(), question, timeout_ms, retries, wait_ms: 1 }
}

fn command(words: &[&str], exit: i32) -> Question {
    Question::Command { command: words.iter().map(|word| (*word).to_owned()).collect(), exit }
}

fn place(dir: &std::path::Path) -> Place {
    Place { dir: dir.to_owned(), env: vec![("EBB_PROJECT", "shop".to_owned())] }
}

/// A service of the test's own: its URL.
async fn service() -> String {
    let router = Router::new()
        .route("/ok", get(async || "fine"))
        .route("/health", get(async || r#"{"checks":[{"ok":true,"rows":3,"name":"db"}]}"#))
        .route("/broken", get(async || (StatusCode::SERVICE_UNAVAILABLE, "no")));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    url
}

#[tokio::test]
async fn http_is_asked_for_status_and_a_place_in_json() {
    let (url, dir) = (service().await, tempfile::tempdir().unwrap());
    let check = async |path: &str, status: u16, json: Option<(&str, &str)>, expect: Result<(), &str>| {
        let (url, json) = (format!("{url}{path}"), json.map(|(at, expect)| (at.to_owned(), expect.to_owned())));
        let (json, wanted) = json.unzip();
        let found = ask(&Question::Http { url, status, json, expect: wanted }, &place(dir.path())).await;
        assert_eq!(found, expect.map_err(str::to_owned), "for {path}");
    };
    check("/ok", 200, None, Ok(())).await;
    check("/broken", 503, None, Ok(())).await;
    check("/broken", 200, None, Err("answers with status 503, not 200")).await;
    check("/health", 200, Some(("/checks/0/ok", "true")), Ok(())).await;
    check("/health", 200, Some(("/checks/0/name", "db")), Ok(())).await;
    check("/health", 200, Some(("/checks/0/rows", "4")), Err("answers \"3\" at \"/checks/0/rows\", not \"4\"")).await;
    check("/health", 200, Some(("/x", "4")), Err("answers JSON that has nothing at \"/x\"")).await;
    let nobody = Question::Http { url: "http://127.0.0.1:1/".to_owned(), status: 200, json: None, expect: None };
    assert!(ask(&nobody, &place(dir.path())).await.unwrap_err().starts_with("has no answer"));
}

#[tokio::test]
async fn programs_run_in_the_release_and_know_only_what_they_are_told() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("here"), "").unwrap();
    let place = place(dir.path());
    let told = command(&["sh", "-c", "test -e here && test \"$EBB_PROJECT\" = shop && test -z \"$HOME\""], 0);
    assert_eq!(ask(&told, &place).await, Ok(()));
    assert_eq!(ask(&command(&["sh", "-c", "exit 3"], 3), &place).await, Ok(()));
    assert_eq!(ask(&command(&["false"], 0), &place).await, Err("exits with 1, not 0".to_owned()));
    assert!(ask(&command(&["./none"], 0), &place).await.unwrap_err().starts_with("cannot be run"));
}

#[tokio::test]
async fn a_probe_is_asked_again_and_given_up_in_time() {
    let asked = AtomicU32::new(0);
    let third = || async {
        match asked.fetch_add(1, Ordering::SeqCst) {
            2 => Ok(()),
            n => Err(format!("no {n}")),
        }
    };
    let any = command(&["true"], 0);
    let answered = until_right(&probe(any.clone(), 1000, 5), third).await;
    assert_eq!((answered.tries, answered.fault), (3, None));
    asked.store(0, Ordering::SeqCst);
    let answered = until_right(&probe(any, 1000, 1), third).await;
    assert_eq!((answered.tries, answered.fault), (2, Some("no 1".to_owned())));

    // What it has started ends with it.
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("mark");
    let script = format!("sleep 600 & echo $! > {}; wait", mark.display());
    let slow = probe(command(&["sh", "-c", &script], 0), 300, 0);
    let place = place(dir.path());
    let answered = until_right(&slow, || ask(&slow.question, &place)).await;
    assert_eq!(answered.fault.as_deref(), Some("did not answer within 300 ms"));
    let pid: i32 = std::fs::read_to_string(&mark).unwrap().trim().parse().unwrap();
    for _ in 0..1000 {
        let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if state.is_empty() || state.contains(") Z ") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("process {pid} goes on");
}
