//! The full ICE agent of a server leg (RFC 8445), on `is`: one per peer connection, with UDP
//! sockets of its own, because LiveKit's mux tells peers apart by source address.

use crate::description::{Creds, LegDescription};
use crate::stun::Path;
use is::stun::{StunMessage, StunPacket};
use is::{
    Candidate, CandidateKind, IceAgent, IceAgentEvent, IceConnectionState, IceCreds, Protocol,
};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Pace of connectivity checks (Ta, RFC 8445 section 14.2 allows down to 5 ms). LiveKit is on the
/// same host or pod, and a join waits for it.
const PACE: Duration = Duration::from_millis(5);

/// First retransmission of a check; the usual 250 ms assume a far peer. LiveKit drops checks until
/// it knows our answer, which is on its way to it when the first ones leave, and a join waits.
const FIRST_RTO: Duration = Duration::from_millis(20);

/// The peer's candidates beyond so many are ignored: LiveKit has one per address and protocol.
const MAX_REMOTE: usize = 32;

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
}

impl FullAgent {
    /// An agent for sockets bound to `locals`.
    #[must_use]
    pub fn new(locals: Vec<SocketAddr>, description: &LegDescription) -> Self {
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
        }
    }

    /// Applies what signalling knows. New credentials on both sides are an ICE restart
    /// (RFC 8445 section 9): checks begin anew, media goes on over the path selected before.
    pub fn describe(&mut self, now: Instant, description: &LegDescription) {
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

    /// Takes a STUN datagram that came over `path`.
    pub fn handle(&mut self, now: Instant, path: Path, datagram: &[u8]) {
        let Ok(message) = StunMessage::parse(datagram) else {
            return;
        };
        let packet = StunPacket {
            proto: Protocol::Udp,
            source: path.remote,
            destination: path.local,
            message,
        };
        if self.agent.handle_packet(now, packet) {
            if !self.knows(&path) && self.proved.len() < MAX_REMOTE {
                self.proved.push(path);
            }
            self.agent.handle_timeout(now);
        }
    }

    /// Whether an authentic check or answer has come over `path`.
    #[must_use]
    pub fn knows(&self, path: &Path) -> bool {
        self.proved.contains(path)
    }

    /// Drives checks and consent.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.agent.handle_timeout(now);
    }

    /// When [`FullAgent::handle_timeout`] wants to be called.
    pub fn poll_timeout(&mut self) -> Option<Instant> {
        self.agent.poll_timeout()
    }

    /// The next STUN datagram to send.
    pub fn poll_transmit(&mut self) -> Option<(Path, Vec<u8>)> {
        let transmit = self.agent.poll_transmit()?;
        let path = Path {
            local: transmit.source,
            remote: transmit.destination,
            tcp: false,
        };
        Some((path, transmit.contents.into()))
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<IceEvent> {
        loop {
            return Some(match self.agent.poll_event()? {
                IceAgentEvent::NominatedSend {
                    source,
                    destination,
                    ..
                } => IceEvent::Selected(Path {
                    local: source,
                    remote: destination,
                    tcp: false,
                }),
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
