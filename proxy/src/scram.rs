//! The server side of SCRAM-SHA-256 (RFC 5802, 7677) over a stored verifier: bytes in, bytes out.
//!
//! ```text
//! client                                         server
//!   SASLInitialResponse  gs2 header, n=,r=cnonce  ──►  Exchange::begin
//!   ◄──  r=cnonce+snonce,s=salt,i=iterations            Exchange::challenge
//!   SASLResponse         c=binding,r=…,p=proof    ──►  Exchange::finish
//!   ◄──  v=server signature, or nothing but 28P01
//! ```
//!
//! A role without a usable verifier goes through the same exchange over a mock one, so that neither the messages nor
//! the work done tell whether the role exists.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

/// The mechanism every driver knows.
pub const MECHANISM: &str = "SCRAM-SHA-256";
/// The same, bound to the TLS channel.
pub const MECHANISM_PLUS: &str = "SCRAM-SHA-256-PLUS";

/// LIMIT: 18 random bytes, as Postgres 15 sends (`SCRAM_RAW_NONCE_LEN`, scram-common.h).
const NONCE_LEN: usize = 18;
/// What Postgres uses unless told otherwise (`SCRAM_DEFAULT_ITERATIONS`); a mock must not differ.
const MOCK_ITERATIONS: u32 = 4096;
const MOCK_SALT_LEN: usize = 16;

type Key = [u8; 32];

/// What is stored of a password: `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`.
#[derive(Clone)]
pub struct Verifier {
    iterations: u32,
    salt: Vec<u8>,
    stored_key: Key,
    server_key: Key,
    /// 0 for a mock: whatever the proof, the answer is no.
    real: Choice,
}

impl Verifier {
    /// Reads the text form of `pg_authid.rolpassword`; `None` if it is not a SCRAM-SHA-256 verifier.
    pub fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("SCRAM-SHA-256$")?;
        let (parameters, keys) = rest.split_once('$')?;
        let (iterations, salt) = parameters.split_once(':')?;
        let (stored_key, server_key) = keys.split_once(':')?;
        let key = |text: &str| BASE64.decode(text).ok()?.try_into().ok();
        Some(Self {
            iterations: iterations.parse().ok().filter(|&count| count > 0)?,
            salt: BASE64.decode(salt).ok()?,
            stored_key: key(stored_key)?,
            server_key: key(server_key)?,
            real: Choice::from(1),
        })
    }

    /// A verifier no password fits, whose salt is always the same for the same `who`.
    pub fn mock(secret: &[u8], who: &str) -> Self {
        let mut salt = hmac(secret, &[b"salt", who.as_bytes()]).to_vec();
        salt.truncate(MOCK_SALT_LEN);
        let stored_key = hmac(secret, &[b"stored", who.as_bytes()]);
        Self { iterations: MOCK_ITERATIONS, salt, stored_key, server_key: stored_key, real: Choice::from(0) }
    }
}

/// How an exchange fails.
#[derive(Debug, PartialEq, Eq)]
pub enum Failure {
    /// The message is not SCRAM: says what is wrong with it.
    Malformed(&'static str),
    /// The proof is wrong, or the verifier was a mock.
    WrongPassword,
}

/// An exchange whose first client message has been read.
pub struct Exchange {
    verifier: Verifier,
    /// What `c=` of the final message must decode to.
    binding: Vec<u8>,
    client_first_bare: String,
    nonce: String,
    server_first: String,
}

impl Exchange {
    /// Reads the client's first message.
    ///
    /// `channel` is the hash of the server's certificate (`tls-server-end-point`, RFC 5929) where the connection has
    /// one; `plus` tells which mechanism the client chose.
    ///
    /// # Errors
    /// If the message is malformed, or its channel binding does not fit the connection.
    pub fn begin(
        verifier: Verifier,
        first: &[u8],
        plus: bool,
        channel: Option<&[u8]>,
        server_nonce: &[u8; NONCE_LEN],
    ) -> Result<Self, Failure> {
        let first = std::str::from_utf8(first).map_err(|_| Failure::Malformed("the SCRAM message is not text"))?;
        let mut parts = first.splitn(3, ',');
        let (Some(flag), Some(authzid), Some(bare)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(Failure::Malformed("the first SCRAM message is incomplete"));
        };
        let binds = match flag {
            "n" => false,
            "y" if channel.is_some() => {
                // The client can bind but was told we cannot, although we offered it: someone sits between.
                return Err(Failure::Malformed("the offer of SCRAM-SHA-256-PLUS was lost on the way"));
            }
            "y" => false,
            "p=tls-server-end-point" => true,
            _ => return Err(Failure::Malformed("the SCRAM channel-binding type is not supported")),
        };
        if binds != plus {
            return Err(Failure::Malformed("the SCRAM mechanism and its channel binding contradict each other"));
        }
        if !authzid.is_empty() {
            return Err(Failure::Malformed("SCRAM authorization identities are not supported"));
        }
        let mut binding = format!("{flag},{authzid},").into_bytes();
        if binds {
            binding.extend_from_slice(channel.ok_or(Failure::Malformed("there is no channel to bind to"))?);
        }
        // The name in `n=` is ignored, as Postgres does: the start-up packet has told it.
        let mut attributes = bare.split(',');
        let named = attributes.next().is_some_and(|name| name.starts_with("n="));
        let client_nonce = attributes.next().and_then(|nonce| nonce.strip_prefix("r="));
        let Some(client_nonce) = client_nonce.filter(|nonce| named && !nonce.is_empty()) else {
            return Err(Failure::Malformed("the first SCRAM message has no nonce"));
        };
        let nonce = format!("{client_nonce}{}", BASE64.encode(server_nonce));
        let server_first = format!("r={nonce},s={},i={}", BASE64.encode(&verifier.salt), verifier.iterations);
        Ok(Self { verifier, binding, client_first_bare: bare.to_owned(), nonce, server_first })
    }

    /// The server's first message.
    pub fn challenge(&self) -> &str {
        &self.server_first
    }

    /// Checks the client's final message and answers the server's.
    ///
    /// # Errors
    /// If the message is malformed or the proof is wrong.
    pub fn finish(&self, last: &[u8]) -> Result<String, Failure> {
        let last = std::str::from_utf8(last).map_err(|_| Failure::Malformed("the SCRAM message is not text"))?;
        let incomplete = Failure::Malformed("the final SCRAM message is incomplete");
        let Some((without_proof, proof)) = last.rsplit_once(",p=") else { return Err(incomplete) };
        let mut attributes = without_proof.split(',');
        let binding = attributes.next().and_then(|binding| binding.strip_prefix("c="));
        let nonce = attributes.next().and_then(|nonce| nonce.strip_prefix("r="));
        let (Some(binding), Some(nonce)) = (binding, nonce) else { return Err(incomplete) };
        if BASE64.decode(binding).ok().as_deref() != Some(&self.binding[..]) {
            return Err(Failure::Malformed("the SCRAM channel binding does not fit the connection"));
        }
        if nonce != self.nonce {
            return Err(Failure::Malformed("the SCRAM nonce is not the one agreed on"));
        }
        let proof: Key = BASE64
            .decode(proof)
            .ok()
            .and_then(|proof| proof.try_into().ok())
            .ok_or(Failure::Malformed("the SCRAM proof has the wrong form"))?;

        let auth: [&[u8]; 5] =
            [self.client_first_bare.as_bytes(), b",", self.server_first.as_bytes(), b",", without_proof.as_bytes()];
        let signature = hmac(&self.verifier.stored_key, &auth);
        let client_key: Key = std::array::from_fn(|i| proof[i] ^ signature[i]);
        let stored_key: Key = Sha256::digest(client_key).into();
        let right = stored_key.ct_eq(&self.verifier.stored_key) & self.verifier.real;
        let server_signature = hmac(&self.verifier.server_key, &auth);
        if bool::from(right) {
            Ok(format!("v={}", BASE64.encode(server_signature)))
        } else {
            Err(Failure::WrongPassword)
        }
    }
}

/// Fresh randomness for [`Exchange::begin`].
pub fn server_nonce() -> [u8; NONCE_LEN] {
    rand::random()
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Key {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of RFC 7677, section 3: user "user", password "pencil".
    const VERIFIER: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";
    const FIRST: &[u8] = b"n,,n=user,r=rOprNGfwEbeRWgbNEkqO";

    fn exchange(verifier: Verifier) -> Exchange {
        Exchange::begin(verifier, FIRST, false, None, &[7; NONCE_LEN]).unwrap()
    }

    /// What a right client answers: computed from the keys of the RFC's example.
    fn answer(exchange: &Exchange, client_key: Key) -> Vec<u8> {
        let without_proof = format!("c=biws,r={}", exchange.nonce);
        let auth = format!("n=user,r=rOprNGfwEbeRWgbNEkqO,{},{without_proof}", exchange.challenge());
        let signature = hmac(&Sha256::digest(client_key), &[auth.as_bytes()]);
        let proof: Key = std::array::from_fn(|i| client_key[i] ^ signature[i]);
        format!("{without_proof},p={}", BASE64.encode(proof)).into_bytes()
    }

    /// The RFC gives proof and AuthMessage; from these the client key follows.
    fn pencil() -> Key {
        let auth = "n=user,r=rOprNGfwEbeRWgbNEkqO,\
                    r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096,\
                    c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
        let proof: Key = BASE64.decode("dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=").unwrap().try_into().unwrap();
        let signature = hmac(&Verifier::parse(VERIFIER).unwrap().stored_key, &[auth.as_bytes()]);
        std::array::from_fn(|i| proof[i] ^ signature[i])
    }

    #[test]
    fn the_rfc_example_is_accepted() {
        let exchange = exchange(Verifier::parse(VERIFIER).unwrap());
        assert!(exchange.challenge().ends_with(",s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"));
        let done = exchange.finish(&answer(&exchange, pencil())).unwrap();
        assert!(done.starts_with("v="), "{done}");
    }

    #[test]
    fn a_wrong_password_and_a_mock_fail_alike() {
        let real = exchange(Verifier::parse(VERIFIER).unwrap());
        assert_eq!(real.finish(&answer(&real, [9; 32])), Err(Failure::WrongPassword));
        let mock = exchange(Verifier::mock(b"secret", "nobody"));
        assert_eq!(mock.finish(&answer(&mock, [9; 32])), Err(Failure::WrongPassword));
        assert_eq!(real.challenge().len(), mock.challenge().len());
        assert_eq!(mock.challenge(), exchange(Verifier::mock(b"secret", "nobody")).challenge());
    }

    #[test]
    fn downgrades_and_contradictions_are_refused() {
        let verifier = || Verifier::parse(VERIFIER).unwrap();
        let begin = |first: &[u8], plus, channel| {
            Exchange::begin(verifier(), first, plus, channel, &[7; NONCE_LEN]).map(|_| ())
        };
        let channel = Some(&b"hash"[..]);
        assert!(begin(b"y,,n=,r=abc", false, None).is_ok());
        assert!(begin(b"y,,n=,r=abc", false, channel).is_err());
        assert!(begin(b"p=tls-server-end-point,,n=,r=abc", true, channel).is_ok());
        assert!(begin(b"p=tls-server-end-point,,n=,r=abc", false, channel).is_err());
        assert!(begin(b"p=tls-server-end-point,,n=,r=abc", true, None).is_err());
        assert!(begin(b"p=tls-unique,,n=,r=abc", true, channel).is_err());
        assert!(begin(b"n,,n=,r=abc", true, channel).is_err());
        assert!(begin(b"n,a=other,n=,r=abc", false, None).is_err());
        assert!(begin(b"n,,n=,r=", false, None).is_err());
        assert!(begin(b"\xff", false, None).is_err());
        assert!(begin(b"", false, None).is_err());
    }

    #[test]
    fn what_is_not_a_verifier_is_not_read_as_one() {
        for text in ["", "md5abc", "SCRAM-SHA-256$4096:!$a:b", "SCRAM-SHA-256$0:AA==$AA==:AA=="] {
            assert!(Verifier::parse(text).is_none(), "{text:?} was taken");
        }
    }
}
