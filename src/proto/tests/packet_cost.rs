//! What packets and strangers' datagrams cost, in allocations: a relayed packet of a known stream none, and what is refused none.
#![allow(
    missing_docs,
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::disallowed_methods,
    // Counting stands in front of the system's allocator, which is unsafe by its nature.
    unsafe_code
)]

#[path = "sim/net.rs"]
mod net;
#[path = "sim/peer.rs"]
mod peer;
#[path = "sim/sdp.rs"]
mod sdp;
#[path = "sim/world.rs"]
mod world;

use auralink_proto::description::{Creds, LegDescription};
use auralink_proto::dtls::SrtpKeys;
use auralink_proto::ice::FullAgent;
use auralink_proto::relay::{Now, Scratch, Side, Transmit};
use auralink_proto::srtp::Srtp;
use auralink_proto::stun::{Checked, LiteAgent, Path, addressed_ufrag};
use is::Sha1HmacProvider;
use is::stun::{StunMessage, TransId};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::{Duration, Instant};
use world::{CM, GCM, Options, World, addr, back, client_addr, front, server_addr};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: what is asked for goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is ending counts no more.
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Allocations, growth of what is there among them, that `f` makes.
fn allocations(f: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    f();
    ALLOCATIONS.get() - before
}

#[test]
fn allocations_are_counted() {
    assert_eq!(allocations(|| drop(vec![1, 2, 3])), 1);
}

fn rtp(sequence: u16, ssrc: u32) -> Vec<u8> {
    let mut packet = vec![0x80, 111];
    packet.extend(sequence.to_be_bytes());
    packet.extend([0, 0, 0, 9]);
    packet.extend(ssrc.to_be_bytes());
    packet.resize(1200, 0x5a);
    packet
}

fn report(ssrc: u32) -> Vec<u8> {
    let mut packet = vec![0x81, 201, 0, 7];
    packet.extend(ssrc.to_be_bytes());
    packet.resize(32, 0);
    packet
}

#[test]
fn srtp_of_a_known_stream_allocates_nothing() {
    for profile in [CM, GCM] {
        let len = if profile == GCM { 56 } else { 60 };
        let srtp = |is_client| {
            let keys = SrtpKeys {
                profile,
                material: (0..len).collect(),
                is_client,
            };
            Srtp::new(&keys).unwrap()
        };
        let (mut from, mut to) = (srtp(true), srtp(false));
        let (mut wire, mut plain) = (Vec::new(), Vec::new());
        let mut packet = rtp(0, 7);
        let report = report(7);
        let mut turn = |sequence: u16| {
            packet[2..4].copy_from_slice(&sequence.to_be_bytes());
            assert!(from.protect_rtp(&packet, &mut wire));
            assert!(to.unprotect_rtp(&wire, &mut plain).is_ok());
            assert!(from.protect_rtcp(&report, &mut wire));
            assert!(to.unprotect_rtcp(&wire, &mut plain).is_ok());
            wire[9] ^= 1;
            assert!(to.unprotect_rtcp(&wire, &mut plain).is_err());
        };
        turn(65_000);
        assert_eq!(
            allocations(|| (0..2000u16).for_each(|n| turn(n.wrapping_add(65_001)))),
            0
        );
    }
}

/// A network on which nobody hears.
struct Nobody(u64);

impl Transmit for Nobody {
    fn transmit(&mut self, _: Side, _: Path, _: &[u8]) {
        self.0 += 1;
    }
}

fn path(local: std::net::SocketAddr, remote: std::net::SocketAddr) -> Path {
    Path {
        local,
        remote,
        tcp: false,
    }
}

#[test]
fn a_relayed_packet_allocates_nothing_and_neither_does_one_that_is_refused() {
    let mut world = World::connected(1, Options::default());
    let (mut scratch, mut out) = (Scratch::default(), Nobody(0));
    let now = Now {
        instant: world.now,
        ntp: 0,
    };
    let ssrc = sdp::CLIENT_AUDIO_SSRC;
    let mut packets: Vec<Vec<u8>> = (1..200)
        .map(|n| world.client.send_rtp(&rtp(n, ssrc)))
        .collect();
    packets.extend((1..50).map(|_| world.client.send_rtcp(&report(ssrc))));
    let relay = world.relay.as_mut().unwrap();
    let from = path(front(), client_addr());
    let last = packets.len() - 1;
    for first in [0, last] {
        assert!(relay.receive(
            now,
            Side::Client,
            from,
            &packets[first],
            &mut scratch,
            &mut out
        ));
    }
    let relayed = allocations(|| {
        for packet in &packets[1..last] {
            assert!(relay.receive(now, Side::Client, from, packet, &mut scratch, &mut out));
        }
    });
    assert_eq!(relayed, 0);
    assert_eq!(out.0, packets.len() as u64);

    // The worst of a kind each: from elsewhere, and in the name of who is really there.
    let strangers = addr("192.0.2.9:9");
    let big = |first: u8, second: u8| {
        let mut datagram = vec![0x5a; 65_000];
        (datagram[0], datagram[1]) = (first, second);
        datagram
    };
    let mut check = big(0, 1);
    check[2..8].copy_from_slice(&[0xfd, 0xd4, 0x21, 0x12, 0xa4, 0x42]);
    check[20..].fill(0);
    let mut clear = report(1);
    clear.extend([0, 0, 0, 1]);
    clear.extend([0; 10]);
    let noise = [
        big(0x80, 111),
        big(0x90, 111),
        big(0x80, 201),
        big(0, 1),
        big(22, 254),
        big(23, 254),
        big(200, 1),
        check,
        clear,
        packets[0].clone(),
    ];
    let mut pester = || {
        for (side, local, real) in [
            (Side::Client, front(), client_addr()),
            (Side::Server, back(), server_addr()),
        ] {
            for datagram in &noise {
                let from = path(local, strangers);
                assert!(!relay.receive(now, side, from, datagram, &mut scratch, &mut out));
                // DTLS from a proved path is another's business, and a packet that was authentic is one again.
                let is_media = datagram[0] >> 6 == 2 && datagram != &packets[0];
                if is_media || datagram[0] < 4 {
                    let from = path(local, real);
                    assert!(!relay.receive(now, side, from, datagram, &mut scratch, &mut out));
                }
            }
        }
    };
    // The buffer grows to the longest datagram there is, once.
    pester();
    assert_eq!(allocations(pester), 0);
    assert_eq!(out.0, packets.len() as u64, "nobody is answered");
}

fn creds(n: u8) -> Creds {
    Creds {
        ufrag: format!("ufrag{n}"),
        pwd: format!("password-password-pass{n}"),
    }
}

fn check(named: &str, pwd: &str) -> Vec<u8> {
    let username = format!("{named}:ufrag2");
    let message = StunMessage::binding_request(&username, TransId::new(), true, 7, 1, true);
    let mut bytes = vec![0; 256];
    let hmac = |key: &[u8], parts: &[&[u8]]| is::DefaultSha1HmacProvider.sha1_hmac(key, parts);
    let len = message.to_bytes(Some(pwd.as_bytes()), &mut bytes, hmac);
    bytes.truncate(len.unwrap());
    bytes
}

#[test]
fn a_strangers_check_is_one_hash_at_the_most() {
    let now = Instant::now();
    let path = path(front(), client_addr());
    let mut lite = LiteAgent::default();
    lite.set_local(&creds(1));
    lite.set_remote(&creds(2));
    let description = LegDescription {
        local: creds(1),
        remote: Some(creds(2)),
        fingerprints: Vec::new(),
        dtls: None,
        remote_candidates: Vec::new(),
        remote_lite: false,
        short_tags: false,
        aic_pts: (None, None),
        controlling: false,
    };
    let timeout = Duration::from_secs(30);
    let mut full = FullAgent::new(now, timeout, vec![front()], &description);
    full.describe(now, &description);
    // Signed by who doesn't know the password, for us and for others; then as many attributes as fit.
    let mut many = check("ufrag1", "guess")[..20].to_vec();
    many.extend([0xc0, 1, 0, 0].repeat(16_000));
    let len = u16::try_from(many.len() - 20).unwrap();
    many[2..4].copy_from_slice(&len.to_be_bytes());
    let mut out = Vec::with_capacity(256);
    for (datagram, named) in [
        (check("ufrag1", "guess"), true),
        (check("ufrag9", "guess"), false),
        (check(&"u".repeat(120), "guess"), false),
        (many, false),
    ] {
        let spent = allocations(|| {
            let _ = addressed_ufrag(&datagram);
            assert_eq!(
                lite.handle(now, path, &datagram, &mut out),
                Checked::Ignored
            );
        });
        assert_eq!(spent, 0);
        // `is` makes a name and a password of the two names before it hashes.
        let spent = allocations(|| assert!(!full.handle(now, path, &datagram)));
        assert!(spent <= if named { 4 } else { 0 }, "{spent}");
    }
    let right = check("ufrag1", &creds(1).pwd);
    assert_ne!(lite.handle(now, path, &right, &mut out), Checked::Ignored);
    assert!(full.handle(now, path, &right));
}
