//! Media crosses the relay as it came, but for what policy asks.

use crate::net::{Netem, for_seeds};
use crate::sdp::{
    CLIENT_AUDIO_SSRC, CLIENT_VIDEO_SSRC, OPUS, RED, SERVER_AUDIO_SSRC, SERVER_VIDEO_SSRC,
};
use crate::world::{Options, World};
use auralink_proto::aic::EXTENSION_URI;
use auralink_proto::packet::RtpHeader;
use auralink_proto::policy::{AudioPolicy, Mode, Policy, RedPolicy};
use auralink_proto::relay::Side;
use std::collections::HashSet;
use std::time::{Duration, Instant};

/// A plain RTP packet (RFC 3550 section 5.1) without extension.
pub(crate) fn rtp(pt: u8, sequence: u16, timestamp: u32, ssrc: u32, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x80, pt];
    packet.extend(sequence.to_be_bytes());
    packet.extend(timestamp.to_be_bytes());
    packet.extend(ssrc.to_be_bytes());
    packet.extend(payload);
    packet
}

/// With the audio-level extension (id 1), marker, and CSRC, as odd as headers get.
fn odd_rtp(pt: u8, sequence: u16, ssrc: u32, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x91, 0x80 | pt];
    packet.extend(sequence.to_be_bytes());
    packet.extend((u32::from(sequence) * 960).to_be_bytes());
    packet.extend(ssrc.to_be_bytes());
    packet.extend([0, 0, 0, 42]);
    packet.extend([0xbe, 0xde, 0, 1, 0x10, 0x85, 0, 0]);
    packet.extend(payload);
    packet
}

/// RED (RFC 2198) of the frame before and this one.
pub(crate) fn red_payload(old: &[u8], new: &[u8]) -> Vec<u8> {
    let mut payload = vec![0x80 | OPUS];
    let word = 960u32 << 10 | u32::try_from(old.len()).unwrap();
    payload.extend(&word.to_be_bytes()[1..]);
    payload.push(OPUS);
    payload.extend(old);
    payload.extend(new);
    payload
}

/// A receiver report about one stream (RFC 3550 section 6.4.2).
pub(crate) fn receiver_report(reporter: u32, about: u32, fraction_lost: u8) -> Vec<u8> {
    let mut packet = vec![0x81, 201, 0, 7];
    packet.extend(reporter.to_be_bytes());
    packet.extend(about.to_be_bytes());
    packet.extend([fraction_lost, 0, 0, 0]);
    packet.extend([0; 16]);
    packet
}

/// PLI (RFC 4585 section 6.3.1).
fn pli(from: u32, about: u32) -> Vec<u8> {
    let mut packet = vec![0x81, 206, 0, 2];
    packet.extend(from.to_be_bytes());
    packet.extend(about.to_be_bytes());
    packet
}

pub(crate) fn plain(received: &[(Instant, Vec<u8>)]) -> Vec<Vec<u8>> {
    received.iter().map(|(_, packet)| packet.clone()).collect()
}

pub(crate) struct Sent {
    pub(crate) up: Vec<Vec<u8>>,
    pub(crate) down: Vec<Vec<u8>>,
}

/// Both ends talk for so many packets, 20 ms each.
pub(crate) fn talk(world: &mut World, packets: u16) -> Sent {
    let base = u16::try_from(world.rng.below(0x4000)).unwrap();
    let (mut up, mut down) = (Vec::new(), Vec::new());
    for n in 0..packets {
        let payload = world.rng.bytes(80);
        let sequence = base + n;
        let a = odd_rtp(OPUS, sequence, CLIENT_AUDIO_SSRC, &payload);
        let b = rtp(
            RED,
            sequence,
            u32::from(n) * 960,
            SERVER_AUDIO_SSRC,
            &red_payload(&payload[..40], &payload),
        );
        world.client.send_rtp(&a);
        world.server.send_rtp(&b);
        up.push(a);
        down.push(b);
        world.run_ms(20);
    }
    world.run_ms(300);
    Sent { up, down }
}

#[test]
fn thirty_seconds_of_call_cross_bit_exact_both_ways() {
    let mut world = World::connected(10, Options::default());
    let (mut up, mut down) = (Vec::new(), Vec::new());
    let (mut up_rtcp, mut down_rtcp) = (Vec::new(), Vec::new());
    for n in 0..1500u16 {
        let payload = world.rng.bytes(60 + usize::from(n % 40));
        let video = world.rng.bytes(1100);
        // Sequence numbers wrap on the way: the rollover counters of both legs have to.
        let sequence = n.wrapping_sub(700);
        let timestamp = u32::from(n).wrapping_mul(960).wrapping_sub(5000);
        for (peer, audio_ssrc, video_ssrc, sent) in [
            (
                &mut world.client,
                CLIENT_AUDIO_SSRC,
                CLIENT_VIDEO_SSRC,
                &mut up,
            ),
            (
                &mut world.server,
                SERVER_AUDIO_SSRC,
                SERVER_VIDEO_SSRC,
                &mut down,
            ),
        ] {
            let audio = if n % 2 == 0 {
                rtp(OPUS, sequence, timestamp, audio_ssrc, &payload)
            } else {
                odd_rtp(RED, sequence, audio_ssrc, &payload)
            };
            // Padding-only probes as bandwidth estimators send them.
            let mut probe = rtp(96, sequence, timestamp, video_ssrc, &[0; 200]);
            probe[0] |= 0x20;
            *probe.last_mut().unwrap() = 200;
            let video = if n % 50 == 7 {
                probe
            } else {
                rtp(96, sequence, timestamp, video_ssrc, &video)
            };
            for packet in [audio, video] {
                peer.send_rtp(&packet);
                sent.push(packet);
            }
        }
        if n % 50 == 0 {
            let a = receiver_report(CLIENT_AUDIO_SSRC, SERVER_AUDIO_SSRC, 20);
            let b = [
                receiver_report(9, CLIENT_AUDIO_SSRC, 0),
                pli(9, CLIENT_VIDEO_SSRC),
            ]
            .concat();
            world.client.send_rtcp(&a);
            world.server.send_rtcp(&b);
            up_rtcp.push(a);
            down_rtcp.push(b);
        }
        world.run_ms(20);
    }
    world.run_ms(200);
    assert!(
        plain(&world.server.rtp) == up,
        "{} of {}",
        world.server.rtp.len(),
        up.len()
    );
    assert!(
        plain(&world.client.rtp) == down,
        "{} of {}",
        world.client.rtp.len(),
        down.len()
    );
    assert_eq!(world.server.rtcp, up_rtcp);
    assert_eq!(world.client.rtcp, down_rtcp);
    for side in [Side::Client, Side::Server] {
        let stats = world.relay().flow_from(side).stats;
        assert_eq!((stats.rtp_packets, stats.rtcp_packets), (3000, 30));
        assert_eq!(
            stats.bytes, stats.native_bytes,
            "nothing is saved where nothing is changed"
        );
        let dropped = stats.dropped_early + stats.dropped_unauthentic + stats.dropped_unsent;
        assert_eq!(
            (dropped, stats.shed_packets, stats.wrapped_packets),
            (0, 0, 0)
        );
    }
}

#[test]
fn what_a_lossy_network_leaves_crosses_unchanged() {
    for_seeds(10, |seed| {
        let mut world = World::connected(
            seed,
            Options {
                client_link: Netem::lossy(40, 0.1),
                server_link: Netem::lossy(2, 0.02),
                ..Options::default()
            },
        );
        world.client.rtp.clear();
        world.server.rtp.clear();
        let sent = talk(&mut world, 500);
        for (received, sent) in [
            (&world.server.rtp, &sent.up),
            (&world.client.rtp, &sent.down),
        ] {
            let known: HashSet<&Vec<u8>> = sent.iter().collect();
            assert!(
                received.iter().all(|(_, packet)| known.contains(packet)),
                "seed {seed}"
            );
            let unique: HashSet<&Vec<u8>> = received.iter().map(|(_, packet)| packet).collect();
            // 12 % are lost on the average of both links; duplicates are passed on.
            assert!(unique.len() > 400, "seed {seed}: {} of 500", unique.len());
            assert!(
                received.len() > unique.len(),
                "seed {seed}: no duplicate came through"
            );
        }
    });
}

#[test]
fn replayed_packets_pass_and_replayed_reports_do_not() {
    // As LiveKit has it: Firefox probes with old packets.
    let mut world = World::connected(11, Options::default());
    let old = world
        .client
        .send_rtp(&rtp(OPUS, 1, 960, CLIENT_AUDIO_SSRC, b"first"));
    let report = world.client.send_rtcp(&receiver_report(1, 2, 0));
    for n in 2..100 {
        world.client.send_rtp(&rtp(
            OPUS,
            n,
            u32::from(n) * 960,
            CLIENT_AUDIO_SSRC,
            b"later",
        ));
    }
    world.run_ms(100);
    let before = world.server.rtp.len();
    for _ in 0..3 {
        world.client.send_raw(&old);
        world.client.send_raw(&report);
    }
    world.run_ms(100);
    assert_eq!(before, 99);
    assert_eq!(world.server.rtp.len(), before + 3);
    assert_eq!(world.server.rtcp.len(), 1);
}

#[test]
fn reports_of_a_hop_end_here_whatever_they_come_among() {
    let mut world = World::connected(12, Options::default());
    let aic = [0x80, 204, 0, 2, 0, 0, 0, 9, b'A', b'I', b'C', b'1'];
    let (first, last) = (receiver_report(1, 2, 0), pli(1, 2));
    for compound in [&[&first[..], &aic, &last].concat()[..], &aic, &last] {
        world.client.send_rtcp(compound);
        world.server.send_rtcp(compound);
    }
    world.run_ms(100);
    let expected = [[&first[..], &last].concat(), last];
    assert_eq!(world.server.rtcp, expected);
    assert_eq!(world.client.rtcp, expected);
}

#[test]
fn data_crosses_both_ways_in_order_and_whole() {
    let mut world = World::connected(12, Options::default());
    // A 60 kB message in SCTP packets as libwebrtc and Pion cut them.
    let fragments: Vec<Vec<u8>> = (0..52).map(|_| world.rng.bytes(1191)).collect();
    for round in 0..20 {
        for fragment in &fragments {
            let now = world.now;
            world.client.send_data(now, fragment);
            world.server.send_data(now, fragment);
        }
        world.run_ms(100);
        let want = fragments.len() * (round + 1);
        assert_eq!(
            (world.server.data.len(), world.client.data.len()),
            (want, want)
        );
    }
    for (n, fragment) in fragments.iter().cycle().take(1040).enumerate() {
        assert!(
            &world.server.data[n] == fragment && &world.client.data[n] == fragment,
            "{n}"
        );
    }
    let largest = world
        .sent
        .iter()
        .map(|(.., bytes)| bytes.len())
        .max()
        .unwrap();
    assert!(largest <= 1191 + 37, "a datagram of {largest} bytes");
}

#[test]
fn what_the_first_leg_sends_before_the_second_is_up_is_not_lost() {
    for slow_server in [true, false] {
        // One side's signalling or path is half a second slower.
        let slow = Netem::clean(250);
        let mut world = World::new(
            13,
            Options {
                client_link: if slow_server { Netem::clean(5) } else { slow },
                server_link: if slow_server { slow } else { Netem::clean(1) },
                ..Options::default()
            },
        );
        world.join();
        let first_is_up = |world: &World| {
            let fast = if slow_server {
                &world.client
            } else {
                &world.server
            };
            fast.established_at.is_some()
        };
        assert!(world.run_until(10, first_is_up), "{}", world.report());
        world.run_ms(50);
        assert!(!world.up(), "{}", world.report());
        let mut sent = Vec::new();
        let now = world.now;
        for n in 0..10u16 {
            let packet = rtp(OPUS, n, u32::from(n) * 960, 77, b"early voice");
            let peer = if slow_server {
                &mut world.client
            } else {
                &mut world.server
            };
            peer.send_rtp(&packet);
            peer.send_data(now, b"INIT");
            peer.send_rtcp(&pli(1, 2));
            sent.push(packet);
            world.run_ms(20);
        }
        assert!(world.run_until(20, World::up), "{}", world.report());
        world.run_ms(1000);
        let late = if slow_server {
            &world.server
        } else {
            &world.client
        };
        assert_eq!(plain(&late.rtp), sent, "{}", world.report());
        assert_eq!((late.data.len(), late.rtcp.len()), (10, 10));
    }
}

pub(crate) fn lean(red: RedPolicy) -> Policy {
    Policy {
        mode: Mode::Lean,
        audio: AudioPolicy {
            red,
            ..AudioPolicy::default()
        },
        ..Policy::default()
    }
}

#[test]
fn redundancy_is_shed_and_given_back_as_the_receiver_reports() {
    let mut world = World::connected(
        14,
        Options {
            policy: lean(RedPolicy::Auto),
            ..Options::default()
        },
    );
    let said = std::cell::Cell::new(0);
    let next = |world: &mut World| {
        let sequence = said.get() + 1;
        said.set(sequence);
        let packet = rtp(
            RED,
            sequence,
            u32::from(sequence) * 960,
            SERVER_AUDIO_SSRC,
            &red_payload(b"older", b"newer"),
        );
        world.server.send_rtp(&packet);
        world.run_ms(30);
        let (_, got) = world.client.rtp.last().unwrap().clone();
        assert_eq!(got[..12], packet[..12], "the header stays");
        if got == packet {
            return false;
        }
        assert_eq!(got[12..], *b"\x6fnewer");
        true
    };
    let report = |world: &mut World, lost| {
        world
            .client
            .send_rtcp(&receiver_report(1, SERVER_AUDIO_SSRC, lost));
        world.run_ms(30);
    };
    assert!(!next(&mut world), "nothing is known of the path yet");
    report(&mut world, 0);
    assert!(next(&mut world), "nothing is lost");
    report(&mut world, 6);
    assert!(
        !next(&mut world),
        "2.3 % lost: redundancy is back within one report"
    );
    for _ in 0..2 {
        report(&mut world, 0);
        assert!(!next(&mut world));
    }
    report(&mut world, 0);
    assert!(next(&mut world));
    // LiveKit's own silence is primary-only RED already.
    said.set(said.get() + 1);
    let silence = rtp(
        RED,
        said.get(),
        u32::from(said.get()) * 960,
        SERVER_AUDIO_SSRC,
        b"\x6f\xf8\xff\xfe\x00\x00",
    );
    world.server.send_rtp(&silence);
    world.run_ms(30);
    assert_eq!(world.client.rtp.last().unwrap().1, silence);
    let stats = world.relay().flow_from(Side::Server).stats;
    assert_eq!(stats.shed_packets, 2);
    assert_eq!(
        stats.native_bytes - stats.bytes,
        2 * 9,
        "header 4 and the older 5 bytes, twice"
    );
    // The room is switched off while the call runs.
    world.session.stop_shedding();
    let update = world.session.poll_update().unwrap();
    world.describe(&update);
    assert!(!next(&mut world));
}

#[test]
fn a_steered_publishers_opus_is_wrapped_for_a_server_that_expects_red() {
    let mut world = World::connected(
        15,
        Options {
            policy: lean(RedPolicy::Auto),
            ..Options::default()
        },
    );
    let answer = world.at_client.last().unwrap().clone();
    assert!(!answer.contains("red/48000"), "{answer}");
    let plain_opus = odd_rtp(OPUS, 1, CLIENT_AUDIO_SSRC, b"frame");
    world.client.send_rtp(&plain_opus);
    world.run_ms(50);
    let got = &world.server.rtp[0].1;
    let header = RtpHeader::parse(got).unwrap();
    assert_eq!(
        (header.payload_type, header.marker, header.sequence),
        (RED, true, 1)
    );
    assert_eq!(header.payload(got), b"\x6fframe");
    assert_eq!(
        header.extension(got, 1),
        Some(&[0x85][..]),
        "audio level survives"
    );
    assert_eq!(got[2..header.header_len], plain_opus[2..header.header_len]);
    // Video of the same peer connection is no business of the rule.
    let video = rtp(96, 1, 3000, CLIENT_VIDEO_SSRC, &[1; 900]);
    world.client.send_rtp(&video);
    world.run_ms(50);
    assert_eq!(world.server.rtp[1].1, video);
}

#[test]
fn nothing_is_added_to_packets_that_arent_framed() {
    let mut world = World::connected(
        16,
        Options {
            policy: lean(RedPolicy::Auto),
            server_takes_aic: true,
            ..Options::default()
        },
    );
    let offer = world.at_server.last().unwrap().clone();
    assert!(offer.contains(EXTENSION_URI), "it is negotiated");
    assert!(
        !world.at_client.last().unwrap().contains(EXTENSION_URI),
        "the client never offered it"
    );
    let video = rtp(96, 1, 3000, CLIENT_VIDEO_SSRC, &[1; 900]);
    world.client.send_rtp(&video);
    world.run_ms(50);
    assert_eq!(world.server.rtp.last().unwrap().1, video);
    for n in 0..100u16 {
        let payload = world.rng.bytes(60);
        let packet = odd_rtp(OPUS, n, CLIENT_AUDIO_SSRC, &payload);
        world.client.send_rtp(&packet);
        world.run_ms(40);
        let got = &world.server.rtp.last().unwrap().1;
        let header = RtpHeader::parse(got).unwrap();
        assert_eq!(got[2..header.header_len], packet[2..header.header_len]);
        assert_eq!(header.payload(got)[1..], payload);
    }
    world.run(Duration::from_millis(100));
}
