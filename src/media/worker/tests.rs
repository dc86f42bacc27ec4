//! A worker's turn from inside, datagram by datagram.

use super::handshakes::A_TURN;
use super::*;
use crate::media::tests::{check, description};
use auralink_engine::EngineConfig;
use auralink_proto::description::{DtlsRole, Fingerprint};
use auralink_proto::dtls::Dtls;
use std::net::UdpSocket;

const PWD: &str = "a-password-of-22-chars";

/// A worker that isn't running, and a participant's socket.
struct Bench {
    state: State,
    peer: UdpSocket,
    path: Path,
    _commands: mpsc::Sender<Command>,
    _events: tokio::sync::mpsc::UnboundedReceiver<MediaEvent>,
}

fn bound() -> (SocketAddr, UdpSocket) {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    (socket.local_addr().unwrap(), socket)
}

fn bench() -> Bench {
    let (local, socket) = bound();
    let (commands, receiver) = mpsc::channel();
    let (sender, events) = tokio::sync::mpsc::unbounded_channel();
    let (state, _) = State::new(Setup {
        index: 0,
        sockets: vec![(local, socket)],
        identity: Identity::generate().unwrap(),
        realtime: false,
        consent: Consent::new(Duration::from_secs(30)),
        engine: Arc::new(Engine::start(EngineConfig::default()).unwrap()),
        commands: receiver,
        mailbox: Arc::default(),
        events: sender,
        snapshot: Arc::default(),
        ended: tokio::sync::watch::channel(None).0,
    })
    .unwrap();
    let (remote, peer) = bound();
    peer.set_read_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    Bench {
        state,
        peer,
        path: Path {
            local,
            remote,
            tcp: false,
        },
        _commands: commands,
        _events: events,
    }
}

fn fingerprint(identity: &Identity) -> Fingerprint {
    let (algorithm, digest) = identity.fingerprint().split_once(' ').unwrap();
    let digest = digest.split(':').map(|hex| u8::from_str_radix(hex, 16));
    Fingerprint {
        algorithm: algorithm.to_owned(),
        digest: digest.collect::<Result<_, _>>().unwrap(),
    }
}

impl Bench {
    /// Opens a peer connection whose client is the participant; its slot and the address of its server leg.
    fn opened(&mut self, session: SessionId, identity: Option<&Identity>) -> (usize, SocketAddr) {
        let mut description = description(&format!("00ufrag{session}"));
        description.client.dtls = Some(DtlsRole::Server);
        description
            .client
            .fingerprints
            .extend(identity.map(fingerprint));
        let (addr, socket) = bound();
        self.state.describe(session, &description, vec![socket]);
        (self.state.by_session[&(session, Target::Publisher)], addr)
    }

    /// A datagram of the participant's.
    fn comes(&mut self, datagram: &[u8]) {
        self.state
            .datagram(now(), Owner::Clients, self.path, datagram);
    }
}

#[test]
fn whoever_has_proved_no_address_takes_no_handshakes_place() {
    let mut bench = bench();
    bench.opened(1, None);
    let (other, server) = bench.opened(2, None);
    bench.comes(&check("00ufrag1", PWD));
    bench.state.handshakes.turn();
    let stranger = Path {
        local: server,
        ..bench.path
    };
    for _ in 0..1000 {
        let owner = Owner::Pc(other);
        bench.state.datagram(now(), owner, stranger, &[22]);
    }
    // Who joins beside that has the whole turn, whatever the first record of its datagrams is.
    for n in 0..A_TURN {
        bench.comes(&[[22, 0], [20, 22], [23, 22]][n % 3]);
    }
    assert!(!bench.state.handshakes.any());
    assert_eq!(bench.state.out.counters.dropped_handshake, 0);
    bench.comes(&[20, 22]);
    assert!(bench.state.handshakes.any(), "the turn has done its share");
}

#[test]
fn a_leg_that_has_its_keys_waits_for_no_handshakes() {
    let mut bench = bench();
    let identity = Identity::generate().unwrap();
    let (key, _) = bench.opened(1, Some(&identity));
    bench.comes(&check("00ufrag1", PWD));
    let mut dtls = Dtls::new(now().instant, DtlsRole::Client, &identity, false).unwrap();
    let state = |bench: &Bench| bench.state.pcs[key].relay.leg(Side::Client).state();
    let mut buffer = [0; 2048];
    for _ in 0..100 {
        bench.state.handshakes.turn();
        while let Some(message) = dtls.poll_transmit() {
            bench.comes(&message);
        }
        bench.state.out.flush();
        while state(&bench) != LegState::Established
            && let Ok(len) = bench.peer.recv(&mut buffer)
        {
            if classify(&buffer[..len]) == Kind::Dtls {
                dtls.handle(now().instant, &buffer[..len], |_| {});
            }
        }
    }
    assert_eq!(state(&bench), LegState::Established);
    bench.state.handshakes.turn();
    for _ in 0..1000 {
        bench.comes(&[22]);
    }
    assert!(!bench.state.handshakes.any());
    assert_eq!(bench.state.out.counters.dropped_handshake, 0);
}

#[test]
fn nobody_is_blamed_for_a_datagram_that_is_not_theirs() {
    let mut bench = bench();
    let (key, _) = bench.opened(1, None);
    bench.comes(&check("00ufrag1", PWD));
    assert_eq!(bench.state.at, Some(key));
    bench.comes(&check("00nobody", PWD));
    assert_eq!(bench.state.at, None);
    let path = bench.path;
    bench.state.guarded(|state| {
        state.datagram(now(), Owner::Clients, path, &check("00ufrag1", PWD));
    });
    assert_eq!(bench.state.at, None);
}
