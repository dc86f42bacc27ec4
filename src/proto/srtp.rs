//! SRTP and SRTCP contexts of one leg (RFC 3711, RFC 7714), on `rtc-srtp`.

use crate::dtls::{DtlsError, Identity, SrtpKeys};
use rtc_dtls::extension::extension_use_srtp::SrtpProtectionProfile;
use rtc_srtp::config::Config;
use rtc_srtp::context::Context;
use rtc_srtp::protection_profile::ProtectionProfile;

/// Both directions of one leg.
pub struct Srtp {
    inbound: Context,
    outbound: Context,
    profile: &'static str,
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
        Ok(Self {
            inbound: context(
                &config.keys.remote_master_key,
                &config.keys.remote_master_salt,
            )?,
            outbound: context(
                &config.keys.local_master_key,
                &config.keys.local_master_salt,
            )?,
            profile: name,
        })
    }

    /// The negotiated profile's name.
    #[must_use]
    pub fn profile(&self) -> &'static str {
        self.profile
    }

    /// Authenticates and decrypts an RTP packet into `plain`, which is overwritten. `false`: not
    /// authentic.
    pub fn unprotect_rtp(&mut self, protected: &[u8], plain: &mut Vec<u8>) -> bool {
        into(self.inbound.decrypt_rtp(protected), plain)
    }

    /// The same for RTCP.
    pub fn unprotect_rtcp(&mut self, protected: &[u8], plain: &mut Vec<u8>) -> bool {
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
