//! Workers from outside: what happens to the others when one thing breaks.

use super::*;
use auralink_engine::EngineConfig;
use auralink_proto::description::{Creds, LegDescription};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use tokio::sync::mpsc::UnboundedReceiver;

/// A peer connection of which nothing is known but our own side.
pub(super) fn description(ufrag: &str) -> PcDescription {
    let leg = |ufrag: &str| LegDescription {
        local: Creds {
            ufrag: ufrag.to_owned(),
            pwd: "a-password-of-22-chars".to_owned(),
        },
        remote: None,
        fingerprint: None,
        dtls: None,
        remote_candidates: Vec::new(),
        remote_lite: false,
        short_tags: false,
        aic_pts: (None, None),
        controlling: false,
    };
    PcDescription {
        target: Target::Publisher,
        client: leg(ufrag),
        server: leg("back"),
        up: Vec::new(),
        down: Vec::new(),
        mid_ext_id: None,
    }
}

fn started(workers: usize, tcp_port: Option<u16>) -> (Media, UnboundedReceiver<MediaEvent>) {
    let (sender, events) = tokio::sync::mpsc::unbounded_channel();
    let config = MediaConfig {
        ips: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
        udp_port: 0,
        tcp_port,
        workers,
        realtime: false,
        consent_timeout: Duration::from_secs(30),
    };
    let engine = Arc::new(Engine::start(EngineConfig::default()).unwrap());
    let media = Media::start(config, &Identity::generate().unwrap(), engine, sender).unwrap();
    (media, events)
}

/// Opens a peer connection; the address of its server leg.
fn opened(media: &Media, worker: usize, session: SessionId) -> SocketAddr {
    let (addresses, sockets): (Vec<_>, Vec<_>) =
        media.bind_server_leg().unwrap().into_iter().unzip();
    let description = description(&format!("{}ufrag{session}", ufrag_prefix(worker)));
    media.describe(worker, session, description, sockets);
    addresses[0]
}

fn until(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..1000 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("not within 10 s: {what}");
}

/// A port can be bound again once the worker has let it go.
fn is_free(addr: SocketAddr) -> bool {
    UdpSocket::bind(addr).is_ok()
}

#[test]
fn a_panic_costs_the_peer_connection_that_was_being_handled_and_no_other() {
    let (media, mut events) = started(1, None);
    let addresses: Vec<SocketAddr> = (1..=3).map(|id| opened(&media, 0, id)).collect();
    media.send(0, Command::Fall(Some(2)));
    let event = events.blocking_recv().unwrap();
    assert!(
        matches!(
            event,
            MediaEvent::Closed {
                session: 2,
                reason: CloseReason::Defect,
                ..
            }
        ),
        "{event:?}"
    );
    until("its socket is free", || is_free(addresses[1]));
    // The worker goes on with the others, and with new ones.
    let new = opened(&media, 0, 4);
    until("a snapshot of the rest", || {
        let snapshot = media.snapshots()[0].clone();
        let live: Vec<SessionId> = snapshot.pcs.iter().map(|pc| pc.session).collect();
        snapshot.counters.panics == 1 && live == [1, 4, 3]
    });
    assert_eq!(media.alive(), [true]);
    for addr in [addresses[0], addresses[2], new] {
        assert!(!is_free(addr));
    }
}

#[tokio::test]
async fn a_worker_that_ends_is_told_of() {
    let (media, _events) = started(2, None);
    let other = tokio::time::timeout(Duration::from_millis(50), media.ended()).await;
    assert!(other.is_err(), "{other:?}");
    media.send(1, Command::Fall(None));
    let why = tokio::time::timeout(Duration::from_secs(10), media.ended()).await;
    assert_eq!(why.unwrap(), "media worker 1 panicked");
    until("it is seen", || media.alive() == [true, false]);
}

#[test]
fn a_peer_connection_that_cannot_be_opened_leaves_nothing_behind() {
    let (media, mut events) = started(1, None);
    let (addr, good) = media.bind_server_leg().unwrap().remove(0);
    // No socket at all: taking it over fails after the first was taken.
    let bad = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    media.describe(0, 7, description("00abcd"), vec![good, bad.into()]);
    let event = events.blocking_recv().unwrap();
    assert!(
        matches!(
            event,
            MediaEvent::Closed {
                session: 7,
                reason: CloseReason::Defect,
                ..
            }
        ),
        "{event:?}"
    );
    until("the first socket is free", || is_free(addr));
    // Its place is another's now, and that one can be reached and ended.
    let next = opened(&media, 0, 8);
    media.close(0, 8);
    until("the next one's socket is free", || is_free(next));
}

#[test]
fn sockets_of_media_fragment_as_any_socket_does() {
    for ip in ["127.0.0.1", "::1"] {
        let ip: IpAddr = ip.parse().unwrap();
        let Ok(plain) = UdpSocket::bind((ip, 0)) else {
            assert!(ip.is_ipv6(), "no IPv4 here");
            continue;
        };
        let socket = socket::bind_udp(SocketAddr::new(ip, 0)).unwrap();
        let local = socket.local_addr().unwrap();
        let udp = sender::Udp::new(socket, local).unwrap();
        let of = |socket: &_| mtu::Fragments::of(socket, ip.is_ipv6()).unwrap();
        assert_eq!(
            of(&std::os::fd::AsFd::as_fd(&udp.socket)),
            of(&std::os::fd::AsFd::as_fd(&plain))
        );
    }
}

#[test]
fn a_join_storm_is_spread_before_any_worker_has_said_a_word() {
    let (media, _events) = started(4, None);
    let places: Vec<Place> = (0..40).map(|_| media.place()).collect();
    assert_eq!(media.placed(), [10, 10, 10, 10]);
    drop(places);
    assert_eq!(media.placed(), [0, 0, 0, 0]);
}
