//! What a finished handshake gives: who the peer is, and the keys of SRTP.

use super::{Dtls, DtlsError, PEER};
use crate::description::{DtlsRole, Fingerprint};
use rtc_dtls::extension::extension_use_srtp::SrtpProtectionProfile;
use sha2::Digest;

/// Keys and profile out of a finished handshake.
pub struct SrtpKeys {
    /// The negotiated profile.
    pub profile: SrtpProtectionProfile,
    /// RFC 5764 exporter output, 2 × (key + salt) bytes.
    pub material: Vec<u8>,
    /// We sent the ClientHello.
    pub is_client: bool,
}

impl Dtls {
    /// Whether the peer's certificate is the one its SDP promised (RFC 8122).
    #[must_use]
    pub fn peer_matches(&self, fingerprint: &Fingerprint) -> bool {
        let Some(der) = self
            .endpoint
            .get_connection_state(PEER)
            .and_then(|state| state.peer_certificates.first())
        else {
            return false;
        };
        let digest = match fingerprint.algorithm.as_str() {
            "sha-256" => sha2::Sha256::digest(der).to_vec(),
            "sha-384" => sha2::Sha384::digest(der).to_vec(),
            "sha-512" => sha2::Sha512::digest(der).to_vec(),
            // Weaker hashes are not accepted (RFC 8122 section 5 requires SHA-256).
            _ => return false,
        };
        digest == fingerprint.digest
    }

    /// SRTP keying material of the complete handshake (RFC 5764 section 4.2).
    ///
    /// # Errors
    /// Before the handshake is complete, or without a common profile.
    pub fn srtp_keys(&self) -> Result<SrtpKeys, DtlsError> {
        let state = self
            .endpoint
            .get_connection_state(PEER)
            .ok_or_else(|| DtlsError("no association".to_owned()))?;
        let profile = state.srtp_protection_profile();
        let len = match profile {
            SrtpProtectionProfile::Srtp_Aead_Aes_128_Gcm => 2 * (16 + 12),
            SrtpProtectionProfile::Srtp_Aes128_Cm_Hmac_Sha1_80 => 2 * (16 + 14),
            other => return Err(DtlsError(format!("no common SRTP profile ({other:?})"))),
        };
        let material = state
            .export_keying_material("EXTRACTOR-dtls_srtp", &[], len)
            .map_err(DtlsError::new)?
            .into_bytes();
        Ok(SrtpKeys {
            profile,
            material,
            is_client: self.role == DtlsRole::Client,
        })
    }
}
