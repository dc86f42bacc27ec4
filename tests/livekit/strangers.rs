//! What strangers send while a call goes on: the worst of each kind that needs no token, one kind after the other. The call
//! beside it loses nothing, no more of its packets come late than of a call through a sidecar that strangers leave alone, what it
//! costs in memory is bounded, and operators are answered.
//!
//! What each kind costs by itself is counted where it is handled: docs/security.md names these tests.

use crate::client::{Client, Kind};
use crate::harness::{Load, Trial};
use crate::http;
use crate::servers::{Options, Sidecar, Stack};
use crate::wire::{capture, now};
use flate2::Compression;
use flate2::write::GzEncoder;
use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

/// Later than this a packet is late: because of strangers, or because the machine was busy, which the other call tells.
const LATE: Duration = Duration::from_millis(50);

/// Of the packets so many may be late that of the other call are not.
const MORE_LATE: f64 = 0.01;

/// How long each kind goes on.
const EACH: Duration = Duration::from_secs(2);

/// What the process may ever hold beyond what it held before, in KiB. The parts are in docs/security.md; together they are below
/// it, and an allocator keeps some of what was freed.
const MOST_KIB: u64 = 64 * 1024;

/// SSRC of the RTP that nobody's keys have sealed: it goes in, and never out.
const FORGED: u32 = 0x5555_5555;

/// A span of the call, in nanoseconds since 1970.
struct Span {
    what: &'static str,
    began: u128,
    ended: u128,
}

/// What became of the call's packets in a span.
#[derive(Debug, Default)]
struct Crossed {
    packets: usize,
    late: usize,
    lost: usize,
    longest: Duration,
}

/// Pairs each packet's first appearance with its second: into the sidecar that has these ports for clients and out of it again. Rooms
/// that are off keep SSRC, sequence number and timestamp.
fn crossed(packets: &Path, ports: &[u16], spans: &[Span]) -> Vec<Crossed> {
    let text = fs::read_to_string(packets).unwrap();
    let lines = || text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    // A stream that is seen there is seen at LiveKit's port too, where those of all sidecars are.
    let own: HashSet<String> = lines()
        .filter(|field| {
            field[1..3].iter().any(|address| {
                let port = address.rsplit(':').next().unwrap();
                ports.contains(&port.parse().unwrap())
            })
        })
        .map(|field| field[3].to_owned())
        .collect();
    let mut first = HashMap::<(u32, u16, u32), u128>::new();
    let mut pairs = Vec::new();
    for field in lines().filter(|field| own.contains(field[3])) {
        let [time, _, _, ssrc, sequence, timestamp, ..] = field[..] else {
            panic!("rtp.py: {field:?}");
        };
        let key = (
            ssrc.parse().unwrap(),
            sequence.parse().unwrap(),
            timestamp.parse().unwrap(),
        );
        if key.0 == FORGED {
            continue;
        }
        let time = time.parse().unwrap();
        match first.remove(&key) {
            Some(before) => pairs.push((before, time - before)),
            None => drop(first.insert(key, time)),
        }
    }
    spans
        .iter()
        .map(|span| {
            let within = |time: u128| (span.began..span.ended).contains(&time);
            let mut found = Crossed {
                lost: first.values().filter(|time| within(**time)).count(),
                ..Crossed::default()
            };
            for (_, took) in pairs.iter().filter(|(before, _)| within(*before)) {
                let took = Duration::from_nanos(u64::try_from(*took).unwrap());
                found.packets += 1;
                found.late += usize::from(took > LATE);
                found.longest = found.longest.max(took);
            }
            found
        })
        .collect()
}

/// Calls `send` so many times a second for [`EACH`].
fn pace(each_second: u32, mut send: impl FnMut(u32)) {
    let began = Instant::now();
    let mut sent = 0;
    while began.elapsed() < EACH {
        let due = (began.elapsed().as_secs_f64() * f64::from(each_second)) as u32;
        while sent < due {
            send(sent);
            sent += 1;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Datagrams of every kind that RFC 7983 knows, to each worker, from addresses that no check has proved.
fn datagrams(sidecar: &Sidecar) {
    let sockets: Vec<UdpSocket> = (0..16)
        .map(|_| UdpSocket::bind(("127.0.0.1", 0)).unwrap())
        .collect();
    let mut stun = vec![0, 1, 0, 28, 0x21, 0x12, 0xa4, 0x42];
    stun.extend([7; 12]);
    // USERNAME of nobody's, and a PRIORITY.
    stun.extend([0, 6, 0, 9]);
    stun.extend(*b"00xxxx:yy\0\0\0");
    stun.extend([0, 0x24, 0, 4, 1, 2, 3, 4]);
    stun.extend([0, 0x25, 0, 0]);
    let mut hello = vec![22, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 13];
    hello.extend([1, 0, 200, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
    let mut rtp = vec![0x80, 111];
    rtp.resize(200, 0x55);
    let mut rtcp = vec![0x81, 203, 0, 1, 0, 0, 0, 1];
    rtcp.resize(40, 0);
    let kinds = [stun, hello.repeat(40), rtp, rtcp, vec![255; 1200]];
    pace(5_000, |n| {
        let n = n as usize;
        let port = sidecar.udp_port + u16::try_from(n).unwrap_or(0) % sidecar.options.workers;
        let socket = &sockets[n % sockets.len()];
        // A full buffer is as good as a lost datagram.
        let _ = socket.send_to(&kinds[n % kinds.len()], ("127.0.0.1", port));
    });
}

/// ICE-TCP: connections that say nothing, and ones that send frames of no bytes as fast as they are taken.
fn ice_tcp(sidecar: &Sidecar) {
    let silent = connections(sidecar.tcp_port, 300, b"");
    let mut busy: Vec<TcpStream> = connections(sidecar.tcp_port, 4, b"");
    for stream in &busy {
        stream.set_nonblocking(true).unwrap();
    }
    let empty = vec![0; 64 * 1024];
    pace(200, |n| {
        let count = busy.len();
        if let Some(stream) = busy.get_mut(n as usize % count.max(1))
            && matches!(stream.write(&empty), Err(error) if error.kind() != std::io::ErrorKind::WouldBlock)
        {
            busy.extend(connections(sidecar.tcp_port, 1, b""));
            busy.swap_remove(n as usize % count);
        }
    });
    drop(silent);
}

/// So many connections that send `head` and then wait.
fn connections(port: u16, count: usize, head: &[u8]) -> Vec<TcpStream> {
    (0..count)
        .filter_map(|_| {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
            let _ = stream.set_nodelay(true);
            // One that was turned away says so at its next use.
            let _ = stream.write_all(head);
            Some(stream)
        })
        .collect()
}

/// Requests whose heads or bodies never end.
fn unfinished(sidecar: &Sidecar) {
    let mut long = b"GET /rtc HTTP/1.1\r\nHost: x\r\nX-Long: ".to_vec();
    long.resize(60_000, b'a');
    let held = [
        connections(sidecar.port, 200, &long),
        connections(sidecar.port, 200, b"POST /whip/v1 HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\nContent-Type: application/sdp\r\n\r\nv=0"),
        connections(sidecar.port, 100, b"PATCH /whip/v1/PA_x HTTP/1.1\r\nHost: x\r\nContent-Length: 200000\r\n\r\n"),
        connections(sidecar.admin_port, 100, b""),
    ];
    std::thread::sleep(EACH);
    drop(held);
}

/// A field of a protobuf message: bytes.
fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut out = vec![number << 3 | 2];
    let mut len = bytes.len();
    while len > 127 {
        out.push((len & 127) as u8 | 128);
        len >>= 7;
    }
    out.push(len as u8);
    out.extend(bytes);
    out
}

/// The head of a request for `/rtc/v1` with a gzipped `join_request`, and a token that nobody signed.
fn join_head(tracks: u32, sections: u32, lines: u32, offers: u32) -> Vec<u8> {
    let mut request = Vec::new();
    for n in 0..tracks {
        // JoinRequest.add_track_requests: cid and source.
        let track = [field(1, format!("track-{n}").as_bytes()), vec![0x40, 2]];
        request.extend(field(5, &track.concat()));
    }
    let mut sdp = "v=0\r\no=- 1 1 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\n".to_owned();
    for n in 0..sections {
        sdp.push_str(&format!(
            "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:{n}\r\na=msid:s track-{n}\r\na=ice-ufrag:u\r\na=ice-pwd:p\r\n"
        ));
        for id in 0..lines {
            sdp.push_str(&format!("a=ssrc:{id} x\r\n"));
        }
    }
    // JoinRequest.publisher_offer: a SessionDescription.
    let offer = [field(1, b"offer"), field(2, sdp.as_bytes())].concat();
    for _ in 0..offers {
        request.extend(field(6, &offer));
    }
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    gzip.write_all(&request).unwrap();
    // WrappedJoinRequest: compression GZIP, join_request.
    let wrapped = [vec![8, 1], field(2, &gzip.finish().unwrap())].concat();
    let encoded = base64_url(&wrapped);
    let token = http::grant(
        serde_json::json!({"room": "off-strangers", "roomJoin": true}),
        "mallory",
        "another secret of at least 32 characters",
    );
    let target = format!("/rtc/v1?join_request={encoded}&access_token={token}");
    let mut head = format!("GET {target} HTTP/1.1\r\nHost: x\r\n");
    for (name, value) in http::UPGRADE {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    head.push_str("\r\n");
    head.into_bytes()
}

/// The dearest request that is taken, which only LiveKit refuses, and one that is refused for its size.
fn joins(sidecar: &Sidecar) {
    let dearest = join_head(16, 64, 100, 1);
    let bomb = join_head(200, 64, 100, 10);
    let mut answers = Vec::new();
    pace(25, |n| {
        let (head, status) = if n % 2 == 0 {
            (&dearest, "401")
        } else {
            (&bomb, "400")
        };
        let answer = connections(sidecar.port, 1, head);
        answers.extend(answer.into_iter().map(|answer| (answer, status)));
    });
    for (mut answer, status) in answers {
        answer
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let mut start = [0; 12];
        answer.read_exact(&mut start).expect("an answer");
        let start = String::from_utf8_lossy(&start).into_owned();
        assert_eq!(
            start,
            format!("HTTP/1.1 {status}"),
            "for a forged token and heads of {} and {} bytes",
            dearest.len(),
            bomb.len()
        );
    }
}

/// Padded, as LiveKit wants it.
fn base64_url(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::URL_SAFE.encode(bytes)
}

/// Small requests, each refused: of a path, a method or a token that nobody has.
fn refusals(sidecar: &Sidecar) {
    let heads: [&[u8]; 5] = [
        b"GET /agent HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nContent-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000000\r\n\r\n",
        b"GET /rtc?access_token=nonsense HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        b"GET foo:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03",
        b"GET /%2e%2e/%2e%2e/admin HTTP/1.1\r\nHost: x\r\n\r\n",
    ];
    pace(200, |n| {
        drop(connections(
            sidecar.port,
            1,
            heads[n as usize % heads.len()],
        ))
    });
}

/// A line of `/proc/PID/status`: VmRSS is what is held now, VmHWM the most that ever was.
fn kib(pid: u32, what: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(what)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn strangers_cost_a_call_nothing() {
    let trial = Trial::new("strangers_cost_a_call_nothing", Load::Alone);
    let room = trial.room("off");
    let stack = Stack::own(&trial, Options::default());
    let sidecar = &stack.sidecar;
    // The same call through a sidecar that strangers don't know.
    let other_dir = trial.dir.join("other");
    let other = Sidecar::start(&other_dir, stack.livekit.port, Options::default());
    trial.watch(&other.process.log);
    let other_room = format!("{room}-other");
    let client = |sidecar: &Sidecar, room: &str, identity: &str, hz: f64| {
        Client::new(Kind::Go, &sidecar.url(), room, identity)
            .tone(hz)
            .seconds(30.0)
            .spawn(&trial)
    };
    let mut talkers = [
        client(sidecar, &room, "anna", 440.0),
        client(sidecar, &room, "ben", 660.0),
        client(&other, &other_room, "other-anna", 440.0),
        client(&other, &other_room, "other-ben", 660.0),
    ];
    talkers
        .iter_mut()
        .for_each(crate::client::Running::wait_begun);
    std::thread::sleep(Duration::from_secs(2));
    let packets = trial.dir.join("packets.txt");
    let livekit = vec![stack.livekit.udp_port];
    let ports = [livekit, sidecar.udp_ports(), other.udp_ports()].concat();
    let mut capture = capture(&trial, &ports, &packets, 60);
    let held = kib(sidecar.process.pid(), "VmRSS:");
    let lines = sidecar.log().len();

    type Kinds<'a> = [(&'static str, &'a (dyn Fn(&Sidecar) + Sync)); 6];
    let kinds: Kinds<'_> = [
        ("nothing", &|_| std::thread::sleep(EACH)),
        ("datagrams", &datagrams),
        ("ICE-TCP", &ice_tcp),
        ("unfinished requests", &unfinished),
        ("joins", &joins),
        ("refusals", &refusals),
    ];
    let mut spans = Vec::new();
    for (what, send) in kinds {
        let began = now();
        std::thread::scope(|scope| {
            let strangers = scope.spawn(|| send(sidecar));
            // In the middle of it operators ask, and so does a participant.
            std::thread::sleep(EACH / 2);
            for (port, target) in [
                (sidecar.admin_port, "/healthz".to_owned()),
                (
                    sidecar.port,
                    format!("/rtc/validate?access_token={}", http::token(&room, "carla")),
                ),
            ] {
                let answer = http::get(port, &target)
                    .unwrap_or_else(|error| panic!("{target} beside {what}: {error}"));
                assert_eq!(
                    answer.status,
                    200,
                    "{target} beside {what}: {}",
                    answer.text()
                );
            }
            strangers.join().unwrap();
        });
        spans.push(Span {
            what,
            began,
            ended: now(),
        });
    }
    let grown = kib(sidecar.process.pid(), "VmHWM:").saturating_sub(held);
    let logged = sidecar.log().into_iter().skip(lines);
    let loud: Vec<_> = logged
        .filter(|line| line["level"] != "DEBUG" && line["level"] != "TRACE")
        .collect();
    let reports = talkers.map(crate::client::Running::finish);
    capture.signal("TERM");
    capture.wait(Duration::from_secs(20));

    reports[0].received(&reports[1]);
    reports[1].received(&reports[0]);
    reports[2].received(&reports[3]);
    reports[3].received(&reports[2]);
    let found = crossed(&packets, &sidecar.udp_ports(), &spans);
    let others = crossed(&packets, &other.udp_ports(), &spans);
    for ((span, crossed), other) in spans.iter().zip(&found).zip(&others) {
        println!("beside {}: {crossed:?}, far from it {other:?}", span.what);
    }
    println!(
        "{grown} KiB more were held at most; {} lines at info and above",
        loud.len()
    );
    for ((span, crossed), other) in spans.iter().zip(&found).zip(&others) {
        // Two talkers, two listeners, 50 packets a second and way.
        assert!(crossed.packets > 300, "beside {}: {crossed:?}", span.what);
        assert_eq!(crossed.lost, 0, "beside {}: {crossed:?}", span.what);
        let most = other.late as f64 + MORE_LATE * crossed.packets as f64;
        assert!(
            crossed.late as f64 <= most,
            "beside {}: {crossed:?}, and far from it {other:?}",
            span.what
        );
    }
    assert!(grown < MOST_KIB, "{grown} KiB were held for strangers");
    assert!(loud.len() < 20, "strangers fill the log: {loud:#?}");
    assert_eq!(sidecar.complaints(), Vec::<String>::new());
}
