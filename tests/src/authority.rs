//! An authority of a test's own.

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};

/// Signs certificates, which are files of a directory; its own is `ca.pem`.
#[derive(Debug)]
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: PathBuf,
}

impl Authority {
    /// Makes one.
    pub fn new(dir: &Path) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test authority");
        let key = KeyPair::generate().expect("a key can be made");
        let issuer = CertifiedIssuer::self_signed(params, key).expect("it signs itself");
        fs::write(dir.join("ca.pem"), issuer.pem()).expect("a file can be written");
        Self { issuer, dir: dir.to_owned() }
    }

    /// The path of a file.
    pub fn path(&self, name: &str) -> String {
        self.dir.join(name).display().to_string()
    }

    /// Writes `NAME.crt` and `NAME.key`.
    pub fn sign(&self, name: &str, common_name: &str, hosts: &[&str]) {
        let key = KeyPair::generate().expect("a key can be made");
        let hosts: Vec<_> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).expect("these are host names");
        params.distinguished_name.push(DnType::CommonName, common_name);
        let certificate = params.signed_by(&key, &self.issuer).expect("it can be signed");
        let write = |suffix: &str, text: String| {
            let path = self.dir.join(format!("{name}.{suffix}"));
            fs::write(&path, text).expect("a file can be written");
            let private = std::os::unix::fs::PermissionsExt::from_mode(0o600);
            fs::set_permissions(&path, private).expect("its mode can be set");
        };
        write("key", key.serialize_pem());
        write("crt", certificate.pem());
    }
}
