//! What nodes say to each other: frames of JSON, each behind its length (32 bits, big-endian).

use std::io;
use std::time::Duration;

use ebb_timeline::clients::{Rest, SessionRow};
use ebb_timeline::nodes::Record;
use ebb_types::{BranchId, NodeId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// LIMIT: the longest frame tells the sessions of a branch, of which there are thousands at most.
const FRAME_BYTES_MAX: u32 = 4 << 20;

/// How often a guest tells what its clients are doing, and an owner that it is there: also a sign of life.
pub const TELL_EVERY: Duration = Duration::from_millis(250);

/// LIMIT: several of these signs may be late on a busy machine.
pub const SILENCE_MAX: Duration = Duration::from_secs(5);

/// What a connection is for: the first thing said on it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Wake the branch.
    Wake { guest: NodeId, branch: BranchId },
    /// From the answer on, every byte is for the Postgres of the branch, which is awake.
    Connect { guest: NodeId, branch: BranchId },
    /// The verifier of a role.
    Verifier { branch: BranchId, role: String },
    /// Promise to take nothing over for so long, if you cannot renew your record.
    Hold { time_ms: u64 },
    /// You have not renewed your record: I take over from you.
    TakeOver { by: Record },
    /// From the answer on, every byte is for the API.
    Api,
    /// From the answer on: orders to the guest, and its news.
    Link { guest: NodeId },
}

/// The answer to a request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Go on.
    Ready,
    /// It is awake, in this generation of its computes.
    Awake { generation: u64 },
    /// Whether it is promised.
    Held { held: bool },
    /// The verifier, if the role may log in.
    Verifier { verifier: Option<String> },
    /// Another node owns it, or is about to: look again.
    Elsewhere,
    /// No, for a reason that the client may be told.
    Refused { sqlstate: String, message: String, hint: Option<String> },
}

/// What the owner wants of a guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Order {
    /// Answers name it.
    pub number: u64,
    /// Whose clients.
    pub branch: BranchId,
    /// What is to be done.
    pub what: What,
}

/// See [`ebb_timeline::clients::Clients`].
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// Hold them.
    Fence { deadline_ms: u64, rest: Rest },
    /// Let them go on.
    Release,
    /// Their compute is gone.
    Lost { generation: u64 },
}

/// What an owner says on a link.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// It is there.
    Alive,
    /// Do this.
    Order(Order),
}

/// What a guest tells.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum News {
    /// A fence is up, or these sessions stand in the way.
    Fenced { number: u64, blocked: Vec<SessionRow> },
    /// What its clients are doing, branch by branch: all it has anything to tell of.
    Activity { branches: Vec<BranchNews> },
}

/// What a guest's clients of a branch are doing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BranchNews {
    pub branch: BranchId,
    pub idle_ms: Option<u64>,
    pub busy: usize,
    pub sessions: Vec<SessionRow>,
}

/// Sends one frame.
pub async fn send(to: &mut (impl AsyncWrite + Unpin), frame: &impl Serialize) -> io::Result<()> {
    let body = serde_json::to_vec(frame).expect("frames are plain data");
    let length = u32::try_from(body.len()).ok().filter(|length| *length <= FRAME_BYTES_MAX);
    let length = length.ok_or_else(|| io::Error::other("a frame is too long to be sent"))?;
    let mut bytes = length.to_be_bytes().to_vec();
    bytes.extend_from_slice(&body);
    to.write_all(&bytes).await?;
    to.flush().await
}

/// Receives one frame. Not cancel-safe.
pub async fn receive<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin)) -> io::Result<T> {
    let length = from.read_u32().await?;
    if length > FRAME_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "a frame is too long"));
    }
    let mut body = vec![0; length as usize];
    from.read_exact(&mut body).await?;
    serde_json::from_slice(&body).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}
