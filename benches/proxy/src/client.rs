//! A client that takes next to nothing of the machine: it reads headers, and throws bodies away.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use postgres_protocol::authentication::sasl::{ChannelBinding, ScramSha256};
use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpSocket, UnixStream};
use tokio_rustls::TlsConnector;

use crate::pooler::{PASSWORD, Target};
use crate::world::Postgres;

trait Stream: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send> Stream for T {}

/// A connection that is ready for queries, or has at least logged in.
pub struct Client {
    stream: Pin<Box<dyn Stream>>,
    scratch: Vec<u8>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").finish_non_exhaustive()
    }
}

impl Client {
    /// Connects and logs in; `from` is the address to come from.
    pub async fn log_in(target: &Target, postgres: Option<&Postgres>, from: Option<Ipv4Addr>) -> Result<Self> {
        let mut client = Self { stream: open(target, postgres, from).await?, scratch: Vec::new() };
        let mut body = b"user\0app\0database\0app\0".to_vec();
        if let Some(options) = target.options {
            body.extend_from_slice(b"options\0");
            body.extend_from_slice(options.as_bytes());
            body.push(0);
        }
        body.push(0);
        let mut packet = (body.len() as u32 + 8).to_be_bytes().to_vec();
        packet.extend_from_slice(&(3_u32 << 16).to_be_bytes());
        packet.extend_from_slice(&body);
        client.stream.write_all(&packet).await?;
        client.stream.flush().await?;

        let mut scram = ScramSha256::new(PASSWORD.as_bytes(), ChannelBinding::unsupported());
        loop {
            let (tag, body) = client.message().await?;
            ensure!(tag == b'R', "not an authentication message: {}", String::from_utf8_lossy(&body));
            match u32::from_be_bytes(body[..4].try_into()?) {
                0 => return Ok(client),
                10 => {
                    let mut first = b"SCRAM-SHA-256\0".to_vec();
                    first.extend_from_slice(&(scram.message().len() as u32).to_be_bytes());
                    first.extend_from_slice(scram.message());
                    client.send(b'p', &first).await?;
                }
                11 => {
                    scram.update(&body[4..])?;
                    let last = scram.message().to_vec();
                    client.send(b'p', &last).await?;
                }
                12 => scram.finish(&body[4..])?,
                other => bail!("authentication of kind {other}"),
            }
        }
    }

    /// Connects, logs in, and waits until queries are taken.
    pub async fn connect(target: &Target, postgres: &Postgres) -> Result<Self> {
        let mut client = Self::log_in(target, Some(postgres), None).await?;
        client.until_ready().await?;
        Ok(client)
    }

    /// Sends a message.
    pub async fn send(&mut self, tag: u8, body: &[u8]) -> Result<()> {
        let mut out = Vec::with_capacity(body.len() + 5);
        out.push(tag);
        out.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
        out.extend_from_slice(body);
        self.stream.write_all(&out).await?;
        self.stream.flush().await?;
        Ok(())
    }

    /// Sends bytes as they are.
    pub async fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await?;
        Ok(())
    }

    /// Runs a simple query to its end; answers how many bytes came.
    pub async fn query(&mut self, sql: &str) -> Result<u64> {
        self.begin(sql).await?;
        self.until_ready().await
    }

    /// Sends a simple query.
    pub async fn begin(&mut self, sql: &str) -> Result<()> {
        self.send(b'Q', &[sql.as_bytes(), b"\0"].concat()).await
    }

    /// Reads up to the next `ReadyForQuery`; answers how many bytes came.
    pub async fn until_ready(&mut self) -> Result<u64> {
        self.until(b'Z').await
    }

    /// Reads up to a message of a kind, and throws away what comes before it and its body.
    pub async fn until(&mut self, wanted: u8) -> Result<u64> {
        // Bytes of the message under way that are still to come; `header` is what is known of the next one.
        let (mut all, mut left, mut tag) = (0, 0_usize, 0);
        let mut header = Vec::with_capacity(5);
        self.scratch.resize(64 * 1024, 0);
        loop {
            let count = self.stream.read(&mut self.scratch).await?;
            ensure!(count > 0, "the server has closed");
            all += count as u64;
            let mut bytes = &self.scratch[..count];
            while !bytes.is_empty() {
                if left == 0 {
                    let take = bytes.len().min(5 - header.len());
                    header.extend_from_slice(&bytes[..take]);
                    bytes = &bytes[take..];
                    if header.len() < 5 {
                        break;
                    }
                    tag = header[0];
                    left = u32::from_be_bytes(header[1..5].try_into()?) as usize - 4;
                    header.clear();
                }
                let take = bytes.len().min(left);
                ensure!(tag != b'E', "the server says: {}", String::from_utf8_lossy(&bytes[..take]));
                left -= take;
                bytes = &bytes[take..];
            }
            if left == 0 && header.is_empty() && tag == wanted {
                self.scratch = Vec::new();
                return Ok(all);
            }
        }
    }

    async fn message(&mut self) -> Result<(u8, Vec<u8>)> {
        let tag = self.stream.read_u8().await?;
        let length = self.stream.read_u32().await? as usize;
        let mut body = vec![0; length.checked_sub(4).context("an impossible length")?];
        self.stream.read_exact(&mut body).await?;
        Ok((tag, body))
    }
}

async fn open(target: &Target, postgres: Option<&Postgres>, from: Option<Ipv4Addr>) -> Result<Pin<Box<dyn Stream>>> {
    let Some(addr) = target.addr else {
        let postgres = postgres.context("a target without an address is Postgres itself")?;
        return Ok(Box::pin(UnixStream::connect(postgres.socket()).await?));
    };
    let socket = TcpSocket::new_v4()?;
    if let Some(from) = from {
        socket.bind(SocketAddr::from((from, 0)))?;
    }
    let mut stream = socket.connect(addr).await?;
    stream.set_nodelay(true)?;
    let Some(ca) = &target.ca else { return Ok(Box::pin(stream)) };
    stream.write_all(&[0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f]).await?;
    ensure!(stream.read_u8().await? == b'S', "the server does not encrypt");
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&fs::read(ca)?)?)?;
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = TlsConnector::from(Arc::new(config));
    Ok(Box::pin(connector.connect(ServerName::try_from("localhost")?, stream).await?))
}
