//! What the documents say against what the code does.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The words of a text that begin like a metric's name.
fn metrics_in(text: &str) -> impl Iterator<Item = String> {
    let is_part = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
    text.split(move |c| !is_part(c))
        .filter(|word| {
            ["ebb_proxy_", "ebb_timeline_", "ebb_compute_", "ebb_storage_"].iter().any(|p| word.starts_with(p))
        })
        .filter(|word| {
            ["_total", "_seconds", "_bytes", "_pending", "_awake", "_objects"].iter().any(|s| word.ends_with(s))
        })
        .map(str::to_owned)
}

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).expect("a crate's sources can be listed") {
        let path = entry.expect("a crate's sources can be listed").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_metric_is_documented() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut files = Vec::new();
    for part in ["proxy", "timeline", "compute", "storage"] {
        sources(&root.join(part).join("src"), &mut files);
    }
    let recorded: BTreeSet<_> = files
        .iter()
        .flat_map(|file| {
            let text = fs::read_to_string(file).unwrap();
            // A metric's name is the first string after the name of its macro.
            let names: Vec<_> = ["counter!(", "gauge!(", "histogram!("]
                .iter()
                .flat_map(|kind| text.split(kind).skip(1).filter_map(|rest| rest.split('"').nth(1)))
                .flat_map(metrics_in)
                .collect();
            names
        })
        .collect();
    let documented: BTreeSet<_> = metrics_in(&fs::read_to_string(root.join("docs/metrics.md")).unwrap()).collect();
    assert_eq!(documented, recorded);
}
