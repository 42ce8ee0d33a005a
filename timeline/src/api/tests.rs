use super::is_loopback;

#[test]
fn only_loopback_hosts_are_taken() {
    for good in ["localhost", "LocalHost:7432", "127.0.0.1", "127.0.0.1:7432", "127.8.8.8:1", "[::1]:7432", "[::1]"] {
        assert!(is_loopback(good), "{good:?} was refused");
    }
    for bad in ["", "ebb.example", "localhost.example:7432", "10.0.0.1:7432", "[::2]:1", "127.0.0.1.example"] {
        assert!(!is_loopback(bad), "{bad:?} was taken");
    }
}
