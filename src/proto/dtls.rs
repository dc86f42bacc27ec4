//! One DTLS 1.2 association of a leg (RFC 5764): `rtc-dtls` behind a gate. The association is keyed
//! to a fixed address, because the path beneath it may change at any time without DTLS knowing.
//!
//! The library recurses once for each fragment of a message, queues what it cannot read yet without
//! a bound, and acts upon records in the clear. So it sees none of the wire's handshake: the gate
//! puts the peer's messages together ([`reassembly`]), reads them strictly ([`messages`]), and hands
//! over a whole flight at a time, each message once, in one piece and in a record of our own. Until
//! the handshake is complete nothing is authentic and anybody could have sent it; what cannot be
//! read is dropped (RFC 6347 section 4.1.2.7), and dropping costs no more than reading its bytes. So
//! there is no total after which a handshake would be given up: that would serve who floods it.

mod identity;
mod keys;
mod messages;
mod reassembly;
mod record;
#[cfg(test)]
mod tests;

use crate::description::DtlsRole;
use bytes::BytesMut;
pub use identity::Identity;
pub use keys::SrtpKeys;
use messages::{CLIENT_HELLO, HELLO_VERIFY_REQUEST, OF_CLIENT, OF_SERVER};
use reassembly::{Assembly, Fragment};
use record::{ALERT, APPLICATION_DATA, CHANGE_CIPHER_SPEC, HANDSHAKE, Record};
use rtc_dtls::config::HandshakeConfig;
use rtc_dtls::endpoint::{Endpoint, EndpointEvent};
pub use rtc_dtls::extension::extension_use_srtp::SrtpProtectionProfile;
use rtc_shared::TransportProtocol;
use std::collections::VecDeque;
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

/// So many of them `rtc-dtls` makes, with its Finished encrypted anew, before it would give up.
const LIBRARY_RETRANSMISSIONS: u32 = 7;

/// Bytes of a HelloVerifyRequest's cookie: as many as `rtc-dtls` has.
const COOKIE: usize = 20;

/// ClientHellos with our cookie that are tried, each at the price of a key pair and a signature: the
/// first one is good, unless the peer and we have nothing in common.
const MAX_HELLOS: u8 = 8;

/// HelloVerifyRequests that are answered. A server sends one; a second would mean that its cookie
/// had expired (RFC 6347 section 4.2.1).
const MAX_HELLO_VERIFIES: u8 = 2;

/// Bytes of an encrypted handshake record that is looked at: a Finished has 24, and a cipher adds at
/// most 24 (AES-GCM) or 56 (AES-CBC with HMAC-SHA1). It has room for nine fragments.
const MAX_FINISHED: usize = 13 + 128;

/// Only records with numbers below this may hold the peer's Finished. It takes a new one each time
/// that it is repeated, which is done ten times at most in browsers, 30 times in Pion, and for a
/// server data may come between. The library reads a number once, so this bounds what a peer with
/// keys makes it read before the handshake is complete; what nobody encrypted is not counted.
const MAX_FINISHED_NUMBER: u64 = 64;

/// Encrypted records of either kind that wait for what comes before them: a Finished that overtook
/// the messages before it, data that overtook the Finished. The peer repeats what is dropped.
const MAX_EARLY: usize = 4;

/// Bytes of early data: a little more than a path takes. SCTP begins with some 100.
const MAX_EARLY_DATA: usize = 1500;

/// The last flight is repeated no more often: browsers ask for it after 50 ms, then half as often
/// each time.
const REPEAT_INTERVAL: Duration = Duration::from_millis(100);

/// So often it is repeated in all. Asking for it takes no key, so there must be an end; a client asks
/// 30 times at most.
const MAX_REPEATS: u32 = 64;

/// Bytes that the gate holds of a peer's unfinished handshake, at most: each message of a server's
/// flight at its longest, which is longer than a client's, with a bit for each byte, and early
/// records.
pub const MAX_HELD: usize = (14 << 10) + MAX_EARLY * (MAX_EARLY_DATA + MAX_FINISHED);

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

/// What a datagram led to.
pub enum DtlsEvent {
    /// The handshake is complete; the certificate has not been checked yet.
    Complete,
    /// Application data: an SCTP packet.
    Data(BytesMut),
    /// The peer said close_notify.
    Closed,
}

/// What is awaited of the peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// Its ClientHello, with our cookie.
    Hello,
    /// The messages in the clear of its flight.
    Flight,
    /// Its Finished: both have keys.
    Finished,
    /// Nothing: data flows.
    Complete,
    /// Nothing any more. A handshake that cannot go on runs out of retransmissions.
    Over,
}

/// What is held of the peer's handshake.
#[derive(Debug, Default)]
struct Inbox {
    /// Number of the first message of the flight that is awaited.
    base: u16,
    messages: [Assembly; OF_SERVER.len()],
    early_finished: Vec<Vec<u8>>,
    early_data: Vec<Vec<u8>>,
}

/// One association.
pub struct Dtls {
    endpoint: Endpoint,
    role: DtlsRole,
    stage: Stage,
    /// A server's settings, and the cookie in them.
    config: Option<Arc<HandshakeConfig>>,
    cookie: [u8; COOKIE],
    hellos: u8,
    inbox: Box<Inbox>,
    out: VecDeque<BytesMut>,
    /// Numbers of the next records in the clear: of those that we send, and of those that the
    /// library is handed.
    next_out: u64,
    next_in: u64,
    /// What was sent last of the handshake, and how often it was repeated.
    flight: Vec<BytesMut>,
    retransmissions: u32,
    /// When it is repeated next.
    due: Option<Instant>,
    /// When the last flight may be repeated again.
    repeat_after: Option<Instant>,
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
        let mut endpoint = Endpoint::new(PEER, TransportProtocol::UDP, None);
        let mut cookie = [0; COOKIE];
        let mut config = None;
        let stage = match role {
            DtlsRole::Client => {
                endpoint
                    .connect(now, PEER, identity.client(short_tags), None)
                    .map_err(DtlsError::new)?;
                Stage::Flight
            }
            DtlsRole::Server => {
                let random = identity.provider().random();
                random.fill(&mut cookie).map_err(DtlsError::new)?;
                config = Some(identity.server(short_tags, cookie)?);
                Stage::Hello
            }
        };
        let mut dtls = Self {
            endpoint,
            role,
            stage,
            config,
            cookie,
            hellos: 0,
            inbox: Box::default(),
            out: VecDeque::new(),
            next_out: 0,
            next_in: 0,
            flight: Vec::new(),
            retransmissions: 0,
            due: None,
            repeat_after: None,
        };
        dtls.pump(now);
        Ok(dtls)
    }

    /// Takes a datagram.
    pub fn handle(&mut self, now: Instant, datagram: &[u8], mut event: impl FnMut(DtlsEvent)) {
        let mut verified = false;
        for record in record::records(datagram) {
            match (record.epoch, record.kind) {
                (0, HANDSHAKE) => {
                    for fragment in reassembly::fragments(record.body) {
                        match self.stage {
                            Stage::Hello => self.hello(now, &fragment, &mut verified),
                            Stage::Flight => self.message(now, &fragment),
                            Stage::Complete => self.repeated(now, &fragment),
                            Stage::Finished | Stage::Over => {}
                        }
                    }
                    if self.stage == Stage::Finished {
                        self.early(now, &mut event);
                    }
                }
                (1, HANDSHAKE) => self.finished(now, &record, &mut event),
                (1, ALERT | APPLICATION_DATA) => self.data(now, &record, &mut event),
                // Alerts and data in the clear are nobody's. That the cipher changes is said by
                // the epoch of what follows, too; and the library would believe one of epoch 1,
                // which it never decrypts, and drop all that is authentic from then on.
                _ => {}
            }
        }
    }

    /// As a server: a part of a ClientHello.
    fn hello(&mut self, now: Instant, fragment: &Fragment, verified: &mut bool) {
        if fragment.kind != CLIENT_HELLO || fragment.length > messages::max_len(CLIENT_HELLO) {
            return;
        }
        // The first is answered whatever it says, as often as it is repeated, and nothing is kept
        // of it (RFC 6347 section 4.2.1): so nobody can be first in the peer's name.
        if fragment.number == 0 && fragment.offset == 0 && !*verified {
            *verified = true;
            if self.flight.is_empty() {
                self.flight.push(self.hello_verify_request());
                self.due = Some(now + FLIGHT_INTERVAL);
            }
            self.send_flight();
        }
        let [assembly, ..] = &mut self.inbox.messages;
        if fragment.number != 1 {
            return;
        }
        if !assembly.add(fragment) {
            return;
        }
        let Some((_, hello)) = assembly.whole() else {
            return;
        };
        let bare = messages::client_hello(hello, &self.cookie);
        let hello = hello.to_vec();
        assembly.clear();
        if let Some(bare) = bare
            && self.hellos < MAX_HELLOS
        {
            self.hellos += 1;
            self.welcome(now, &bare, &hello);
        }
    }

    fn hello_verify_request(&self) -> BytesMut {
        // Version, length of the cookie.
        let body = [0xfe, 0xfd, COOKIE as u8];
        let header = reassembly::header(HELLO_VERIFY_REQUEST, 0, body.len() + COOKIE, 0);
        let mut datagram = Vec::new();
        record::write(&mut datagram, HANDSHAKE, 0, &[&header, &body, &self.cookie]);
        BytesMut::from(&datagram[..])
    }

    /// Begins with a ClientHello: `rtc-dtls` sees it without the cookie first.
    fn welcome(&mut self, now: Instant, bare: &[u8], hello: &[u8]) {
        self.endpoint = Endpoint::new(PEER, TransportProtocol::UDP, self.config.clone());
        self.next_in = 0;
        self.feed_messages(now, &[(CLIENT_HELLO, 0, bare)]);
        while let Some(answer) = self.endpoint.poll_transmit() {
            let mut answer = answer.message;
            // Its HelloVerifyRequest, which ours was; or an alert.
            if answer.first() != Some(&HANDSHAKE) {
                record::renumber(&mut answer, &mut self.next_out);
                self.out.push_back(answer);
                return;
            }
        }
        self.feed_messages(now, &[(CLIENT_HELLO, 1, hello)]);
        if self.pump(now) {
            self.stage = Stage::Flight;
            self.inbox.base = 2;
            self.config = None;
        }
    }

    /// A part of a message of the flight that is awaited.
    fn message(&mut self, now: Instant, fragment: &Fragment) {
        let awaited = match self.role {
            DtlsRole::Client => OF_SERVER,
            DtlsRole::Server => OF_CLIENT,
        };
        let inbox = &mut *self.inbox;
        let place = usize::from(fragment.number.wrapping_sub(inbox.base));
        let Some(kind) = awaited.get(place) else {
            return;
        };
        let assembly = &mut inbox.messages[place];
        // A server may ask for its cookie first.
        let verify = self.role == DtlsRole::Client
            && place == 0
            && fragment.kind == HELLO_VERIFY_REQUEST
            && inbox.base < u16::from(MAX_HELLO_VERIFIES)
            && assembly.whole().is_none();
        if fragment.kind != *kind && !verify || fragment.length > messages::max_len(fragment.kind) {
            return;
        }
        // What is whole was read when it became so, and was valid.
        if !assembly.add(fragment) {
            return;
        }
        let Some((kind, body)) = assembly.whole() else {
            return;
        };
        if !messages::valid(kind, body) {
            assembly.clear();
            return;
        }
        let base = inbox.base;
        if verify {
            let body = body.to_vec();
            assembly.clear();
            inbox.base += 1;
            self.feed_messages(now, &[(kind, base, &body)]);
            self.pump(now);
            return;
        }
        // The library forgets its timer over a part of a flight, and repeats its parsing.
        let whole = inbox.messages[..awaited.len()].iter().zip(base..);
        let flight: Option<Vec<_>> = whole
            .map(|(assembly, number)| assembly.whole().map(|(kind, body)| (kind, number, body)))
            .collect();
        let Some(flight) = flight else {
            return;
        };
        let datagram = datagram(&flight, &mut self.next_in);
        self.inbox.messages = Default::default();
        self.feed(now, &datagram);
        let keys = self
            .endpoint
            .get_connection_state(PEER)
            .and_then(|state| state.cipher_suite())
            .is_some_and(|cipher| cipher.is_initialized());
        self.pump(now);
        if !keys {
            self.stage = Stage::Over;
            return;
        }
        self.stage = Stage::Finished;
        let mut datagram = Vec::new();
        record::write(&mut datagram, CHANGE_CIPHER_SPEC, self.next_in, &[&[1]]);
        self.next_in += 1;
        self.feed(now, &datagram);
    }

    /// Hands over what waited for the keys.
    fn early(&mut self, now: Instant, event: &mut impl FnMut(DtlsEvent)) {
        for bytes in std::mem::take(&mut self.inbox.early_finished) {
            for record in record::records(&bytes) {
                self.finished(now, &record, event);
            }
        }
    }

    /// An encrypted handshake record.
    fn finished(&mut self, now: Instant, record: &Record, event: &mut impl FnMut(DtlsEvent)) {
        if record.bytes.len() > MAX_FINISHED {
            return;
        }
        match self.stage {
            Stage::Flight if self.role == DtlsRole::Server => {
                hold(&mut self.inbox.early_finished, record);
            }
            Stage::Finished if record.number < MAX_FINISHED_NUMBER => {
                let complete = self
                    .feed(now, record.bytes)
                    .iter()
                    .any(|event| matches!(event, EndpointEvent::HandshakeComplete));
                if complete {
                    self.flight = Vec::new();
                }
                self.pump(now);
                if !complete {
                    return;
                }
                self.stage = Stage::Complete;
                self.due = None;
                self.retransmissions = 0;
                event(DtlsEvent::Complete);
                let inbox = std::mem::take(&mut self.inbox);
                for bytes in inbox.early_data {
                    for record in record::records(&bytes) {
                        self.data(now, &record, event);
                    }
                }
            }
            // The client repeats its last flight. That nothing else is in there cannot be known
            // without the library, which would keep it: there is no second handshake.
            Stage::Complete => self.repeat(now),
            _ => {}
        }
    }

    /// An encrypted alert or data.
    fn data(&mut self, now: Instant, record: &Record, event: &mut impl FnMut(DtlsEvent)) {
        match self.stage {
            // A client has no data before it has had our Finished, which completes it here.
            Stage::Finished
                if self.role == DtlsRole::Client && record.bytes.len() <= MAX_EARLY_DATA =>
            {
                hold(&mut self.inbox.early_data, record);
            }
            Stage::Complete => {
                let mut closed = false;
                for e in self.feed(now, record.bytes) {
                    match e {
                        EndpointEvent::ApplicationData(data) => {
                            // It has keys, so it has had our last flight.
                            self.flight = Vec::new();
                            event(DtlsEvent::Data(data));
                        }
                        EndpointEvent::PeerClosed => closed = true,
                        _ => {}
                    }
                }
                if closed {
                    self.pump(now);
                    self.end();
                    event(DtlsEvent::Closed);
                }
                // The library answers every alert with the same one: two of it would never stop.
                while self.endpoint.poll_transmit().is_some() {}
            }
            _ => {}
        }
    }

    /// After the handshake, a message in the clear: of the flight that ours was the answer to?
    fn repeated(&mut self, now: Instant, fragment: &Fragment) {
        // After both ClientHellos.
        let place = usize::from(fragment.number.wrapping_sub(2));
        if self.role == DtlsRole::Server && OF_CLIENT.get(place) == Some(&fragment.kind) {
            self.repeat(now);
        }
    }

    /// Repeats the last flight, which only a server has.
    fn repeat(&mut self, now: Instant) {
        if self.flight.is_empty()
            || self.retransmissions >= MAX_REPEATS
            || self.repeat_after.is_some_and(|after| after > now)
        {
            return;
        }
        self.retransmissions += 1;
        self.repeat_after = Some(now + REPEAT_INTERVAL);
        self.send_flight();
    }

    fn feed_messages(&mut self, now: Instant, messages: &[(u8, u16, &[u8])]) {
        let datagram = datagram(messages, &mut self.next_in);
        self.feed(now, &datagram);
    }

    fn feed(&mut self, now: Instant, datagram: &[u8]) -> Vec<EndpointEvent> {
        let datagram = BytesMut::from(datagram);
        let events = self.endpoint.read(now, PEER, None, datagram);
        events.unwrap_or_default()
    }

    /// Takes what the endpoint wants to send; whether a flight of the handshake was among it.
    fn pump(&mut self, now: Instant) -> bool {
        let mut flight = Vec::new();
        while let Some(transmit) = self.endpoint.poll_transmit() {
            let mut datagram = transmit.message;
            if matches!(datagram.first(), Some(&(HANDSHAKE | CHANGE_CIPHER_SPEC))) {
                flight.push(datagram);
            } else {
                record::renumber(&mut datagram, &mut self.next_out);
                self.out.push_back(datagram);
            }
        }
        if flight.is_empty() {
            return false;
        }
        self.flight = flight;
        self.send_flight();
        self.retransmissions = 0;
        self.due = Some(now + FLIGHT_INTERVAL);
        true
    }

    fn send_flight(&mut self) {
        for datagram in &mut self.flight {
            record::renumber(datagram, &mut self.next_out);
            self.out.push_back(datagram.clone());
        }
    }

    /// Sends the second half of our first ClientHello once more, by itself.
    ///
    /// A Pion server (3.1) whose HelloVerifyRequest was lost ignores a repeated ClientHello for
    /// ever, but answers a part of one that doesn't begin at its beginning. Others drop it: they
    /// have had all of the message just before.
    fn nudge(&mut self) {
        let hello = self.flight.first().and_then(|datagram| {
            let record = record::records(datagram).next()?;
            let message = reassembly::fragments(record.body).next()?;
            let half = message.length / 2;
            let header = reassembly::header(message.kind, message.number, message.length, half);
            let mut datagram = Vec::new();
            let body = message.body.get(half..)?;
            record::write(&mut datagram, HANDSHAKE, self.next_out, &[&header, body]);
            Some(BytesMut::from(&datagram[..]))
        });
        if let Some(hello) = hello {
            self.next_out += 1;
            self.out.push_back(hello);
        }
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
        let retransmissions = self.retransmissions + 1;
        if retransmissions > MAX_RETRANSMISSIONS {
            self.due = None;
            return Err(DtlsError("no answer to the handshake".to_owned()));
        }
        if retransmissions <= LIBRARY_RETRANSMISSIONS && self.endpoint.poll_timeout(&PEER).is_some()
        {
            self.endpoint
                .handle_timeout(PEER, now)
                .map_err(DtlsError::new)?;
            self.pump(now);
        } else {
            // The library forgot its timer when a part of the peer's flight came, or is at its end.
            self.send_flight();
        }
        let unanswered = self.stage == Stage::Flight && self.inbox.base == 0;
        // One lost answer is nothing unusual; the library forgets its own timer over a nudge.
        if self.role == DtlsRole::Client && unanswered && retransmissions > 1 {
            self.nudge();
        }
        self.retransmissions = retransmissions;
        let interval = FLIGHT_INTERVAL * (1 << retransmissions.min(8));
        self.due = Some(now + interval.min(MAX_FLIGHT_INTERVAL));
        Ok(())
    }

    /// Sends application data. `false`, and lost, before the handshake is complete; callers wait.
    pub fn write(&mut self, now: Instant, data: &[u8]) -> bool {
        if self.stage != Stage::Complete {
            return false;
        }
        let written = self.endpoint.write(now, PEER, data).is_ok();
        self.pump(now);
        written
    }

    /// Sends close_notify.
    pub fn close(&mut self, now: Instant) {
        // Nothing is left to be done about a failure to say goodbye.
        let _ = self.endpoint.close(now);
        self.pump(now);
        self.end();
    }

    fn end(&mut self) {
        self.stage = Stage::Over;
        self.due = None;
        self.flight = Vec::new();
        *self.inbox = Inbox::default();
    }

    /// Bytes held of the peer's handshake, at most [`MAX_HELD`].
    #[must_use]
    pub fn held(&self) -> usize {
        let inbox = &self.inbox;
        let early = inbox.early_finished.iter().chain(&inbox.early_data);
        let messages = inbox.messages.iter().map(Assembly::held);
        messages.chain(early.map(Vec::capacity)).sum()
    }

    /// The library's state, for tests of peers that have keys.
    #[doc(hidden)]
    #[must_use]
    pub fn connection_state(&self) -> Option<&rtc_dtls::state::State> {
        self.endpoint.get_connection_state(PEER)
    }
}

/// Messages for the library: one record and one piece each.
fn datagram(messages: &[(u8, u16, &[u8])], next: &mut u64) -> Vec<u8> {
    let mut datagram = Vec::new();
    for (kind, number, body) in messages {
        let header = reassembly::header(*kind, *number, body.len(), 0);
        record::write(&mut datagram, HANDSHAKE, *next, &[&header, body]);
        *next += 1;
    }
    datagram
}

fn hold(early: &mut Vec<Vec<u8>>, record: &Record) {
    if early.len() < MAX_EARLY {
        early.push(record.bytes.to_vec());
    }
}

impl std::fmt::Debug for Dtls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dtls")
            .field("role", &self.role)
            .field("stage", &self.stage)
            .finish_non_exhaustive()
    }
}
