//! An end of a call, built by hand from `is`, `rtc-dtls` and `rtc-srtp`: it shares no line with
//! the code under test.

use crate::sdp::Described;
use bytes::BytesMut;
use is::stun::{StunMessage, StunPacket};
use is::{Candidate, IceAgent, IceAgentEvent, IceConnectionState, IceCreds, Protocol};
use rtc_dtls::config::{ClientAuthType, ConfigBuilder, ExtendedMasterSecretType, HandshakeConfig};
use rtc_dtls::crypto::Certificate;
use rtc_dtls::endpoint::{Endpoint, EndpointEvent};
use rtc_dtls::extension::extension_use_srtp::SrtpProtectionProfile;
use rtc_shared::TransportProtocol;
use rtc_srtp::config::Config;
use rtc_srtp::context::Context;
use rtc_srtp::protection_profile::ProtectionProfile;
use sha2::Digest;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

const FAR: SocketAddr = SocketAddr::V4(std::net::SocketAddrV4::new(
    std::net::Ipv4Addr::new(192, 0, 2, 99),
    9,
));

/// A datagram on its way: from, to, contents.
pub(crate) type Datagram = (SocketAddr, SocketAddr, Vec<u8>);

pub(crate) struct Peer {
    pub(crate) name: &'static str,
    pub(crate) locals: Vec<SocketAddr>,
    pub(crate) creds: IceCreds,
    pub(crate) remote: Option<Described>,
    pub(crate) fingerprint: String,
    /// `Some(true)`: sends the ClientHello.
    pub(crate) active: Option<bool>,
    agent: IceAgent,
    controlling: bool,
    client_config: Arc<HandshakeConfig>,
    server_config: Arc<HandshakeConfig>,
    endpoint: Option<Endpoint>,
    srtp: Option<(Context, Context)>,
    /// What the keys were made of: RFC 5764 exporter output.
    pub(crate) material: Vec<u8>,
    pub(crate) profile: Option<ProtectionProfile>,
    pub(crate) path: Option<(SocketAddr, SocketAddr)>,
    /// Retransmissions so far of the current DTLS flight.
    flight: u32,
    flight_due: Option<Instant>,
    /// Handshake datagrams that it has had: `rtc-dtls` forgets its timer over a repeated one; the
    /// ends of real calls, Pion and BoringSSL, don't.
    had: Vec<Vec<u8>>,
    pub(crate) ice_state: IceConnectionState,
    pub(crate) established_at: Option<Instant>,
    /// By close_notify.
    pub(crate) closed: bool,
    /// The STUN username fragments, DTLS and media sources it ever heard from.
    pub(crate) heard: Vec<SocketAddr>,
    pub(crate) rtp: Vec<(Instant, Vec<u8>)>,
    pub(crate) rtcp: Vec<Vec<u8>>,
    pub(crate) data: Vec<Vec<u8>>,
    pub(crate) unauthentic: usize,
    out: VecDeque<Datagram>,
}

fn new_creds(tag: &str) -> IceCreds {
    let random = IceCreds::new();
    IceCreds {
        ufrag: format!("{tag}{}", random.ufrag),
        pass: random.pass,
    }
}

impl Peer {
    pub(crate) fn new(
        name: &'static str,
        locals: &[SocketAddr],
        controlling: bool,
        profiles: &[SrtpProtectionProfile],
    ) -> Self {
        let provider = rtc_crypto::default_provider().expect("ring");
        let certificate =
            Certificate::generate_self_signed(vec![name.to_owned()], provider.crypto())
                .expect("certificate");
        let digest = sha2::Sha256::digest(certificate.certificate.first().expect("a certificate"));
        let hex: Vec<String> = digest.iter().map(|byte| format!("{byte:02X}")).collect();
        let config = |is_client| {
            let config = ConfigBuilder::default()
                .with_crypto_provider(provider.clone())
                .with_certificates(vec![certificate.clone()])
                .with_srtp_protection_profiles(profiles.to_vec())
                .with_client_auth(ClientAuthType::RequireAnyClientCert)
                .with_extended_master_secret(ExtendedMasterSecretType::Require)
                .with_insecure_skip_verify(true)
                .build(is_client, None)
                .expect("DTLS settings");
            Arc::new(config)
        };
        let creds = new_creds(name);
        Self {
            name,
            agent: agent(&creds, locals, controlling),
            locals: locals.to_vec(),
            creds,
            remote: None,
            fingerprint: format!("sha-256 {}", hex.join(":")),
            active: None,
            controlling,
            client_config: config(true),
            server_config: config(false),
            endpoint: None,
            srtp: None,
            material: Vec::new(),
            profile: None,
            path: None,
            flight: 0,
            flight_due: None,
            had: Vec::new(),
            ice_state: IceConnectionState::New,
            established_at: None,
            closed: false,
            heard: Vec::new(),
            rtp: Vec::new(),
            rtcp: Vec::new(),
            data: Vec::new(),
            unauthentic: 0,
            out: VecDeque::new(),
        }
    }

    /// New credentials of its own; the next SDP that it writes has them.
    pub(crate) fn restart(&mut self) {
        self.creds = new_creds(self.name);
        self.agent = agent(&self.creds, &self.locals, self.controlling);
        self.remote = None;
    }

    /// Its old addresses are gone, there are new ones.
    pub(crate) fn move_to(&mut self, locals: &[SocketAddr]) {
        self.locals = locals.to_vec();
        self.path = None;
        self.restart();
    }

    /// Takes what the far side's SDP says.
    pub(crate) fn learn(&mut self, now: Instant, described: Described) {
        let (ufrag, pwd) = (described.ufrag.clone(), described.pwd.clone());
        self.agent
            .set_remote_credentials(IceCreds { ufrag, pass: pwd });
        for line in &described.candidates {
            if let Ok(candidate) = Candidate::from_sdp_string(line)
                && candidate.proto() == Protocol::Udp
            {
                self.agent.add_remote_candidate(candidate);
            }
        }
        self.remote = Some(described);
        self.agent.handle_timeout(now);
        self.advance(now);
    }

    pub(crate) fn receive(&mut self, now: Instant, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        if !self.heard.contains(&from) {
            self.heard.push(from);
        }
        match bytes {
            [0..=3, ..] => {
                if let Ok(message) = StunMessage::parse(bytes) {
                    let packet = StunPacket {
                        proto: Protocol::Udp,
                        source: from,
                        destination: to,
                        message,
                    };
                    if self.agent.handle_packet(now, packet) {
                        self.agent.handle_timeout(now);
                    }
                }
            }
            [20..=63, ..] => self.dtls(now, bytes),
            [_, 192..=223, ..] => match self.srtp.as_mut().map(|s| s.0.decrypt_rtcp(bytes)) {
                Some(Ok(plain)) => self.rtcp.push(plain.to_vec()),
                _ => self.unauthentic += 1,
            },
            [128..=191, ..] => match self.srtp.as_mut().map(|s| s.0.decrypt_rtp(bytes)) {
                Some(Ok(plain)) => self.rtp.push((now, plain.to_vec())),
                _ => self.unauthentic += 1,
            },
            _ => {}
        }
        self.advance(now);
    }

    fn dtls(&mut self, now: Instant, bytes: &[u8]) {
        if self.closed {
            return;
        }
        if self.endpoint.is_none() && self.active == Some(false) {
            self.endpoint = Some(Endpoint::new(
                FAR,
                TransportProtocol::UDP,
                Some(self.server_config.clone()),
            ));
        }
        let Some(endpoint) = &mut self.endpoint else {
            return;
        };
        if self.established_at.is_none() && bytes[3..5] == [0, 0] {
            // Everything but the record sequence numbers, which a repeated flight has anew.
            let messages = messages(bytes);
            // Type 1, number 0: the first ClientHello, which asks for a HelloVerifyRequest.
            let first_hello = messages.first() == Some(&1) && messages.get(5) == Some(&0);
            // A part of what it has had (`Dtls::nudge`) is a repetition, too.
            let part = bytes[0] == 22 && bytes[13] == 1 && bytes[19..22] != [0, 0, 0];
            if part || self.had.contains(&messages) && !(first_hello && self.had.len() == 1) {
                return;
            }
            if !self.had.contains(&messages) {
                self.had.push(messages);
            }
            (self.flight, self.flight_due) = (0, None);
        }
        let events = endpoint.read(now, FAR, None, BytesMut::from(bytes));
        for event in events.unwrap_or_default() {
            match event {
                EndpointEvent::HandshakeComplete => self.key(now),
                EndpointEvent::ApplicationData(data) => self.data.push(data.to_vec()),
                EndpointEvent::PeerClosed => self.closed = true,
                _ => {}
            }
        }
    }

    fn key(&mut self, now: Instant) {
        let endpoint = self.endpoint.as_ref().expect("handshaking");
        let state = endpoint.get_connection_state(FAR).expect("association");
        let der = state.peer_certificates.first().expect("certificate");
        let digest = sha2::Sha256::digest(der);
        let hex: Vec<String> = digest.iter().map(|byte| format!("{byte:02X}")).collect();
        let told = self
            .remote
            .as_ref()
            .map(|remote| remote.fingerprint.clone());
        assert_eq!(
            told,
            Some(format!("sha-256 {}", hex.join(":"))),
            "{}: the sidecar's certificate is the one in its SDP",
            self.name
        );
        let (profile, len) = match state.srtp_protection_profile() {
            SrtpProtectionProfile::Srtp_Aead_Aes_128_Gcm => (ProtectionProfile::AeadAes128Gcm, 56),
            SrtpProtectionProfile::Srtp_Aes128_Cm_Hmac_Sha1_80 => {
                (ProtectionProfile::Aes128CmHmacSha1_80, 60)
            }
            other => panic!("{}: profile {other:?}", self.name),
        };
        let material = state
            .export_keying_material("EXTRACTOR-dtls_srtp", &[], len)
            .expect("keying material")
            .into_bytes();
        let mut config = Config {
            profile,
            ..Config::default()
        };
        config
            .set_session_keys_from_keying_material(&material, self.active == Some(true))
            .expect("keys");
        let provider = rtc_crypto::default_provider().expect("ring");
        let context = |key: &[u8], salt: &[u8]| {
            Context::new(key, salt, profile, None, None, provider.crypto()).expect("context")
        };
        let keys = &config.keys;
        self.srtp = Some((
            context(&keys.remote_master_key, &keys.remote_master_salt),
            context(&keys.local_master_key, &keys.local_master_salt),
        ));
        self.material = material;
        self.profile = Some(profile);
        self.established_at = Some(now);
    }

    fn advance(&mut self, now: Instant) {
        while let Some(event) = self.agent.poll_event() {
            match event {
                IceAgentEvent::NominatedSend {
                    source,
                    destination,
                    ..
                } => self.path = Some((source, destination)),
                IceAgentEvent::IceConnectionStateChange(state) => self.ice_state = state,
                _ => {}
            }
        }
        while let Some(transmit) = self.agent.poll_transmit() {
            let contents: Vec<u8> = transmit.contents.into();
            self.out
                .push_back((transmit.source, transmit.destination, contents));
        }
        if self.endpoint.is_none() && self.path.is_some() && self.active == Some(true) {
            let mut endpoint = Endpoint::new(FAR, TransportProtocol::UDP, None);
            endpoint
                .connect(now, FAR, self.client_config.clone(), None)
                .expect("ClientHello");
            self.endpoint = Some(endpoint);
        }
        let path = self.path.or_else(|| {
            let remote = self.remote.as_ref()?.first_address()?;
            Some((*self.locals.first()?, remote))
        });
        if let (Some(endpoint), Some((from, to))) = (&mut self.endpoint, path) {
            while let Some(transmit) = endpoint.poll_transmit() {
                self.out.push_back((from, to, transmit.message.to_vec()));
                self.flight_due.get_or_insert(now + Duration::from_secs(1));
            }
        }
    }

    pub(crate) fn poll_timeout(&mut self) -> Option<Instant> {
        let dtls = self.dtls_timeout();
        let ice = self.remote.is_some().then(|| self.agent.poll_timeout());
        [ice.flatten(), dtls].into_iter().flatten().min()
    }

    pub(crate) fn handle_timeout(&mut self, now: Instant) {
        if self.agent.poll_timeout().is_some_and(|due| due <= now) {
            self.agent.handle_timeout(now);
        }
        if self.dtls_timeout().is_some_and(|due| due <= now)
            && let Some(endpoint) = &mut self.endpoint
        {
            self.flight += 1;
            // 1 s, doubling (RFC 6347 section 4.2.4.1), as Pion does, up to 4 s.
            self.flight_due = Some(now + Duration::from_secs(1 << self.flight.min(2)));
            let _ = endpoint.handle_timeout(FAR, now);
        }
        self.advance(now);
    }

    fn dtls_timeout(&self) -> Option<Instant> {
        self.flight_due.filter(|_| self.established_at.is_none())
    }

    pub(crate) fn poll_transmit(&mut self) -> Option<Datagram> {
        self.out.pop_front()
    }

    /// The protected packet, and sends it.
    pub(crate) fn send_rtp(&mut self, plain: &[u8]) -> Vec<u8> {
        let (_, outbound) = self.srtp.as_mut().expect("keys");
        let packet = outbound.encrypt_rtp(plain).expect("RTP").to_vec();
        self.send_raw(&packet);
        packet
    }

    pub(crate) fn send_rtcp(&mut self, plain: &[u8]) -> Vec<u8> {
        let (_, outbound) = self.srtp.as_mut().expect("keys");
        let packet = outbound.encrypt_rtcp(plain).expect("RTCP").to_vec();
        self.send_raw(&packet);
        packet
    }

    pub(crate) fn send_raw(&mut self, datagram: &[u8]) {
        let (from, to) = self.path.expect("a path");
        self.out.push_back((from, to, datagram.to_vec()));
    }

    pub(crate) fn send_data(&mut self, now: Instant, data: &[u8]) {
        let endpoint = self.endpoint.as_mut().expect("an association");
        endpoint.write(now, FAR, data).expect("data");
        self.advance(now);
    }

    pub(crate) fn close(&mut self, now: Instant) {
        self.endpoint
            .as_mut()
            .expect("an association")
            .close(now)
            .expect("close_notify");
        self.advance(now);
        self.endpoint = None;
    }
}

/// The records of a datagram without their headers.
fn messages(datagram: &[u8]) -> Vec<u8> {
    let mut bodies = Vec::new();
    let mut rest = datagram;
    while rest.len() > 13 {
        let len = usize::from(u16::from_be_bytes([rest[11], rest[12]]));
        bodies.extend_from_slice(&rest[13..13 + len]);
        rest = &rest[13 + len..];
    }
    bodies
}

fn agent(creds: &IceCreds, locals: &[SocketAddr], controlling: bool) -> IceAgent {
    let mut agent = IceAgent::new(creds.clone());
    agent.set_controlling(controlling);
    // Ordinary clients' pace, RFC 8445 section 14.2.
    agent.set_timing_advance(Duration::from_millis(50));
    for addr in locals {
        let candidate = Candidate::host(*addr, Protocol::Udp).expect("host candidate");
        agent.add_local_candidate(candidate);
    }
    agent
}
