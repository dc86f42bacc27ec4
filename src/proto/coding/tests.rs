//! What a participant can do with its streams.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use super::*;
use crate::aic::payload::{Body, Part, Redundant};
use crate::description::{PackRule, RecodeRule, RestoreRule, TrackRule};
use crate::ladder::{CodecId, Frames};
use std::collections::HashMap;
use std::time::Duration;

const OPUS: u8 = 111;
const FRAMED: u8 = 20;

const ALL: EngineRungs = EngineRungs {
    encodes: Rungs::ALL,
    decodes: Rungs::ALL,
    ..EngineRungs::NONE
};

fn now(start: Instant, ms: u64) -> Now {
    Now {
        instant: start + Duration::from_millis(ms),
        ntp: 0,
    }
}

fn rule(mid: &str, ssrcs: &[u32]) -> TrackRule {
    TrackRule {
        ssrcs: ssrcs.to_vec(),
        mid: mid.to_owned(),
        opus_pts: (Some(OPUS), None),
        ..TrackRule::default()
    }
}

fn packed(rule: TrackRule) -> TrackRule {
    TrackRule {
        pack: Some(PackRule {
            pt: FRAMED,
            rungs: Rungs::ALL,
            short_headers: true,
            more_units: true,
            models: None,
            rung: Rung::L4,
            hint_id: 5,
            level_id: None,
        }),
        ..rule
    }
}

fn restored(rule: TrackRule, pt: u8) -> TrackRule {
    TrackRule {
        restore: Some(RestoreRule {
            pt,
            models: None,
            hint_id: 5,
            level_id: None,
        }),
        ..rule
    }
}

/// A framed packet, which holds another of payload type 95.
fn framed(ssrc: u32, sequence: u8) -> Vec<u8> {
    let mut packet = vec![0x80, FRAMED, 0, sequence, 0, 0, 0, sequence];
    packet.extend(ssrc.to_be_bytes());
    packet.extend([0x00, 0x12, sequence, 0xdf, 0x48, 0xaa, 0xbb]);
    packet
}

/// A framed packet that holds another.
fn native(hop: u8, sequence: u8, pt: u8) -> Vec<u8> {
    let mut packet = framed(7, hop);
    packet.truncate(12);
    let part = Part {
        sequence: u16::from(sequence),
        packets: 1,
        red: false,
        body: Body::Native {
            payload_type: pt,
            marker: false,
            trimmed_from: None,
            payload: vec![0x48, 0xaa, hop],
        },
    };
    let copy: Option<&Redundant<Vec<u8>>> = None;
    part.write(copy, Frames::LYRA, &mut packet).unwrap();
    packet
}

/// A framed packet of 40 ms of speech on the cheapest rung.
fn cheapest(ssrc: u32, hop: u8) -> Vec<u8> {
    let mut packet = framed(ssrc, hop);
    packet.truncate(12);
    let part = Part {
        sequence: u16::from(hop) * 2,
        packets: 2,
        red: false,
        body: Body::Coded {
            codec: Rung::L1.codec(),
            unit_ms: 20,
            gain: 0,
            payload: vec![0x55; 16],
        },
    };
    let copy: Option<&Redundant<Vec<u8>>> = None;
    part.write(copy, Frames::LYRA, &mut packet).unwrap();
    packet
}

/// An engine with models, and rules that restore what was coded with the same.
fn with_models(rule: TrackRule) -> (EngineRungs, TrackRule) {
    let engine = EngineRungs {
        models: Some(1),
        ..ALL
    };
    let mut rule = restored(rule, FRAMED);
    if let Some(restore) = &mut rule.restore {
        restore.models = Some(1);
    }
    (engine, rule)
}

fn decodes(coding: &mut Coding) -> usize {
    let jobs = std::iter::from_fn(|| coding.poll_job());
    jobs.filter(|job| matches!(job, Job::Decode(..))).count()
}

/// Speech of 20 ms (SILK, wideband).
fn opus(ssrc: u32, sequence: u16) -> Vec<u8> {
    let mut packet = vec![0x80, OPUS];
    packet.extend(sequence.to_be_bytes());
    packet.extend((u32::from(sequence) * 960).to_be_bytes());
    packet.extend(ssrc.to_be_bytes());
    packet.push(0x48);
    packet.extend([0x55; 60]);
    packet
}

/// The same with MID "0" under id 3.
fn with_mid(mut packet: Vec<u8>) -> Vec<u8> {
    packet[0] |= 0x10;
    packet.splice(12..12, [0xbe, 0xde, 0, 1, 0x30, b'0', 0, 0]);
    packet
}

fn encoded(job: &EncodeJob) -> Encoded {
    Encoded {
        codec: CodecId::Opus,
        payload: vec![0x58, 1, 2],
        gain: 0,
        unit_ms: job.unit_ms,
        voice: true,
        rung: Rung::L4,
    }
}

/// Takes everything that is there; the packets.
fn drain(coding: &mut Coding, now: Now) -> Vec<Vec<u8>> {
    let (mut packets, mut out) = (Vec::new(), Vec::new());
    while coding.poll_packet(now, &mut out).is_some() {
        packets.push(out.clone());
    }
    packets
}

#[test]
fn a_framed_packet_never_passes_as_it_is() {
    let start = Instant::now();
    let at = now(start, 0);
    let by_ssrc = restored(rule("0", &[7]), FRAMED);
    let by_mid = restored(rule("0", &[]), FRAMED);
    for (known, mid_ext_id) in [(by_ssrc, None), (by_mid, Some(3))] {
        let fresh = || {
            let mut coding = Coding::new(0, MAX_UP, ALL);
            coding.set_rules(start, std::slice::from_ref(&known), mid_ext_id);
            let first = with_mid(framed(7, 1));
            assert_eq!(coding.take(at, &first, 50, |_| None), Taken::Framed);
            coding
        };
        let take = |coding: &mut Coding, packet: &[u8]| coding.take(at, packet, 50, |_| None);
        // The rule is by MID and the packet has none: it is restored all the same.
        let mut coding = fresh();
        assert_eq!(take(&mut coding, &framed(7, 2)), Taken::Framed);
        assert_eq!(coding.stats().framed_received, 2);
        // The m-section became inactive.
        coding.set_rules(start, &[], None);
        assert_eq!(take(&mut coding, &framed(7, 3)), Taken::Framed);
        // Another one came.
        coding.set_rules(start, &[packed(rule("1", &[9]))], mid_ext_id);
        assert_eq!(take(&mut coding, &framed(7, 4)), Taken::Framed);
        // Its payload type is another now; what is under way is restored.
        let mut coding = fresh();
        let moved = restored(known.clone(), 21);
        coding.set_rules(start, &[moved], mid_ext_id);
        assert_eq!(take(&mut coding, &framed(7, 5)), Taken::Framed);
        assert_eq!(coding.stats().framed_received, 2);
        // It is to be coded in another way.
        let recode = RecodeRule {
            rung: None,
            key: None,
            lossy_only: false,
        };
        for other in [packed(rule("0", &[7])), rule("0", &[7])] {
            let other = TrackRule {
                recode: Some(recode),
                ..other
            };
            let mut coding = fresh();
            coding.set_rules(start, &[other], mid_ext_id);
            assert_eq!(take(&mut coding, &framed(7, 6)), Taken::Framed);
        }
        // A stream of which nothing is known, under the payload type that the peer was told, with rules or without.
        let mut coding = fresh();
        coding.set_told(Some(FRAMED));
        assert_eq!(take(&mut coding, &framed(8, 1)), Taken::Framed);
        coding.set_rules(start, &[], None);
        assert_eq!(take(&mut coding, &framed(8, 2)), Taken::Framed);
        assert_eq!(take(&mut coding, &opus(8, 2)), Taken::Not);
        let mut coding = Coding::new(0, MAX_UP, ALL);
        coding.set_told(Some(FRAMED));
        assert!(!coding.is_idle());
        assert_eq!(take(&mut coding, &framed(7, 1)), Taken::Framed);
    }
}

#[test]
fn what_was_restored_is_no_framed_packet() {
    let start = Instant::now();
    let at = now(start, 0);
    let mut coding = Coding::new(0, MAX_UP, ALL);
    coding.set_rules(start, &[restored(rule("0", &[7]), FRAMED)], None);
    for (n, pt, goes) in [(1, OPUS, 1), (2, FRAMED, 0), (3, OPUS, 1)] {
        coding.take(at, &native(n, n, pt), 50, |_| None);
        assert_eq!(drain(&mut coding, at).len(), goes, "{pt}");
    }
}

#[test]
fn among_restored_packets_none_goes_by_a_number_that_was_used() {
    let start = Instant::now();
    let at = now(start, 0);
    let mut coding = Coding::new(0, MAX_UP, ALL);
    coding.set_rules(start, &[restored(rule("0", &[7]), FRAMED)], None);
    // 30 went on before it was framed.
    let mut take = |packet: &[u8]| {
        let taken = coding.take(at, packet, 50, |_| Some(30));
        (taken, drain(&mut coding, at).len())
    };
    let went = take(&native(1, 40, OPUS));
    assert_eq!(went, (Taken::Framed, 1));
    assert_eq!(take(&native(2, 30, OPUS)), (Taken::Framed, 0));
    assert_eq!(take(&opus(7, 30)).0, Taken::Original, "it may have gone");
    assert_eq!(take(&opus(7, 41)).0, Taken::Not);
    assert_eq!(take(&opus(7, 41)).0, Taken::Not, "the same again");
    let mut other = opus(7, 41);
    other.push(1);
    assert_eq!(take(&other).0, Taken::Original);
}

#[test]
fn one_participant_takes_no_more_codecs_than_it_can_speak() {
    // One microphone, forty SSRCs, packets of 60 ms, six times as many as time passes; then with eight microphones more.
    for (tracks, most) in [(1u32, 3.0), (40, 12.0)] {
        let start = Instant::now();
        let mut coding = Coding::new(0, MAX_UP, ALL);
        let rules: Vec<TrackRule> = (0..tracks)
            .map(|n| match n {
                0 => packed(rule("0", &[])),
                n => packed(rule(&format!("x{n}"), &[1000 + n])),
            })
            .collect();
        coding.set_rules(start, &rules, Some(3));
        let mut asked = HashMap::new();
        for tick in 0..500u16 {
            let at = now(start, u64::from(tick) * 10);
            for n in 0..40u32 {
                let ssrc = if n < tracks && n > 0 { 1000 + n } else { n };
                let mut packet = with_mid(opus(ssrc, tick));
                packet[4..8].copy_from_slice(&(u32::from(tick) * 2880).to_be_bytes());
                packet[20] = 0x58;
                coding.take(at, &packet, 100, |_| None);
            }
            while let Some(job) = coding.poll_job() {
                let Job::Encode(track, job) = job else {
                    continue;
                };
                // What a stream may begin with is used up after two seconds.
                if tick >= 200 {
                    let ms = u64::from(job.unit_ms) * job.packets.len() as u64;
                    *asked.entry(track).or_insert(0) += ms;
                }
                let outcome = Outcome::Encoded(track, job.id, encoded(&job));
                coding.outcome(at, outcome);
            }
            drain(&mut coding, at);
        }
        let each = asked.values().sum::<u64>() as f64 / 3000.0;
        assert!(each < most, "{each:.1} s of audio are coded each second");
        assert!(each > most / 4.0, "{each:.1}");
        // And those that have codecs keep them.
        assert_eq!(asked.len(), if tracks == 1 { 2 } else { 9 });
    }
}

#[test]
fn who_is_silent_leaves_the_codecs_to_who_speaks() {
    let start = Instant::now();
    let mut coding = Coding::new(0, 4, ALL);
    coding.set_rules(
        start,
        &[packed(rule("0", &[])), packed(rule("1", &[]))],
        Some(3),
    );
    let mut says = |ssrc: u32, ms: u64| {
        let at = now(start, ms);
        for n in 0..2 {
            let sequence = u16::try_from(ms / 20 + n).unwrap();
            coding.take(at, &with_mid(opus(ssrc, sequence)), 100, |_| None);
        }
        let mut jobs = 0;
        while let Some(job) = coding.poll_job() {
            if let Job::Encode(track, job) = job {
                coding.outcome(at, Outcome::Encoded(track, job.id, encoded(&job)));
                jobs += 1;
            }
        }
        drain(&mut coding, at);
        jobs > 0
    };
    for ms in (0..4000).step_by(400) {
        assert!(says(1, ms) && says(2, ms) && !says(3, ms));
    }
    for ms in (4000..12_000).step_by(400) {
        assert!(says(1, ms), "it never stopped");
        assert_eq!(says(3, ms), ms >= 8800, "{ms}");
    }
    assert!(!says(2, 12_000));
}

#[test]
fn a_stream_that_begins_on_the_cheapest_rung_is_restored_from_the_first_packet_on() {
    let start = Instant::now();
    let (engine, rule) = with_models(rule("0", &[7]));
    let mut coding = Coding::new(0, MAX_UP, engine);
    coding.set_rules(start, &[rule], None);
    for hop in 1..10 {
        let at = now(start, u64::from(hop) * 40);
        let packet = cheapest(7, hop);
        assert!(packet.len() - 12 <= SILENCE);
        assert_eq!(coding.take(at, &packet, 50, |_| None), Taken::Framed);
        assert_eq!(decodes(&mut coding), 1, "{hop}");
    }
}

#[test]
fn what_needs_no_codec_takes_none_from_what_does() {
    let start = Instant::now();
    let (engine, rule) = with_models(rule("0", &[]));
    // Native ones where framed ones are restored, framed ones that hold such, and other payload types than Opus'.
    let mut held = native(1, 1, OPUS);
    held.extend([0x55; 60]);
    let mut other = opus(1, 1);
    other[1] = 8;
    let packs = packed(rule.clone());
    for (rule, packet) in [(&rule, opus(1, 1)), (&rule, held), (&packs, other)] {
        let mut coding = Coding::new(0, MAX_UP, engine);
        coding.set_rules(start, std::slice::from_ref(rule), Some(3));
        for ssrc in 10..20u32 {
            let mut packet = with_mid(packet.clone());
            packet[8..12].copy_from_slice(&ssrc.to_be_bytes());
            coding.take(now(start, 0), &packet, 100, |_| None);
            assert!(coding.streams.of(ssrc).is_some());
        }
        assert!(coding.streams.iter().all(|stream| !stream.seated));
        coding.take(now(start, 20), &with_mid(cheapest(7, 1)), 50, |_| None);
        assert_eq!(decodes(&mut coding), 1);
    }
}

#[test]
fn streams_that_ended_give_up_their_places_and_keep_their_numbers() {
    let start = Instant::now();
    let mut coding = Coding::new(0, 4, ALL);
    let every = [packed(rule("0", &[])), packed(rule("1", &[]))];
    coding.set_rules(start, &every, Some(3));
    let mut closed = 0;
    let mut tracks = std::collections::HashSet::new();
    let mut ms = 0;
    // 64 for each place are remembered; one after the other each has its codec.
    for ssrc in 0..300u32 {
        ms += 61_000;
        let at = now(start, ms);
        let (mut framed, mut jobs) = (0, 0);
        for sequence in 0..4 {
            let taken = coding.take(at, &with_mid(opus(ssrc, sequence)), 100, |_| None);
            framed += usize::from(taken == Taken::Original);
            while let Some(job) = coding.poll_job() {
                match job {
                    Job::Close(_, way) => {
                        assert_eq!(way, Way::Encode, "nothing else was used");
                        closed += 1;
                    }
                    Job::Encode(track, job) => {
                        tracks.insert(track);
                        jobs += 1;
                        coding.outcome(at, Outcome::Encoded(track, job.id, encoded(&job)));
                    }
                    _ => {}
                }
            }
            drain(&mut coding, at);
        }
        assert!(coding.streams.len() <= 4);
        if ssrc < 256 {
            assert_eq!((framed, jobs), (4, 2), "{ssrc}");
        } else {
            assert_eq!(
                (framed, jobs),
                (0, 0),
                "it goes as it comes, from the first on"
            );
        }
    }
    assert_eq!((closed, tracks.len()), (252, 256));
    // One that comes again goes on after what went, framed, whether there are rules or not.
    let at = now(start, ms + 61_000);
    let taken = coding.take(at, &with_mid(opus(7, 4)), 100, |_| Some(1));
    assert_eq!(taken, Taken::Original);
    coding.take(at, &with_mid(opus(7, 5)), 100, |_| Some(1));
    let late = now(start, ms + 61_100);
    coding.handle_timeout(late);
    let sent = drain(&mut coding, late);
    let numbers: Vec<u16> = sent
        .iter()
        .map(|p| RtpHeader::parse(p).unwrap().sequence)
        .collect();
    assert_eq!(numbers, [2, 3]);
    coding.set_rules(at.instant, &[], None);
    let taken = coding.take(at, &opus(8, 9), 100, |_| None);
    assert_eq!((taken, drain(&mut coding, at).len()), (Taken::Original, 0));
}

#[test]
fn a_goodbye_frees_a_place_at_once() {
    let start = Instant::now();
    let mut coding = Coding::new(0, 4, ALL);
    coding.set_rules(start, &[packed(rule("0", &[]))], Some(3));
    let mut take = |ssrc: u32, ms| {
        let at = now(start, ms);
        coding.take(at, &with_mid(opus(ssrc, 1)), 100, |_| None);
        let known = coding.streams.of(ssrc).is_some();
        if ssrc == 4 && !known {
            coding.goodbyes(&[0x81, 203, 0, 1, 0, 0, 0, 2]);
        }
        known
    };
    assert!((0..4).all(|ssrc| take(ssrc, 0)));
    assert!(!take(4, 1) && take(4, 1100));
    assert!(coding.streams.of(2).is_none());
}

#[test]
fn what_ended_closes_once_for_each_use_that_was_made_of_the_engine() {
    let start = Instant::now();
    let at = now(start, 0);
    let mut coding = Coding::new(0, MAX_DOWN, ALL);
    let rules: Vec<TrackRule> = (0..100)
        .map(|n| packed(rule(&n.to_string(), &[n])))
        .collect();
    coding.set_rules(start, &rules, None);
    for ssrc in 0..100u32 {
        for sequence in 0..2 {
            coding.take(at, &opus(ssrc, sequence), 100, |_| None);
        }
    }
    while coding.poll_job().is_some() {}
    coding.close();
    let mut closes = 0;
    while let Some(job) = coding.poll_job() {
        assert!(matches!(job, Job::Close(_, Way::Encode)));
        closes += 1;
    }
    assert_eq!(closes, 100);
    assert!(coding.is_idle() && coding.poll_timeout().is_none());
}

#[test]
fn a_packet_costs_the_same_among_5_streams_and_500() {
    let costs = |count: u32| {
        let start = Instant::now();
        let at = now(start, 0);
        let mut coding = Coding::new(0, MAX_DOWN, ALL);
        let rules: Vec<TrackRule> = (0..count)
            .map(|n| restored(rule(&n.to_string(), &[1000 + n]), FRAMED))
            .collect();
        coding.set_rules(start, &rules, None);
        for n in 0..count {
            let packet = framed(1000 + n, 1);
            assert_eq!(coding.take(at, &packet, 50, |_| None), Taken::Framed);
        }
        while coding.poll_job().is_some() {}
        drain(&mut coding, at);
        assert_eq!(coding.streams.len(), count as usize);
        let mut costs = Vec::new();
        // One of the last, video without a rule, and one that nothing is known of.
        let mut video = opus(1, 1);
        video[1] = 96;
        for packet in [framed(999 + count, 2), video, framed(2, 1)] {
            coding.streams.looks.set(0);
            coding.rules.looks.set(0);
            coding.take(at, &packet, 50, |_| None);
            while coding.poll_job().is_some() {}
            drain(&mut coding, at);
            let _ = coding.poll_timeout();
            costs.push((coding.streams.looks.get(), coding.rules.looks.get()));
        }
        // What is due is looked at, and nothing else.
        coding.streams.looks.set(0);
        let due = coding.poll_timeout().unwrap();
        coding.handle_timeout(Now {
            instant: due,
            ntp: 0,
        });
        (costs, coding.streams.looks.get() / u64::from(count))
    };
    let (few, _) = costs(5);
    let (many, due) = costs(500);
    assert_eq!(few, many);
    assert!(
        many.iter()
            .all(|(streams, rules)| *streams < 12 && *rules < 8),
        "{many:?}"
    );
    assert!(due < 12, "{due} looks for each that was due");
}

#[test]
fn rules_that_come_again_and_again_fill_nothing() {
    let start = Instant::now();
    let mut coding = Coding::new(0, MAX_UP, ALL);
    for turn in 0..1000u16 {
        let rules = [
            packed(rule("0", &[7])),
            packed(rule(&turn.to_string(), &[8])),
        ];
        coding.set_rules(start, &rules, None);
        coding.take(now(start, 0), &opus(7, turn), 100, |_| None);
        coding.take(now(start, 0), &opus(8, turn), 100, |_| None);
        assert!(coding.touched.len() <= 2 && coding.jobs.len() <= MAX_JOBS);
    }
}
