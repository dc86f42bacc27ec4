//! The full ICE agent of a server leg (RFC 8445), on `is`: one per peer connection, with UDP
//! sockets of its own, because LiveKit's mux tells peers apart by source address.

use crate::description::{Creds, LegDescription};
use crate::stun::{Glance, Path};
use is::stun::{StunMessage, StunPacket};
use is::{
    Candidate, CandidateKind, IceAgent, IceAgentEvent, IceConnectionState, IceCreds, Protocol,
};
use rustc_hash::FxBuildHasher;
use std::hash::BuildHasher;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Pace of connectivity checks (Ta, RFC 8445 section 14.2 allows down to 5 ms). LiveKit is on the
/// same host or pod, and a join waits for it.
const PACE: Duration = Duration::from_millis(5);

/// First retransmission of a check; the usual 250 ms assume a far peer. LiveKit drops checks until
/// it knows our answer, which is on its way to it when the first ones leave, and a join waits.
const FIRST_RTO: Duration = Duration::from_millis(20);

/// A path that works is checked so often, give or take a fifth (RFC 7675 section 5.1): more often than each 4 s it MUST NOT be.
/// LiveKit gives up one that is silent for 15 s.
const CONSENT: Duration = Duration::from_secs(5);

/// A check that is unanswered for so long makes us check as often as in the beginning: over half of `URGENT_RTO`, from where on
/// `is` counts it, and more than most round trips.
const ANSWERED_WITHIN: Duration = Duration::from_millis(1600);

/// The longest time between two of those checks.
const URGENT_RTO: Duration = Duration::from_secs(3);

/// The peer's candidates beyond so many are ignored: LiveKit has one per address and protocol.
const MAX_REMOTE: usize = 32;

/// Paths over which the peer has proved itself that are remembered: those of one of our sockets to all of its candidates, before an ICE
/// restart and after. Each check makes its path the newest, so that the ones in use stay.
const MAX_PROVED: usize = 2 * MAX_REMOTE;

/// How a Binding request begins (RFC 8489 section 5).
const BINDING_REQUEST: [u8; 2] = [0, 1];

/// What the agent tells its leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IceEvent {
    /// Send on this path from now on.
    Selected(Path),
    /// No path works at the moment.
    Disconnected,
    /// A path works again, or for the first time.
    Connected,
}

/// A full agent over the UDP sockets of one peer connection.
pub struct FullAgent {
    agent: IceAgent,
    locals: Vec<SocketAddr>,
    local: Creds,
    remote: Option<Creds>,
    /// Candidates already handed to the agent.
    known: Vec<String>,
    controlling: bool,
    /// Paths over which the peer has proved itself.
    proved: Vec<Path>,
    consent: Consent,
    now: Instant,
}

/// How a path that was selected is checked (RFC 7675).
struct Consent {
    /// Mean time from check to check.
    period: Duration,
    /// Periods so far: each is of another length.
    turn: u32,
    /// None was selected yet: all is checked as fast as it may be.
    path: Option<Path>,
    /// When the check went out that is unanswered.
    asked: Option<Instant>,
    urgent: bool,
}

impl FullAgent {
    /// An agent for sockets bound to `locals`. Three checks fit into `consent_timeout`, which the peer is taken to have as well.
    #[must_use]
    pub fn new(
        now: Instant,
        consent_timeout: Duration,
        locals: Vec<SocketAddr>,
        description: &LegDescription,
    ) -> Self {
        let controlling = description.controlling;
        let agent = start(&locals, &description.local, controlling);
        Self {
            agent,
            locals,
            local: description.local.clone(),
            remote: None,
            known: Vec::new(),
            controlling,
            proved: Vec::new(),
            consent: Consent {
                period: CONSENT.min(consent_timeout / 3),
                turn: 0,
                path: None,
                asked: None,
                urgent: false,
            },
            now,
        }
    }

    /// The next check of the selected path comes when the path is a period older.
    fn calm(&mut self) {
        let consent = &mut self.consent;
        (consent.asked, consent.urgent) = (None, false);
        consent.turn = consent.turn.wrapping_add(1);
        // From 0.8 to 1.2, so that checks of many legs don't fall together.
        let odd = FxBuildHasher.hash_one((&self.local.ufrag, consent.turn)) % 401;
        let period = consent.period * (800 + u32::try_from(odd).unwrap_or(0)) / 1000;
        self.agent.set_initial_stun_rto(period);
        self.agent.set_max_stun_rto(period);
    }

    /// Whether a check has been unanswered for too long.
    fn hurry(&mut self, now: Instant) {
        self.now = now;
        if self.consent.urgent || self.patience().is_none_or(|end| end > now) {
            return;
        }
        self.consent.urgent = true;
        self.agent.set_initial_stun_rto(FIRST_RTO);
        self.agent.set_max_stun_rto(URGENT_RTO);
    }

    fn patience(&self) -> Option<Instant> {
        let asked = self.consent.asked.filter(|_| !self.consent.urgent)?;
        Some(asked + ANSWERED_WITHIN)
    }

    /// Applies what signalling knows. New credentials on both sides are an ICE restart
    /// (RFC 8445 section 9): checks begin anew, media goes on over the path selected before.
    pub fn describe(&mut self, now: Instant, description: &LegDescription) {
        self.now = now;
        let Some(remote) = &description.remote else {
            return;
        };
        let controlling = description.controlling || description.remote_lite;
        let changed = self.remote.as_ref() != Some(remote);
        if changed {
            if self.remote.is_some() || self.local != description.local {
                if self.remote.is_some() && self.local == description.local {
                    // The peer restarted and our own new credentials aren't known yet: the pair
                    // of new ones comes with the answer.
                    return;
                }
                self.agent = start(&self.locals, &description.local, controlling);
                self.local = description.local.clone();
                self.known.clear();
                (self.consent.path, self.consent.asked) = (None, None);
            }
            self.agent.set_remote_credentials(IceCreds {
                ufrag: remote.ufrag.clone(),
                pass: remote.pwd.clone(),
            });
            self.remote = Some(remote.clone());
        }
        if self.controlling != controlling {
            self.controlling = controlling;
            self.agent.set_controlling(controlling);
        }
        for line in description.remote_candidates.iter().take(MAX_REMOTE) {
            if self.known.contains(line) {
                continue;
            }
            self.known.push(line.clone());
            // Host names (mDNS) and unknown kinds don't parse; TCP isn't dialled: LiveKit listens
            // on UDP wherever a sidecar can stand beside it.
            if let Ok(candidate) = Candidate::from_sdp_string(line)
                && candidate.proto() == Protocol::Udp
                && candidate.kind() != CandidateKind::PeerReflexive
            {
                self.agent.add_remote_candidate(candidate);
            }
        }
        self.agent.handle_timeout(now);
    }

    /// Takes a STUN datagram that came over `path`. `false`: it is not authentic, and nothing was done.
    pub fn handle(&mut self, now: Instant, path: Path, datagram: &[u8]) -> bool {
        if !Glance::of(datagram).is_some_and(|glance| glance.is_signed()) {
            return false;
        }
        let Ok(message) = StunMessage::parse(datagram) else {
            return false;
        };
        let answer = message.is_successful_binding_response();
        let packet = StunPacket {
            proto: Protocol::Udp,
            source: path.remote,
            destination: path.local,
            message,
        };
        self.now = now;
        if !self.agent.handle_packet(now, packet) {
            return false;
        }
        if answer && self.consent.path == Some(path) {
            self.calm();
        }
        // The one that was heard of last is at the end, and the first in line to be forgotten is the oldest.
        self.proved.retain(|known| *known != path);
        self.proved.push(path);
        if self.proved.len() > MAX_PROVED {
            self.proved.remove(0);
        }
        self.agent.handle_timeout(now);
        true
    }

    /// Whether an authentic check or answer has come over `path`.
    #[must_use]
    pub fn knows(&self, path: &Path) -> bool {
        self.proved.contains(path)
    }

    /// Drives checks and consent.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.hurry(now);
        self.agent.handle_timeout(now);
    }

    /// When [`FullAgent::handle_timeout`] wants to be called.
    pub fn poll_timeout(&mut self) -> Option<Instant> {
        self.agent
            .poll_timeout()
            .into_iter()
            .chain(self.patience())
            .min()
    }

    /// The next STUN datagram to send.
    pub fn poll_transmit(&mut self) -> Option<(Path, Vec<u8>)> {
        let transmit = self.agent.poll_transmit()?;
        let path = Path {
            local: transmit.source,
            remote: transmit.destination,
            tcp: false,
        };
        let datagram: Vec<u8> = transmit.contents.into();
        if self.consent.path == Some(path) && datagram.starts_with(&BINDING_REQUEST) {
            self.consent.asked.get_or_insert(self.now);
        }
        Some((path, datagram))
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<IceEvent> {
        loop {
            return Some(match self.agent.poll_event()? {
                IceAgentEvent::NominatedSend {
                    source,
                    destination,
                    ..
                } => {
                    let path = Path {
                        local: source,
                        remote: destination,
                        tcp: false,
                    };
                    self.consent.path = Some(path);
                    self.calm();
                    IceEvent::Selected(path)
                }
                IceAgentEvent::IceConnectionStateChange(IceConnectionState::Disconnected) => {
                    IceEvent::Disconnected
                }
                IceAgentEvent::IceConnectionStateChange(state) if state.is_connected() => {
                    IceEvent::Connected
                }
                _ => continue,
            });
        }
    }
}

fn start(locals: &[SocketAddr], local: &Creds, controlling: bool) -> IceAgent {
    let mut agent = IceAgent::new(IceCreds {
        ufrag: local.ufrag.clone(),
        pass: local.pwd.clone(),
    });
    agent.set_controlling(controlling);
    agent.set_timing_advance(PACE);
    agent.set_initial_stun_rto(FIRST_RTO);
    for addr in locals {
        if let Ok(candidate) = Candidate::host(*addr, Protocol::Udp) {
            agent.add_local_candidate(candidate);
        }
    }
    agent
}

impl std::fmt::Debug for FullAgent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FullAgent")
            .field("locals", &self.locals)
            .field("state", &self.agent.state())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
mod tests {
    use super::*;

    const STEP: Duration = Duration::from_millis(10);

    fn creds(name: &str) -> Creds {
        Creds {
            ufrag: name.to_owned(),
            pwd: name.repeat(6),
        }
    }

    /// Our agent and a peer's, 10 ms apart, for so many seconds; the path is cut after `cut`. When, in seconds, our checks went out,
    /// and when the path was selected and lost.
    fn checks(consent_timeout: u64, seconds: u64, cut: u64) -> (Vec<f64>, f64, Option<f64>) {
        let start = Instant::now();
        let (here, there): (SocketAddr, SocketAddr) = (
            "192.0.2.1:1".parse().unwrap(),
            "192.0.2.2:2".parse().unwrap(),
        );
        let description = LegDescription {
            local: creds("ours"),
            remote: Some(creds("peer")),
            fingerprints: Vec::new(),
            dtls: None,
            remote_candidates: vec!["candidate:1 1 udp 1 192.0.2.2 2 typ host".to_owned()],
            remote_lite: true,
            short_tags: false,
            aic_pts: (None, None),
            controlling: true,
        };
        let timeout = Duration::from_secs(consent_timeout);
        let mut ours = FullAgent::new(start, timeout, vec![here], &description);
        let mut peer = start_peer(there);
        ours.describe(start, &description);
        let (mut times, mut selected, mut lost) = (Vec::new(), 0.0, None);
        for step in 0..seconds * 100 {
            let now = start + STEP * u32::try_from(step).unwrap();
            let at = (now - start).as_secs_f64();
            if ours.poll_timeout().is_none_or(|due| due <= now) {
                ours.handle_timeout(now);
            }
            peer.handle_timeout(now);
            while let Some((path, datagram)) = ours.poll_transmit() {
                if datagram.starts_with(&BINDING_REQUEST) {
                    times.push(at);
                }
                if at < cut as f64 {
                    let message = StunMessage::parse(&datagram).unwrap();
                    let packet = StunPacket {
                        proto: Protocol::Udp,
                        source: path.local,
                        destination: path.remote,
                        message,
                    };
                    peer.handle_packet(now, packet);
                }
            }
            while let Some(transmit) = peer.poll_transmit() {
                let path = Path {
                    local: here,
                    remote: there,
                    tcp: false,
                };
                let datagram: Vec<u8> = transmit.contents.into();
                ours.handle(now + STEP, path, &datagram);
            }
            while let Some(event) = ours.poll_event() {
                match event {
                    IceEvent::Selected(_) => selected = at,
                    IceEvent::Disconnected => lost = lost.or(Some(at)),
                    IceEvent::Connected => {}
                }
            }
        }
        (times, selected, lost)
    }

    fn start_peer(local: SocketAddr) -> IceAgent {
        let mut peer = IceAgent::new(IceCreds {
            ufrag: creds("peer").ufrag,
            pass: creds("peer").pwd,
        });
        peer.set_ice_lite(true);
        peer.set_remote_credentials(IceCreds {
            ufrag: creds("ours").ufrag,
            pass: creds("ours").pwd,
        });
        peer.add_local_candidate(Candidate::host(local, Protocol::Udp).unwrap());
        peer
    }

    #[test]
    fn a_path_that_works_is_checked_as_rfc_7675_says() {
        let (times, selected, lost) = checks(30, 300, 300);
        assert!(selected < 1.0 && lost.is_none(), "{selected} {lost:?}");
        let later: Vec<f64> = times
            .into_iter()
            .filter(|at| *at > selected + 1.0)
            .collect();
        let gaps: Vec<f64> = later.windows(2).map(|two| two[1] - two[0]).collect();
        assert!(gaps.len() > 45, "{gaps:?}");
        assert!(
            gaps.iter().all(|gap| (3.99..6.05).contains(gap)),
            "{gaps:?}"
        );
        let (shortest, longest) = gaps
            .iter()
            .fold((9.0f64, 0.0f64), |(a, b), gap| (a.min(*gap), b.max(*gap)));
        assert!(longest - shortest > 1.0, "not all alike: {gaps:?}");
    }

    #[test]
    fn a_path_that_fails_is_noticed_soon() {
        let (_, _, lost) = checks(30, 120, 60);
        let after = lost.unwrap() - 60.0;
        assert!((5.0..16.0).contains(&after), "{after}");
        // Who ends a leg that is silent for 5 s is asked for consent more often.
        let (times, selected, _) = checks(5, 60, 60);
        let count = times.iter().filter(|at| **at > selected + 1.0).count();
        assert!((25..50).contains(&count), "{count}");
    }
}
