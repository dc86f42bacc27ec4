//! SRTP and SRTCP contexts of one leg (RFC 3711, RFC 7714), on `rtc-srtp`.

use crate::dtls::{DtlsError, Identity, SrtpKeys};
use rtc_dtls::extension::extension_use_srtp::SrtpProtectionProfile;
use rtc_srtp::config::Config;
use rtc_srtp::context::Context;
use rtc_srtp::option::srtp_replay_protection;
use rtc_srtp::protection_profile::ProtectionProfile;
use rustc_hash::{FxHashMap, FxHashSet};
use std::sync::Arc;

/// Streams whose packets are taken on one leg: a room of 1,000 subscribed tracks with RTX and
/// three layers each has 6,000.
const MAX_STREAMS: usize = 8192;

/// Packets of unknown streams that a probe takes before it is made anew.
const PROBES: u32 = 1024;

/// Bytes of the tag of AES_CM_128_HMAC_SHA1_80 and of what framed packets keep of it.
const TAG: usize = 10;
const SHORT_TAG: usize = 4;

/// Both directions of one leg.
pub struct Srtp {
    inbound: Inbound,
    outbound: Context,
    profile: &'static str,
    /// Payload types of framed packets (docs/protocol.md), in and out: the tag of those is the first
    /// four bytes of HMAC-SHA1 instead of ten, which is AES_CM_128_HMAC_SHA1_32 (RFC 3711 section 5).
    short_pts: (Option<u8>, Option<u8>),
    /// For those that come.
    short: Option<Inbound>,
    /// The quarter of the sequence numbers that `short` was last shown of each stream of whole tags.
    shown: FxHashMap<u32, u16>,
    /// The highest sequence number sent of each stream. There are no more than the other leg admits.
    newest_sent: FxHashMap<u32, u16>,
    fresh_short: Option<Fresh>,
}

/// Makes a context, with a replay window of so many packets.
type Fresh = Box<dyn Fn(Option<usize>) -> Option<Context> + Send>;

/// Framed packets are replay-protected, because each is decoded and coded anew: the same one again would
/// become other bytes under the same sequence numbers.
const REPLAY_WINDOW: usize = 1024;

/// What comes.
struct Inbound {
    context: Context,
    /// Tries the first packet of each stream. `rtc-srtp` keeps state for an SSRC before it knows
    /// that the packet is authentic, so a stranger's random ones would fill the memory; the probe
    /// is thrown away from time to time, and what it has authenticated goes to `context`.
    probe: Context,
    probes: u32,
    known: [FxHashSet<u32>; 2],
    fresh: Fresh,
}

impl Srtp {
    /// Makes the contexts from a finished handshake. Replay protection is off, as LiveKit has it:
    /// Firefox probes with old packets, and a relay hands duplicates on to a receiver that copes.
    ///
    /// # Errors
    /// When keys don't fit the profile.
    pub fn new(keys: &SrtpKeys, identity: &Identity) -> Result<Self, DtlsError> {
        let (profile, name, short) = match keys.profile {
            SrtpProtectionProfile::Srtp_Aead_Aes_128_Gcm => {
                (ProtectionProfile::AeadAes128Gcm, "AEAD_AES_128_GCM", None)
            }
            _ => (
                ProtectionProfile::Aes128CmHmacSha1_80,
                "AES128_CM_HMAC_SHA1_80",
                Some(ProtectionProfile::Aes128CmHmacSha1_32),
            ),
        };
        let mut config = Config {
            profile,
            ..Config::default()
        };
        let wrong = |error: rtc_shared::error::Error| DtlsError::from_srtp(&error);
        config
            .set_session_keys_from_keying_material(&keys.material, keys.is_client)
            .map_err(wrong)?;
        let keys = Arc::new(config.keys);
        let outbound = Context::new(
            &keys.local_master_key,
            &keys.local_master_salt,
            profile,
            None,
            None,
            identity.provider().crypto(),
        )
        .map_err(wrong)?;
        let fresh = |profile| -> Fresh {
            let (keys, identity) = (keys.clone(), identity.clone());
            Box::new(move |replays| {
                let (key, salt) = (&keys.remote_master_key, &keys.remote_master_salt);
                let crypto = identity.provider().crypto();
                let replays = replays.map(srtp_replay_protection);
                Context::new(key, salt, profile, replays, None, crypto).ok()
            })
        };
        let inbound = Inbound::new(fresh(profile), None).ok_or_else(DtlsError::no_keys)?;
        Ok(Self {
            inbound,
            outbound,
            profile: name,
            short_pts: (None, None),
            short: None,
            shown: FxHashMap::default(),
            newest_sent: FxHashMap::default(),
            fresh_short: short.map(fresh),
        })
    }

    /// Payload types of framed packets that come and that go. No effect where the profile has no
    /// short tag.
    pub fn set_short_pts(&mut self, pts: (Option<u8>, Option<u8>)) {
        if self.short.is_none()
            && pts != (None, None)
            && let Some(fresh) = self.fresh_short.take()
        {
            self.short = Inbound::new(fresh, Some(REPLAY_WINDOW));
        }
        if self.short.is_some() {
            self.short_pts = pts;
        }
    }

    /// The negotiated profile's name.
    #[must_use]
    pub fn profile(&self) -> &'static str {
        self.profile
    }

    /// Authenticates and decrypts an RTP packet into `plain`, which is overwritten. `false`: not
    /// authentic.
    pub fn unprotect_rtp(&mut self, protected: &[u8], plain: &mut Vec<u8>) -> bool {
        let framed = is_of(protected, self.short_pts.0);
        let inbound = match &mut self.short {
            Some(short) if framed => short,
            _ => &mut self.inbound,
        };
        let authentic = |probe: &mut Context| probe.decrypt_rtp(protected).is_ok();
        if !inbound.admits(false, 8, protected, authentic) {
            return false;
        }
        let done = into(inbound.context.decrypt_rtp(protected), plain);
        if done && !framed {
            self.show_short(protected);
        }
        done
    }

    /// Lets the context of short tags see that a stream goes on: both have to guess the same rollover counter
    /// (RFC 3711 section 3.3.1) when the stream becomes framed. The whole tag, which has been checked, begins
    /// with the short one; a packet of each quarter of the sequence numbers is enough for the guess.
    fn show_short(&mut self, protected: &[u8]) {
        let Some(short) = &mut self.short else {
            return;
        };
        let Some((ssrc, sequence)) = stream_of(protected) else {
            return;
        };
        let quarter = sequence >> 14;
        if self.shown.get(&ssrc) == Some(&quarter) {
            return;
        }
        self.shown.insert(ssrc, quarter);
        let kept = protected.len().saturating_sub(TAG - SHORT_TAG);
        let cut = protected.get(..kept).unwrap_or_default();
        if short.admits(false, 8, cut, |probe| probe.decrypt_rtp(cut).is_ok()) {
            // Whether it is authentic is known already, and what is in it as well.
            let _ = short.context.decrypt_rtp(cut);
        }
    }

    /// The same for RTCP.
    pub fn unprotect_rtcp(&mut self, protected: &[u8], plain: &mut Vec<u8>) -> bool {
        let authentic = |probe: &mut Context| probe.decrypt_rtcp(protected).is_ok();
        if !self.inbound.admits(true, 4, protected, authentic) {
            return false;
        }
        into(self.inbound.context.decrypt_rtcp(protected), plain)
    }

    /// Encrypts an RTP packet into `protected`, which is overwritten.
    pub fn protect_rtp(&mut self, plain: &[u8], protected: &mut Vec<u8>) -> bool {
        let done = into(self.outbound.encrypt_rtp(plain), protected);
        if done && let Some((ssrc, sequence)) = stream_of(plain) {
            let newest = self.newest_sent.entry(ssrc).or_insert(sequence);
            if sequence.wrapping_sub(*newest).cast_signed() > 0 {
                *newest = sequence;
            }
        }
        // One context for both lengths, so that no index of a stream is ever used twice.
        if done && is_of(plain, self.short_pts.1) {
            protected.truncate(protected.len() - (TAG - SHORT_TAG));
        }
        done
    }

    /// The highest sequence number that was sent of a stream, if any was: no index up to it may be used again
    /// for other bytes (RFC 3711 section 9.1).
    #[must_use]
    pub fn newest_sent(&self, ssrc: u32) -> Option<u16> {
        self.newest_sent.get(&ssrc).copied()
    }

    /// The same for RTCP.
    pub fn protect_rtcp(&mut self, plain: &[u8], protected: &mut Vec<u8>) -> bool {
        into(self.outbound.encrypt_rtcp(plain), protected)
    }
}

impl Inbound {
    fn new(fresh: Fresh, replays: Option<usize>) -> Option<Self> {
        Some(Self {
            context: fresh(replays)?,
            probe: fresh(None)?,
            probes: 0,
            known: [FxHashSet::default(), FxHashSet::default()],
            fresh,
        })
    }

    /// Whether the stream of a packet, whose SSRC is at `at`, is known or proves itself with it.
    fn admits(
        &mut self,
        rtcp: bool,
        at: usize,
        packet: &[u8],
        authentic: impl FnOnce(&mut Context) -> bool,
    ) -> bool {
        let Some(ssrc) = packet.get(at..).and_then(|rest| rest.first_chunk()) else {
            return false;
        };
        let ssrc = u32::from_be_bytes(*ssrc);
        let known = &mut self.known[usize::from(rtcp)];
        if known.contains(&ssrc) {
            return true;
        }
        if self.probes >= PROBES
            && let Some(fresh) = (self.fresh)(None)
        {
            self.probe = fresh;
            self.probes = 0;
        }
        self.probes += 1;
        known.len() < MAX_STREAMS && authentic(&mut self.probe) && known.insert(ssrc)
    }
}

/// SSRC and sequence number of an RTP packet.
fn stream_of(packet: &[u8]) -> Option<(u32, u16)> {
    let &[_, _, s1, s0, _, _, _, _, a, b, c, d] = packet.first_chunk()?;
    Some((
        u32::from_be_bytes([a, b, c, d]),
        u16::from_be_bytes([s1, s0]),
    ))
}

/// Whether an RTP packet, whose header is never encrypted, has this payload type.
fn is_of(packet: &[u8], pt: Option<u8>) -> bool {
    pt.is_some_and(|pt| packet.get(1).is_some_and(|byte| byte & 0x7f == pt))
}

fn into(result: rtc_shared::error::Result<bytes::BytesMut>, buffer: &mut Vec<u8>) -> bool {
    buffer.clear();
    match result {
        Ok(bytes) => {
            buffer.extend_from_slice(&bytes);
            true
        }
        Err(_) => false,
    }
}

impl std::fmt::Debug for Srtp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Srtp")
            .field("profile", &self.profile)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const PLAIN: u8 = 111;
    const FRAMED: u8 = 20;

    fn pair() -> (Srtp, Srtp) {
        let identity = Identity::generate().unwrap();
        let end = |is_client| {
            let keys = SrtpKeys {
                profile: SrtpProtectionProfile::Srtp_Aes128_Cm_Hmac_Sha1_80,
                material: (0..60).collect(),
                is_client,
            };
            let mut srtp = Srtp::new(&keys, &identity).unwrap();
            srtp.set_short_pts((Some(FRAMED), Some(FRAMED)));
            srtp
        };
        (end(true), end(false))
    }

    fn rtp(payload_type: u8, sequence: u16) -> Vec<u8> {
        let mut packet = vec![0x80, payload_type];
        packet.extend(sequence.to_be_bytes());
        packet.extend([0, 0, 0, 9, 0, 0, 0, 7, b's', b'a', b'i', b'd']);
        packet
    }

    /// Sends one packet; its length on the wire, if it arrives.
    fn goes(from: &mut Srtp, to: &mut Srtp, packet: &[u8]) -> Option<usize> {
        let (mut wire, mut plain) = (Vec::new(), Vec::new());
        assert!(from.protect_rtp(packet, &mut wire));
        let arrives = to.unprotect_rtp(&wire, &mut plain);
        assert!(!arrives || plain == packet);
        arrives.then_some(wire.len())
    }

    #[test]
    fn a_stream_that_becomes_framed_late_is_understood() {
        for last in [65_530u32, 65_535, 70_000, 140_000, 200_000] {
            let (mut edge, mut origin) = pair();
            // Not one of each number: the guess goes by the highest.
            for index in (60_000..last).step_by(97).chain([last]) {
                let packet = rtp(PLAIN, u16::try_from(index & 0xffff).unwrap());
                let len = goes(&mut edge, &mut origin, &packet);
                assert_eq!(len, Some(packet.len() + TAG), "{index}");
            }
            let newest = edge.newest_sent(7).unwrap();
            assert_eq!(u32::from(newest), last & 0xffff);
            for ahead in 1..20 {
                let packet = rtp(FRAMED, newest.wrapping_add(ahead));
                let len = goes(&mut edge, &mut origin, &packet);
                assert_eq!(len, Some(packet.len() + SHORT_TAG), "{last} + {ahead}");
            }
        }
    }

    #[test]
    fn the_highest_sequence_number_sent_is_known() {
        let (mut edge, _) = pair();
        assert_eq!(edge.newest_sent(7), None);
        let mut wire = Vec::new();
        for (sequence, newest) in [(65_534, 65_534), (65_533, 65_534), (2, 2), (65_535, 2)] {
            assert!(edge.protect_rtp(&rtp(PLAIN, sequence), &mut wire));
            assert_eq!(edge.newest_sent(7), Some(newest));
        }
    }
}
