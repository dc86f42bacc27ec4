//! The two protection profiles: AES_CM_128_HMAC_SHA1_80 (RFC 3711) and AEAD_AES_128_GCM (RFC 7714), one
//! direction of one leg. Ciphers and hashes are those of `ring`, `aes`, `ctr`, `hmac` and `sha1`; what is
//! here is where they are applied, with which counter and over which bytes.
//!
//! Nothing here knows streams: the index comes from the caller, who must never use one twice for sending.

use aes::Aes128Enc;
use aes::cipher::{BlockEncrypt, InnerIvInit, KeyInit, StreamCipher, StreamCipherCoreWrapper};
use ctr::CtrCore;
use ctr::flavors::Ctr128BE;
use hmac::{Hmac, Mac};
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use sha1::Sha1;

/// Bytes of the master and session keys of both profiles.
pub(super) const KEY: usize = 16;
/// Bytes of the salts (RFC 3711 section 8.2, RFC 7714 section 12).
pub(super) const CM_SALT: usize = 14;
pub(super) const GCM_SALT: usize = 12;
/// Bytes of the key of HMAC-SHA1 (RFC 3711 section 8.2).
const AUTH_KEY: usize = 20;

/// Bytes of the tags: HMAC-SHA1 whole as the profile has it, what framed packets keep of it, and GCM's.
pub(super) const CM_TAG: usize = 10;
pub(super) const SHORT_TAG: usize = 4;
pub(super) const GCM_TAG: usize = 16;

/// Bytes of an RTCP packet that are never encrypted: the first header and its SSRC.
pub(super) const RTCP_HEAD: usize = 8;
/// The E bit and the 31 bits of the SRTCP index (RFC 3711 section 3.4).
pub(super) const INDEX: usize = 4;
pub(super) const E_BIT: u32 = 1 << 31;

/// What a key is derived for (RFC 3711 section 4.3.2): of RTP; of RTCP it is 3 more.
const ENCRYPTION: u8 = 0;
const AUTHENTICATION: u8 = 1;
const SALT: u8 = 2;
const OF_RTCP: u8 = 3;

/// Keys of one direction.
pub(super) enum Cipher {
    /// AES in counter mode, authenticated by HMAC-SHA1.
    Cm(Box<[Cm; 2]>),
    /// AES in Galois counter mode.
    Gcm(Box<[Gcm; 2]>),
}

const RTP: usize = 0;
const RTCP: usize = 1;

impl Cipher {
    pub(super) fn cm(master_key: &[u8], master_salt: &[u8]) -> Option<Self> {
        let keys = Derivation::new(master_key, master_salt)?;
        let cm = |first| {
            Cm::new(
                &keys.derive::<KEY>(first + ENCRYPTION),
                &keys.derive::<AUTH_KEY>(first + AUTHENTICATION),
                &keys.derive::<CM_SALT>(first + SALT),
            )
        };
        Some(Self::Cm(Box::new([cm(0)?, cm(OF_RTCP)?])))
    }

    pub(super) fn gcm(master_key: &[u8], master_salt: &[u8]) -> Option<Self> {
        let keys = Derivation::new(master_key, master_salt)?;
        let gcm = |first| {
            Gcm::new(
                &keys.derive::<KEY>(first + ENCRYPTION),
                keys.derive::<GCM_SALT>(first + SALT),
            )
        };
        Some(Self::Gcm(Box::new([gcm(0)?, gcm(OF_RTCP)?])))
    }

    /// Bytes of the tag of an RTP packet.
    pub(super) fn rtp_tag(&self, short: bool) -> usize {
        match self {
            Self::Cm(_) if short => SHORT_TAG,
            Self::Cm(_) => CM_TAG,
            Self::Gcm(_) => GCM_TAG,
        }
    }

    /// Bytes that protection adds to an RTCP packet.
    pub(super) fn rtcp_overhead(&self) -> usize {
        match self {
            Self::Cm(_) => INDEX + CM_TAG,
            Self::Gcm(_) => GCM_TAG + INDEX,
        }
    }

    /// Where the E bit and the index of an SRTCP packet are, which is long enough for them.
    pub(super) fn rtcp_index_at(&self, protected: &[u8]) -> usize {
        match self {
            Self::Cm(_) => protected.len() - INDEX - CM_TAG,
            Self::Gcm(_) => protected.len() - INDEX,
        }
    }

    /// Encrypts the RTP packet in `packet` from `header_len` on, and appends the tag.
    pub(super) fn seal_rtp(
        &self,
        packet: &mut Vec<u8>,
        header_len: usize,
        ssrc: u32,
        index: u64,
        short: bool,
    ) -> bool {
        match self {
            Self::Cm(keys) => {
                let keys = &keys[RTP];
                keys.apply(
                    ssrc,
                    index,
                    packet.get_mut(header_len..).unwrap_or_default(),
                );
                let tag = keys.mac(packet, &rollover(index)).finalize().into_bytes();
                packet.extend_from_slice(&tag[..self.rtp_tag(short)]);
                true
            }
            Self::Gcm(keys) => {
                let keys = &keys[RTP];
                let Some((header, payload)) = packet.split_at_mut_checked(header_len) else {
                    return false;
                };
                let nonce = keys.rtp_nonce(ssrc, index);
                let aad = Aad::from(&*header);
                match keys.key.seal_in_place_separate_tag(nonce, aad, payload) {
                    Ok(tag) => packet.extend_from_slice(tag.as_ref()),
                    Err(_) => return false,
                }
                true
            }
        }
    }

    /// Authenticates an SRTP packet and decrypts it into `plain`, which is overwritten. `false`: it is not
    /// authentic, and nothing of it is in `plain`.
    pub(super) fn open_rtp(
        &self,
        protected: &[u8],
        plain: &mut Vec<u8>,
        header_len: usize,
        ssrc: u32,
        index: u64,
        short: bool,
    ) -> bool {
        plain.clear();
        match self {
            Self::Cm(keys) => {
                let keys = &keys[RTP];
                let end = protected.len().checked_sub(self.rtp_tag(short));
                let Some((packet, tag)) = end.and_then(|end| protected.split_at_checked(end))
                else {
                    return false;
                };
                let mac = keys.mac(packet, &rollover(index));
                // Constant time.
                if packet.len() < header_len || mac.verify_truncated_left(tag).is_err() {
                    return false;
                }
                plain.extend_from_slice(packet);
                keys.apply(ssrc, index, plain.get_mut(header_len..).unwrap_or_default());
                true
            }
            Self::Gcm(keys) => {
                let keys = &keys[RTP];
                let nonce = keys.rtp_nonce(ssrc, index);
                keys.open(protected, &[], nonce, header_len, plain)
            }
        }
    }

    /// Encrypts the RTCP packet in `packet`, and appends index and tag.
    pub(super) fn seal_rtcp(&self, packet: &mut Vec<u8>, ssrc: u32, index: u32) -> bool {
        let trailer = (index | E_BIT).to_be_bytes();
        match self {
            Self::Cm(keys) => {
                let keys = &keys[RTCP];
                let payload = packet.get_mut(RTCP_HEAD..).unwrap_or_default();
                keys.apply(ssrc, index.into(), payload);
                packet.extend_from_slice(&trailer);
                let tag = keys.mac(packet, &[]).finalize().into_bytes();
                packet.extend_from_slice(&tag[..CM_TAG]);
                true
            }
            Self::Gcm(keys) => {
                let keys = &keys[RTCP];
                let Some((head, payload)) = packet.split_first_chunk_mut::<RTCP_HEAD>() else {
                    return false;
                };
                let nonce = keys.rtcp_nonce(ssrc, index);
                let aad = Aad::from(rtcp_aad(head, trailer));
                match keys.key.seal_in_place_separate_tag(nonce, aad, payload) {
                    Ok(tag) => packet.extend_from_slice(tag.as_ref()),
                    Err(_) => return false,
                }
                packet.extend_from_slice(&trailer);
                true
            }
        }
    }

    /// The same for SRTCP, whose index the caller has read and whose E bit is set.
    pub(super) fn open_rtcp(
        &self,
        protected: &[u8],
        plain: &mut Vec<u8>,
        ssrc: u32,
        index: u32,
    ) -> bool {
        plain.clear();
        match self {
            Self::Cm(keys) => {
                let keys = &keys[RTCP];
                let end = protected.len().checked_sub(CM_TAG);
                let Some((signed, tag)) = end.and_then(|end| protected.split_at_checked(end))
                else {
                    return false;
                };
                let Some((packet, _)) = signed.split_last_chunk::<INDEX>() else {
                    return false;
                };
                if keys.mac(signed, &[]).verify_truncated_left(tag).is_err() {
                    return false;
                }
                plain.extend_from_slice(packet);
                let payload = plain.get_mut(RTCP_HEAD..).unwrap_or_default();
                keys.apply(ssrc, index.into(), payload);
                true
            }
            Self::Gcm(keys) => {
                let keys = &keys[RTCP];
                let Some((packet, trailer)) = protected.split_last_chunk::<INDEX>() else {
                    return false;
                };
                let nonce = keys.rtcp_nonce(ssrc, index);
                keys.open(packet, trailer, nonce, RTCP_HEAD, plain)
            }
        }
    }
}

/// The rollover counter, which is authenticated with an RTP packet (RFC 3711 section 4.2).
fn rollover(index: u64) -> [u8; 4] {
    let [_, _, a, b, c, d, _, _] = index.to_be_bytes();
    [a, b, c, d]
}

fn rtcp_aad(head: &[u8; RTCP_HEAD], trailer: [u8; INDEX]) -> [u8; RTCP_HEAD + INDEX] {
    let mut aad = [0; RTCP_HEAD + INDEX];
    aad[..RTCP_HEAD].copy_from_slice(head);
    aad[RTCP_HEAD..].copy_from_slice(&trailer);
    aad
}

/// Session keys of AES_CM and HMAC-SHA1.
pub(super) struct Cm {
    aes: Aes128Enc,
    /// Keyed once: the key's own two blocks are not hashed for each packet.
    mac: Hmac<Sha1>,
    salt: [u8; KEY],
}

impl Cm {
    pub(super) fn new(
        key: &[u8; KEY],
        auth: &[u8; AUTH_KEY],
        salt: &[u8; CM_SALT],
    ) -> Option<Self> {
        let mut padded = [0; KEY];
        padded[..CM_SALT].copy_from_slice(salt);
        Some(Self {
            aes: Aes128Enc::new_from_slice(key).ok()?,
            mac: <Hmac<Sha1> as Mac>::new_from_slice(auth).ok()?,
            salt: padded,
        })
    }

    /// Encrypts or decrypts (RFC 3711 section 4.1.1).
    pub(super) fn apply(&self, ssrc: u32, index: u64, bytes: &mut [u8]) {
        let mut iv = self.salt;
        let mixed = u128::from(ssrc) << 64 | u128::from(index) << 16;
        for (byte, mixed) in iv.iter_mut().zip(mixed.to_be_bytes()) {
            *byte ^= mixed;
        }
        let core = CtrCore::<_, Ctr128BE>::inner_iv_init(&self.aes, &iv.into());
        // An error would be 2^128 blocks.
        let _ = StreamCipherCoreWrapper::from_core(core).try_apply_keystream(bytes);
    }

    fn mac(&self, packet: &[u8], more: &[u8]) -> Hmac<Sha1> {
        let mut mac = self.mac.clone();
        mac.update(packet);
        mac.update(more);
        mac
    }
}

/// Session key of AES-GCM.
pub(super) struct Gcm {
    key: LessSafeKey,
    salt: [u8; GCM_SALT],
}

impl Gcm {
    pub(super) fn new(key: &[u8; KEY], salt: [u8; GCM_SALT]) -> Option<Self> {
        let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, key).ok()?);
        Some(Self { key, salt })
    }

    /// RFC 7714 section 8.1: two zeros, SSRC, rollover counter, sequence number.
    fn rtp_nonce(&self, ssrc: u32, index: u64) -> Nonce {
        self.nonce(u128::from(ssrc) << 48 | u128::from(index))
    }

    /// RFC 7714 section 9.1: two zeros, SSRC, two zeros, the index of 31 bits.
    fn rtcp_nonce(&self, ssrc: u32, index: u32) -> Nonce {
        self.nonce(u128::from(ssrc) << 48 | u128::from(index))
    }

    fn nonce(&self, mixed: u128) -> Nonce {
        let mut nonce = self.salt;
        for (byte, mixed) in nonce.iter_mut().zip(&mixed.to_be_bytes()[4..]) {
            *byte ^= mixed;
        }
        Nonce::assume_unique_for_key(nonce)
    }

    /// Opens what is behind the first `clear` bytes, which are authenticated before `more`.
    fn open(
        &self,
        protected: &[u8],
        more: &[u8],
        nonce: Nonce,
        clear: usize,
        plain: &mut Vec<u8>,
    ) -> bool {
        let Some(head) = protected.get(..clear) else {
            return false;
        };
        plain.extend_from_slice(protected);
        let sealed = plain.get_mut(clear..).unwrap_or_default();
        let opened = match (head.first_chunk(), more.first_chunk()) {
            (Some(head), Some(more)) => {
                let aad = Aad::from(rtcp_aad(head, *more));
                self.key.open_in_place(nonce, aad, sealed)
            }
            _ => self.key.open_in_place(nonce, Aad::from(head), sealed),
        };
        match opened.map(|payload| payload.len()) {
            Ok(len) => {
                plain.truncate(clear + len);
                true
            }
            Err(_) => {
                plain.clear();
                false
            }
        }
    }
}

/// Derives session keys from a master key (RFC 3711 section 4.3, with a derivation rate of 0; RFC 7714
/// section 11 has the same for GCM, whose salt is followed by zeros).
pub(super) struct Derivation {
    aes: Aes128Enc,
    salt: [u8; KEY],
}

impl Derivation {
    pub(super) fn new(master_key: &[u8], master_salt: &[u8]) -> Option<Self> {
        let mut salt = [0; KEY];
        salt.get_mut(..master_salt.len().min(CM_SALT))?
            .copy_from_slice(master_salt.get(..CM_SALT.min(master_salt.len()))?);
        Some(Self {
            aes: Aes128Enc::new_from_slice(master_key).ok()?,
            salt,
        })
    }

    pub(super) fn derive<const N: usize>(&self, label: u8) -> [u8; N] {
        let mut key = [0; N];
        for (n, out) in (0u8..).zip(key.chunks_mut(KEY)) {
            let mut block = self.salt;
            block[7] ^= label;
            block[15] = n;
            let mut block = block.into();
            self.aes.encrypt_block(&mut block);
            out.copy_from_slice(&block[..out.len()]);
        }
        key
    }
}
