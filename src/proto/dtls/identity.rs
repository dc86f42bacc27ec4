//! The process's certificate, and the settings of handshakes made with it.

use super::{COOKIE, DtlsError, FLIGHT_INTERVAL};
use rtc_crypto::{CryptoError, RTCCrypto, RTCCryptoProvider, RTCRandom};
use rtc_dtls::config::{ClientAuthType, ConfigBuilder, ExtendedMasterSecretType, HandshakeConfig};
use rtc_dtls::crypto::Certificate;
use rtc_dtls::extension::extension_use_srtp::SrtpProtectionProfile;
use sha2::Digest;
use std::sync::Arc;

/// The process's certificate and the handshake settings made from it, shared by all legs.
#[derive(Clone)]
pub struct Identity {
    /// By whether tags are to be short.
    client: [Arc<HandshakeConfig>; 2],
    certificate: Certificate,
    provider: Arc<dyn RTCCryptoProvider>,
    fingerprint: String,
}

impl Identity {
    /// Makes a self-signed ECDSA P-256 certificate.
    ///
    /// # Errors
    /// When the crypto provider cannot make one.
    pub fn generate() -> Result<Self, DtlsError> {
        let provider = rtc_crypto::default_provider().map_err(DtlsError::new)?;
        let certificate =
            Certificate::generate_self_signed(vec!["auralink".to_owned()], provider.crypto())
                .map_err(DtlsError::new)?;
        let der = certificate
            .certificate
            .first()
            .ok_or_else(|| DtlsError("no certificate was made".to_owned()))?;
        let fingerprint = format!("sha-256 {}", hex_colons(&sha2::Sha256::digest(der)));
        let client = |short_tags| config(true, short_tags, &certificate, provider.clone());
        Ok(Self {
            client: [client(false)?, client(true)?],
            certificate,
            provider,
            fingerprint,
        })
    }

    /// Value of `a=fingerprint`.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    pub(super) fn provider(&self) -> &dyn RTCCryptoProvider {
        self.provider.as_ref()
    }

    pub(super) fn client(&self, short_tags: bool) -> Arc<HandshakeConfig> {
        self.client[usize::from(short_tags)].clone()
    }

    /// Settings of one association, whose cookie is this one.
    pub(super) fn server(
        &self,
        short_tags: bool,
        cookie: [u8; COOKIE],
    ) -> Result<Arc<HandshakeConfig>, DtlsError> {
        let inner = self.provider.clone();
        let provider = Arc::new(WithCookie { inner, cookie });
        config(false, short_tags, &self.certificate, provider)
    }
}

fn config(
    is_client: bool,
    short_tags: bool,
    certificate: &Certificate,
    provider: Arc<dyn RTCCryptoProvider>,
) -> Result<Arc<HandshakeConfig>, DtlsError> {
    // Every WebRTC endpoint has AES_CM_128_HMAC_SHA1_80 (RFC 8827 section 6.5). It is the
    // only one offered where its short tag is wanted: a DTLS server chooses by its own
    // order, and browsers put GCM first.
    let mut profiles = vec![
        SrtpProtectionProfile::Srtp_Aead_Aes_128_Gcm,
        SrtpProtectionProfile::Srtp_Aes128_Cm_Hmac_Sha1_80,
    ];
    if short_tags {
        profiles.remove(0);
    }
    ConfigBuilder::default()
        .with_crypto_provider(provider)
        .with_certificates(vec![certificate.clone()])
        .with_srtp_protection_profiles(profiles)
        .with_client_auth(ClientAuthType::RequireAnyClientCert)
        .with_extended_master_secret(ExtendedMasterSecretType::Require)
        .with_flight_interval(FLIGHT_INTERVAL)
        // Identity is the fingerprint out of the SDP, checked after the handshake and
        // before any key is used (RFC 5763), not a chain of trust.
        .with_insecure_skip_verify(true)
        // Without a name the library warns and takes this one. Peers are known by their
        // fingerprints.
        .with_server_name(if is_client { "localhost" } else { "" }.to_owned())
        .build(is_client, None)
        .map(Arc::new)
        .map_err(DtlsError::new)
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity")
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

fn hex_colons(bytes: &[u8]) -> String {
    let hex: Vec<String> = bytes.iter().map(|byte| format!("{byte:02X}")).collect();
    hex.join(":")
}

/// Crypto whose random bytes, where as many as a cookie's are asked for, are the cookie.
///
/// `rtc-dtls` draws a server's cookie when it sees the first ClientHello, binds itself to that
/// hello, and checks the second against it. Here it sees no hello before one has come with the
/// cookie that we sent, so it has to be told which that was. It asks for these 20 bytes for nothing
/// else: random values of hellos have 28, nonces 8, initialization vectors 16. A version that did
/// would fail every test of a handshake.
struct WithCookie {
    inner: Arc<dyn RTCCryptoProvider>,
    cookie: [u8; COOKIE],
}

impl RTCCryptoProvider for WithCookie {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn crypto(&self) -> &dyn RTCCrypto {
        self.inner.crypto()
    }

    fn random(&self) -> &dyn RTCRandom {
        self
    }
}

impl RTCRandom for WithCookie {
    fn fill(&self, output: &mut [u8]) -> Result<(), CryptoError> {
        if output.len() == COOKIE {
            output.copy_from_slice(&self.cookie);
            return Ok(());
        }
        self.inner.random().fill(output)
    }
}
