//! `ebb url`, and where `ebb psql` goes: the addresses of a branch, and of its moments.

use ebb_timeline::api::types::BranchUrl;
use ebb_types::{ErrorKind, Point, PointRef};

use super::{Session, branch_path};
use crate::failure::Failure;

pub fn run(to: &Session, place: &PointRef) -> Result<(), Failure> {
    let urls = urls(to, place)?;
    let answer = serde_json::to_value(&urls).expect("URLs are plain data");
    to.show(&answer, |view: BranchUrl| view.url + "\n")
}

/// The URLs of a branch; with a point, those of a visit to it.
pub fn urls(to: &Session, place: &PointRef) -> Result<BranchUrl, Failure> {
    let answer = to.client.get(&format!("{}/url", branch_path(&place.at)))?;
    let urls: BranchUrl = serde_json::from_value(answer).map_err(|error| {
        Failure::new(ErrorKind::Internal, format!("the API answered something else than URLs: {error}"))
            .hint("Are this `ebb` and the `ebb serve` it talks to of the same version?")
    })?;
    Ok(match &place.point {
        Point::Head => urls,
        point => BranchUrl { url: at(&urls.url, point), url_sni: at(&urls.url_sni, point), ..urls },
    })
}

/// Adds a point to the options of a URL, or options to one that has none. They stand last in those that have some.
fn at(url: &str, point: &Point) -> String {
    let separator = if url.contains("options=") { "%20" } else { "&options=" };
    format!("{url}{separator}point%3D{}", encoded(&point.to_string()))
}

/// As a value of a URL's query.
pub fn encoded(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for byte in value.bytes() {
        match byte {
            b'-' | b'.' | b'_' => text.push(char::from(byte)),
            byte if byte.is_ascii_alphanumeric() => text.push(char::from(byte)),
            byte => text.push_str(&format!("%{byte:02X}")),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_goes_into_the_options() {
        let check = |url: &str, point: &str, expect: &str| assert_eq!(at(url, &point.parse().unwrap()), expect);
        check(
            "postgres://app:x@h:6432/app?options=endpoint%3Dprod--shop",
            "2026-11-21T06:00:00Z",
            "postgres://app:x@h:6432/app?options=endpoint%3Dprod--shop%20point%3D2026-11-21T06%3A00%3A00Z",
        );
        check("postgres://h/app?sslmode=require", "0/1F", "postgres://h/app?sslmode=require&options=point%3D0%2F1F");
    }
}
