//! The real media workers over loopback UDP between two ends of an independent WebRTC stack.
#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod end;

use auralink::media::{Media, MediaConfig, MediaEvent, ufrag_prefix};
use auralink_engine::{Engine, EngineConfig};
use auralink_proto::aic::EXTENSION_URI;
use auralink_proto::description::Target;
use auralink_proto::dtls::Identity;
use auralink_proto::leg::LegState;
use auralink_proto::policy::{Mode, Policy};
use auralink_proto::relay::Side;
use auralink_proto::session::{Env, Session, SessionConfig};
use auralink_proto::signal::wire::{write_bytes, write_uint};
use auralink_proto::signal::{Frame, Verdict};
use end::{End, OPUS, RED, wait};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const MICROPHONE: &str = "client-microphone";

/// Session and media worker, wired as the sidecar wires them.
struct Sidecar {
    media: Media,
    session: Session,
    events: tokio::sync::mpsc::UnboundedReceiver<MediaEvent>,
    bound: Bound,
}

#[derive(Default)]
struct Bound {
    sockets: Vec<UdpSocket>,
    addresses: Vec<SocketAddr>,
    random: u8,
}

struct Binding<'a>(&'a Media, &'a mut Bound);

impl Env for Binding<'_> {
    fn random(&mut self, bytes: &mut [u8]) {
        // Different each time is all that a test needs of it.
        for byte in bytes {
            self.1.random = self.1.random.wrapping_mul(181).wrapping_add(97);
            *byte = self.1.random;
        }
    }

    fn bind_server_leg(&mut self, _: Target) -> Result<Vec<SocketAddr>, String> {
        let bound = self
            .0
            .bind_server_leg()
            .map_err(|error| error.to_string())?;
        (self.1.addresses, self.1.sockets) = bound.into_iter().unzip();
        Ok(self.1.addresses.clone())
    }
}

impl Sidecar {
    fn new(policy: Policy) -> Self {
        let identity = Identity::generate().unwrap();
        let (sender, events) = tokio::sync::mpsc::unbounded_channel();
        let media = Media::start(
            MediaConfig {
                ips: vec![IpAddr::V4(Ipv4Addr::LOCALHOST)],
                external: Vec::new(),
                udp_port: 0,
                tcp_port: None,
                workers: 1,
                realtime: false,
                consent_timeout: Duration::from_secs(30),
            },
            &identity,
            Arc::new(Engine::start(EngineConfig::default()).unwrap()),
            sender,
        )
        .unwrap();
        let session = Session::new(SessionConfig {
            policy,
            fingerprint: identity.fingerprint().to_owned(),
            client_candidates: media.client_candidates(0),
            ufrag_prefix: ufrag_prefix(0),
            rungs: media.rungs(),
            models: None,
        });
        Self {
            media,
            session,
            events,
            bound: Bound::default(),
        }
    }

    /// Passes a message on its way: `number` is its field in `SignalRequest` or `SignalResponse`.
    fn pass(&mut self, from: Side, number: u32, message: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        write_bytes(&mut frame, number, message);
        let mut env = Binding(&self.media, &mut self.bound);
        let verdict = match from {
            Side::Client => self.session.client_frame(&mut env, Frame::Binary(&frame)),
            Side::Server => self.session.server_frame(&mut env, Frame::Binary(&frame)),
        };
        while let Some(description) = self.session.poll_update() {
            let sockets = std::mem::take(&mut self.bound.sockets);
            self.media.describe(0, 1, description, sockets);
        }
        match verdict.unwrap() {
            Verdict::Binary(new) => new,
            Verdict::Keep => frame,
            other => panic!("{other:?}"),
        }
    }

    /// Passes an SDP through signalling.
    fn pass_sdp(&mut self, from: Side, number: u32, kind: &str, sdp: &str) -> String {
        let mut description = Vec::new();
        write_bytes(&mut description, 1, kind.as_bytes());
        write_bytes(&mut description, 2, sdp.as_bytes());
        let frame = self.pass(from, number, &description);
        let text = String::from_utf8_lossy(&frame);
        let start = text.find("v=0").unwrap();
        text[start..].to_owned()
    }

    /// Negotiates a call of the two ends and waits until it is up.
    async fn connect(&mut self, client: &End, server: &End) -> [String; 2] {
        let mut track = Vec::new();
        write_bytes(&mut track, 1, MICROPHONE.as_bytes());
        write_uint(&mut track, 8, 2);
        self.pass(Side::Client, 4, &track);
        let offer = client.offer().await;
        let offer = self.pass_sdp(Side::Client, 1, "offer", &offer);
        let answer = server.answer(&offer).await;
        let answer = self.pass_sdp(Side::Server, 2, "answer", &answer);
        client.take_answer(&answer).await;
        wait("a connection", || client.connected() && server.connected()).await;
        [offer, answer]
    }
}

fn payload(n: u16) -> Vec<u8> {
    (0..80)
        .map(|i: u16| (n.wrapping_mul(31).wrapping_add(i * 7) & 0xff) as u8)
        .collect()
}

async fn talk(client: &End, server: &End, server_pt: u8, packets: u16) {
    for n in 1..=packets {
        client.send_rtp(OPUS, n, &payload(n)).await;
        server.send_rtp(server_pt, n, &payload(n)).await;
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_independent_stack_talks_through_the_sidecar_on_both_sides() {
    let mut sidecar = Sidecar::new(Policy::default());
    let client = End::new(MICROPHONE, 1001, OPUS, None).await;
    let server = End::new("server-track", 2001, OPUS, None).await;
    client.open_channel().await;
    let [offer, answer] = sidecar.connect(&client, &server).await;
    let back = sidecar.bound.addresses[0].port().to_string();
    let front = sidecar.media.client_candidates(0)[0]
        .addr
        .port()
        .to_string();
    for (sdp, port) in [(&offer, &back), (&answer, &front)] {
        let candidates: Vec<&str> = sdp
            .lines()
            .filter(|l| l.starts_with("a=candidate"))
            .collect();
        assert!(!candidates.is_empty());
        for candidate in candidates {
            assert_eq!(
                candidate.split(' ').nth(5),
                Some(port.as_str()),
                "{candidate}"
            );
        }
    }

    talk(&client, &server, OPUS, 300).await;
    for (end, ssrc) in [(&server, 1001), (&client, 2001)] {
        wait("the last packet", || {
            end.heard.rtp.lock().unwrap().len() >= 295
        })
        .await;
        let heard: Vec<_> = end.heard.rtp.lock().unwrap().clone();
        for packet in &heard {
            let n = packet.header.sequence_number;
            assert_eq!(packet.payload, payload(n), "packet {n}");
            assert_eq!(packet.header.ssrc, ssrc);
            assert_eq!(
                (packet.header.payload_type, packet.header.timestamp),
                (OPUS, u32::from(n) * 960)
            );
        }
        // Sender reports of the far end, or its receiver reports.
        wait("RTCP", || end.heard.rtcp.load(Ordering::Relaxed) > 0).await;
    }

    wait("a data channel", || {
        client.channel_is_open() && server.channel_is_open()
    })
    .await;
    let message: Vec<u8> = (0..60_000u32).map(|n| (n * 7 % 251) as u8).collect();
    for _ in 0..10 {
        client.send_data(&message).await;
        server.send_data(&message).await;
    }
    for end in [&client, &server] {
        wait("60 kB messages", || {
            end.heard.data.lock().unwrap().len() >= 10
        })
        .await;
        assert!(
            end.heard
                .data
                .lock()
                .unwrap()
                .iter()
                .all(|data| *data == message)
        );
    }

    // A snapshot a second.
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let snapshot = sidecar.media.snapshots()[0].clone();
    let [pc] = &snapshot.pcs[..] else {
        panic!("{} peer connections", snapshot.pcs.len());
    };
    assert_eq!(
        (pc.client.state, pc.server.state),
        (LegState::Established, LegState::Established)
    );
    assert!(
        pc.up.rtp_packets >= 300 && pc.down.rtp_packets >= 300,
        "{pc:?}"
    );
    assert!(pc.up.rtcp_packets > 0 && pc.down.rtcp_packets > 0, "{pc:?}");
    assert!(
        pc.up.data_packets > 500 && pc.down.data_packets > 500,
        "{pc:?}"
    );

    client.pc.close().await.unwrap();
    wait("the server's end of the call", || !server.connected()).await;
    let mut closed = false;
    while let Ok(event) = sidecar.events.try_recv() {
        closed |= matches!(
            event,
            MediaEvent::Closed {
                side: Side::Client,
                ..
            }
        );
    }
    assert!(closed, "the sidecar heard it from the client");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_takes_the_hint_gets_none_on_what_isnt_framed() {
    let mut sidecar = Sidecar::new(Policy {
        mode: Mode::Lean,
        ..Policy::default()
    });
    let client = End::new(MICROPHONE, 1001, OPUS, None).await;
    let server = End::new("server-track", 2001, OPUS, Some(EXTENSION_URI)).await;
    let [offer, answer] = sidecar.connect(&client, &server).await;
    let line = offer
        .lines()
        .find(|line| line.ends_with(EXTENSION_URI))
        .unwrap();
    let id: u8 = line
        .trim_start_matches("a=extmap:")
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(
        !answer.contains(EXTENSION_URI),
        "the client never offered it"
    );
    assert!(!answer.contains("red/48000"), "{answer}");
    assert!(answer.contains("b=TIAS:12000"), "{answer}");

    talk(&client, &server, OPUS, 100).await;
    wait("the last packet", || {
        server.heard.rtp.lock().unwrap().len() >= 95
    })
    .await;
    let heard = server.heard.rtp.lock().unwrap();
    for packet in heard.iter() {
        let n = packet.header.sequence_number;
        assert!(packet.header.get_extension(id).is_none(), "a hint on {n}");
        // Wrapped as primary-only RED: the far end negotiated RED.
        assert_eq!(packet.header.payload_type, RED);
        assert_eq!(packet.payload[0], OPUS);
        assert_eq!(packet.payload[1..], payload(n));
    }
}
