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
        fingerprints: Vec::new(),
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
        external: Vec::new(),
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

/// A binding request (RFC 8489) to who has this username fragment, signed with a password.
pub(super) fn check(ufrag: &str, pwd: &str) -> Vec<u8> {
    use is::Sha1HmacProvider;
    let username = format!("{ufrag}:them");
    let mut message = vec![0, 1, 0, 0, 0x21, 0x12, 0xa4, 0x42];
    message.extend([7; 12]);
    let len = username.len();
    message.extend([0, 6, 0, len as u8]);
    message.extend(username.as_bytes());
    message.resize(message.len().next_multiple_of(4), 0);
    // ICE-CONTROLLING and PRIORITY (RFC 8445 section 16.1).
    message.extend([0x80, 0x2a, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]);
    message.extend([0, 0x24, 0, 4, 0x6e, 0, 1, 0xff]);
    let body = message.len() as u16 - 20 + 24;
    message[2..4].copy_from_slice(&body.to_be_bytes());
    let digest = is::DefaultSha1HmacProvider.sha1_hmac(pwd.as_bytes(), &[message.as_slice()]);
    message.extend([0, 8, 0, 20]);
    message.extend(digest);
    message
}

fn framed(datagram: &[u8]) -> Vec<u8> {
    let mut frame = (datagram.len() as u16).to_be_bytes().to_vec();
    frame.extend(datagram);
    frame
}

/// A connection to a media port from one of loopback's many addresses.
fn dialled(from: [u8; 4], to: SocketAddr) -> std::net::TcpStream {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
    socket.connect(&to.into()).unwrap();
    socket.into()
}

fn is_over(stream: &mut std::net::TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let over = match io::Read::read(stream, &mut [0; 64]) {
        Ok(n) => n == 0,
        Err(error) => error.kind() != io::ErrorKind::WouldBlock,
    };
    stream.set_nonblocking(false).unwrap();
    over
}

fn counters(media: &Media) -> WorkerCounters {
    media.snapshots()[0].counters
}

/// Media that accepts ICE-TCP, and where.
fn accepting() -> (Arc<Media>, SocketAddr, UnboundedReceiver<MediaEvent>) {
    let (media, events) = started(1, Some(0));
    let media = Arc::new(media);
    let addr = media.tcp[0].0;
    tokio::spawn(media.clone().accept_tcp());
    (media, addr, events)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connections_of_one_address_keep_nobody_else_out() {
    let (media, addr, _events) = accepting();
    let mut silent: Vec<_> = (0..300).map(|_| dialled([127, 0, 0, 2], addr)).collect();
    let open = |silent: &mut Vec<std::net::TcpStream>| {
        silent.retain_mut(|stream| !is_over(stream));
        silent.len()
    };
    for _ in 0..1000 {
        if open(&mut silent) == arrivals::MOST_OF_ONE {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(open(&mut silent), arrivals::MOST_OF_ONE);
    // Somebody else is looked at: for a check that names nobody that is the end.
    let mut other = dialled([127, 0, 0, 3], addr);
    io::Write::write_all(
        &mut other,
        &framed(&check("00nobody", "a-password-of-22-chars")),
    )
    .unwrap();
    until("the check is looked at", || {
        counters(&media).dropped_unknown_ufrag == 1
    });
    until("it is over", || is_over(&mut other.try_clone().unwrap()));
    assert_eq!(open(&mut silent), arrivals::MOST_OF_ONE);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_empty_frames_is_spread_over_turns_and_a_bad_one_ends_it() {
    let (media, addr, _events) = accepting();
    opened(&media, 0, 1);
    let mut stream = dialled([127, 0, 0, 2], addr);
    let first = framed(&check("00ufrag1", "a-password-of-22-chars"));
    io::Write::write_all(&mut stream, &first).unwrap();
    let mut answer = [0; 64];
    let read = io::Read::read(&mut stream, &mut answer).unwrap();
    assert!(
        read > 20 && answer[2..4] == [1, 1],
        "a success response: {answer:?}"
    );

    let before = counters(&media);
    let frames = 200_000;
    io::Write::write_all(&mut stream, &vec![0; 2 * frames]).unwrap();
    until("all have been read", || {
        counters(&media).received >= before.received + frames as u64
    });
    let after = counters(&media);
    // Whatever came together: between any 128 of them the others had their turn.
    let turns = after.turns - before.turns;
    assert!(turns >= frames as u64 / 128, "{turns} turns");
    assert!(!is_over(&mut stream));
    io::Write::write_all(&mut stream, &[0xff, 0xff, 0, 0]).unwrap();
    until("the connection is over", || {
        is_over(&mut stream.try_clone().unwrap())
    });
    assert_eq!(media.alive(), [true]);
}

/// Behind a NAT: what is bound stays local, and LiveKit, which may be on this side of it, is told of that.
#[tokio::test]
async fn clients_are_told_the_external_address_and_livekit_the_local_one() {
    let (sender, _events) = tokio::sync::mpsc::unbounded_channel();
    let (local, external) = (IpAddr::V4(Ipv4Addr::LOCALHOST), [203, 0, 113, 7].into());
    let config = MediaConfig {
        ips: vec![local],
        external: vec![([192, 0, 2, 1].into(), local), (local, external)],
        udp_port: 0,
        tcp_port: Some(0),
        workers: 1,
        realtime: false,
        consent_timeout: Duration::from_secs(30),
    };
    let engine = Arc::new(Engine::start(EngineConfig::default()).unwrap());
    let media = Media::start(config, &Identity::generate().unwrap(), engine, sender).unwrap();
    let told = media.client_candidates(0);
    assert_eq!(told.len(), 2);
    for candidate in &told {
        assert_eq!(candidate.addr.ip(), external);
        assert_ne!(candidate.addr.port(), 0);
    }
    let udp = told.iter().find(|candidate| !candidate.tcp).unwrap();
    assert!(
        UdpSocket::bind((local, udp.addr.port())).is_err(),
        "the port is taken at the local address"
    );
    assert_eq!(media.bind_server_leg().unwrap()[0].0.ip(), local);
}
