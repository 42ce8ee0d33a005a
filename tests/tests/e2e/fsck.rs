//! Each thing that can break is broken, in a copy of a real bucket and node; the checker must find just that.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ebb_tests::{Node, wait_for};
use serde_json::Value;

/// A stopped node, whose bucket and data directory are copied for each damage.
struct Sample {
    node: Node,
    head: String,
    artifact: String,
    project: String,
    branch: String,
}

impl Sample {
    fn new() -> Self {
        let mut node = Node::with_shop();
        node.psql("shop/prod", "create table t as select generate_series(1, 20000) as n");
        let code = node.scratch().join("code");
        fs::create_dir_all(code.join("migrations")).expect("a directory can be made");
        fs::write(code.join("migrations/1.sql"), "create table made ()").expect("a file can be written");
        fs::write(code.join("run"), "#!/bin/sh\n").expect("a file can be written");
        std::os::unix::fs::symlink("run", code.join("start")).expect("a link can be made");
        let path = code.to_str().expect("test paths are UTF-8");
        let release = node.json(&["release", "create", "shop", "--artifact", path]);
        node.psql("shop/prod", "update t set n = -n");
        // Let go, and waiting for its grace period: no finding.
        node.ok(&["branch", "create", "shop/gone", "--from", "shop/prod"]);
        node.psql("shop/gone", "drop table t");
        node.suspend("shop/gone");
        node.suspend("shop/prod");
        let gone = node.json(&["branch", "show", "shop/gone"]);
        let shown = node.json(&["branch", "show", "shop/prod"]);
        let layers = node.data().join("bucket/layers");
        for one in [&gone, &shown] {
            let head = layers.join(one["head"].as_str().expect("a head"));
            wait_for("the upload", || head.exists());
        }
        node.ok(&["branch", "delete", "shop/gone"]);
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        let project = text(&node.json(&["project", "show", "shop"])["id"]);
        let (head, branch) = (text(&shown["head"]), text(&shown["id"]));
        node.stop();
        Self { head, artifact: text(&release["artifact"]), project, branch, node }
    }

    /// A copy of the data directory, bucket included, of hard links: what is damaged must be written anew.
    fn copy(&self) -> PathBuf {
        let copy = self.node.scratch().join("copy");
        let _ = fs::remove_dir_all(&copy);
        let copied = Command::new("cp").arg("-al").arg(self.node.data()).arg(&copy).status();
        assert!(copied.expect("cp can be started").success());
        copy
    }

    fn fsck(&self, args: &[&str]) -> (i32, Value) {
        let ran = self.node.ebb(&[&["fsck", "--json"], args].concat());
        let report = serde_json::from_str(&ran.stdout).unwrap_or(Value::Null);
        (ran.code, report)
    }

    /// Breaks a fresh copy, and compares what is found: kinds, and ends of the objects' names.
    fn check(&self, what: Looked, damage: impl Fn(&Path), expect: &[(&str, &str)]) -> PathBuf {
        let data = self.copy();
        damage(&data);
        let (code, found) = self.found(what, &data, false);
        assert_eq!(code, i32::from(!expect.is_empty()), "{found:#?}");
        let matches = found.len() == expect.len()
            && expect.iter().all(|(kind, end)| found.iter().any(|(k, object)| k == kind && object.ends_with(end)));
        assert!(matches, "wanted {expect:#?}\nfound {found:#?}");
        data
    }

    /// As `check`, and `--repair` mends it: afterwards all is clean.
    fn mends(&self, what: Looked, damage: impl Fn(&Path), expect: &[(&str, &str)]) {
        let data = self.check(what, damage, expect);
        assert_eq!(self.found(what, &data, true).0, 0, "repairing {expect:?}");
        assert_eq!(self.found(what, &data, false), (0, vec![]), "after repairing {expect:?}");
    }

    fn found(&self, what: Looked, data: &Path, repair: bool) -> (i32, Vec<(String, String)>) {
        let (bucket, data) = (data.join("bucket"), data.to_str().expect("test paths are UTF-8"));
        let bucket = bucket.to_str().expect("test paths are UTF-8");
        let mut args = match what {
            Looked::Bucket => vec!["--bucket", bucket],
            Looked::Node => vec!["--data", data],
            Looked::Both => vec!["--bucket", bucket, "--data", data],
        };
        args.extend(repair.then_some("--repair"));
        let (code, report) = self.fsck(&args);
        let findings = report["findings"].as_array().unwrap_or_else(|| panic!("{report}"));
        let text = |value: &Value| value.as_str().expect("a text").to_owned();
        for finding in findings.iter().filter(|finding| finding["kind"] == "missing" || finding["kind"] == "corrupt") {
            assert!(!text(&finding["what"]).is_empty() && !text(&finding["advice"]).is_empty(), "{finding}");
        }
        (code, findings.iter().map(|finding| (text(&finding["kind"]), text(&finding["object"]))).collect())
    }
}

#[derive(Debug, Clone, Copy)]
enum Looked {
    Bucket,
    Node,
    Both,
}

/// Writes a file anew: the one that is there may be the sample's own.
fn write(path: &Path, bytes: impl AsRef<[u8]>) {
    let _ = fs::remove_file(path);
    fs::write(path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

fn flip(path: &Path, at: impl Fn(u64) -> u64) {
    let mut bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let at = at(bytes.len() as u64) as usize;
    bytes[at] ^= 0x10;
    write(path, bytes);
}

fn cut(path: &Path, to: impl Fn(u64) -> u64) {
    let mut bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    bytes.truncate(to(bytes.len() as u64) as usize);
    write(path, bytes);
}

fn remove(path: &Path) {
    let removed = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// The largest file in a directory.
fn largest(dir: &Path) -> PathBuf {
    let entries = fs::read_dir(dir).expect("a directory can be listed").flatten();
    let sized = entries.map(|entry| (entry.metadata().expect("a file has metadata").len(), entry.path()));
    sized.max().expect("there is a file").1
}

#[test]
fn in_a_bucket_every_damage_is_found_and_nothing_else() {
    use Looked::Bucket;
    let sample = Sample::new();
    let (head, project) = (sample.head.as_str(), sample.project.as_str());
    let layer = format!("layers/{head}");
    let at = |key: &str| {
        let key = key.to_owned();
        move |data: &Path| data.join("bucket").join(&key)
    };
    sample.check(Bucket, |_| {}, &[]);

    let object = at(&layer);
    let places: [fn(u64) -> u64; 5] = [|_| 20, |_| 100, |size| size / 2, |size| size - 200, |size| size - 50];
    for place in places {
        sample.check(Bucket, |data| flip(&object(data), place), &[("corrupt", &layer)]);
    }
    for length in [|size| size - 1, |_| 0_u64] as [fn(u64) -> u64; 2] {
        sample.check(Bucket, |data| cut(&object(data), length), &[("corrupt", &layer)]);
    }

    let entry = |seq: u64| format!("projects/{project}/ledger/{seq:020}");
    let (first, third) = (entry(0), entry(3));
    sample.check(Bucket, |data| flip(&at(&third)(data), |size| size / 2), &[("corrupt", &third)]);
    sample.check(Bucket, |data| remove(&at(&third)(data)), &[("missing", &third)]);
    let whole = format!("projects/{project}/ledger");
    sample.check(Bucket, |data| remove(&at(&whole)(data)), &[("missing", &first)]);
    let catalog = "catalog/00000000000000000000";
    sample.check(Bucket, |data| flip(&at(catalog)(data), |size| size / 2), &[("corrupt", catalog)]);

    // Things that have nothing to do with each other, all at once.
    let artifact = format!("artifacts/{}", sample.artifact);
    let (secret, stray) = (format!("secrets/{project}/owner"), "layers/ly_01a1fd5db455746c8a608f5495f9f539");
    let many = |data: &Path| {
        fs::copy(at(&layer)(data), at(stray)(data)).expect("a file can be copied");
        remove(&object(data));
        flip(&at(&artifact)(data), |size| size / 2);
        remove(&at(&secret)(data));
        write(&at("templates/15")(data), "{}");
        fs::create_dir(at("notes")(data)).expect("a directory can be made");
        write(&at("notes/x")(data), "x");
    };
    let found = [
        ("missing", layer.as_str()),
        ("missing", &secret),
        ("corrupt", &artifact),
        ("corrupt", "templates/15"),
        ("orphaned", stray),
        ("orphaned", "notes/x"),
    ];
    sample.check(Bucket, many, &found);
    sample.check(Bucket, |data| remove(&at(&artifact)(data)), &[("missing", &artifact)]);
    let staging = |data: &Path| write(&at(".staging/dead")(data), "x");
    sample.mends(Bucket, staging, &[("stale", ".staging/dead")]);

    let (code, report) = sample.fsck(&["--bucket", sample.node.data().join("bucket").to_str().expect("UTF-8")]);
    assert_eq!((code, &report["checked"]["artifacts"]), (0, &Value::from(1)), "{report}");
    assert!(report["checked"]["waiting_objects"].as_u64() > Some(0), "{report}");
    let (code, _) = sample.fsck(&["--bucket", "/nonexistent/bucket"]);
    assert_eq!(code, 2);
    assert_eq!(sample.fsck(&[]).0, 2);
}

#[test]
fn on_a_node_every_damage_is_found_and_what_is_safe_is_repaired() {
    use Looked::{Both, Node};
    let sample = Sample::new();
    let head = sample.head.as_str();
    let (layer, branch) = (format!("layers/{head}"), format!("branches/{}", sample.branch));
    let (layer_dir, branch_dir) = (|data: &Path| data.join(&layer), |data: &Path| data.join(&branch));
    sample.check(Both, |_| {}, &[]);
    sample.check(Node, |_| {}, &[]);

    // A layer: what it tells by itself, and what only the bucket tells.
    let manifest = |data: &Path| flip(&layer_dir(data).join("manifest"), |size| size / 2);
    sample.check(Node, manifest, &[("corrupt", &layer)]);
    sample.mends(Both, manifest, &[("corrupt", &layer)]);
    let largest_data = |data: &Path| largest(&layer_dir(data).join("data"));
    sample.check(Node, |data| remove(&largest_data(data)), &[("corrupt", &layer)]);
    sample.check(Node, |data| cut(&largest_data(data), |size| size / 2), &[("corrupt", &layer)]);
    sample.check(Node, |data| remove(&largest(&layer_dir(data).join("wal"))), &[("corrupt", &layer)]);
    let bit = |data: &Path| flip(&largest_data(data), |size| size / 2);
    sample.check(Node, bit, &[]);
    sample.mends(Both, bit, &[("corrupt", &layer)]);
    let gone = |data: &Path| remove(&layer_dir(data));
    sample.check(Node, gone, &[("missing", &layer)]);
    sample.mends(Both, gone, &[("missing", &layer)]);

    // What one side lacks and the other has.
    let object = |data: &Path| remove(&data.join("bucket").join(&layer));
    sample.mends(Both, object, &[("missing", &layer)]);
    let artifact = format!("artifacts/{}", sample.artifact);
    let code = |data: &Path| {
        write(&data.join(&artifact).join("run"), "#!/bin/false\n");
    };
    sample.mends(Both, code, &[("corrupt", &artifact)]);
    let neither = |data: &Path| {
        remove(&data.join("bucket").join(&layer));
        gone(data);
    };
    sample.check(Both, neither, &[("missing", &layer), ("missing", &layer)]);

    // Leftovers of kills.
    let leftovers = |data: &Path| {
        fs::create_dir_all(data.join("layers/.fetch-x")).expect("a directory can be made");
        fs::create_dir_all(data.join("tmp/template-15-1")).expect("a directory can be made");
        write(&data.join("node.json"), "{}");
        write(&data.join(format!("{artifact}.1.tar.zst")), "x");
    };
    let stale = [("stale", "layers/.fetch-x"), ("stale", "/tmp"), ("stale", "/node.json"), ("stale", ".1.tar.zst")];
    sample.mends(Node, leftovers, &stale);

    // A volume.
    let upper = fs::read_dir(branch_dir(sample.node.data()).join("uppers")).expect("there are uppers");
    let upper = upper.flatten().next().expect("there is an upper").file_name().into_string().expect("UTF-8");
    let journal = format!("uppers/{upper}/journal");
    let state = |data: &Path| write(&branch_dir(data).join("volume.json"), "{");
    sample.check(Node, state, &[("corrupt", "volume.json")]);
    sample.check(Node, |data| flip(&branch_dir(data).join(&journal), |_| 20), &[("corrupt", &journal)]);
    sample.check(Node, |data| remove(&branch_dir(data).join(&journal)), &[("missing", &journal)]);
    let segment = largest(&branch_dir(sample.node.data()).join("wal"));
    let segment = segment.file_name().and_then(|name| name.to_str()).expect("UTF-8").to_owned();
    let wal = |data: &Path| remove(&branch_dir(data).join("wal"));
    sample.check(Node, wal, &[("missing", &segment)]);
    sample.check(Node, |data| remove(&branch_dir(data).join("line")), &[("missing", "line")]);
    let stray = |data: &Path| {
        fs::create_dir_all(branch_dir(data).join("uppers/99/data")).expect("a directory can be made");
        write(&branch_dir(data).join(format!("uppers/{upper}/data/999999")), "x");
    };
    sample.mends(Node, stray, &[("stale", "uppers/99"), ("stale", "data/999999")]);
    let unknown = "branches/br_01a1fd5db455746c8a608f5495f9f539";
    let strange = |data: &Path| fs::create_dir(data.join(unknown)).expect("a directory can be made");
    sample.check(Both, strange, &[("orphaned", unknown)]);

    assert_eq!(sample.fsck(&["--data", "/proc"]).0, 2, "no data directory");
}

#[test]
fn a_node_in_use_is_not_checked_and_its_bucket_is() {
    let mut node = Node::with_shop();
    node.psql("shop/prod", "create table t (n int)");
    let (bucket, data) = (node.data().join("bucket"), node.data().to_owned());
    let (bucket, data) = (bucket.to_str().expect("UTF-8"), data.to_str().expect("UTF-8"));
    let ran = node.ebb(&["fsck", "--data", data]);
    assert_eq!(ran.code, 2, "{ran:?}");
    assert!(ran.stderr.contains("in use by"), "{}", ran.stderr);
    node.suspend("shop/prod");
    let head = node.json(&["branch", "show", "shop/prod"])["head"].as_str().expect("a head").to_owned();
    wait_for("the upload", || Path::new(bucket).join("layers").join(&head).exists());
    let ran = node.ebb(&["fsck", "--bucket", bucket]);
    assert_eq!(ran.code, 0, "{}{}", ran.stdout, ran.stderr);
    assert!(ran.stdout.ends_with("clean\n"), "{}", ran.stdout);
    // A unit outlives its server, and has its volume open.
    node.ok(&["compute", "wake", "shop/prod"]);
    node.kill_server();
    let ran = node.ebb(&["fsck", "--data", data]);
    assert_eq!(ran.code, 2, "{ran:?}");
    assert!(ran.stderr.contains("suspend it first"), "{}", ran.stderr);
    node.serve();
}
