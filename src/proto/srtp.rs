//! SRTP and SRTCP contexts of one leg (RFC 3711, RFC 7714), on `rtc-srtp`.

use crate::dtls::{DtlsError, Identity, SrtpKeys};
use rtc_dtls::extension::extension_use_srtp::SrtpProtectionProfile;
use rtc_srtp::config::Config;
use rtc_srtp::context::Context;
use rtc_srtp::protection_profile::ProtectionProfile;
use rustc_hash::FxHashSet;

/// Streams whose packets are taken on one leg: a room of 1,000 subscribed tracks with RTX and
/// three layers each has 6,000.
const MAX_STREAMS: usize = 8192;

/// Packets of unknown streams that a probe takes before it is made anew.
const PROBES: u32 = 1024;

/// Both directions of one leg.
pub struct Srtp {
    inbound: Context,
    outbound: Context,
    profile: &'static str,
    /// Tries the first packet of each stream. `rtc-srtp` keeps state for an SSRC before it knows
    /// that the packet is authentic, so a stranger's random ones would fill the memory; the probe
    /// is thrown away from time to time, and what it has authenticated goes to `inbound`.
    probe: Context,
    probes: u32,
    known: [FxHashSet<u32>; 2],
    fresh: Box<dyn Fn() -> Option<Context> + Send>,
}

impl Srtp {
    /// Makes the contexts from a finished handshake. Replay protection is off, as LiveKit has it:
    /// Firefox probes with old packets, and a relay hands duplicates on to a receiver that copes.
    ///
    /// # Errors
    /// When keys don't fit the profile.
    pub fn new(keys: &SrtpKeys, identity: &Identity) -> Result<Self, DtlsError> {
        let (profile, name) = match keys.profile {
            SrtpProtectionProfile::Srtp_Aead_Aes_128_Gcm => {
                (ProtectionProfile::AeadAes128Gcm, "AEAD_AES_128_GCM")
            }
            _ => (
                ProtectionProfile::Aes128CmHmacSha1_80,
                "AES128_CM_HMAC_SHA1_80",
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
        let crypto = identity.provider().crypto();
        let context = |key: &[u8], salt: &[u8]| {
            Context::new(key, salt, profile, None, None, crypto).map_err(wrong)
        };
        let keys = config.keys;
        let inbound = || context(&keys.remote_master_key, &keys.remote_master_salt);
        let (inbound, probe) = (inbound()?, inbound()?);
        let outbound = context(&keys.local_master_key, &keys.local_master_salt)?;
        let identity = identity.clone();
        let fresh = move || {
            let (key, salt) = (&keys.remote_master_key, &keys.remote_master_salt);
            let crypto = identity.provider().crypto();
            Context::new(key, salt, profile, None, None, crypto).ok()
        };
        Ok(Self {
            inbound,
            outbound,
            profile: name,
            probe,
            probes: 0,
            known: [FxHashSet::default(), FxHashSet::default()],
            fresh: Box::new(fresh),
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
            && let Some(fresh) = (self.fresh)()
        {
            self.probe = fresh;
            self.probes = 0;
        }
        self.probes += 1;
        known.len() < MAX_STREAMS && authentic(&mut self.probe) && known.insert(ssrc)
    }

    /// The negotiated profile's name.
    #[must_use]
    pub fn profile(&self) -> &'static str {
        self.profile
    }

    /// Authenticates and decrypts an RTP packet into `plain`, which is overwritten. `false`: not
    /// authentic.
    pub fn unprotect_rtp(&mut self, protected: &[u8], plain: &mut Vec<u8>) -> bool {
        let authentic = |probe: &mut Context| probe.decrypt_rtp(protected).is_ok();
        if !self.admits(false, 8, protected, authentic) {
            return false;
        }
        into(self.inbound.decrypt_rtp(protected), plain)
    }

    /// The same for RTCP.
    pub fn unprotect_rtcp(&mut self, protected: &[u8], plain: &mut Vec<u8>) -> bool {
        let authentic = |probe: &mut Context| probe.decrypt_rtcp(protected).is_ok();
        if !self.admits(true, 4, protected, authentic) {
            return false;
        }
        into(self.inbound.decrypt_rtcp(protected), plain)
    }

    /// Encrypts an RTP packet into `protected`, which is overwritten.
    pub fn protect_rtp(&mut self, plain: &[u8], protected: &mut Vec<u8>) -> bool {
        into(self.outbound.encrypt_rtp(plain), protected)
    }

    /// The same for RTCP.
    pub fn protect_rtcp(&mut self, plain: &[u8], protected: &mut Vec<u8>) -> bool {
        into(self.outbound.encrypt_rtcp(plain), protected)
    }
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
