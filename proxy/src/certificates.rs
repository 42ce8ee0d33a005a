//! What the listening side shows to clients by TLS, and wants of them: the own authority's certificates or given ones, and
//! the authorities of client certificates. Files that were given are read again when they change.
//!
//! A client is served by what was in force when its handshake began, to the end: the certificate that SCRAM binds to is the
//! one the client has seen, however soon another follows.
//!
//! **Crash**: nothing is kept. Files that cannot be used at the start keep the proxy from starting; later, the old ones stay
//! in force, and the log and a metric tell.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::RwLock;
use rustls::crypto::aws_lc_rs;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use sha2::{Digest as _, Sha256, Sha384, Sha512};
use tokio_util::sync::CancellationToken;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use crate::tls::{Authority, TlsError, server_config};

/// How often it is looked whether files have changed. A pair is written one file after the other: what has just changed is
/// read when it has not changed any more for as long.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The files that the operator gave.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct GivenFiles {
    /// The server's certificate with those that lead to its authority, and its key; both PEM.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// Certificates of the authorities that clients' certificates are of; PEM. With it, who is not on this machine must
    /// show one whose common name is the role, besides the password.
    pub client_ca: Option<PathBuf>,
}

impl GivenFiles {
    fn paths(&self) -> impl Iterator<Item = &Path> {
        let pair = self.certificate.iter().flat_map(|(chain, key)| [chain.as_path(), key]);
        pair.chain(self.client_ca.as_deref())
    }

    /// What tells that a file was changed, of each.
    fn stamps(&self) -> Vec<Option<(SystemTime, u64, u64)>> {
        let stamp = |path: &Path| {
            let found = fs::metadata(path).ok()?;
            Some((found.modified().ok()?, found.len(), found.ino()))
        };
        self.paths().map(stamp).collect()
    }
}

/// What is shown and wanted at one moment.
#[derive(Debug)]
pub struct Served {
    /// The settings of the TLS library.
    pub config: Arc<rustls::ServerConfig>,
    shown: Shown,
}

#[derive(Debug)]
enum Shown {
    /// Of the own authority: another one for each host.
    Own(Arc<Authority>),
    /// The given one, and what SCRAM binds to with it.
    Given(Option<Box<[u8]>>),
}

impl Served {
    /// The hash that SCRAM binds to where a client came by this host name (`tls-server-end-point`, RFC 5929); `None` where
    /// that is not defined for the certificate, and so cannot be offered.
    pub fn channel_binding(&self, sni: Option<&str>) -> Option<Box<[u8]>> {
        match &self.shown {
            Shown::Own(authority) => Some(authority.channel_binding(sni).into()),
            Shown::Given(binding) => binding.clone(),
        }
    }
}

/// What is in force.
#[derive(Debug)]
pub struct Certificates {
    authority: Arc<Authority>,
    files: GivenFiles,
    served: RwLock<Arc<Served>>,
    /// What the files in force looked like before they were read.
    stamps: Vec<Option<(SystemTime, u64, u64)>>,
}

impl Certificates {
    /// Reads the files.
    ///
    /// # Errors
    /// If one of them cannot be used.
    pub fn open(authority: Arc<Authority>, files: GivenFiles) -> Result<Self, TlsError> {
        let stamps = files.stamps();
        let (served, outdated) = load(&authority, &files)?;
        if let Some(outdated) = outdated {
            tracing::warn!(why = outdated, "the given certificate is used although clients will not trust it");
        }
        Ok(Self { authority, files, served: RwLock::new(Arc::new(served)), stamps })
    }

    /// What is in force now.
    pub fn served(&self) -> Arc<Served> {
        self.served.read().clone()
    }

    /// Reads the files again when they change, until told to stop.
    pub async fn keep(self: Arc<Self>, stop: CancellationToken) {
        if self.files == GivenFiles::default() {
            return;
        }
        let mut tick = tokio::time::interval(LOOK_EVERY);
        let (mut in_force, mut before) = (self.stamps.clone(), self.stamps.clone());
        while stop.run_until_cancelled(tick.tick()).await.is_some() {
            let this = self.clone();
            let (known, last) = (in_force.clone(), before.clone());
            // Files may be on a file system that is slow to answer.
            let looked = tokio::task::spawn_blocking(move || {
                let now = this.files.stamps();
                if now != known && now == last {
                    this.reload();
                    return (now.clone(), now);
                }
                (known, now)
            });
            let Ok(looked) = looked.await else { return };
            (in_force, before) = looked;
        }
    }

    fn reload(&self) {
        let loaded = load(&self.authority, &self.files).and_then(|(served, outdated)| match outdated {
            None => Ok(served),
            Some(why) => Err(TlsError::Given { path: self.certificate_path(), why }),
        });
        let result = match loaded {
            Ok(served) => {
                *self.served.write() = Arc::new(served);
                tracing::info!("certificates were read again and are in force");
                "ok"
            }
            Err(error) => {
                let why = std::error::Error::source(&error).map(ToString::to_string);
                tracing::warn!(%error, why, "certificates have changed but cannot be used; the old ones stay in force");
                "error"
            }
        };
        metrics::counter!("ebb_proxy_certificate_reloads_total", "result" => result).increment(1);
    }

    fn certificate_path(&self) -> PathBuf {
        self.files.certificate.as_ref().map(|(chain, _)| chain.clone()).unwrap_or_default()
    }
}

/// Reads the files; also why clients will not trust the certificate today, if its dates say so.
fn load(authority: &Arc<Authority>, files: &GivenFiles) -> Result<(Served, Option<String>), TlsError> {
    let verifier = files.client_ca.as_deref().map(client_verifier).transpose()?;
    let Some((chain, key)) = &files.certificate else {
        let config = server_config(authority.clone(), verifier)?;
        return Ok((Served { config, shown: Shown::Own(authority.clone()) }, None));
    };
    let unusable = |path: &Path, why: String| TlsError::Given { path: path.to_owned(), why };
    let certificates = read_certificates(chain)?;
    let (_, first) = X509Certificate::from_der(&certificates[0]).map_err(|error| unusable(chain, error.to_string()))?;
    let validity = first.validity();
    let outdated = (!validity.is_valid())
        .then(|| format!("it is valid from {} to {}, and not now", validity.not_before, validity.not_after));
    let binding = binding(&first, &certificates[0]);
    metrics::gauge!("ebb_proxy_certificate_expires_timestamp_seconds").set(validity.not_after.timestamp() as f64);
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| unusable(key, pem_fault(&error, "private key")))?;
    let certified = CertifiedKey::from_der(certificates, private, &aws_lc_rs::default_provider())
        .map_err(|error| unusable(key, format!("it does not fit the certificate: {error}")))?;
    let config = server_config(Arc::new(Always(Arc::new(certified))), verifier)?;
    Ok((Served { config, shown: Shown::Given(binding) }, outdated))
}

fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let unusable = |why: String| TlsError::Given { path: path.to_owned(), why };
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let read = read.map_err(|error| unusable(pem_fault(&error, "certificate")))?;
    if read.is_empty() {
        return Err(unusable("there is no certificate in it".to_owned()));
    }
    Ok(read)
}

fn pem_fault(error: &rustls_pki_types::pem::Error, what: &str) -> String {
    use rustls_pki_types::pem::Error;
    match error {
        Error::Io(error) if error.kind() == io::ErrorKind::NotFound => "it is not there".to_owned(),
        Error::Io(error) => format!("it cannot be read: {error}"),
        Error::NoItemsFound => format!("there is no {what} in it"),
        other => format!("it is not PEM: {other}"),
    }
}

/// Checks certificates that clients show; whether one has to, is decided when it is known where the client is.
fn client_verifier(path: &Path) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let unusable = |why: String| TlsError::Given { path: path.to_owned(), why };
    let mut roots = rustls::RootCertStore::empty();
    for authority in read_certificates(path)? {
        roots.add(authority).map_err(|error| unusable(error.to_string()))?;
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
        .allow_unauthenticated()
        .build()
        .map_err(|error| unusable(error.to_string()))
}

/// Shows one certificate to everyone.
#[derive(Debug)]
struct Always(Arc<CertifiedKey>);

impl ResolvesServerCert for Always {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

/// The certificate's hash by the algorithm it is signed with, or by SHA-256 where that is MD5 or SHA-1 (RFC 5929, 4.1). Of
/// other algorithms clients disagree, or have no hash at all (Ed25519).
fn binding(certificate: &X509Certificate<'_>, der: &[u8]) -> Option<Box<[u8]>> {
    match certificate.signature_algorithm.algorithm.to_id_string().as_str() {
        // MD5, SHA-1 and SHA-256 with RSA; SHA-1 and SHA-256 with ECDSA.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => Some(Sha256::digest(der).as_slice().into()),
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => Some(Sha384::digest(der).as_slice().into()),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => Some(Sha512::digest(der).as_slice().into()),
        _ => None,
    }
}

/// Whom a client's certificate names: its only common name.
pub fn common_name(certificate: &CertificateDer<'_>) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let mut names = certificate.subject().iter_common_name();
    let (only, more) = (names.next()?, names.next());
    let name = only.as_str().ok()?;
    (more.is_none() && !name.is_empty() && !name.contains('\0')).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519};

    use super::*;

    struct Files {
        dir: tempfile::TempDir,
        given: GivenFiles,
    }

    impl Files {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let pair = (dir.path().join("server.pem"), dir.path().join("server.key"));
            Self { dir, given: GivenFiles { certificate: Some(pair), client_ca: None } }
        }

        fn write(&self, host: &str, algorithm: &'static rcgen::SignatureAlgorithm) -> (Vec<u8>, String) {
            self.write_for(host, algorithm, (2024, 2074))
        }

        fn write_for(
            &self,
            host: &str,
            algorithm: &'static rcgen::SignatureAlgorithm,
            years: (i32, i32),
        ) -> (Vec<u8>, String) {
            let key = KeyPair::generate_for(algorithm).unwrap();
            let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
            params.not_before = rcgen::date_time_ymd(years.0, 1, 1);
            params.not_after = rcgen::date_time_ymd(years.1, 1, 1);
            let certificate = params.self_signed(&key).unwrap();
            fs::write(self.dir.path().join("server.pem"), certificate.pem()).unwrap();
            fs::write(self.dir.path().join("server.key"), key.serialize_pem()).unwrap();
            (certificate.der().to_vec(), key.serialize_pem())
        }

        fn open(&self) -> Result<Certificates, TlsError> {
            let authority = Authority::open(&self.dir.path().join("tls"), "localhost")?;
            Certificates::open(Arc::new(authority), self.given.clone())
        }

        fn fault(&self) -> String {
            self.open().unwrap_err().to_string()
        }
    }

    #[test]
    fn what_scram_binds_to_follows_the_certificates_algorithm() {
        let files = Files::new();
        let (der, _) = files.write("db.example.com", &PKCS_ECDSA_P256_SHA256);
        let served = files.open().unwrap().served();
        assert_eq!(served.channel_binding(None).as_deref(), Some(&Sha256::digest(&der)[..]));
        assert_eq!(served.channel_binding(Some("any")), served.channel_binding(None));
        let (der, _) = files.write("db.example.com", &PKCS_ECDSA_P384_SHA384);
        assert_eq!(files.open().unwrap().served().channel_binding(None).as_deref(), Some(&Sha384::digest(&der)[..]));
        files.write("db.example.com", &PKCS_ED25519);
        assert_eq!(files.open().unwrap().served().channel_binding(None), None);
    }

    #[test]
    fn what_cannot_be_used_is_told_with_its_file() {
        let files = Files::new();
        assert!(files.fault().ends_with("server.pem\" cannot be used: it is not there"), "{}", files.fault());
        let (_, old_key) = files.write("a", &PKCS_ECDSA_P256_SHA256);
        files.write("a", &PKCS_ECDSA_P256_SHA256);
        fs::write(files.dir.path().join("server.key"), old_key).unwrap();
        assert!(
            files.fault().contains("server.key\" cannot be used: it does not fit the certificate"),
            "{}",
            files.fault()
        );
        fs::write(files.dir.path().join("server.key"), "").unwrap();
        assert!(files.fault().ends_with("there is no private key in it"), "{}", files.fault());
        fs::write(files.dir.path().join("server.pem"), "garbage").unwrap();
        assert!(files.fault().ends_with("there is no certificate in it"), "{}", files.fault());
    }

    #[test]
    fn a_bad_new_pair_leaves_the_old_one_in_force() {
        let files = Files::new();
        let (first, _) = files.write("a", &PKCS_ECDSA_P256_SHA256);
        let certificates = files.open().unwrap();
        let in_force = |der: &[u8]| {
            assert_eq!(certificates.served().channel_binding(None).as_deref(), Some(&Sha256::digest(der)[..]));
        };
        in_force(&first);
        files.write_for("a", &PKCS_ECDSA_P256_SHA256, (2020, 2021));
        certificates.reload();
        in_force(&first);
        fs::remove_file(files.dir.path().join("server.key")).unwrap();
        certificates.reload();
        in_force(&first);
        let (second, _) = files.write("a", &PKCS_ECDSA_P256_SHA256);
        certificates.reload();
        in_force(&second);
    }

    #[test]
    fn a_certificate_names_one_role() {
        let check = |names: &[&str], expect: Option<&str>| {
            let mut params = CertificateParams::default();
            params.distinguished_name = rcgen::DistinguishedName::new();
            for name in names {
                params.distinguished_name.push(DnType::CommonName, *name);
            }
            let certificate = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            assert_eq!(common_name(certificate.der()).as_deref(), expect, "for {names:?}");
        };
        check(&["app"], Some("app"));
        check(&["o'hara ü"], Some("o'hara ü"));
        check(&[], None);
        check(&["app\0"], None);
        assert_eq!(common_name(&CertificateDer::from(vec![1, 2, 3])), None);
    }
}
