//! The networks between the ends and the sidecar, and the clock.

use super::{World, back, front};
use auralink_proto::relay::{Now, Relay, Side, Transmit};
use auralink_proto::stun::Path;
use std::cmp::Reverse;
use std::fmt::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

pub(super) enum Event {
    Datagram(SocketAddr, SocketAddr, Vec<u8>),
    /// Signalling, and where it arrives.
    ProxyFromClient(Vec<u8>),
    Server(Vec<u8>),
    ProxyFromServer(Vec<u8>),
    Client(Vec<u8>),
}

pub(super) struct Due {
    at: Instant,
    order: u64,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

#[derive(Default)]
pub(super) struct Out(Vec<(Side, Path, Vec<u8>)>);

impl Transmit for Out {
    fn transmit(&mut self, side: Side, path: Path, datagram: &[u8]) {
        self.0.push((side, path, datagram.to_vec()));
    }
}

impl World {
    pub(super) fn schedule(&mut self, after: Duration, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Due {
            at: self.now + after,
            order: self.order,
            event,
        }));
    }

    /// A datagram enters the network.
    pub(crate) fn post(&mut self, from: SocketAddr, to: SocketAddr, bytes: Vec<u8>) {
        if self.dead.contains(&from) || self.dead.contains(&to) {
            return;
        }
        let trace = std::env::var_os("AURALINK_TRACE").is_some();
        let link = if from == back() || to == back() {
            self.options.server_link
        } else {
            self.options.client_link
        };
        let arrivals = link.arrivals(&mut self.rng);
        if trace && bytes.first().is_some_and(|b| (20..64).contains(b)) {
            eprintln!(
                "{:?} {from} -> {to}{}: {arrivals:?}",
                self.elapsed(),
                records(&bytes)
            );
        }
        for after in arrivals {
            self.schedule(after, Event::Datagram(from, to, bytes.clone()));
        }
    }

    pub(super) fn clock(&self) -> Now {
        let elapsed = Duration::from_secs(1_700_000_000) + self.elapsed();
        Now {
            instant: self.now,
            ntp: auralink_proto::aic::ntp_middle(elapsed),
        }
    }

    /// Hands a datagram to the sidecar at once, past the network.
    pub(crate) fn inject(&mut self, side: Side, path: Path, bytes: &[u8]) {
        let now = self.clock();
        let mut out = Out::default();
        if let Some(relay) = &mut self.relay {
            relay.receive(now, side, path, bytes, &mut self.scratch, &mut out);
        }
        self.after_relay(out);
    }

    pub(crate) fn close_relay(&mut self) {
        let now = self.clock();
        let mut out = Out::default();
        if let Some(relay) = &mut self.relay {
            relay.close(now, &mut self.scratch, &mut out);
        }
        self.after_relay(out);
    }

    pub(super) fn after_relay(&mut self, out: Out) {
        for (side, path, bytes) in out.0 {
            self.sent.push((self.now, side, path, bytes.clone()));
            self.post(path.local, path.remote, bytes);
        }
        let elapsed = self.elapsed();
        if let Some(relay) = &mut self.relay {
            while let Some(event) = relay.poll_event() {
                self.events.push((elapsed, event));
            }
        }
    }

    pub(crate) fn flush_peers(&mut self) {
        while let Some((from, to, bytes)) = self.client.poll_transmit() {
            self.post(from, to, bytes);
        }
        while let Some((from, to, bytes)) = self.server.poll_transmit() {
            self.post(from, to, bytes);
        }
    }

    fn deliver(&mut self, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        if self.dead.contains(&to) {
            return;
        }
        let path = Path {
            local: to,
            remote: from,
            tcp: false,
        };
        if to == front() {
            self.inject(Side::Client, path, bytes);
        } else if to == back() {
            self.inject(Side::Server, path, bytes);
        } else if self.client.locals.contains(&to) {
            self.client.receive(self.now, from, to, bytes);
        } else if self.server.locals.contains(&to) {
            self.server.receive(self.now, from, to, bytes);
        }
    }

    /// Does what is next, if it is due until `end`; otherwise sets the clock to `end`.
    fn step(&mut self, end: Instant) -> bool {
        let queued = self.queue.peek().map(|Reverse(due)| due.at);
        let client = self.client.poll_timeout();
        let server = self.server.poll_timeout();
        let relay = self.relay.as_mut().and_then(Relay::poll_timeout);
        let next = [queued, client, server, relay].into_iter().flatten().min();
        let Some(next) = next.filter(|next| *next <= end) else {
            self.now = end;
            return false;
        };
        self.now = self.now.max(next);
        if queued == Some(next)
            && let Some(Reverse(due)) = self.queue.pop()
        {
            match due.event {
                Event::Datagram(from, to, bytes) => self.deliver(from, to, &bytes),
                Event::ProxyFromClient(frame) => self.at_proxy(Side::Client, frame),
                Event::ProxyFromServer(frame) => self.at_proxy(Side::Server, frame),
                Event::Client(frame) => self.at_end(Side::Client, frame),
                Event::Server(frame) => self.at_end(Side::Server, frame),
            }
        } else if relay == Some(next) {
            let now = self.clock();
            let mut out = Out::default();
            if let Some(relay) = &mut self.relay {
                relay.handle_timeout(now, &mut self.scratch, &mut out);
            }
            self.after_relay(out);
        } else if client == Some(next) {
            self.client.handle_timeout(self.now);
        } else {
            self.server.handle_timeout(self.now);
        }
        self.flush_peers();
        true
    }

    /// Lets so much time pass.
    pub(crate) fn run(&mut self, time: Duration) {
        self.flush_peers();
        let end = self.now + time;
        let mut at_once = 0;
        let mut last = self.now;
        while self.step(end) {
            at_once = if self.now == last { at_once + 1 } else { 0 };
            last = self.now;
            assert!(
                at_once < 100_000,
                "the clock stands still: {}",
                self.report()
            );
        }
    }

    /// Lets time pass until `condition` holds, at the most so many seconds; whether it does.
    pub(crate) fn run_until(&mut self, seconds: u64, condition: impl Fn(&Self) -> bool) -> bool {
        let end = self.now + Duration::from_secs(seconds);
        self.flush_peers();
        while self.now < end {
            if condition(self) {
                return true;
            }
            self.run(Duration::from_millis(5));
        }
        condition(self)
    }

    pub(crate) fn run_ms(&mut self, ms: u64) {
        self.run(Duration::from_millis(ms));
    }
}

/// Each DTLS record's content type, epoch, sequence number and, in the clear, handshake type.
fn records(datagram: &[u8]) -> String {
    let mut text = String::new();
    let mut rest = datagram;
    while let [
        kind,
        _,
        _,
        _,
        epoch,
        _,
        _,
        _,
        _,
        _,
        sequence,
        l1,
        l2,
        body @ ..,
    ] = rest
    {
        let len = usize::from(u16::from_be_bytes([*l1, *l2])).min(body.len());
        let _ = write!(text, " [{kind} e{epoch} s{sequence}");
        if *kind == 22 && *epoch == 0 && len > 5 {
            let _ = write!(text, " handshake {} #{}", body[0], body[5]);
        }
        let _ = write!(text, " {len}]");
        rest = &body[len..];
    }
    text
}
