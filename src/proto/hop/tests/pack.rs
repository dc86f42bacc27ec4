//! The packer.

use super::*;
use crate::aic::Hint;
use crate::aic::payload::{Body, Payload};
use crate::hop::{NativeReason, Refusal, Report};
use crate::packet::RtpHeader;

/// Originals that each framed packet stands for, and its codec.
fn framed(packets: &[Vec<u8>]) -> Vec<(u16, u8, CodecId)> {
    let payload = |packet: &Vec<u8>| {
        let header = RtpHeader::parse(packet).unwrap();
        let payload = Payload::parse(header.payload(packet), Frames::LYRA).unwrap();
        let part = payload.part;
        (part.sequence, part.packets, part.body.codec())
    };
    packets.iter().map(payload).collect()
}

#[test]
fn two_of_20_ms_go_together_and_longer_ones_alone() {
    let clock = Clock::new();
    let mut packer = packer(Rung::L4);
    packer.take(clock.at(0), &speech(1), 100);
    assert!(packer.poll_job().is_none());
    packer.take(clock.at(20), &speech(2), 100);
    assert_eq!(packer.poll_job().unwrap().packets.len(), 2);
    // SILK 40 ms, then 60 ms.
    for (n, toc) in [(3, 0x50), (4, 0x58)] {
        packer.take(clock.at(60), &rtp(OPUS, n, 0, &[toc; 60]), 100);
        let job = packer.poll_job().unwrap();
        assert_eq!((job.packets.len(), job.rung), (1, Rung::L4));
    }
}

#[test]
fn a_lone_one_goes_when_its_partner_is_25_ms_late() {
    let clock = Clock::new();
    let mut packer = packer(Rung::L2);
    packer.take(clock.at(0), &speech(1), 100);
    assert_eq!(packer.poll_timeout(), Some(clock.at(45)));
    packer.handle_timeout(clock.at(44));
    assert!(packer.poll_job().is_none());
    packer.handle_timeout(clock.at(45));
    let job = packer.poll_job().unwrap();
    assert_eq!(packer.poll_timeout(), Some(clock.at(65)));
    packer.encoded(clock.at(64), job.id, lyra6(&job));
    assert_eq!(framed(&sent(&mut packer)), [(1, 1, CodecId::Lyra6)]);
}

#[test]
fn what_does_not_follow_begins_a_new_group() {
    let clock = Clock::new();
    let marked = |mut packet: Vec<u8>| {
        packet[1] |= 0x80;
        packet
    };
    let other_timestamp = rtp(OPUS, 2, 999_999, &[0x48; 60]);
    let red = rtp(RED, 2, 1920, &[&[OPUS][..], &[0x48; 60]].concat());
    for second in [marked(speech(2)), other_timestamp, red, speech(3)] {
        let mut packer = packer(Rung::L2);
        packer.take(clock.at(0), &speech(1), 100);
        packer.take(clock.at(20), &second, 100);
        assert_eq!(packer.poll_job().unwrap().packets.len(), 1);
        assert!(packer.poll_job().is_none());
    }
    let mut packer = packer(Rung::L2);
    packer.take(clock.at(0), &speech(1), 100);
    packer.take(clock.at(20), &speech(4), 100);
    assert_eq!(packer.poll_job().unwrap().lost_before, 0);
    packer.take(clock.at(40), &speech(5), 100);
    assert_eq!(packer.poll_job().unwrap().lost_before, 2);
    assert_eq!(packer.stats.lost, 2);
}

#[test]
fn what_is_no_speech_goes_as_it_came_with_its_reason() {
    let mut silence = vec![0xf8, 0xff, 0xfe];
    silence.resize(80, 0);
    let cases: [(u8, &[u8], NativeReason); 7] = [
        (OPUS, &[0x48; 8], NativeReason::Dtx),
        (OPUS, &[], NativeReason::Dtx),
        (OPUS, &silence, NativeReason::Silence),
        (OPUS, &[0x4c; 60], NativeReason::Stereo),
        (OPUS, &[0x40; 60], NativeReason::Duration),
        (9, &[0x48; 60], NativeReason::PayloadType),
        (RED, &[0x80; 60], NativeReason::PayloadType),
    ];
    for (payload_type, payload, reason) in cases {
        let clock = Clock::new();
        let mut packer = packer(Rung::L2);
        let original = rtp(payload_type, 1, 960, payload);
        packer.take(clock.at(0), &original, 100);
        assert_eq!(packer.stats.native(reason), 1, "{reason:?}");
        assert!(packer.poll_job().is_none());
        let mut out = Vec::new();
        packer.poll_packet(0, &mut out).unwrap();
        let mut restorer = restorer();
        restorer.take(clock.at(1), 0, &out, 100);
        restorer.poll_packet(&mut out).unwrap();
        assert_eq!(out, original, "{reason:?}");
    }
}

#[test]
fn silence_takes_a_few_bytes_and_is_no_voice() {
    let clock = Clock::new();
    let mut packer = packer(Rung::L2);
    let mut silence = vec![0xf8, 0xff, 0xfe];
    silence.resize(80, 0);
    packer.take(clock.at(0), &rtp(OPUS, 1, 960, &silence), 146);
    let packet = sent(&mut packer).remove(0);
    let header = RtpHeader::parse(&packet).unwrap();
    let payload = Payload::parse(header.payload(&packet), Frames::LYRA).unwrap();
    let Body::Native {
        trimmed_from,
        payload,
        ..
    } = payload.part.body
    else {
        panic!("coded");
    };
    assert_eq!((trimmed_from, payload), (Some(80), &[0xf8, 0xff, 0xfe][..]));
    let hint = Hint::parse(header.extension(&packet, HINT).unwrap()).unwrap();
    assert!(!hint.voice);
    assert_eq!(hint.rung, 0);
}

#[test]
fn packets_keep_the_order_of_their_originals() {
    let clock = Clock::new();
    let mut packer = packer(Rung::L2);
    packer.take(clock.at(0), &speech(1), 100);
    packer.take(clock.at(20), &speech(2), 100);
    packer.take(clock.at(25), &rtp(OPUS, 3, 2880, &[0x48; 3]), 50);
    assert!(
        sent(&mut packer).is_empty(),
        "DTX waits for the group before it"
    );
    packer.take(clock.at(26), &speech(1), 100);
    let aside = sent(&mut packer);
    assert_eq!(
        framed(&aside),
        [(1, 1, CodecId::Native)],
        "a duplicate waits for nobody"
    );
    packer.handle_timeout(clock.at(40));
    let rest = sent(&mut packer);
    let native = CodecId::Native;
    assert_eq!(
        framed(&rest),
        [(1, 1, native), (2, 1, native), (3, 1, native)]
    );
    let numbers: Vec<u8> = aside.iter().chain(&rest).map(|packet| packet[3]).collect();
    assert_eq!(numbers, [0xe8, 0xe9, 0xea, 0xeb]);
    assert_eq!(packer.next_sequence(), 1004);
    assert_eq!(
        (
            packer.stats.missed,
            packer.stats.native(NativeReason::Missed)
        ),
        (1, 2)
    );
}

#[test]
fn results_that_make_no_sense_are_refused() {
    let clock = Clock::new();
    let wrong: [fn(&mut Encoded); 5] = [
        |encoded| encoded.codec = CodecId::Native,
        |encoded| encoded.payload.push(0),
        |encoded| encoded.gain = 32,
        |encoded| encoded.unit_ms = 40,
        |encoded| encoded.payload.clear(),
    ];
    for wrong in wrong {
        let mut packer = packer(Rung::L2);
        packer.take(clock.at(0), &speech(1), 100);
        packer.take(clock.at(20), &speech(2), 100);
        let job = packer.poll_job().unwrap();
        let mut encoded = lyra6(&job);
        wrong(&mut encoded);
        packer.encoded(clock.at(21), job.id, encoded);
        assert_eq!(packer.stats.native(NativeReason::Refused), 2);
        assert_eq!(sent(&mut packer).len(), 2);
    }
}

#[test]
fn a_rung_that_the_receiver_lost_is_left_at_once() {
    let clock = Clock::new();
    let mut packer = packer(Rung::L2);
    packer.take(clock.at(0), &speech(1), 100);
    packer.take(clock.at(20), &speech(2), 100);
    let job = packer.poll_job().unwrap();
    let report = unrestored(Rungs::OPUS, 0, 0);
    packer.report(clock.at(21), &report);
    assert_eq!(packer.rung(), Rung::L3);
    packer.encoded(clock.at(22), job.id, lyra6(&job));
    assert_eq!(
        packer.stats.native(NativeReason::Refused),
        2,
        "coded at a rung that is gone"
    );
    packer.take(clock.at(40), &speech(3), 100);
    packer.take(clock.at(60), &speech(4), 100);
    assert_eq!(packer.poll_job().unwrap().rung, Rung::L3);
}

fn unrestored(rungs: Rungs, highest: u16, unrestored: u16) -> Report {
    Report {
        ssrc: 7,
        fraction_lost: 0,
        fraction_missing: 0,
        rungs,
        highest,
        jitter: 0,
        ratio: 0,
        unrestored,
    }
}

/// Twenty packets of speech, coded and sent in ten framed ones from `first` on, at 20, 60, ... 380 ms.
fn coded_from(clock: Clock, first: u16) -> Packer {
    let mut packer = packer_from(Rung::L2, first);
    for n in 0..20 {
        let now = clock.at(20 * u64::from(n));
        packer.take(now, &speech(n), 100);
        while let Some(job) = packer.poll_job() {
            packer.encoded(now, job.id, lyra6(&job));
        }
        sent(&mut packer);
    }
    packer
}

#[test]
fn what_the_receiver_could_not_restore_goes_again_as_it_came() {
    let clock = Clock::new();
    // The numbers wrap between what is named and what is under way.
    let first = 65530_u16;
    let place = |n: u16| first.wrapping_add(n);
    let mut packer = coded_from(clock, first);
    packer.take(clock.at(400), &speech(20), 100);
    packer.report(clock.at(401), &unrestored(Rungs::ALL, place(9), 0));
    assert_eq!(framed(&sent(&mut packer)), []);
    // 2 to 6 are named: 2 and 3 are older than 250 ms; 7 to 9 were under way.
    packer.report(clock.at(401), &unrestored(Rungs::NONE, place(6), 5));
    let mut bytes = Vec::new();
    let mut packets = Vec::new();
    while let Some(sent) = packer.poll_packet(0, &mut bytes) {
        packets.push(bytes.clone());
        let again = packets.len() <= 12;
        let counted = if again { 0 } else { 100 };
        assert_eq!(sent.native_bytes, counted, "counted once");
    }
    let natives: Vec<_> = (8..=20).map(|n| (n, 1, CodecId::Native)).collect();
    assert_eq!(framed(&packets), natives, "the open group's with them");
    let next = u16::from_be_bytes([packets[0][2], packets[0][3]]);
    assert_eq!(next, place(10), "numbers of the hop go on");
    assert_eq!(packer.stats.resent, 12);
    packer.report(clock.at(402), &unrestored(Rungs::NONE, place(10), 9));
    assert_eq!(framed(&sent(&mut packer)), [], "once only");
}

#[test]
fn what_is_named_later_goes_again_later() {
    let clock = Clock::new();
    let mut packer = coded_from(clock, 1000);
    packer.report(clock.at(385), &unrestored(Rungs::OPUS, 1009, 1));
    assert_eq!(
        framed(&sent(&mut packer)),
        [(18, 1, CodecId::Native), (19, 1, CodecId::Native)]
    );
    packer.report(clock.at(386), &unrestored(Rungs::OPUS, 1009, 2));
    assert_eq!(
        framed(&sent(&mut packer)),
        [(16, 1, CodecId::Native), (17, 1, CodecId::Native)]
    );
}

#[test]
fn a_report_from_another_time_or_of_more_than_can_be_named_is_taken_for_what_it_can_be() {
    let clock = Clock::new();
    for (highest, named, again) in [
        (1009, u16::MAX, 14),
        (1009u16.wrapping_sub(400), 64, 0),
        (1500, 64, 0),
    ] {
        let mut packer = coded_from(clock, 1000);
        packer.report(clock.at(385), &unrestored(Rungs::OPUS, highest, named));
        assert_eq!(packer.stats.resent, again, "{highest}, {named}");
    }
}

#[test]
fn nothing_waits_for_a_coder_once_the_receiver_has_none() {
    let clock = Clock::new();
    let mut packer = packer(Rung::L2);
    packer.take(clock.at(0), &speech(1), 100);
    packer.take(clock.at(20), &speech(2), 100);
    assert!(packer.poll_job().is_some());
    packer.report(clock.at(21), &unrestored(Rungs::NONE, 999, 0));
    assert_eq!(sent(&mut packer).len(), 2);
    assert_eq!(packer.stats.native(NativeReason::Rung), 2);
}

#[test]
fn refusals_that_last_are_tried_less_and_less_often() {
    let clock = Clock::new();
    let mut packer = packer(Rung::L2);
    let mut tried = Vec::new();
    for n in 0..3000u16 {
        let ms = u64::from(n) * 20;
        packer.take(clock.at(ms), &speech(n), 100);
        while let Some(job) = packer.poll_job() {
            tried.push(ms);
            packer.refused(clock.at(ms), job.id, Refusal::Undecodable);
        }
        let _ = sent(&mut packer);
    }
    // Three groups; then after 0.3, 0.6, 1.2, 2.4 and 4.8 s, and so on.
    assert_eq!(tried[..3], [20, 60, 100]);
    assert!((17..=19).contains(&tried.len()), "{tried:?}");
    assert!(packer.stats.native(NativeReason::Resting) > 2900);
}

#[test]
fn a_burst_is_coded_as_far_as_the_engine_is_asked_and_loses_nothing() {
    let clock = Clock::new();
    let mut packer = packer(Rung::L2);
    let mut jobs = 0;
    for n in 0..60 {
        packer.take(clock.at(0), &speech(n), 100);
        while packer.poll_job().is_some() {
            jobs += 1;
        }
    }
    assert_eq!(jobs, 16);
    packer.handle_timeout(clock.at(20));
    let sent = framed(&sent(&mut packer));
    let numbers: Vec<u16> = sent.iter().map(|(sequence, ..)| *sequence).collect();
    assert_eq!(numbers, (0..60).collect::<Vec<u16>>());
    assert_eq!(packer.stats.native(NativeReason::Crowded), 28);
}

#[test]
fn nothing_grows_when_nobody_polls() {
    let clock = Clock::new();
    let mut packer = packer(Rung::L2);
    for n in 0..60_000u16 {
        let ms = u64::from(n);
        packer.take(clock.at(ms), &speech(n), 100);
        packer.take(clock.at(ms), &speech(n), 100);
    }
    // Groups of two that went native count twice.
    let left = sent(&mut packer).len();
    assert!(left <= 64 + 2 * 64, "{left}");
    let mut jobs = 0;
    while packer.poll_job().is_some() {
        jobs += 1;
    }
    assert!(jobs <= 64, "{jobs}");
    assert!(packer.stats.dropped > 50_000);
}

#[test]
fn red_gives_back_what_was_lost_and_once_only() {
    let clock = Clock::new();
    let red = |n: u16| {
        let mut payload = vec![0x80 | OPUS];
        payload.extend(&(960u32 << 10 | 60).to_be_bytes()[1..]);
        payload.push(OPUS);
        payload.extend([0x48; 60]);
        payload.extend([0x48; 60]);
        rtp(RED, n, u32::from(n) * 960, &payload)
    };
    let mut packer = packer(Rung::NATIVE);
    packer.take(clock.at(0), &red(1), 200);
    packer.take(clock.at(40), &red(3), 200);
    packer.take(clock.at(41), &red(2), 200);
    packer.take(clock.at(42), &red(2), 200);
    let numbers: Vec<u16> = framed(&sent(&mut packer))
        .iter()
        .map(|(n, ..)| *n)
        .collect();
    // The second one is a plain duplicate and goes its way.
    assert_eq!(numbers, [2, 1, 2, 3]);
    assert_eq!(
        (packer.stats.recovered, packer.stats.recovered_came),
        (1, 1)
    );
    // 5 is in 6; 4 is in none.
    packer.take(clock.at(120), &red(6), 200);
    let numbers: Vec<u16> = framed(&sent(&mut packer))
        .iter()
        .map(|(n, ..)| *n)
        .collect();
    assert_eq!((numbers, packer.stats.lost), (vec![5, 6], 1));
}

#[test]
fn frames_of_another_bundle_cross_the_hop() {
    let clock = Clock::new();
    // 40 ms a frame, 16 and 30 bytes.
    let frames = Frames::new(1920, 16, 30).unwrap();
    let mut packer = packer(Rung::L2);
    packer.set_frames(frames);
    packer.set_redundancy(Redundancy::Always { distance: 1 });
    let mut restorer = restorer();
    restorer.set_frames(frames);
    let mut jobs = Vec::new();
    for n in 1..=6u16 {
        packer.take(clock.at(u64::from(n) * 20), &speech(n), 100);
        let Some(job) = packer.poll_job() else {
            continue;
        };
        let frame: Vec<u8> = (0..30).map(|byte| byte + n as u8).collect();
        let encoded = Encoded {
            payload: frame,
            ..lyra6(&job)
        };
        packer.encoded(clock.at(u64::from(n) * 20), job.id, encoded);
        for (at, packet) in sent(&mut packer).into_iter().enumerate() {
            // The second is lost; the third carries its first 16 bytes.
            if n != 4 {
                restorer.take(clock.at(u64::from(n) * 20 + 1 + at as u64), 0, &packet, 100);
            }
        }
        while let Some(job) = restorer.poll_job() {
            restorer.decoded(clock.at(u64::from(n) * 20 + 2), job.id, opus(&job));
            jobs.push((job.codec, job.payload));
        }
    }
    let frame = |n: u8, len: u8| (0..len).map(|byte| byte + n).collect::<Vec<u8>>();
    let wanted = [
        (CodecId::Lyra6, frame(2, 30)),
        (CodecId::Lyra3, frame(4, 16)),
        (CodecId::Lyra6, frame(6, 30)),
    ];
    assert_eq!(jobs, wanted);
    assert_eq!(heard(&mut restorer), [1, 2, 3, 4, 5, 6]);
    // As Lyra's they would be refused: 30 bytes of an original alone are no frame of 20 ms.
    packer.set_frames(Frames::LYRA);
    packer.take(clock.at(140), &speech(7), 100);
    packer.handle_timeout(clock.at(200));
    let job = packer.poll_job().unwrap();
    let encoded = Encoded {
        payload: vec![1; 30],
        ..lyra6(&job)
    };
    packer.encoded(clock.at(200), job.id, encoded);
    assert_eq!(packer.stats.native(NativeReason::Refused), 1);
}

/// Ten seconds of speech of 20 ms: the bytes of headers are what they must be, and every packet is restored as what it was.
#[test]
fn steady_speech_takes_75_bytes_of_the_wire_for_40_ms() {
    let clock = Clock::new();
    let mut packer = packer_from(Rung::L2, 65_400);
    packer.renegotiated(PackerConfig {
        short_headers: true,
        ..config(0)
    });
    let (mut restorer, mut out) = (restorer(), Vec::new());
    let (mut wire, mut hints, mut heard) = (Vec::new(), 0, Vec::new());
    for n in 0..500u16 {
        let ms = u64::from(n) * 20;
        packer.take(clock.at(ms), &speech(n.wrapping_add(65_300)), 100);
        let Some(job) = packer.poll_job() else {
            continue;
        };
        packer.encoded(clock.at(ms), job.id, lyra6(&job));
        let ntp = u32::try_from(ms * 65_536 / 1000).unwrap();
        packer.poll_packet(ntp, &mut out).unwrap();
        let header = RtpHeader::parse(&out).unwrap();
        hints += usize::from(header.extension(&out, HINT).is_some());
        wire.push(out.len() + 28 + 4);
        restorer.take(clock.at(ms), ntp, &out, out.len());
        let job = restorer.poll_job().unwrap();
        assert_eq!((job.codec, job.gain, job.count), (CodecId::Lyra6, 3, 2));
        restorer.decoded(clock.at(ms), job.id, opus(&job));
        while let Some(restored) = restorer.poll_packet(&mut out) {
            assert_eq!(restored.rung, Rung::L2);
            let header = RtpHeader::parse(&out).unwrap();
            heard.push((header.sequence, header.timestamp));
        }
    }
    let expected: Vec<_> = (0..500u16)
        .map(|n| n.wrapping_add(65_300))
        .map(|n| (n, u32::from(n) * 960))
        .collect();
    // The numbers wrap within it, the timestamps of `speech` with them: what comes after is no gap.
    assert_eq!(heard, expected);
    // At the start three times, then each second.
    assert_eq!(hints, 3 + 9);
    assert_eq!(wire.iter().min(), Some(&75));
    let sum: usize = wire.iter().sum();
    assert!(sum < 250 * 76, "{sum} bytes");
    assert_eq!(restorer.stats.unreadable, 0);
}

#[test]
fn originals_of_10_and_120_ms_are_coded_and_come_back() {
    let clock = Clock::new();
    let mut packer = packer(Rung::L4);
    packer.renegotiated(PackerConfig {
        more_units: true,
        ..config(0)
    });
    let (mut restorer, mut out, mut heard) = (restorer(), Vec::new(), Vec::new());
    // SILK 10 ms; the sixth is lost; then one of 120 ms.
    let mut originals: Vec<Vec<u8>> = (1..=9)
        .filter(|n| *n != 6)
        .map(|n| rtp(OPUS, n, u32::from(n) * 480, &[0x40; 40]))
        .collect();
    originals.push(rtp(OPUS, 10, 4800, &[0x5b, 2, 9, 9, 9, 9, 9, 9, 9]));
    let mut jobs = Vec::new();
    for (n, original) in originals.iter().enumerate() {
        let now = clock.at(10 * n as u64);
        packer.take(now, original, 100);
        while let Some(job) = packer.poll_job() {
            jobs.push((job.packets.len(), job.unit_ms));
            let encoded = Encoded {
                codec: CodecId::Opus,
                payload: vec![0x50; 30],
                gain: 0,
                unit_ms: job.unit_ms,
                voice: true,
                rung: Rung::L4,
            };
            packer.encoded(now, job.id, encoded);
        }
        while packer.poll_packet(0, &mut out).is_some() {
            restorer.take(now, 0, &out, out.len());
            while let Some(job) = restorer.poll_job() {
                restorer.decoded(now, job.id, opus(&job));
            }
        }
        while let Some(restored) = restorer.poll_packet(&mut out) {
            let header = RtpHeader::parse(&out).unwrap();
            heard.push((header.sequence, header.timestamp, restored.native));
        }
    }
    assert_eq!(jobs, [(4, 10), (2, 10), (1, 120)]);
    // Four together; one before the gap, and the third after it, have no partner.
    let natives = [5, 9];
    let expected: Vec<_> = (1..=10)
        .filter(|n| *n != 6)
        .map(|n| (n, u32::from(n) * 480, natives.contains(&n)))
        .collect();
    assert_eq!(heard, expected);
    assert_eq!(packer.stats.native(NativeReason::Duration), 2);
}
