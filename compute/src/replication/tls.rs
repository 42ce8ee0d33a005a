//! TLS to a source, as libpq's `sslmode` has it (PostgreSQL 15 manual, 34.19): asked for in the protocol, verified or not.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::server::ParsedCertificate;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::wire::{Error, Result, Transport};

/// When TLS is used, and what each side proves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tls {
    /// What is asked of the source.
    pub(crate) mode: Mode,
    /// What this side proves to it.
    pub(crate) client: Option<Client>,
}

/// Named as libpq's `sslmode`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Mode {
    /// `disable`.
    Never,
    /// `prefer`: against who only listens, where the source can.
    Prefer,
    /// `require`: against who only listens.
    Require,
    /// `verify-ca`: the source proves to these authorities that they know it, by whatever name.
    VerifyAuthority(PathBuf),
    /// `verify-full`: the source proves its host name to these authorities.
    VerifyName(PathBuf),
}

/// PEM files of a certificate, with those between it and its authority, and of its key, which no passphrase protects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Client {
    /// `sslcert`.
    pub(crate) certificate: PathBuf,
    /// `sslkey`.
    pub(crate) key: PathBuf,
}

/// Begins TLS on a connection, if it is to be used.
pub(crate) async fn negotiate(mut stream: TcpStream, host: &str, tls: &Tls) -> Result<Box<dyn Transport>> {
    if tls.mode == Mode::Never {
        return Ok(Box::new(stream));
    }
    let mut ask = BytesMut::new();
    frontend::ssl_request(&mut ask);
    stream.write_all(&ask).await?;
    // Exactly this byte: what follows is the server's part of the handshake.
    match (stream.read_u8().await?, &tls.mode) {
        (b'S', _) => {}
        (_, Mode::Prefer) => return Ok(Box::new(stream)),
        _ => return Err(Error::NoTls),
    }
    let config = config(tls).map_err(Error::Tls)?;
    let name = ServerName::try_from(host.to_owned()).map_err(|error| Error::Tls(std::io::Error::other(error)))?;
    let connected = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
    Ok(Box::new(connected.map_err(Error::Tls)?))
}

fn config(tls: &Tls) -> std::io::Result<ClientConfig> {
    let other = |error: rustls::Error| std::io::Error::other(error);
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone()).with_safe_default_protocol_versions();
    let builder = builder.map_err(other)?;
    let unnamed =
        |roots| builder.clone().dangerous().with_custom_certificate_verifier(Arc::new(Unnamed { roots, provider }));
    let builder = match &tls.mode {
        Mode::VerifyName(roots) => builder.with_root_certificates(authorities(roots)?),
        Mode::VerifyAuthority(roots) => unnamed(Some(authorities(roots)?)),
        Mode::Never | Mode::Prefer | Mode::Require => unnamed(None),
    };
    let Some(Client { certificate, key }) = &tls.client else { return Ok(builder.with_no_client_auth()) };
    let chain = certificates("sslcert", certificate)?;
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|error| unusable("sslkey", key, &error))?;
    builder.with_client_auth_cert(chain, secret).map_err(|error| unusable("sslcert", certificate, &error))
}

fn authorities(path: &Path) -> std::io::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates("sslrootcert", path)? {
        roots.add(certificate).map_err(|error| unusable("sslrootcert", path, &error))?;
    }
    match roots.is_empty() {
        true => Err(unusable("sslrootcert", path, &"it holds no certificate")),
        false => Ok(roots),
    }
}

fn certificates(what: &str, path: &Path) -> std::io::Result<Vec<CertificateDer<'static>>> {
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    found.map_err(|error| unusable(what, path, &error))
}

fn unusable(what: &str, path: &Path, why: &dyn std::fmt::Display) -> std::io::Error {
    std::io::Error::other(format!("{what} {path:?} cannot be used: {why}"))
}

/// Takes a certificate by whatever name, as libpq does without `verify-full`: of one of these authorities, or any. The
/// handshake must still be of whoever has its key.
#[derive(Debug)]
struct Unnamed {
    roots: Option<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Unnamed {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        between: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        if let Some(roots) = &self.roots {
            let certificate = ParsedCertificate::try_from(certificate)?;
            let algorithms = self.provider.signature_verification_algorithms.all;
            verify_server_cert_signed_by_trust_anchor(&certificate, roots, between, now, algorithms)?;
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
