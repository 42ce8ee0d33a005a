//! Secrets in the bucket, encrypted with a key that never leaves the node.
//!
//! An object `secrets/<project>/<name>` is a 24-byte nonce and what XChaCha20-Poly1305 makes of the value, with the
//! object's key as associated data, so that one secret cannot be put in another's place. The key is 32 random bytes in
//! `secret.key`, mode 0600. Values are wiped from memory after use and have no `Debug`.

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

use bytes::Bytes;
use chacha20poly1305::aead::{Aead as _, KeyInit as _, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use ebb_storage::object_store::Bucket;
use ebb_types::ProjectId;
use zeroize::Zeroizing;

use crate::error::LocalContext as _;
use crate::{Error, Result};

const KEY_BYTES: usize = 32;

/// Makes the key that nodes know each other by another one than any that is made of the same secret for something else.
const PEERS_CONTEXT: &str = "ebb 2026-11-21 authority of the nodes on one bucket";
const NONCE_BYTES: usize = 24;

/// LIMIT: 24 characters of 64 are 144 bits, beyond any guessing.
const PASSWORD_CHARS: usize = 24;

/// A secret's value: wiped when dropped, never shown by `Debug`.
pub type Secret = Zeroizing<String>;

/// The encrypted secrets of all projects.
pub struct SecretStore {
    bucket: Bucket,
    cipher: XChaCha20Poly1305,
    peers: Zeroizing<[u8; KEY_BYTES]>,
}

impl fmt::Debug for SecretStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretStore")
    }
}

/// Where the owner's password of a project is.
fn owner_key(project: ProjectId) -> String {
    format!("secrets/{project}/owner")
}

/// A fresh password: URL-safe characters only.
pub fn generate_password() -> Secret {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let random: Zeroizing<[u8; PASSWORD_CHARS]> = Zeroizing::new(rand::random());
    Zeroizing::new(random.iter().map(|byte| char::from(ALPHABET[usize::from(byte % 64)])).collect())
}

impl SecretStore {
    /// Reads the node's key, making one if there is none. Blocks.
    ///
    /// # Errors
    /// If the key file cannot be used, has another size, or others may read it.
    pub fn open(data_dir: &Path, bucket: Bucket) -> Result<Self> {
        let key = read_or_make_key(&data_dir.join("secret.key"))?;
        let peers = Zeroizing::new(blake3::derive_key(PEERS_CONTEXT, &*key));
        Ok(Self { bucket, cipher: XChaCha20Poly1305::new((&*key).into()), peers })
    }

    /// What nodes with the same key know each other by; tells nothing about the key itself.
    pub fn peers(&self) -> &Zeroizing<[u8; KEY_BYTES]> {
        &self.peers
    }

    /// Stores the owner's password of a project.
    pub async fn put_owner(&self, project: ProjectId, password: &Secret) -> Result<()> {
        let key = owner_key(project);
        let nonce: [u8; NONCE_BYTES] = rand::random();
        let payload = Payload { msg: password.as_bytes(), aad: key.as_bytes() };
        let sealed =
            self.cipher.encrypt(&XNonce::from(nonce), payload).map_err(|_| Error::Secret { name: key.clone() })?;
        let mut object = nonce.to_vec();
        object.extend_from_slice(&sealed);
        Ok(self.bucket.put(&key, Bytes::from(object)).await?)
    }

    /// Reads the owner's password of a project.
    ///
    /// # Errors
    /// [`Error::Secret`] if it was encrypted with another node's key, or altered.
    pub async fn owner(&self, project: ProjectId) -> Result<Secret> {
        let key = owner_key(project);
        let unreadable = || Error::Secret { name: key.clone() };
        let object = self.bucket.get(&key).await?;
        let (nonce, sealed) = object.split_first_chunk::<NONCE_BYTES>().ok_or_else(unreadable)?;
        let payload = Payload { msg: sealed, aad: key.as_bytes() };
        let value = Zeroizing::new(self.cipher.decrypt(&XNonce::from(*nonce), payload).map_err(|_| unreadable())?);
        let text = std::str::from_utf8(&value).map_err(|_| unreadable())?;
        Ok(Zeroizing::new(text.to_owned()))
    }

    /// Deletes the owner's password of a project.
    pub async fn delete_owner(&self, project: ProjectId) -> Result<()> {
        Ok(self.bucket.delete(&owner_key(project)).await?)
    }
}

fn read_or_make_key(path: &Path) -> Result<Zeroizing<[u8; KEY_BYTES]>> {
    match fs::read(path) {
        Ok(bytes) => {
            let bytes = Zeroizing::new(bytes);
            let mode = fs::metadata(path).on("look at", path)?.permissions().mode();
            let fault =
                |why: &str| Error::Local { act: "use", path: path.to_owned(), source: std::io::Error::other(why) };
            if mode & 0o077 != 0 {
                return Err(fault("others may read it (want mode 0600)"));
            }
            let key: [u8; KEY_BYTES] = bytes.as_slice().try_into().map_err(|_| fault("it is not 32 bytes long"))?;
            Ok(Zeroizing::new(key))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let key: Zeroizing<[u8; KEY_BYTES]> = Zeroizing::new(rand::random());
            // A key cut short by a crash would be refused for ever: write aside, then rename.
            let temp = path.with_extension("key.new");
            let _ = fs::remove_file(&temp);
            let mut file =
                OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temp).on("create", &temp)?;
            file.write_all(&*key).on("write", &temp)?;
            file.sync_all().on("sync", &temp)?;
            fs::rename(&temp, path).on("rename", &temp)?;
            crate::files::sync_dir(path.parent().unwrap_or(Path::new(".")))?;
            Ok(key)
        }
        Err(error) => Err(error).on("read", path),
    }
}
