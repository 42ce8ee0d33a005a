//! The proxy's own certificate authority and the certificates it hands out.
//!
//! Only the authority is kept (`ca.pem`, `ca.key`): it is what clients pin. Server certificates live in memory and are
//! signed anew at each start. One names `localhost`, the loopback addresses and `*.<domain>`; for each endpoint's host
//! name one more is signed at its first use, because several verifiers (OpenSSL's own, webpki, Node) refuse a wildcard
//! directly below a top-level name such as `localhost`.
//!
//! **Crash**: the key is written before the certificate; a directory without `ca.pem` has no authority yet.

use std::collections::HashMap;
use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    date_time_ymd,
};
use rustls::crypto::aws_lc_rs;
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{ClientHello, NoClientAuth, ResolvesServerCert};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest, Sha256};

use crate::startup::endpoint_of_host;

/// LIMIT: host names are not authenticated; more than this many different ones get the wildcard certificate.
const MINTED_MAX: usize = 1024;

/// Why there is no certificate authority.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file of the authority cannot be read or written.
    #[error("file {path:?} of the certificate authority cannot be {act}")]
    File {
        /// Which file.
        path: PathBuf,
        /// `read` or `written`.
        act: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// `ca.pem` or `ca.key` are not what they should be.
    #[error("certificate authority in {dir:?} is unusable")]
    Authority {
        /// Where it is.
        dir: PathBuf,
        /// What is wrong with it.
        #[source]
        source: rcgen::Error,
    },
    /// The TLS library refused a certificate just made.
    #[error("certificate is unusable")]
    Certificate(#[from] rustls::Error),
    /// A file that the operator gave cannot be used.
    #[error("file {path:?} cannot be used: {why}")]
    Given {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
}

/// A certificate authority with its server key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    domain: String,
    ca_pem: PathBuf,
    /// Stable over starts and secret: seeds the mock salts of unknown roles.
    mock_secret: [u8; 32],
    server_key: KeyPair,
    signing_key: Arc<dyn SigningKey>,
    wildcard: Arc<CertifiedKey>,
    minted: Mutex<HashMap<String, Arc<CertifiedKey>>>,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("ca_pem", &self.ca_pem).field("domain", &self.domain).finish_non_exhaustive()
    }
}

impl Authority {
    /// Reads the authority in `dir`, or makes one there.
    ///
    /// # Errors
    /// If its files cannot be read or written, or are not an authority.
    pub fn open(dir: &Path, domain: &str) -> Result<Self, TlsError> {
        let ca_pem = dir.join("ca.pem");
        let key_path = dir.join("ca.key");
        if !ca_pem.exists() {
            make_authority(dir, &ca_pem, &key_path)?;
        }
        let read = |path: &Path| std::fs::read_to_string(path).map_err(|source| file_error(path, "read", source));
        let (certificate, key_pem) = (read(&ca_pem)?, read(&key_path)?);
        let unusable = |source| TlsError::Authority { dir: dir.to_owned(), source };
        let key = KeyPair::from_pem(&key_pem).map_err(unusable)?;
        let mock_secret = Sha256::new_with_prefix(b"ebb mock salt").chain_update(key.serialize_der()).finalize().into();
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).map_err(unusable)?;

        let server_key = KeyPair::generate().map_err(unusable)?;
        let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(server_key.serialize_der()));
        let signing_key = aws_lc_rs::sign::any_supported_type(&der)?;
        let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned).into_iter().chain([format!("*.{domain}")]);
        let wildcard = sign(&issuer, &server_key, &signing_key, names.collect()).map_err(unusable)?;
        Ok(Self {
            issuer,
            domain: domain.to_owned(),
            ca_pem,
            mock_secret,
            server_key,
            signing_key,
            wildcard,
            minted: Mutex::default(),
        })
    }

    /// Where the authority's certificate is.
    pub fn ca_pem_path(&self) -> &Path {
        &self.ca_pem
    }

    /// What the mock verifiers of unknown roles are made from.
    pub fn mock_secret(&self) -> &[u8] {
        &self.mock_secret
    }

    /// The hash that SCRAM binds to (`tls-server-end-point`, RFC 5929: the certificate's own signature hash, SHA-256).
    pub fn channel_binding(&self, sni: Option<&str>) -> [u8; 32] {
        Sha256::digest(&self.certificate(sni).cert[0]).into()
    }

    /// The certificate for a host name: always the same one for the same name.
    fn certificate(&self, sni: Option<&str>) -> Arc<CertifiedKey> {
        let Some(endpoint) = sni.and_then(|host| endpoint_of_host(host, &self.domain)) else {
            return self.wildcard.clone();
        };
        let host = format!("{endpoint}.{}", self.domain);
        let mut minted = self.minted.lock();
        if let Some(certificate) = minted.get(&host) {
            return certificate.clone();
        }
        if minted.len() >= MINTED_MAX {
            return self.wildcard.clone();
        }
        match sign(&self.issuer, &self.server_key, &self.signing_key, vec![host.clone()]) {
            Ok(certificate) => minted.entry(host).or_insert(certificate).clone(),
            Err(error) => {
                tracing::warn!(%error, "certificate for an endpoint's host could not be signed");
                self.wildcard.clone()
            }
        }
    }
}

impl ResolvesServerCert for Authority {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.certificate(hello.server_name()))
    }
}

/// What a client that speaks ALPN calls the protocol (PostgreSQL 18, 54.2.10).
pub const ALPN: &[u8] = b"postgresql";

/// LIMIT: plaintext of one record, as Postgres sends it. libpq has room for so much when it reads (`pqReadData`, fe-misc.c); of
/// a longer record the rest stays in its TLS library, and a client that waits at its socket, as all of libpq's asynchronous
/// functions are used and as pg_basebackup receives WAL, does not learn that it is there.
const RECORD_MAX: usize = 8 * 1024;
/// What rustls counts to the size of a record besides: its header.
const RECORD_HEADER: usize = 5;

/// The TLS settings of the listening side: TLS 1.2 and 1.3; client certificates where there is a verifier for them. A
/// client that offers other protocols only is refused in the handshake.
///
/// # Errors
/// If the TLS library does not offer these versions.
pub fn server_config(
    shown: Arc<dyn ResolvesServerCert>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
) -> Result<Arc<rustls::ServerConfig>, TlsError> {
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(clients.unwrap_or_else(|| Arc::new(NoClientAuth)))
        .with_cert_resolver(shown);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.max_fragment_size = Some(RECORD_MAX + RECORD_HEADER);
    Ok(Arc::new(config))
}

fn sign(
    issuer: &Issuer<'static, KeyPair>,
    key: &KeyPair,
    signing_key: &Arc<dyn SigningKey>,
    names: Vec<String>,
) -> Result<Arc<CertifiedKey>, rcgen::Error> {
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name.push(DnType::CommonName, "Ebb proxy");
    params.use_authority_key_identifier_extension = true;
    params.key_usages.push(KeyUsagePurpose::DigitalSignature);
    params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
    set_validity(&mut params);
    let certificate = params.signed_by(key, issuer)?;
    Ok(Arc::new(CertifiedKey::new(vec![certificate.der().clone()], signing_key.clone())))
}

fn make_authority(dir: &Path, ca_pem: &Path, key_path: &Path) -> Result<(), TlsError> {
    let unusable = |source| TlsError::Authority { dir: dir.to_owned(), source };
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Ebb proxy CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params);
    let key = KeyPair::generate().map_err(unusable)?;
    let certificate = params.self_signed(&key).map_err(unusable)?;

    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| file_error(dir, "written", source))?;
    write_whole(key_path, &key.serialize_pem(), 0o600)?;
    write_whole(ca_pem, &certificate.pem(), 0o644)
}

/// The authority is pinned by clients and has no renewal yet; revoking it is deleting it.
fn set_validity(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2024, 1, 1);
    params.not_after = date_time_ymd(2074, 1, 1);
}

/// Writes a file so that it is there whole or not at all.
fn write_whole(path: &Path, text: &str, mode: u32) -> Result<(), TlsError> {
    let temporary = path.with_extension("new");
    let write = || -> io::Result<()> {
        // A left-over of a crash may have other permissions: it is not reused.
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        std::fs::File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    write().map_err(|source| file_error(path, "written", source))
}

fn file_error(path: &Path, act: &'static str, source: io::Error) -> TlsError {
    TlsError::File { path: path.to_owned(), act, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn the_authority_is_kept_and_its_key_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let tls = dir.path().join("tls");
        let first = Authority::open(&tls, "localhost").unwrap();
        let pem = std::fs::read(first.ca_pem_path()).unwrap();
        let second = Authority::open(&tls, "localhost").unwrap();
        assert_eq!(std::fs::read(second.ca_pem_path()).unwrap(), pem);
        assert_eq!(first.mock_secret(), second.mock_secret());
        let mode = std::fs::metadata(tls.join("ca.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn an_endpoints_host_has_a_certificate_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::open(dir.path(), "localhost").unwrap();
        let of = |sni| authority.channel_binding(sni);
        assert_eq!(of(None), of(Some("localhost")));
        assert_eq!(of(None), of(Some("no-endpoint.localhost")));
        assert_ne!(of(None), of(Some("prod--shop.localhost")));
        assert_eq!(of(Some("PROD--shop.localhost")), of(Some("prod--shop.localhost")));
    }

    #[test]
    fn a_certificate_without_its_key_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        Authority::open(dir.path(), "localhost").unwrap();
        std::fs::remove_file(dir.path().join("ca.key")).unwrap();
        assert!(matches!(Authority::open(dir.path(), "localhost"), Err(TlsError::File { .. })));
    }
}
