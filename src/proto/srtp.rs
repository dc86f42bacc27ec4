//! SRTP and SRTCP of one leg (RFC 3711, RFC 7714): what comes is authentic or is refused.
//!
//! No index is sent twice with different bytes of RTCP, nor of any RTP that AuraLink makes or changes. RTP of a stream without a rule
//! goes on under the number that its sender gave it: a participant who sends two payloads under one number has both sealed under one
//! index, as Pion would. Who sees both on the wire learns how the two differ, and with AES-GCM can forge packets of that leg from then on.
//!
//! The ciphers are in [`cipher`], what is known of streams in [`streams`]. Packets are copied once, into a buffer of the
//! caller's, and worked upon there: none of a known stream allocates.

mod cipher;
mod streams;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod vectors;

use crate::dtls::{DtlsError, SrtpKeys, SrtpProtectionProfile};
use crate::packet::RtpHeader;
use cipher::{CM_SALT, Cipher, E_BIT, GCM_SALT, INDEX, KEY, RTCP_HEAD};
use foldhash::{HashMap, HashMapExt};
use streams::{Table, guess};

/// Streams that one leg knows at a time, of RTP and of RTCP each: a room of 1,000 subscribed tracks with RTX and three
/// layers each has 6,000. Where there are more, the oldest are forgotten ([`Table`]). So many fit a hash table of 2^14 places.
const MAX_STREAMS: usize = 14_336;

/// Streams that one key sends in its life. None is ever forgotten, because one that came back would begin with indices that were
/// used for other bytes (RFC 3711 section 9.1, RFC 7714 section 10.1). A leg that a stream begins on each second lasts for 31 hours;
/// then the key is used up, and the leg with it (RFC 3711 section 9.2). So many fit a hash table of 2^17 places, which has 2.2 MiB.
const MAX_SENT: usize = 114_688;

/// The SRTCP index has 31 bits (RFC 3711 section 3.4).
const MAX_RTCP_INDEX: u32 = E_BIT - 1;

/// Why a packet is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// STUN that is no check or answer of this call's.
    Check,
    /// It came over a path that no check has proved.
    Unproved,
    /// No key fits, there is none yet, or RTCP that isn't encrypted.
    Unauthentic,
    /// It came before.
    Replayed,
    /// Authentic or not, its lengths don't add up.
    Malformed,
}

/// Both directions of one leg.
pub struct Srtp {
    inbound: Cipher,
    outbound: Cipher,
    profile: &'static str,
    /// Payload types of framed packets (docs/protocol.md), in and out. Where the profile is AES_CM_128_HMAC_SHA1_80 their tag is the
    /// first four bytes of HMAC-SHA1 instead of ten. They are replay-protected, because each is decoded and coded anew: the same one
    /// again would become other bytes under the same sequence numbers.
    framed_pts: (Option<u8>, Option<u8>),
    came: Table,
    came_rtcp: Table,
    /// The highest index sent of each stream.
    sent: HashMap<u32, u64>,
    /// One counter for all streams: whatever SSRC an RTCP packet has, its index is new.
    sent_rtcp: u32,
    used_up: bool,
}

impl Srtp {
    /// Makes the contexts from a finished handshake. Replay protection of RTP is off but for framed packets, as LiveKit has it:
    /// Firefox probes with old packets, and a relay hands duplicates on to a receiver that copes.
    ///
    /// # Errors
    /// When keys don't fit the profile.
    pub fn new(keys: &SrtpKeys) -> Result<Self, DtlsError> {
        type Make = fn(&[u8], &[u8]) -> Option<Cipher>;
        let (make, salt, profile): (Make, _, _) = match keys.profile {
            SrtpProtectionProfile::Srtp_Aead_Aes_128_Gcm => {
                (Cipher::gcm, GCM_SALT, "AEAD_AES_128_GCM")
            }
            SrtpProtectionProfile::Srtp_Aes128_Cm_Hmac_Sha1_80 => {
                (Cipher::cm, CM_SALT, "AES128_CM_HMAC_SHA1_80")
            }
            _ => return Err(DtlsError::no_keys()),
        };
        // RFC 5764 section 4.2: keys of client and server, then their salts.
        if keys.material.len() != 2 * (KEY + salt) {
            return Err(DtlsError::no_keys());
        }
        let (of_keys, of_salts) = keys.material.split_at(2 * KEY);
        let cipher = |of_client: bool| {
            let (key, salt) = if of_client {
                (&of_keys[..KEY], &of_salts[..salt])
            } else {
                (&of_keys[KEY..], &of_salts[salt..])
            };
            make(key, salt).ok_or_else(DtlsError::no_keys)
        };
        Ok(Self {
            inbound: cipher(!keys.is_client)?,
            outbound: cipher(keys.is_client)?,
            profile,
            framed_pts: (None, None),
            came: Table::new(MAX_STREAMS),
            came_rtcp: Table::new(MAX_STREAMS),
            sent: HashMap::new(),
            sent_rtcp: 0,
            used_up: false,
        })
    }

    /// Payload types of framed packets that come and that go.
    pub fn set_framed_pts(&mut self, pts: (Option<u8>, Option<u8>)) {
        self.framed_pts = pts;
    }

    /// The negotiated profile's name.
    #[must_use]
    pub fn profile(&self) -> &'static str {
        self.profile
    }

    /// Authenticates and decrypts an RTP packet into `plain`, which is overwritten. What comes out has a header, an extension and
    /// padding that fit into it ([`RtpHeader::parse`] reads it).
    ///
    /// # Errors
    /// Why it is refused. What isn't authentic changes nothing of what is known of its stream.
    pub fn unprotect_rtp(&mut self, protected: &[u8], plain: &mut Vec<u8>) -> Result<(), Refusal> {
        let header = RtpHeader::parse_protected(protected).ok_or(Refusal::Malformed)?;
        let framed = self.framed_pts.0 == Some(header.payload_type);
        if header.header_len + self.inbound.rtp_tag(framed) > protected.len() {
            return Err(Refusal::Malformed);
        }
        let known = self.came.get(header.ssrc);
        let index = guess(known.map(streams::Window::highest), header.sequence)
            .ok_or(Refusal::Unauthentic)?;
        if framed && known.is_some_and(|known| known.has(index)) {
            return Err(Refusal::Replayed);
        }
        let (cipher, ssrc) = (&self.inbound, header.ssrc);
        if !cipher.open_rtp(protected, plain, header.header_len, ssrc, index, framed) {
            return Err(Refusal::Unauthentic);
        }
        self.came.authentic(ssrc, index, framed);
        if header.padded(plain).is_none() {
            plain.clear();
            return Err(Refusal::Malformed);
        }
        Ok(())
    }

    /// The same for RTCP, all of which is replay-protected.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn unprotect_rtcp(&mut self, protected: &[u8], plain: &mut Vec<u8>) -> Result<(), Refusal> {
        let ssrc = rtcp_ssrc(protected).ok_or(Refusal::Malformed)?;
        if protected.len() < RTCP_HEAD + self.inbound.rtcp_overhead() {
            return Err(Refusal::Malformed);
        }
        let at = self.inbound.rtcp_index_at(protected);
        let index: &[u8; INDEX] = protected
            .get(at..)
            .and_then(|rest| rest.first_chunk())
            .ok_or(Refusal::Malformed)?;
        let index = u32::from_be_bytes(*index);
        // RTCP that is authenticated but not encrypted (E is 0) is nobody's in WebRTC, and is refused before it is worth a hash.
        if index & E_BIT == 0 {
            return Err(Refusal::Unauthentic);
        }
        let index = index & !E_BIT;
        let known = self.came_rtcp.get(ssrc);
        if known.is_some_and(|known| known.has(index.into())) {
            return Err(Refusal::Replayed);
        }
        if !self.inbound.open_rtcp(protected, plain, ssrc, index) {
            return Err(Refusal::Unauthentic);
        }
        self.came_rtcp.authentic(ssrc, index.into(), true);
        Ok(())
    }

    /// Streams of RTP and RTCP that had to make room for others.
    #[must_use]
    pub fn forgotten(&self) -> u64 {
        self.came.forgotten + self.came_rtcp.forgotten
    }

    /// Encrypts an RTP packet into `protected`, which is overwritten. `false`: it isn't RTP, or the key is used up.
    pub fn protect_rtp(&mut self, plain: &[u8], protected: &mut Vec<u8>) -> bool {
        protected.clear();
        let Some(header) = RtpHeader::parse_protected(plain) else {
            return false;
        };
        let known = self.sent.get(&header.ssrc).copied();
        let index = match guess(known, header.sequence) {
            Some(index) if known.is_some() || self.sent.len() < MAX_SENT => index,
            _ => {
                self.used_up = true;
                return false;
            }
        };
        let framed = self.framed_pts.1 == Some(header.payload_type);
        protected.reserve(plain.len() + cipher::GCM_TAG);
        protected.extend_from_slice(plain);
        let (cipher, ssrc) = (&self.outbound, header.ssrc);
        if !cipher.seal_rtp(protected, header.header_len, ssrc, index, framed) {
            return false;
        }
        if known.is_none_or(|known| known < index) {
            self.sent.insert(ssrc, index);
        }
        true
    }

    /// The highest sequence number that was sent of a stream, if any was: no index up to it may be used again
    /// for other bytes (RFC 3711 section 9.1).
    #[must_use]
    pub fn newest_sent(&self, ssrc: u32) -> Option<u16> {
        self.sent.get(&ssrc).map(|index| (index & 0xffff) as u16)
    }

    /// The same for RTCP.
    pub fn protect_rtcp(&mut self, plain: &[u8], protected: &mut Vec<u8>) -> bool {
        protected.clear();
        let Some(ssrc) = rtcp_ssrc(plain) else {
            return false;
        };
        if self.sent_rtcp >= MAX_RTCP_INDEX {
            self.used_up = true;
            return false;
        }
        // Before it is used, so that whatever happens none is used twice.
        self.sent_rtcp += 1;
        protected.reserve(plain.len() + cipher::GCM_TAG + INDEX);
        protected.extend_from_slice(plain);
        self.outbound.seal_rtcp(protected, ssrc, self.sent_rtcp)
    }

    /// No index is left for what had to be sent: the leg must end.
    #[must_use]
    pub fn is_used_up(&self) -> bool {
        self.used_up
    }
}

/// The SSRC of an RTCP packet, protected or not.
fn rtcp_ssrc(packet: &[u8]) -> Option<u32> {
    let &[_, _, _, _, a, b, c, d] = packet.first_chunk::<RTCP_HEAD>()?;
    Some(u32::from_be_bytes([a, b, c, d]))
}

impl std::fmt::Debug for Srtp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Srtp")
            .field("profile", &self.profile)
            .finish_non_exhaustive()
    }
}
