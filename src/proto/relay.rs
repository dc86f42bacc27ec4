//! A peer connection as the sidecar sees it: a leg to the client, a leg to the server, and the
//! media that passes between them.
//!
//! RTP and RTCP headers stay as they are, so SR, RR, NACK, PLI, TWCC and REMB work end to end
//! between SFU and client; only a track's rule changes its packets ([`crate::flow`]).

mod coded;
mod early;

use crate::coding::{Coding, EngineRungs, Job, MAX_DOWN, MAX_UP, Outcome, Taken};
use crate::description::{PcDescription, Target};
use crate::dtls::Identity;
use crate::flow::Flow;
use crate::hop::report;
use crate::leg::{CloseReason, Leg, LegEvent, LegState, Received};
use crate::packet::report_blocks;
use crate::stun::Path;
use early::Early;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Which side of the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The participant.
    Client,
    /// LiveKit.
    Server,
}

impl Side {
    /// The other one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }

    /// Its name in metrics and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

/// Takes datagrams to the network.
pub trait Transmit {
    /// Sends one datagram on `side` over `path`.
    fn transmit(&mut self, side: Side, path: Path, datagram: &[u8]);
}

/// A track's number is the relay's, a bit for the direction, and the stream's.
const TRACK_BITS: u32 = 16;
const DOWN: u64 = 1 << (TRACK_BITS - 1);

/// The relay that a track belongs to.
#[must_use]
pub fn relay_of_track(track: u64) -> u64 {
    track >> TRACK_BITS
}

/// Buffers that every packet passes through; one set per worker, so that nothing is allocated for a packet.
#[derive(Debug, Default)]
pub struct Scratch {
    plain: Vec<u8>,
    protected: Vec<u8>,
}

/// What a relay tells its worker.
#[derive(Debug, PartialEq, Eq)]
pub enum RelayEvent {
    /// Datagrams that come over this path on the client side belong here.
    PathSeen(Path),
    /// And no more.
    PathForgotten(Path),
    /// The leg on this side is up.
    Established(Side, Duration),
    /// Over: this side ended first, for this reason.
    Closed(Side, CloseReason),
}

/// Time as packets need it.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// For timers.
    pub instant: Instant,
    /// Middle 32 bits of the NTP time ([`crate::aic::ntp_middle`]).
    pub ntp: u32,
}

/// One peer connection. After every call that takes a time, drain [`Relay::poll_event`].
#[derive(Debug)]
pub struct Relay {
    target: Target,
    client: Leg,
    server: Leg,
    up: Flow,
    down: Flow,
    early_up: Early,
    early_down: Early,
    up_coding: Coding,
    down_coding: Coding,
    closed: bool,
    events: VecDeque<RelayEvent>,
}

impl Relay {
    /// A relay whose server leg owns sockets bound to `server_locals`. `id` is unique in the process; `engine` is
    /// what the codecs can do now.
    #[must_use]
    pub fn new(
        id: u64,
        engine: EngineRungs,
        now: Instant,
        identity: &Identity,
        consent_timeout: Duration,
        server_locals: Vec<SocketAddr>,
        description: &PcDescription,
    ) -> Self {
        Self {
            target: description.target,
            client: Leg::client(now, identity, consent_timeout),
            server: Leg::server(
                now,
                identity,
                consent_timeout,
                server_locals,
                &description.server,
            ),
            up: Flow::default(),
            down: Flow::default(),
            early_up: Early::default(),
            early_down: Early::default(),
            up_coding: Coding::new(id << TRACK_BITS, MAX_UP, engine),
            down_coding: Coding::new(id << TRACK_BITS | DOWN, MAX_DOWN, engine),
            closed: false,
            events: VecDeque::new(),
        }
    }

    /// Which of the participant's peer connections it is.
    #[must_use]
    pub fn target(&self) -> Target {
        self.target
    }

    /// A leg.
    #[must_use]
    pub fn leg(&self, side: Side) -> &Leg {
        match side {
            Side::Client => &self.client,
            Side::Server => &self.server,
        }
    }

    /// Whether the client has proved that it may send on `path`.
    #[must_use]
    pub fn client_knows(&self, path: &Path) -> bool {
        self.client.knows(path)
    }

    /// The direction that comes from `side`.
    #[must_use]
    pub fn flow_from(&self, side: Side) -> &Flow {
        match side {
            Side::Client => &self.up,
            Side::Server => &self.down,
        }
    }

    /// Whether it is over and may be dropped.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Applies what signalling knows.
    pub fn describe(
        &mut self,
        now: Now,
        description: &PcDescription,
        scratch: &mut Scratch,
        out: &mut impl Transmit,
    ) {
        self.client.describe(now.instant, &description.client);
        self.server.describe(now.instant, &description.server);
        self.up.set_rules(&description.up, description.mid_ext_id);
        self.down.set_rules(&description.down, None);
        let (up, down) = (&mut self.up_coding, &mut self.down_coding);
        up.set_rules(now.instant, &description.up, description.mid_ext_id);
        down.set_rules(now.instant, &description.down, None);
        up.set_told(description.client.aic_pts.0);
        down.set_told(description.server.aic_pts.0);
        self.settle(now, scratch, out);
    }

    /// Takes a datagram that came on `side` over `path`. `false`: it was refused, which is counted and had no other effect.
    pub fn receive(
        &mut self,
        now: Now,
        side: Side,
        path: Path,
        datagram: &[u8],
        scratch: &mut Scratch,
        out: &mut impl Transmit,
    ) -> bool {
        let leg = match side {
            Side::Client => &mut self.client,
            Side::Server => &mut self.server,
        };
        let received = leg.receive(now.instant, path, datagram, &mut scratch.plain);
        match received {
            Received::Rtp | Received::Rtcp => {
                self.pass(
                    now,
                    side,
                    received,
                    Some((path, datagram.len())),
                    scratch,
                    out,
                );
            }
            Received::Refused(refusal) => {
                self.flow_mut(side).stats.refused(refusal);
                return false;
            }
            Received::Data | Received::Nothing => self.settle(now, scratch, out),
        }
        true
    }

    fn flow_mut(&mut self, side: Side) -> &mut Flow {
        match side {
            Side::Client => &mut self.up,
            Side::Server => &mut self.down,
        }
    }

    /// Hands the packet in `scratch.plain` to the other side, without the hop's reports in it: they are about what goes
    /// to where they come from, and end here.
    fn pass(
        &mut self,
        now: Now,
        side: Side,
        what: Received,
        came: Option<(Path, usize)>,
        scratch: &mut Scratch,
        out: &mut impl Transmit,
    ) {
        if what != Received::Rtcp || !report::is_in(&scratch.plain) {
            return self.pass_on(now, side, what, came, scratch, out);
        }
        let back = match side {
            Side::Client => &mut self.down_coding,
            Side::Server => &mut self.up_coding,
        };
        back.report(now, &scratch.plain);
        report::take_out(&mut scratch.plain);
        if !scratch.plain.is_empty() {
            self.pass_on(now, side, what, came, scratch, out);
        }
        // What the reports set free.
        self.pass_coded(now, side.other(), scratch, out);
    }

    /// Hands the packet in `scratch.plain` to the other side. `came` is the path it came over and
    /// its length on it.
    fn pass_on(
        &mut self,
        now: Now,
        side: Side,
        what: Received,
        came: Option<(Path, usize)>,
        scratch: &mut Scratch,
        out: &mut impl Transmit,
    ) {
        let to = side.other();
        let (leg, flow, early, coding, back) = match to {
            Side::Client => (
                &mut self.client,
                &mut self.down,
                &mut self.early_down,
                &mut self.down_coding,
                &mut self.up_coding,
            ),
            Side::Server => (
                &mut self.server,
                &mut self.up,
                &mut self.early_up,
                &mut self.up_coding,
                &mut self.down_coding,
            ),
        };
        if leg.state() != LegState::Established {
            if !early.push(what, &scratch.plain) {
                flow.stats.dropped_early += 1;
            }
            return;
        }
        if what == Received::Rtp && !coding.is_idle() {
            let wire = came.map_or(scratch.plain.len(), |(path, len)| wire_len(&path, len));
            let taken = coding.take(now, &scratch.plain, wire, |ssrc| leg.newest_sent(ssrc));
            if taken == Taken::Framed {
                // The hop's wire is the one that costs.
                flow.stats.bytes += wire as u64;
            }
            if taken != Taken::Not {
                self.pass_coded(now, side, scratch, out);
                return;
            }
        }
        let plain_len = scratch.plain.len();
        let mut saved = 0;
        let sent = if what == Received::Rtp {
            let wire = came.map_or(plain_len, |(path, len)| wire_len(&path, len));
            let newest = |ssrc| leg.newest_sent(ssrc);
            let Some(applied) = flow.apply(&mut scratch.plain, wire, now.ntp, newest) else {
                flow.stats.dropped_unsent += 1;
                return;
            };
            saved = applied;
            leg.protect_rtp(&scratch.plain, &mut scratch.protected)
        } else {
            leg.protect_rtcp(&scratch.plain, &mut scratch.protected)
        };
        let Some(path) = sent else {
            flow.stats.dropped_unsent += 1;
            return;
        };
        out.transmit(to, path, &scratch.protected);
        // The books are kept on the client's wire: that is the one that costs.
        let bytes = match (to, came) {
            (Side::Server, Some((path, len))) => wire_len(&path, len),
            (Side::Client, _) | (Side::Server, None) => wire_len(&path, scratch.protected.len()),
        };
        flow.stats.bytes += bytes as u64;
        flow.stats.native_bytes += bytes as u64 + saved;
        if what == Received::Rtp {
            flow.stats.rtp_packets += 1;
            return;
        }
        flow.stats.rtcp_packets += 1;
        // Reports that cross towards one side speak of the streams that come from there.
        let reported = match side {
            Side::Client => &mut self.down,
            Side::Server => &mut self.up,
        };
        if reported.wants_reports() {
            report_blocks(&scratch.plain, |ssrc, lost| reported.report(ssrc, lost));
        }
        if back.wants_loss() {
            report_blocks(&scratch.plain, |ssrc, lost| {
                back.loss(now.instant, ssrc, lost)
            });
        }
        if !coding.is_idle() {
            coding.goodbyes(&scratch.plain);
        }
    }

    /// The direction that comes from `side`, as the hop codes it.
    #[must_use]
    pub fn coding_from(&self, side: Side) -> &Coding {
        match side {
            Side::Client => &self.up_coding,
            Side::Server => &self.down_coding,
        }
    }

    /// Something is coded here: packets change timers and make jobs.
    #[must_use]
    pub fn is_coding(&self) -> bool {
        !self.up_coding.is_idle() || !self.down_coding.is_idle()
    }

    /// The next job for the engine.
    pub fn poll_job(&mut self) -> Option<Job> {
        self.up_coding
            .poll_job()
            .or_else(|| self.down_coding.poll_job())
    }

    /// Takes the engine's answer to a job.
    pub fn outcome(
        &mut self,
        now: Now,
        outcome: Outcome,
        scratch: &mut Scratch,
        out: &mut impl Transmit,
    ) {
        if outcome.track() & DOWN == 0 {
            self.up_coding.outcome(now, outcome);
            self.pass_coded(now, Side::Client, scratch, out);
        } else {
            self.down_coding.outcome(now, outcome);
            self.pass_coded(now, Side::Server, scratch, out);
        }
    }

    /// What the codecs can do from now on.
    pub fn set_engine(&mut self, now: Instant, engine: EngineRungs) {
        self.up_coding.set_engine(now, engine);
        self.down_coding.set_engine(now, engine);
    }

    /// Makes jobs by which the engine forgets this relay.
    pub fn end_coding(&mut self) {
        self.up_coding.close();
        self.down_coding.close();
    }

    /// Moves data, control datagrams and events on after a leg did something.
    fn settle(&mut self, now: Now, scratch: &mut Scratch, out: &mut impl Transmit) {
        // Before any media: what makes a leg ready may end with a flight that its peer needs first.
        self.flush(out);
        for side in [Side::Client, Side::Server] {
            self.pass_data(now.instant, side);
            self.pass_early(now, side, scratch, out);
        }
        for side in [Side::Client, Side::Server] {
            while let Some(event) = self.leg_mut(side).poll_event() {
                match event {
                    LegEvent::PathSeen(path) => self.events.push_back(RelayEvent::PathSeen(path)),
                    LegEvent::PathForgotten(path) => {
                        self.events.push_back(RelayEvent::PathForgotten(path));
                    }
                    LegEvent::Established { took } => {
                        self.events.push_back(RelayEvent::Established(side, took));
                        // What came early goes out now.
                        self.flush(out);
                        for side in [Side::Client, Side::Server] {
                            self.pass_data(now.instant, side);
                            self.pass_early(now, side, scratch, out);
                        }
                    }
                    LegEvent::Closed(reason) => {
                        if !self.closed {
                            self.closed = true;
                            self.events.push_back(RelayEvent::Closed(side, reason));
                        }
                        self.leg_mut(side.other()).close(now.instant);
                    }
                }
            }
        }
        self.flush(out);
    }

    fn flush(&mut self, out: &mut impl Transmit) {
        for side in [Side::Client, Side::Server] {
            while let Some((path, datagram)) = self.leg_mut(side).poll_transmit() {
                out.transmit(side, path, &datagram);
            }
        }
    }

    fn leg_mut(&mut self, side: Side) -> &mut Leg {
        match side {
            Side::Client => &mut self.client,
            Side::Server => &mut self.server,
        }
    }

    fn pass_data(&mut self, now: Instant, from: Side) {
        let (source, sink, flow, early) = match from {
            Side::Client => (
                &mut self.client,
                &mut self.server,
                &mut self.up,
                &mut self.early_up,
            ),
            Side::Server => (
                &mut self.server,
                &mut self.client,
                &mut self.down,
                &mut self.early_down,
            ),
        };
        while let Some(data) = source.poll_data() {
            if sink.state() != LegState::Established {
                if !early.push(Received::Data, &data) {
                    flow.stats.dropped_early += 1;
                }
            } else if sink.send_data(now, &data) {
                flow.stats.data_packets += 1;
                // 13 record header, 8 nonce, 16 tag, 28 IPv4 and UDP: an AES-GCM record in a datagram
                // of its own. An estimate, the same on both sides of the books, so that it saves
                // nothing: over IPv6 a packet is 20 bytes longer, over TCP 14.
                let bytes = data.len() as u64 + 65;
                flow.stats.bytes += bytes;
                flow.stats.native_bytes += bytes;
            } else {
                flow.stats.dropped_unsent += 1;
            }
        }
    }

    fn pass_early(&mut self, now: Now, from: Side, scratch: &mut Scratch, out: &mut impl Transmit) {
        let (sink, early) = match from {
            Side::Client => (&self.server, &mut self.early_up),
            Side::Server => (&self.client, &mut self.early_down),
        };
        if early.packets.is_empty() || sink.state() != LegState::Established {
            return;
        }
        let held = std::mem::take(early);
        for (what, bytes) in held.packets {
            if what == Received::Data {
                self.leg_mut(from.other()).send_data(now.instant, &bytes);
                self.flow_mut(from).stats.data_packets += 1;
            } else {
                scratch.plain.clear();
                scratch.plain.extend_from_slice(&bytes);
                self.pass(now, from, what, None, scratch, out);
            }
        }
    }

    /// A transport connection beneath the client leg is gone.
    pub fn path_lost(&mut self, path: &Path) {
        self.client.path_lost(path);
    }

    /// Ends both legs with close_notify.
    pub fn close(&mut self, now: Now, scratch: &mut Scratch, out: &mut impl Transmit) {
        self.client.close(now.instant);
        self.server.close(now.instant);
        self.settle(now, scratch, out);
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Now, scratch: &mut Scratch, out: &mut impl Transmit) {
        self.client.handle_timeout(now.instant);
        self.server.handle_timeout(now.instant);
        self.settle(now, scratch, out);
        if self.is_coding() {
            self.up_coding.handle_timeout(now);
            self.down_coding.handle_timeout(now);
            self.pass_coded(now, Side::Client, scratch, out);
            self.pass_coded(now, Side::Server, scratch, out);
        }
    }

    /// When [`Relay::handle_timeout`] wants to be called.
    pub fn poll_timeout(&mut self) -> Option<Instant> {
        let client = self.client.poll_timeout();
        let server = self.server.poll_timeout();
        let up = self.up_coding.poll_timeout();
        let down = self.down_coding.poll_timeout();
        [client, server, up, down].into_iter().flatten().min()
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<RelayEvent> {
        self.events.pop_front()
    }
}

/// Bytes that a datagram of `len` takes on the wire: IPv4 20 or IPv6 40, UDP 8 or TCP 20 and the
/// two bytes of RFC 4571 framing.
#[must_use]
pub fn wire_len(path: &Path, len: usize) -> usize {
    let ip = if path.remote.is_ipv6() { 40 } else { 20 };
    let transport = if path.tcp { 22 } else { 8 };
    len + ip + transport
}
