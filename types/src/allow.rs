//! From where one may connect.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// LIMIT: a list is looked through for every client; more than this is a firewall's task.
const NETWORKS_MAX: usize = 256;

/// The networks from which clients may connect; an empty list allows all of them. Cheap to clone.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<IpNet>", into = "Vec<IpNet>")]
pub struct AllowList(Arc<[IpNet]>);

impl AllowList {
    /// Whether everyone may connect.
    pub fn is_any(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a client at this address may connect.
    pub fn admits(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.is_any() || self.0.iter().any(|network| network.contains(&address))
    }

    /// The networks, in order.
    pub fn networks(&self) -> &[IpNet] {
        &self.0
    }

    /// Why it cannot be a list, if it cannot.
    pub fn fault(&self) -> Option<String> {
        (self.0.len() > NETWORKS_MAX).then(|| format!("an allow list has at most {NETWORKS_MAX} networks"))
    }
}

impl From<Vec<IpNet>> for AllowList {
    fn from(networks: Vec<IpNet>) -> Self {
        // `10.1.2.3/8` means `10.0.0.0/8`, as in Postgres' own files.
        let mut networks: Vec<IpNet> = networks.iter().map(IpNet::trunc).collect();
        networks.sort();
        networks.dedup();
        Self(networks.into())
    }
}

impl From<AllowList> for Vec<IpNet> {
    fn from(list: AllowList) -> Self {
        list.0.to_vec()
    }
}

impl fmt::Display for AllowList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_any() {
            return f.write_str("any");
        }
        let networks: Vec<_> = self.0.iter().map(ToString::to_string).collect();
        f.write_str(&networks.join(", "))
    }
}

/// Reads a network, `192.0.2.0/24`, or a single address.
///
/// # Errors
/// If it is neither.
pub fn parse_network(text: &str) -> Result<IpNet, String> {
    let network = match text.parse::<IpAddr>() {
        Ok(address) => Ok(IpNet::from(address.to_canonical())),
        Err(_) => text.parse(),
    };
    network.map_err(|_| format!("{text:?} is not a network (want 192.0.2.0/24, 2001:db8::/32, or one address)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(networks: &[&str]) -> AllowList {
        networks.iter().map(|text| parse_network(text).unwrap()).collect::<Vec<_>>().into()
    }

    #[test]
    fn a_list_admits_what_is_on_it_and_an_empty_one_everyone() {
        let check = |networks: &[&str], address: &str, expect: bool| {
            assert_eq!(list(networks).admits(address.parse().unwrap()), expect, "{address} by {networks:?}");
        };
        check(&[], "192.0.2.1", true);
        check(&["192.0.2.0/24"], "192.0.2.1", true);
        check(&["192.0.2.0/24"], "::ffff:192.0.2.1", true);
        check(&["192.0.2.0/24"], "192.0.3.1", false);
        check(&["192.0.2.0/24"], "2001:db8::1", false);
        check(&["192.0.2.0/24", "2001:db8::/32"], "2001:db8:7::1", true);
        check(&["192.0.2.7"], "192.0.2.7", true);
        check(&["192.0.2.7"], "192.0.2.8", false);
        check(&["::ffff:192.0.2.7"], "192.0.2.7", true);
        check(&["0.0.0.0/0"], "192.0.2.8", true);
        check(&["0.0.0.0/0"], "::1", false);
    }

    #[test]
    fn a_list_is_kept_in_order_and_written_as_it_is_read() {
        let list = list(&["10.1.2.3/8", "192.0.2.7", "10.0.0.0/8"]);
        assert_eq!(list.to_string(), "10.0.0.0/8, 192.0.2.7/32");
        let text = serde_json::to_string(&list).unwrap();
        assert_eq!(text, r#"["10.0.0.0/8","192.0.2.7/32"]"#);
        assert_eq!(serde_json::from_str::<AllowList>(&text).unwrap(), list);
        assert_eq!(AllowList::default().to_string(), "any");
    }

    #[test]
    fn what_is_no_network_is_refused() {
        for text in ["", "192.0.2.0/33", "192.0.2", "host", "192.0.2.1-5", "/8"] {
            assert!(parse_network(text).is_err(), "{text:?} was taken");
        }
    }
}
