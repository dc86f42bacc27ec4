//! One peer's transport: ICE, DTLS and SRTP of one side of a peer connection.
//!
//! Calling order: [`Leg::describe`] whenever signalling learned something, [`Leg::receive`] for
//! every datagram, [`Leg::handle_timeout`] when [`Leg::poll_timeout`] says so; after each of them
//! [`Leg::poll_transmit`] and [`Leg::poll_event`] until they are empty.

use crate::description::{DtlsRole, Fingerprint, LegDescription};
use crate::dtls::{Dtls, DtlsEvent, Identity};
use crate::ice::{FullAgent, IceEvent};
use crate::packet::{Kind, classify};
use crate::srtp::{Refusal, Srtp};
use crate::stun::{Checked, LiteAgent, Path};
use bytes::BytesMut;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Data-channel packets held while the peer's SDP with its fingerprint is still on its way.
const MAX_HELD_DATA: usize = 256;

/// How far a leg has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LegState {
    /// No path yet.
    Checking,
    /// A path, no keys yet.
    Handshaking,
    /// Media flows.
    Established,
    /// Over.
    Closed,
}

impl LegState {
    /// Its name in metrics and on the status page.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Checking => "checking",
            Self::Handshaking => "handshaking",
            Self::Established => "established",
            Self::Closed => "closed",
        }
    }
}

/// Why a leg ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CloseReason {
    /// DTLS close_notify from the peer.
    PeerClosed,
    /// The peer has proved no consent for the time that policy gives it (RFC 7675).
    ConsentLost,
    /// The DTLS handshake failed.
    Handshake(String),
    /// The peer's certificate is not the one its SDP promised.
    Fingerprint,
    /// No SRTP index is left under its keys (RFC 3711 section 9.2).
    KeysUsedUp,
    /// We ended it.
    Local,
    /// A mistake of ours: handling it panicked, or its sockets could not be used.
    Defect,
}

impl CloseReason {
    /// Its name in metrics.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::PeerClosed => "peer_closed",
            Self::ConsentLost => "consent_lost",
            Self::Handshake(_) => "handshake",
            Self::Fingerprint => "fingerprint",
            Self::KeysUsedUp => "keys_used_up",
            Self::Local => "local",
            Self::Defect => "defect",
        }
    }
}

/// What a leg tells its owner.
#[derive(Debug, PartialEq, Eq)]
pub enum LegEvent {
    /// The peer may send on this path: datagrams from there belong to this leg.
    PathSeen(Path),
    /// The path was forgotten for a newer one.
    PathForgotten(Path),
    /// Keys are there; so long after the leg was made.
    Established {
        /// Since the leg was made.
        took: Duration,
    },
    /// It is over.
    Closed(CloseReason),
}

/// What a datagram turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Received {
    /// Handled inside.
    Nothing,
    /// A decrypted RTP packet lies in the buffer.
    Rtp,
    /// A decrypted RTCP compound lies in the buffer.
    Rtcp,
    /// Data-channel bytes wait in [`Leg::poll_data`].
    Data,
    /// Not from whom it should be, or not what it should be: it had no effect.
    Refused(Refusal),
}

#[derive(Debug)]
enum Ice {
    Lite(LiteAgent),
    Full(Box<FullAgent>),
}

/// One leg. See the module for the calling order.
#[derive(Debug)]
pub struct Leg {
    identity: Identity,
    ice: Ice,
    path: Option<Path>,
    dtls: Option<Dtls>,
    role: Option<DtlsRole>,
    short_tags: bool,
    aic_pts: (Option<u8>, Option<u8>),
    fingerprints: Vec<Fingerprint>,
    handshake_done: bool,
    srtp: Option<Srtp>,
    closed: bool,
    created: Instant,
    consent_timeout: Duration,
    /// The full agent has no working path since then.
    disconnected_since: Option<Instant>,
    transmits: VecDeque<(Path, Vec<u8>)>,
    events: VecDeque<LegEvent>,
    data: VecDeque<BytesMut>,
    response: Vec<u8>,
}

impl Leg {
    /// A client leg: ICE-lite on a muxed port.
    #[must_use]
    pub fn client(now: Instant, identity: &Identity, consent_timeout: Duration) -> Self {
        let ice = Ice::Lite(LiteAgent::default());
        Self::new(now, identity, consent_timeout, ice)
    }

    /// A server leg: full ICE on sockets bound to `locals`, of this leg alone.
    #[must_use]
    pub fn server(
        now: Instant,
        identity: &Identity,
        consent_timeout: Duration,
        locals: Vec<SocketAddr>,
        description: &LegDescription,
    ) -> Self {
        let ice = Ice::Full(Box::new(FullAgent::new(
            now,
            consent_timeout,
            locals,
            description,
        )));
        Self::new(now, identity, consent_timeout, ice)
    }

    fn new(now: Instant, identity: &Identity, consent_timeout: Duration, ice: Ice) -> Self {
        Self {
            identity: identity.clone(),
            ice,
            path: None,
            dtls: None,
            role: None,
            short_tags: false,
            aic_pts: (None, None),
            fingerprints: Vec::new(),
            handshake_done: false,
            srtp: None,
            closed: false,
            created: now,
            consent_timeout,
            disconnected_since: None,
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            data: VecDeque::new(),
            response: Vec::new(),
        }
    }

    /// How far it has come.
    #[must_use]
    pub fn state(&self) -> LegState {
        match (self.closed, &self.srtp, self.path) {
            (true, _, _) => LegState::Closed,
            (_, Some(_), _) => LegState::Established,
            (_, _, Some(_)) => LegState::Handshaking,
            _ => LegState::Checking,
        }
    }

    /// Where it sends.
    #[must_use]
    pub fn path(&self) -> Option<Path> {
        self.path
    }

    /// Name of the SRTP profile, once there are keys.
    #[must_use]
    pub fn srtp_profile(&self) -> Option<&'static str> {
        self.srtp.as_ref().map(Srtp::profile)
    }

    /// Whether the peer has proved that it may send on `path`.
    #[must_use]
    pub fn knows(&self, path: &Path) -> bool {
        match &self.ice {
            Ice::Lite(agent) => agent.knows(path),
            Ice::Full(agent) => agent.knows(path),
        }
    }

    /// Username fragments under which the peer may address an ICE-lite leg.
    pub fn lite_ufrags(&self) -> impl Iterator<Item = &str> {
        let lite = match &self.ice {
            Ice::Lite(agent) => Some(agent),
            Ice::Full(_) => None,
        };
        lite.into_iter().flat_map(LiteAgent::ufrags)
    }

    /// Applies what signalling knows of this leg.
    pub fn describe(&mut self, now: Instant, description: &LegDescription) {
        if self.closed {
            return;
        }
        match &mut self.ice {
            Ice::Lite(agent) => {
                agent.set_local(&description.local);
                if let Some(remote) = &description.remote {
                    agent.set_remote(remote);
                }
            }
            Ice::Full(agent) => agent.describe(now, description),
        }
        if !description.fingerprints.is_empty() {
            self.fingerprints.clone_from(&description.fingerprints);
        }
        if self.role.is_none() {
            self.role = description.dtls;
        }
        self.short_tags = description.short_tags;
        if self.aic_pts != description.aic_pts {
            self.aic_pts = description.aic_pts;
            if let Some(srtp) = &mut self.srtp {
                srtp.set_framed_pts(self.aic_pts);
            }
        }
        self.advance(now);
    }

    /// Takes one datagram. Media comes out in `plain`, which is overwritten.
    pub fn receive(
        &mut self,
        now: Instant,
        path: Path,
        datagram: &[u8],
        plain: &mut Vec<u8>,
    ) -> Received {
        if self.closed {
            return Received::Nothing;
        }
        let kind = classify(datagram);
        // Before anything is read of it: what isn't a check has to come from where one came from.
        if kind != Kind::Stun && self.path != Some(path) && !self.knows(&path) {
            return Received::Refused(Refusal::Unproved);
        }
        match kind {
            Kind::Rtp => {
                let Some(srtp) = &mut self.srtp else {
                    return Received::Refused(Refusal::Unauthentic);
                };
                if let Err(refusal) = srtp.unprotect_rtp(datagram, plain) {
                    return Received::Refused(refusal);
                }
                self.media_on(now, path);
                Received::Rtp
            }
            Kind::Rtcp => {
                let Some(srtp) = &mut self.srtp else {
                    return Received::Refused(Refusal::Unauthentic);
                };
                if let Err(refusal) = srtp.unprotect_rtcp(datagram, plain) {
                    return Received::Refused(refusal);
                }
                self.media_on(now, path);
                Received::Rtcp
            }
            Kind::Stun => {
                if !self.stun(now, path, datagram) {
                    return Received::Refused(Refusal::Check);
                }
                self.advance(now);
                Received::Nothing
            }
            Kind::Dtls => {
                self.handle_dtls(now, path, datagram);
                if self.data.is_empty() {
                    Received::Nothing
                } else {
                    Received::Data
                }
            }
            Kind::Other => Received::Refused(Refusal::Malformed),
        }
    }

    fn media_on(&mut self, now: Instant, path: Path) {
        if self.path != Some(path)
            && let Ice::Lite(agent) = &mut self.ice
        {
            agent.media_on(now, path);
            self.path = agent.selected();
        }
    }

    /// `false`: it is not authentic, and nothing was done.
    fn stun(&mut self, now: Instant, path: Path, datagram: &[u8]) -> bool {
        match &mut self.ice {
            Ice::Lite(agent) => match agent.handle(now, path, datagram, &mut self.response) {
                Checked::Ignored => false,
                Checked::Answered {
                    new_path,
                    selected,
                    forgotten,
                } => {
                    self.transmits.push_back((path, self.response.clone()));
                    if new_path {
                        self.events.push_back(LegEvent::PathSeen(path));
                    }
                    if let Some(path) = forgotten {
                        self.events.push_back(LegEvent::PathForgotten(path));
                    }
                    if selected.is_some() {
                        self.path = selected;
                    }
                    true
                }
            },
            Ice::Full(agent) => agent.handle(now, path, datagram),
        }
    }

    fn handle_dtls(&mut self, now: Instant, path: Path, datagram: &[u8]) {
        if self.dtls.is_none() {
            // A ClientHello that overtakes the answer which would have told us our role.
            const HANDSHAKE: u8 = 22;
            if self.role.is_none() && datagram.first() == Some(&HANDSHAKE) {
                self.role = Some(DtlsRole::Server);
            }
            self.advance(now);
        }
        let Some(dtls) = &mut self.dtls else {
            return;
        };
        let (mut complete, mut closed) = (false, false);
        let data = &mut self.data;
        dtls.handle(now, datagram, |event| match event {
            DtlsEvent::Complete => complete = true,
            // Only what waits for the certificate check piles up; SCTP repeats the rest.
            DtlsEvent::Data(bytes) if data.len() < MAX_HELD_DATA => data.push_back(bytes),
            DtlsEvent::Data(_) => {}
            DtlsEvent::Closed => closed = true,
        });
        self.handshake_done |= complete;
        self.flush_dtls(Some(path));
        if closed {
            self.finish(CloseReason::PeerClosed);
        } else {
            self.advance(now);
        }
    }

    fn flush_dtls(&mut self, fallback: Option<Path>) {
        let Some(dtls) = &mut self.dtls else {
            return;
        };
        while let Some(message) = dtls.poll_transmit() {
            // Without a path there is nobody to tell; DTLS retransmits.
            if let Some(path) = self.path.or(fallback) {
                self.transmits.push_back((path, message.to_vec()));
            }
        }
    }

    /// Does whatever has become possible.
    fn advance(&mut self, now: Instant) {
        if self.closed {
            return;
        }
        if let Ice::Lite(agent) = &mut self.ice {
            while let Some(path) = agent.nudge(&mut self.response) {
                self.transmits.push_back((path, self.response.clone()));
            }
        }
        if let Ice::Full(agent) = &mut self.ice {
            while let Some(event) = agent.poll_event() {
                match event {
                    IceEvent::Selected(path) => {
                        self.path = Some(path);
                        self.disconnected_since = None;
                    }
                    IceEvent::Connected => self.disconnected_since = None,
                    IceEvent::Disconnected => {
                        self.disconnected_since.get_or_insert(now);
                    }
                }
            }
            while let Some(transmit) = agent.poll_transmit() {
                self.transmits.push_back(transmit);
            }
        }
        if self.dtls.is_none()
            && self.path.is_some()
            && let Some(role) = self.role
        {
            match Dtls::new(now, role, &self.identity, self.short_tags) {
                Ok(dtls) => self.dtls = Some(dtls),
                Err(error) => return self.finish(CloseReason::Handshake(error.to_string())),
            }
            self.flush_dtls(None);
        }
        if self.handshake_done && self.srtp.is_none() {
            self.key(now);
        }
    }

    /// Derives the SRTP keys, if the peer is who its SDP said. Waits for the SDP where the
    /// handshake was faster.
    fn key(&mut self, now: Instant) {
        let Some(dtls) = self.dtls.as_mut().filter(|_| !self.fingerprints.is_empty()) else {
            return;
        };
        if !self.fingerprints.iter().any(|one| dtls.peer_matches(one)) {
            dtls.close(now);
            self.flush_dtls(None);
            return self.finish(CloseReason::Fingerprint);
        }
        let keyed = dtls.srtp_keys().and_then(|keys| Srtp::new(&keys));
        match keyed {
            Ok(mut srtp) => {
                srtp.set_framed_pts(self.aic_pts);
                self.srtp = Some(srtp);
                self.events.push_back(LegEvent::Established {
                    took: now.duration_since(self.created),
                });
            }
            Err(error) => self.finish(CloseReason::Handshake(error.to_string())),
        }
    }

    fn finish(&mut self, reason: CloseReason) {
        if !self.closed {
            self.closed = true;
            self.events.push_back(LegEvent::Closed(reason));
        }
    }

    /// The highest RTP sequence number that was sent of a stream ([`Srtp::newest_sent`]).
    #[must_use]
    pub fn newest_sent(&self, ssrc: u32) -> Option<u16> {
        self.srtp.as_ref()?.newest_sent(ssrc)
    }

    /// Encrypts an RTP packet into `protected`; where to send it, or `None` where it can't be.
    pub fn protect_rtp(&mut self, plain: &[u8], protected: &mut Vec<u8>) -> Option<Path> {
        let path = self.path?;
        let srtp = self.srtp.as_mut()?;
        let sent = srtp.protect_rtp(plain, protected);
        self.sent(sent).then_some(path)
    }

    /// The same for RTCP.
    pub fn protect_rtcp(&mut self, plain: &[u8], protected: &mut Vec<u8>) -> Option<Path> {
        let path = self.path?;
        let srtp = self.srtp.as_mut()?;
        let sent = srtp.protect_rtcp(plain, protected);
        self.sent(sent).then_some(path)
    }

    /// Ends the leg where nothing more can be sent under its keys: the peer comes back with new ones.
    fn sent(&mut self, sent: bool) -> bool {
        if !sent && self.srtp.as_ref().is_some_and(Srtp::is_used_up) {
            self.finish(CloseReason::KeysUsedUp);
        }
        sent
    }

    /// Streams that made room for others in the tables of what comes ([`Srtp::forgotten`]).
    #[must_use]
    pub fn forgotten_streams(&self) -> u64 {
        self.srtp.as_ref().map_or(0, Srtp::forgotten)
    }

    /// Sends data-channel bytes; `false` before the leg is established.
    pub fn send_data(&mut self, now: Instant, data: &[u8]) -> bool {
        if self.srtp.is_none() || self.closed {
            return false;
        }
        let sent = self.dtls.as_mut().is_some_and(|dtls| dtls.write(now, data));
        self.flush_dtls(None);
        sent
    }

    /// The next data-channel bytes from the peer. Held back until its certificate is checked.
    pub fn poll_data(&mut self) -> Option<BytesMut> {
        self.srtp.as_ref()?;
        self.data.pop_front()
    }

    /// Ends the leg, telling the peer by close_notify.
    pub fn close(&mut self, now: Instant) {
        if self.closed {
            return;
        }
        if let Some(dtls) = &mut self.dtls {
            dtls.close(now);
        }
        self.flush_dtls(None);
        self.finish(CloseReason::Local);
    }

    /// A transport connection beneath the leg is gone.
    pub fn path_lost(&mut self, path: &Path) {
        if let Ice::Lite(agent) = &mut self.ice {
            agent.forget(path);
            self.path = agent.selected();
        }
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.closed {
            return;
        }
        if let Ice::Full(agent) = &mut self.ice {
            agent.handle_timeout(now);
        }
        if let Some(dtls) = &mut self.dtls
            && dtls.poll_timeout().is_some_and(|due| due <= now)
        {
            let result = dtls.handle_timeout(now);
            self.flush_dtls(None);
            if let Err(error) = result {
                return self.finish(CloseReason::Handshake(error.to_string()));
            }
        }
        if self.consent_ends().is_some_and(|end| end <= now) {
            return self.finish(CloseReason::ConsentLost);
        }
        self.advance(now);
    }

    fn consent_ends(&self) -> Option<Instant> {
        let since = match &self.ice {
            Ice::Lite(agent) => agent.last_check(),
            Ice::Full(_) => self.disconnected_since,
        };
        since.map(|since| since + self.consent_timeout)
    }

    /// When [`Leg::handle_timeout`] wants to be called.
    pub fn poll_timeout(&mut self) -> Option<Instant> {
        if self.closed {
            return None;
        }
        let ice = match &mut self.ice {
            Ice::Lite(_) => None,
            Ice::Full(agent) => agent.poll_timeout(),
        };
        let dtls = self.dtls.as_ref().and_then(Dtls::poll_timeout);
        let consent = self.consent_ends();
        [ice, dtls, consent].into_iter().flatten().min()
    }

    /// The next control datagram (STUN, DTLS) to send.
    pub fn poll_transmit(&mut self) -> Option<(Path, Vec<u8>)> {
        self.transmits.pop_front()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<LegEvent> {
        self.events.pop_front()
    }
}
