//! A sidecar alone that codes packets anew, between a client and a server.

use crate::media::{lean, plain, receiver_report, red_payload, rtp};
use crate::sdp::{CLIENT_AUDIO_SSRC, OPUS, RED, SERVER_AUDIO_SSRC};
use crate::world::{Options, World};
use auralink_proto::coding::{EngineRungs, Job, Outcome};
use auralink_proto::ladder::{Rung, Rungs};
use auralink_proto::packet::RtpHeader;
use auralink_proto::policy::{Policy, RecodeFor, RedPolicy};
use auralink_proto::relay::Side;

const ABLE: EngineRungs = EngineRungs {
    encodes: Rungs::OPUS,
    decodes: Rungs::OPUS,
    ..EngineRungs::NONE
};

/// SILK or CELT of 20 ms with a number in it.
fn opus(toc: u8, n: u16, len: usize) -> Vec<u8> {
    let mut opus = vec![toc, n as u8];
    opus.resize(len, 0x5a);
    opus
}

/// An engine that keeps the number.
fn answer(job: Job) -> Option<Outcome> {
    let Job::Recode(track, job) = job else {
        return None;
    };
    let len = job.rung.map_or(160, |_| 30);
    let made = opus(0x48, u16::from(job.payload[1]), len);
    Some(Outcome::Recoded(track, job.id, made))
}

fn world(seed: u64, policy: Policy) -> World {
    let mut world = World::connected(
        seed,
        Options {
            policy,
            ..Options::default()
        },
    );
    world.codecs(ABLE, answer);
    world
}

#[test]
fn what_a_steered_publisher_sends_is_enhanced() {
    let mut policy = lean(RedPolicy::Auto);
    let sent = |policy| {
        let mut world = world(41, policy);
        let mut sent = Vec::new();
        for n in 0..50u16 {
            let packet = rtp(
                OPUS,
                n,
                u32::from(n) * 960,
                CLIENT_AUDIO_SSRC,
                &opus(0x48, n, 30),
            );
            world.client.send_rtp(&packet);
            sent.push(packet);
            world.run_ms(21);
            world.codecs(ABLE, answer);
        }
        world.run_ms(200);
        let stats = world.relay().flow_from(Side::Client).stats;
        (sent, plain(&world.server.rtp), stats)
    };
    let (_, _, as_it_came) = sent(policy);
    policy.audio.enhance = true;
    let (said, got, stats) = sent(policy);
    assert_eq!(got.len(), said.len());
    for (n, (said, got)) in said.iter().zip(&got).enumerate() {
        let header = RtpHeader::parse(got).unwrap();
        // As for every steered publisher the server gets RED, and all else of the header as it was.
        assert_eq!(header.payload_type, RED);
        assert_eq!(got[2..12], said[2..12]);
        let mut wanted = vec![OPUS];
        wanted.extend(opus(0x48, n as u16, 160));
        assert_eq!(header.payload(got), wanted);
    }
    // The client's wire is what the books are about: nothing has changed there.
    let books = |stats: auralink_proto::flow::FlowStats| {
        (stats.bytes, stats.native_bytes, stats.rtp_packets)
    };
    assert_eq!(books(stats), books(as_it_came));
    assert!(stats.native_bytes > stats.bytes);
}

/// The server's next packet as the client gets it.
fn heard(world: &mut World, n: u16) -> Vec<u8> {
    let payload = red_payload(&opus(0xf8, n - 1, 120), &opus(0xf8, n, 120));
    let packet = rtp(RED, n, u32::from(n) * 960, SERVER_AUDIO_SSRC, &payload);
    world.server.send_rtp(&packet);
    // To the sidecar, to the engine and back, to the client.
    world.run_ms(3);
    world.codecs(ABLE, answer);
    world.run_ms(40);
    let got = world.client.rtp.last().unwrap().1.clone();
    assert_eq!(got[..12], packet[..12], "the header stays");
    got[12..].to_vec()
}

#[test]
fn a_constrained_subscriber_gets_less_and_its_redundancy_of_the_same() {
    let mut policy = lean(RedPolicy::Auto);
    policy.audio.recode = Rung::L4;
    let mut world = world(42, policy);
    let full = |n| red_payload(&opus(0xf8, n - 1, 120), &opus(0xf8, n, 120));
    assert_eq!(
        heard(&mut world, 10),
        full(10),
        "nothing is known of its path"
    );
    let report = |world: &mut World, lost| {
        world
            .client
            .send_rtcp(&receiver_report(1, SERVER_AUDIO_SSRC, lost));
        world.run_ms(30);
    };
    report(&mut world, 12);
    let before = world.relay().flow_from(Side::Server).stats;
    assert_eq!(heard(&mut world, 11)[1..], opus(0x48, 11, 30));
    let small = red_payload(&opus(0x48, 11, 30), &opus(0x48, 12, 30));
    assert_eq!(
        heard(&mut world, 12),
        small,
        "it loses packets: redundancy stays"
    );
    let after = world.relay().flow_from(Side::Server).stats;
    let (bytes, native) = (
        after.bytes - before.bytes,
        after.native_bytes - before.native_bytes,
    );
    let removed = full(11).len() - 31 + full(12).len() - small.len();
    assert_eq!(native - bytes, removed as u64);
    // Not lossy any more: redundancy goes, the low rate stays for half a minute.
    for _ in 0..3 {
        report(&mut world, 0);
    }
    assert_eq!(heard(&mut world, 13)[1..], opus(0x48, 13, 30));
    world.run_ms(31_000);
    assert_eq!(heard(&mut world, 14)[1..], opus(0xf8, 14, 120));
}

#[test]
fn a_room_switched_off_gets_everything_as_it_is_at_once() {
    let mut policy = lean(RedPolicy::Keep);
    policy.audio.recode = Rung::L4;
    policy.audio.recode_for = RecodeFor::All;
    let mut world = world(43, policy);
    assert_eq!(heard(&mut world, 10)[1..], opus(0x48, 10, 30));
    assert_eq!(
        world
            .relay()
            .coding_from(Side::Server)
            .stats()
            .recode
            .recoded,
        1
    );
    world.session.stop_shedding();
    let update = world.session.poll_update().unwrap();
    world.describe(&update);
    let full = |n| red_payload(&opus(0xf8, n - 1, 120), &opus(0xf8, n, 120));
    assert_eq!(heard(&mut world, 11), full(11));
    // What went coded before is asked for again.
    let again = heard(&mut world, 10);
    assert_eq!(again[1..], opus(0x48, 10, 30));
}

#[test]
fn an_engine_that_never_answers_costs_twenty_milliseconds() {
    let mut policy = lean(RedPolicy::Keep);
    policy.audio.recode = Rung::L4;
    policy.audio.recode_for = RecodeFor::All;
    let mut world = world(44, policy);
    let (mut sent, start) = (Vec::new(), world.client.rtp.len());
    for n in 0..40u16 {
        let packet = rtp(
            OPUS,
            n,
            u32::from(n) * 960,
            SERVER_AUDIO_SSRC,
            &opus(0xf8, n, 120),
        );
        world.server.send_rtp(&packet);
        sent.push((world.now, packet));
        world.run_ms(20);
        world.codecs(ABLE, |_| None);
    }
    world.run_ms(100);
    let got = &world.client.rtp[start..];
    assert_eq!(got.len(), sent.len());
    for ((sent_at, sent), (got_at, got)) in sent.iter().zip(got) {
        assert_eq!(got, sent);
        let late = got_at.duration_since(*sent_at).as_millis();
        assert!(late <= 1 + 20 + 20 + 1, "{late} ms");
    }
}
