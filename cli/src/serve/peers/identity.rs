//! Who is a node: mutual TLS under an authority that every node derives from the secret they share.
//!
//! Nothing of it is stored. The authority's key is the same everywhere; each node signs itself a certificate for the name
//! that its identifier makes, with a key that lives as long as the process.

use std::sync::Arc;

use anyhow::{Context as _, Result};
use ebb_types::NodeId;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, PKCS_ED25519, date_time_ymd,
};
use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// What a private Ed25519 key in PKCS #8 begins with (RFC 8410, section 7); the 32 bytes of the key follow.
const ED25519_PKCS8: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

/// This node's side of mutual TLS.
#[derive(Clone)]
pub struct Identity {
    /// This node.
    pub node: NodeId,
    acceptor: TlsAcceptor,
    connector: TlsConnector,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("node", &self.node).finish_non_exhaustive()
    }
}

impl Identity {
    /// Makes a node's identity of the secret that all nodes of a bucket share.
    ///
    /// # Errors
    /// If the TLS library refuses what it made itself.
    pub fn derive(secret: &[u8; 32], node: NodeId) -> Result<Self> {
        let mut pkcs8 = ED25519_PKCS8.to_vec();
        pkcs8.extend_from_slice(secret);
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&PrivatePkcs8KeyDer::from(pkcs8), &PKCS_ED25519)
            .context("the nodes' key is none")?;
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "Ebb nodes");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        set_validity(&mut params);
        let authority = CertifiedIssuer::self_signed(params, key)?;

        let own = KeyPair::generate_for(&PKCS_ED25519)?;
        let mut params = CertificateParams::new(vec![host(node)])?;
        params.distinguished_name.push(DnType::CommonName, node.to_string());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        set_validity(&mut params);
        let chain = vec![params.signed_by(&own, &authority)?.der().clone()];
        let own_key = || PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(own.serialize_der()));

        let mut roots = RootCertStore::empty();
        roots.add(authority.der().clone())?;
        let (roots, provider) = (Arc::new(roots), Arc::new(aws_lc_rs::default_provider()));
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone()).build()?;
        let server = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), own_key())?;
        let client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, own_key())?;
        Ok(Self { node, acceptor: Arc::new(server).into(), connector: Arc::new(client).into() })
    }

    /// For connections from other nodes.
    pub fn acceptor(&self) -> &TlsAcceptor {
        &self.acceptor
    }

    /// For connections to other nodes.
    pub fn connector(&self) -> &TlsConnector {
        &self.connector
    }
}

/// The name that a node's certificate is for.
pub fn server_name(node: NodeId) -> ServerName<'static> {
    ServerName::try_from(host(node)).expect("hexadecimal digits are a host name")
}

fn host(node: NodeId) -> String {
    let digits: String = node.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{digits}.node.ebb.internal")
}

/// As long as the secret is; revoking it is replacing that.
fn set_validity(params: &mut CertificateParams) {
    params.not_before = date_time_ymd(2024, 1, 1);
    params.not_after = date_time_ymd(2074, 1, 1);
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn shake(server: &Identity, client: &Identity, expect: NodeId) -> std::io::Result<()> {
        let (near, far) = tokio::io::duplex(1 << 16);
        let accepted = async {
            let mut stream = server.acceptor().accept(far).await?;
            stream.write_u8(7).await?;
            stream.flush().await
        };
        let connected = async {
            let mut stream = client.connector().connect(server_name(expect), near).await?;
            stream.read_u8().await.map(|byte| assert_eq!(byte, 7))
        };
        tokio::try_join!(accepted, connected).map(|_| ())
    }

    #[tokio::test]
    async fn nodes_of_one_secret_know_each_other_and_no_others() {
        let of = |secret: u8, n: u128| Identity::derive(&[secret; 32], NodeId::for_test(n)).unwrap();
        let (one, two, stranger) = (of(1, 1), of(1, 2), of(9, 2));
        shake(&one, &two, one.node).await.unwrap();
        shake(&two, &one, two.node).await.unwrap();
        // Of another bucket, or another node than was asked for.
        shake(&one, &stranger, one.node).await.unwrap_err();
        shake(&stranger, &one, stranger.node).await.unwrap_err();
        shake(&one, &two, two.node).await.unwrap_err();
    }
}
