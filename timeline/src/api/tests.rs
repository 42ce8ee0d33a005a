use std::sync::Arc;

use axum::body::Body;
use axum::http::{Request, StatusCode};
use serde_json::{Value, json};
use tower::ServiceExt as _;

use super::{is_loopback, router_with_metrics};
use crate::service::fake::Rig;

#[test]
fn only_loopback_hosts_are_taken() {
    for good in ["localhost", "LocalHost:7432", "127.0.0.1", "127.0.0.1:7432", "127.8.8.8:1", "[::1]:7432", "[::1]"] {
        assert!(is_loopback(good), "{good:?} was refused");
    }
    for bad in ["", "ebb.example", "localhost.example:7432", "10.0.0.1:7432", "[::2]:1", "127.0.0.1.example"] {
        assert!(!is_loopback(bad), "{bad:?} was taken");
    }
}

/// A service behind its routes.
struct Api {
    rig: Rig,
    router: axum::Router,
}

impl Api {
    async fn new() -> Self {
        let rig = Rig::new().await;
        let router = router_with_metrics(rig.open().await, Some(Arc::new(|| "ebb_up 1\n".to_owned())));
        Self { rig, router }
    }

    async fn send(&self, request: Request<Body>) -> (StatusCode, String) {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let status = response.status();
        let bytes = axum::body::to_bytes(response.into_body(), 1 << 24).await.unwrap();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    async fn call(&self, line: &str, body: Option<Value>) -> (StatusCode, Value) {
        let (method, path) = line.split_once(' ').unwrap();
        let mut request = Request::builder().method(method).uri(path).header("host", "127.0.0.1:7432");
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let body = body.map_or(Body::empty(), |body| Body::from(body.to_string()));
        let (status, text) = self.send(request.body(body).unwrap()).await;
        (status, if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap() })
    }

    async fn ok(&self, line: &str, body: Option<Value>) -> Value {
        let (status, answer) = self.call(line, body).await;
        assert!(status.is_success(), "{line}: {status} {answer}");
        answer
    }
}

#[tokio::test]
async fn the_contract_from_project_to_ledger() {
    let api = Api::new().await;
    let (status, made) = api.call("POST /v1/projects", Some(json!({"name": "shop"}))).await;
    assert_eq!(status, StatusCode::CREATED);
    assert_eq!(made["role"], "app");
    assert_eq!(made["project"]["branches"][0]["endpoint"], "prod--shop");
    assert_eq!(api.ok("GET /v1/projects", None).await["projects"][0]["name"], "shop");

    let at = "/v1/projects/shop/branches";
    let (status, branch) = api.call(&format!("POST {at}"), Some(json!({"name": "pr", "from": "shop/prod"}))).await;
    assert_eq!((status, &branch["parent"]), (StatusCode::CREATED, &json!({"branch": "prod", "point": "head"})));
    let changed = api.ok(&format!("PATCH {at}/pr"), Some(json!({"idle_suspend_seconds": 2.5}))).await;
    assert_eq!(changed["idle_suspend_seconds"], 2.5);
    let (status, _) = api.call(&format!("POST {at}/pr/checkpoints"), Some(json!({"name": "one"}))).await;
    assert_eq!(status, StatusCode::CREATED);
    assert_eq!(api.ok(&format!("GET {at}/pr/checkpoints"), None).await["checkpoints"][0]["name"], "one");
    let restored = api.ok(&format!("POST {at}/pr/restore"), Some(json!({"to": "one"}))).await;
    assert_eq!((&restored["branch"]["id"], &restored["rescue"]["name"]), (&branch["id"], &json!("rescue-pr-1")));
    assert_eq!(api.ok(&format!("POST {at}/pr/compute/wake"), None).await["state"], "active");
    assert_eq!(api.ok(&format!("POST {at}/pr/compute/suspend"), None).await["state"], "suspended");
    assert_eq!(api.ok(&format!("GET {at}/pr/compute"), None).await["wakes"], 1);
    let dir = api.rig.dir.path().join("out");
    assert_eq!(api.ok(&format!("POST {at}/pr/export"), Some(json!({"dir": dir}))).await["dir"], json!(dir));
    assert!(api.ok(&format!("GET {at}/pr/url"), None).await["url"].as_str().unwrap().contains("pr--shop"));
    let asked = json!({"point": "one", "probes": [{"sql": "select count(*) from t", "expect": "0"}]});
    let (status, drill) = api.call(&format!("POST {at}/pr/drills"), Some(asked)).await;
    assert_eq!(
        (status, &drill["passed"], &drill["point"]),
        (StatusCode::CREATED, &json!(true), &json!("one")),
        "{drill}"
    );
    let wrong = json!({"point": "one", "probes": [{"sql": "select count(*) from t", "expect": "1"}]});
    let (status, problem) = api.call(&format!("POST {at}/pr/drills"), Some(wrong)).await;
    assert_eq!((status, &problem["kind"]), (StatusCode::INTERNAL_SERVER_ERROR, &json!("corrupt")), "{problem}");
    let drills = api.ok(&format!("GET {at}/pr/drills"), None).await;
    assert_eq!((&drills["drills"][0]["passed"], &drills["drills"][1]["passed"]), (&json!(true), &json!(false)));
    assert_eq!(api.call(&format!("DELETE {at}/pr/checkpoints/one"), None).await.0, StatusCode::NO_CONTENT);
    assert_eq!(api.call(&format!("DELETE {at}/pr"), None).await.0, StatusCode::NO_CONTENT);

    for name in ["one", "two"] {
        let artifact = api.rig.artifact(name, &[]);
        let (status, _) = api.call("POST /v1/projects/shop/releases", Some(json!({"artifact": artifact}))).await;
        assert_eq!(status, StatusCode::CREATED);
    }
    let plan = api.ok("POST /v1/projects/shop/rollback", Some(json!({"to": "v1", "plan": true}))).await;
    assert_eq!(plan["checkpoint"], "before-v2");
    let done = api.ok("POST /v1/projects/shop/rollback", Some(json!({"to": "v1"}))).await;
    assert_eq!(done["plan"]["release"], "v1");
    assert_eq!(api.ok("GET /v1/projects/shop/releases", None).await["releases"][1]["state"], "rolled_back");

    let verdict = api.ok("GET /v1/projects/shop/ledger/verify", None).await;
    let entries = api.ok("GET /v1/projects/shop/ledger", None).await;
    let entries = entries["entries"].as_array().unwrap();
    assert_eq!((&verdict["ok"], verdict["entries"].as_u64()), (&json!(true), Some(entries.len() as u64)));
    assert_eq!(entries.last().unwrap()["hash"], verdict["head_hash"]);
    assert_eq!(api.call("DELETE /v1/projects/shop?confirm=shop", None).await.0, StatusCode::NO_CONTENT);
    assert!(api.ok("GET /v1/projects", None).await["projects"].as_array().unwrap().is_empty());
}

#[tokio::test]
async fn problems_say_what_kind_and_what_to_do() {
    let api = Api::new().await;
    api.ok("POST /v1/projects", Some(json!({"name": "shop"}))).await;
    let mut problems = String::new();
    for (line, body) in [
        ("GET /v1/projects/shpo", None),
        ("GET /v1/projects/shop/branches/prdo", None),
        ("POST /v1/projects", Some(json!({"name": "shop"}))),
        ("POST /v1/projects", Some(json!({"name": "Shop"}))),
        ("POST /v1/projects", Some(json!({"name": "a", "colour": 1}))),
        ("POST /v1/projects/shop/branches", Some(json!({"name": "x", "from": "other/prod"}))),
        ("POST /v1/projects/shop/branches", Some(json!({"name": "x", "from": "shop/prod@2026-01-01T00:00:00Z"}))),
        ("POST /v1/projects/shop/branches/prod/restore", Some(json!({"to": "nowhere"}))),
        ("POST /v1/projects/shop/rollback", Some(json!({"to": "v1"}))),
        ("POST /v1/projects/shop/releases", Some(json!({"artifact": "relative"}))),
        ("DELETE /v1/projects/shop/branches/prod", None),
        ("DELETE /v1/projects/shop", None),
        ("PATCH /v1/projects/shop/branches/prod", Some(json!({"idle_suspend_seconds": -1}))),
        ("PATCH /v1/projects/shop/branches/prod", Some(json!({"upkeep": {"drill_every_seconds": 0.5}}))),
        ("PATCH /v1/projects/shop/branches/prod", Some(json!({"upkeep": {"checkpoints": {"hourly": 5000}}}))),
        ("POST /v1/projects/shop/branches/prod/drills", Some(json!({"point": "nowhere"}))),
        ("POST /v1/projects/shop/branches/prod/drills", Some(json!({"probes": [{"sql": " ", "expect": "1"}]}))),
        ("GET /v1/nothing", None),
        ("PUT /v1/projects", None),
    ] {
        let (status, problem) = api.call(line, body.clone()).await;
        assert_eq!(problem["status"], status.as_u16());
        let body = body.map(|body| format!(" {body}")).unwrap_or_default();
        let hint = without_times(problem["hint"].as_str().unwrap_or("-"));
        let (kind, detail) = (problem["kind"].as_str().unwrap(), problem["detail"].as_str().unwrap());
        problems.push_str(&format!("{line}{body}\n    {} {kind}: {detail}\n    hint: {hint}\n", status.as_u16()));
    }
    insta::assert_snapshot!(problems);
}

/// What a message says whenever it is said.
fn without_times(text: &str) -> String {
    let is_time = |word: &&str| word.trim_end_matches([',', '.']).parse::<ebb_types::Timestamp>().is_ok();
    text.split(' ').map(|word| if is_time(&word) { "TIME" } else { word }).collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn a_key_makes_a_repetition_answer_the_first_result() {
    let api = Api::new().await;
    let send = |key: &'static str, body: Value| {
        let request = Request::post("/v1/projects")
            .header("host", "localhost")
            .header("content-type", "application/json")
            .header("idempotency-key", key);
        api.send(request.body(Body::from(body.to_string())).unwrap())
    };
    let (first, made) = send("k", json!({"name": "shop"})).await;
    let (again, same) = send("k", json!({"name": "shop"})).await;
    assert_eq!((first, again, made), (StatusCode::CREATED, StatusCode::OK, same));
    assert_eq!(send("k", json!({"name": "other"})).await.0, StatusCode::CONFLICT);
    assert_eq!(send("l", json!({"name": "shop"})).await.0, StatusCode::CONFLICT);
    assert_eq!(send("", json!({"name": "other"})).await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn what_a_web_page_could_send_is_refused() {
    let api = Api::new().await;
    let post = |headers: &[(&str, &str)]| {
        let mut request = Request::post("/v1/projects");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        api.send(request.body(Body::from(r#"{"name":"shop"}"#)).unwrap())
    };
    let json = ("content-type", "application/json");
    assert_eq!(post(&[("host", "evil.example"), json]).await.0, StatusCode::FORBIDDEN);
    assert_eq!(post(&[json]).await.0, StatusCode::FORBIDDEN);
    let origin = ("origin", "https://evil.example");
    assert_eq!(post(&[("host", "127.0.0.1:7432"), origin, json]).await.0, StatusCode::FORBIDDEN);
    let text = ("content-type", "text/plain");
    assert_eq!(post(&[("host", "127.0.0.1:7432"), text]).await.0, StatusCode::UNSUPPORTED_MEDIA_TYPE);
    let own = ("origin", "http://127.0.0.1:7432");
    assert_eq!(post(&[("host", "127.0.0.1:7432"), own, json]).await.0, StatusCode::CREATED);
}

#[tokio::test]
async fn the_description_names_every_route() {
    let api = Api::new().await;
    let described = api.ok("GET /openapi.json", None).await;
    let mut routes: Vec<String> = Vec::new();
    for (path, methods) in described["paths"].as_object().unwrap() {
        routes.extend(methods.as_object().unwrap().keys().map(|method| format!("{} {path}", method.to_uppercase())));
    }
    routes.sort();
    insta::assert_snapshot!(routes.join("\n"));
    let request = Request::get("/metrics").header("host", "localhost").body(Body::empty()).unwrap();
    assert_eq!(api.send(request).await.1, "ebb_up 1\n");
}
