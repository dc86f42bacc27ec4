//! One DTLS 1.2 association of a leg (RFC 5764), on `rtc-dtls`. The association is keyed to a
//! fixed address, because the path beneath it may change at any time without DTLS knowing.

use crate::description::{DtlsRole, Fingerprint};
use bytes::BytesMut;
use rtc_dtls::config::{ClientAuthType, ConfigBuilder, ExtendedMasterSecretType, HandshakeConfig};
use rtc_dtls::crypto::Certificate;
use rtc_dtls::endpoint::{Endpoint, EndpointEvent};
pub use rtc_dtls::extension::extension_use_srtp::SrtpProtectionProfile;
use rtc_shared::TransportProtocol;
use sha2::Digest;
use std::collections::{HashSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Stands for the peer inside `rtc-dtls`.
const PEER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1);

/// First retransmission of a lost flight. RFC 6347 allows less than its 1 s where the round trip
/// is known to be short; ICE has just measured it, and every lost flight delays a join.
const FLIGHT_INTERVAL: Duration = Duration::from_millis(250);

/// Each retransmission waits twice as long as the one before (RFC 6347 section 4.2.4.1), up to
/// this: Pion repeats every second, browsers sooner.
const MAX_FLIGHT_INTERVAL: Duration = Duration::from_secs(1);

/// So many come before the handshake has failed: 30 s with the intervals above.
const MAX_RETRANSMISSIONS: u32 = 30;

/// So many of them `rtc-dtls` makes, with fresh record sequence numbers, before it would give up.
const LIBRARY_RETRANSMISSIONS: u32 = 7;

/// Handshake records remembered: five messages make a flight, so this is a dozen fragments each.
const MAX_SEEN: usize = 64;

/// Why the identity or an association could not be set up.
#[derive(Debug, thiserror::Error)]
#[error("DTLS: {0}")]
pub struct DtlsError(String);

impl DtlsError {
    fn new(error: impl std::fmt::Display) -> Self {
        Self(error.to_string())
    }

    pub(crate) fn no_keys() -> Self {
        Self("SRTP: the keys don't fit the profile".to_owned())
    }
}

/// The process's certificate and the handshake settings made from it, shared by all legs.
#[derive(Clone)]
pub struct Identity {
    /// By role, then by whether tags are to be short.
    client: [Arc<HandshakeConfig>; 2],
    server: [Arc<HandshakeConfig>; 2],
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
        let build = |is_client: bool, short_tags: bool| {
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
                .with_crypto_provider(provider.clone())
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
        };
        Ok(Self {
            client: [build(true, false)?, build(true, true)?],
            server: [build(false, false)?, build(false, true)?],
            fingerprint,
        })
    }

    /// Value of `a=fingerprint`.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }
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

/// Keys and profile out of a finished handshake.
pub struct SrtpKeys {
    /// The negotiated profile.
    pub profile: SrtpProtectionProfile,
    /// RFC 5764 exporter output, 2 × (key + salt) bytes.
    pub material: Vec<u8>,
    /// We sent the ClientHello.
    pub is_client: bool,
}

/// What a datagram led to.
pub enum DtlsEvent {
    /// The handshake is complete; the certificate has not been checked yet.
    Complete,
    /// Application data: an SCTP packet.
    Data(BytesMut),
    /// The peer said close_notify.
    Closed,
}

/// One association.
pub struct Dtls {
    endpoint: Endpoint,
    role: DtlsRole,
    complete: bool,
    out: VecDeque<BytesMut>,
    /// What was sent last before the handshake was complete, and how often it was repeated.
    flight: Vec<BytesMut>,
    retransmissions: u32,
    /// When it is repeated next.
    due: Option<Instant>,
    /// Digests of the handshake records that came in the clear.
    seen: HashSet<[u8; 32]>,
    /// A ClientHello with a cookie was among them (RFC 6347 section 4.2.1).
    cookie_came: bool,
}

impl Dtls {
    /// Starts an association: as a client the ClientHello is ready to be taken from
    /// [`Dtls::poll_transmit`], as a server the peer's is awaited. `short_tags` offers only the SRTP
    /// profile with the 10-byte tag.
    ///
    /// # Errors
    /// When the handshake cannot start.
    pub fn new(
        now: Instant,
        role: DtlsRole,
        identity: &Identity,
        short_tags: bool,
    ) -> Result<Self, DtlsError> {
        let order = usize::from(short_tags);
        let server = matches!(role, DtlsRole::Server).then(|| identity.server[order].clone());
        let mut endpoint = Endpoint::new(PEER, TransportProtocol::UDP, server);
        if matches!(role, DtlsRole::Client) {
            endpoint
                .connect(now, PEER, identity.client[order].clone(), None)
                .map_err(DtlsError::new)?;
        }
        let mut dtls = Self {
            endpoint,
            role,
            complete: false,
            out: VecDeque::new(),
            flight: Vec::new(),
            retransmissions: 0,
            due: None,
            seen: HashSet::new(),
            cookie_came: false,
        };
        if dtls.pump() {
            dtls.due = Some(now + FLIGHT_INTERVAL);
        }
        Ok(dtls)
    }

    /// Takes a datagram. What cannot be read is dropped (RFC 6347 section 4.1.2.7): until the
    /// handshake is complete nothing is authentic, so anybody could have sent it. A handshake that
    /// really cannot go on runs out of retransmissions.
    pub fn handle(&mut self, now: Instant, datagram: &[u8], mut event: impl FnMut(DtlsEvent)) {
        if !self.complete && !self.is_news(datagram) {
            return;
        }
        let events = self
            .endpoint
            .read(now, PEER, None, BytesMut::from(datagram));
        for e in events.unwrap_or_default() {
            match e {
                EndpointEvent::HandshakeComplete => {
                    self.complete = true;
                    event(DtlsEvent::Complete);
                }
                EndpointEvent::ApplicationData(data) => event(DtlsEvent::Data(data)),
                EndpointEvent::PeerClosed => event(DtlsEvent::Closed),
                _ => {}
            }
        }
        if self.pump() {
            self.retransmissions = 0;
            self.due = Some(now + FLIGHT_INTERVAL);
        }
    }

    /// Whether a datagram can bring an unfinished handshake on. Alerts and data in the clear are
    /// nobody's; a repeated message is the peer's way to ask for the flight that its timer and
    /// ours will bring anyhow, and `rtc-dtls` would forget its timer over it.
    fn is_news(&mut self, datagram: &[u8]) -> bool {
        const CHANGE_CIPHER_SPEC: u8 = 20;
        const HANDSHAKE: u8 = 22;
        let mut news = false;
        let mut rest = datagram;
        // Record header: type, version (2), epoch (2), sequence number (6), length (2).
        while let Some((header, tail)) = rest.split_first_chunk::<13>() {
            let len = usize::from(u16::from_be_bytes([header[11], header[12]]));
            let Some(body) = tail.get(..len) else {
                return false;
            };
            rest = &tail[len..];
            let encrypted = header[3..5] != [0, 0];
            match header[0] {
                _ if encrypted => news = true,
                CHANGE_CIPHER_SPEC => news = true,
                // A server has no timer for its HelloVerifyRequest: the ClientHello without a
                // cookie asks for it until the one with a cookie has come.
                HANDSHAKE if body.first() == Some(&1) && body.get(4..6) == Some(&[0, 0]) => {
                    news |= !self.cookie_came;
                }
                // Shorter than the header of a message.
                HANDSHAKE if body.len() < 12 => {}
                HANDSHAKE if self.seen.len() < MAX_SEEN => {
                    self.cookie_came |= body.first() == Some(&1);
                    let message: [u8; 32] = sha2::Sha256::digest(body).into();
                    news |= self.seen.insert(message);
                }
                HANDSHAKE => news = true,
                _ => return false,
            }
        }
        news && rest.is_empty()
    }

    /// Takes what the endpoint wants to send; whether it was a flight of the handshake that awaits
    /// an answer.
    fn pump(&mut self) -> bool {
        let before = self.out.len();
        while let Some(transmit) = self.endpoint.poll_transmit() {
            self.out.push_back(transmit.message);
        }
        if self.complete {
            // The endpoint repeats its last flight by itself, when the peer repeats its own.
            self.due = None;
            self.flight = Vec::new();
            self.seen = HashSet::new();
            return false;
        }
        if self.out.len() == before {
            return false;
        }
        self.flight = self.out.range(before..).cloned().collect();
        true
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<BytesMut> {
        self.out.pop_front()
    }

    /// When [`Dtls::handle_timeout`] wants to be called.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        self.due
    }

    /// Retransmits what is due.
    ///
    /// # Errors
    /// When retransmissions are exhausted.
    pub fn handle_timeout(&mut self, now: Instant) -> Result<(), DtlsError> {
        if self.due.is_none_or(|due| due > now) {
            return Ok(());
        }
        if self.retransmissions >= MAX_RETRANSMISSIONS {
            self.due = None;
            return Err(DtlsError("no answer to the handshake".to_owned()));
        }
        self.retransmissions += 1;
        let interval = FLIGHT_INTERVAL * (1 << self.retransmissions.min(8));
        self.due = Some(now + interval.min(MAX_FLIGHT_INTERVAL));
        if self.retransmissions <= LIBRARY_RETRANSMISSIONS
            && self.endpoint.poll_timeout(&PEER).is_some()
        {
            self.endpoint
                .handle_timeout(PEER, now)
                .map_err(DtlsError::new)?;
            self.pump();
        } else {
            // The library forgot its timer when a part of the peer's flight came, or is at its end.
            self.out.extend(self.flight.iter().cloned());
        }
        Ok(())
    }

    /// Sends application data. Lost silently before the handshake is complete; callers wait.
    pub fn write(&mut self, now: Instant, data: &[u8]) -> bool {
        let written = self.endpoint.write(now, PEER, data).is_ok();
        self.pump();
        written
    }

    /// Sends close_notify.
    pub fn close(&mut self, now: Instant) {
        // Nothing is left to be done about a failure to say goodbye.
        let _ = self.endpoint.close(now);
        self.pump();
        self.due = None;
    }

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

impl std::fmt::Debug for Dtls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dtls")
            .field("role", &self.role)
            .field("complete", &self.complete)
            .finish_non_exhaustive()
    }
}
