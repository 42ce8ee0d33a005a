//! TLS to a source, as libpq's `sslmode` has it (PostgreSQL 15 manual, 34.19): asked for in the protocol, verified or not.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::wire::{Error, Result, Transport};

/// When TLS is used, and what for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Tls {
    /// `disable`.
    Never,
    /// `prefer`: against who only listens, where the source can.
    Prefer,
    /// `require`: against who only listens.
    Require,
    /// `verify-full`: the source proves its host name to these authorities.
    Verify(PathBuf),
}

/// Begins TLS on a connection, if it is to be used.
pub(crate) async fn negotiate(mut stream: TcpStream, host: &str, tls: &Tls) -> Result<Box<dyn Transport>> {
    if *tls == Tls::Never {
        return Ok(Box::new(stream));
    }
    let mut ask = BytesMut::new();
    frontend::ssl_request(&mut ask);
    stream.write_all(&ask).await?;
    // Exactly this byte: what follows is the server's part of the handshake.
    match (stream.read_u8().await?, tls) {
        (b'S', _) => {}
        (_, Tls::Prefer) => return Ok(Box::new(stream)),
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
    let builder = match tls {
        Tls::Verify(roots) => builder.with_root_certificates(authorities(roots)?),
        _ => builder.dangerous().with_custom_certificate_verifier(Arc::new(Anybody(provider))),
    };
    Ok(builder.with_no_client_auth())
}

fn authorities(path: &Path) -> std::io::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    let unusable = |why: String| std::io::Error::other(format!("sslrootcert {path:?} cannot be used: {why}"));
    for certificate in CertificateDer::pem_file_iter(path).map_err(|error| unusable(error.to_string()))? {
        let certificate = certificate.map_err(|error| unusable(error.to_string()))?;
        roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
    }
    match roots.is_empty() {
        true => Err(unusable("it holds no certificate".to_owned())),
        false => Ok(roots),
    }
}

/// Takes any certificate, as libpq does without `verify-…`; the handshake must still be of whoever has its key.
#[derive(Debug)]
struct Anybody(Arc<CryptoProvider>);

impl ServerCertVerifier for Anybody {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
