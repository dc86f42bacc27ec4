//! Packets coded anew one by one.

use super::{Clock, OPUS, RED, rtp};
use crate::description::RecodeRule;
use crate::hop::Refusal;
use crate::hop::recode::{Kept, RecodeJob, Recoder};
use crate::ladder::Rung;
use proptest::prelude::*;
use std::collections::{HashMap, VecDeque};
use std::time::Instant;

const ALL: RecodeRule = RecodeRule {
    rung: Some(Rung::L4),
    key: Some(9),
    lossy_only: false,
};
const ENHANCE: RecodeRule = RecodeRule {
    rung: None,
    key: None,
    lossy_only: false,
};

fn recoder(rule: RecodeRule) -> Recoder {
    Recoder::new(OPUS, Some(RED), rule, true)
}

/// 20 ms of CELT at 48 kbit/s; its second byte is the number.
fn media(n: u16) -> Vec<u8> {
    let mut media = vec![0xf8, n as u8];
    media.resize(120, 0x55);
    media
}

fn packet(n: u16) -> Vec<u8> {
    rtp(OPUS, n, u32::from(n) * 960, &media(n))
}

/// What the engine makes of it: SILK, wideband, 20 ms.
fn small(n: u16) -> Vec<u8> {
    let mut opus = vec![0x48, n as u8];
    opus.resize(30, 0x66);
    opus
}

fn job(recoder: &mut Recoder) -> RecodeJob {
    recoder.poll_job().expect("a job")
}

fn out(recoder: &mut Recoder) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    recoder.poll_packet(&mut out).map(|_| out)
}

/// Takes packet `n` and codes it.
fn coded(recoder: &mut Recoder, now: Instant, n: u16) -> Vec<u8> {
    recoder.take(now, &packet(n), 160);
    let job = job(recoder);
    assert_eq!(job.payload, media(n));
    recoder.recoded(now, job.id, small(n));
    out(recoder).unwrap()
}

#[test]
fn only_the_payload_changes() {
    let (clock, mut recoder) = (Clock::new(), recoder(ALL));
    // Marker, CSRC, an extension, padding.
    let mut original = vec![0xb1, 0x80 | OPUS, 0, 5, 0, 0, 0, 9, 0, 0, 0, 7, 1, 2, 3, 4];
    original.extend([0xbe, 0xde, 0, 1, 0x10, 0x85, 0, 0]);
    let header = original.clone();
    original.extend(media(5));
    original.extend([0, 0, 0, 4]);
    recoder.take(clock.at(0), &original, 200);
    let asked = job(&mut recoder);
    assert_eq!(
        (asked.payload, asked.rung, asked.key),
        (media(5), Some(Rung::L4), Some(9))
    );
    assert_eq!((asked.unit_ms, asked.lost_before), (20, 0));
    assert_eq!(out(&mut recoder), None, "it waits");
    recoder.recoded(clock.at(3), asked.id, small(5));
    let mut sent = Vec::new();
    let passed = recoder.poll_packet(&mut sent).unwrap();
    assert_eq!((passed.wire_len, passed.saved), (200, 120 + 4 - 30));
    let mut wanted = header;
    wanted[0] &= !0x20;
    wanted.extend(small(5));
    assert_eq!(sent, wanted);
    assert_eq!((recoder.stats.recoded, recoder.stats.saved), (1, 94));
}

#[test]
fn what_is_late_goes_as_it_came_and_in_order() {
    let (clock, mut recoder) = (Clock::new(), recoder(ALL));
    recoder.take(clock.at(0), &packet(1), 160);
    recoder.take(clock.at(5), &packet(2), 160);
    let (first, second) = (job(&mut recoder), job(&mut recoder));
    recoder.recoded(clock.at(8), second.id, small(2));
    assert_eq!(out(&mut recoder), None, "the first goes first");
    assert_eq!(recoder.poll_timeout(), Some(clock.at(20)));
    recoder.handle_timeout(clock.at(20));
    assert_eq!(out(&mut recoder), Some(packet(1)));
    assert_eq!(out(&mut recoder).unwrap()[12..], small(2));
    recoder.recoded(clock.at(21), first.id, small(1));
    assert_eq!(out(&mut recoder), None);
    assert_eq!(recoder.stats.kept[Kept::Missed as usize], 1);
}

#[test]
fn an_engine_that_fails_is_left_alone_and_tried_again() {
    let (clock, mut recoder) = (Clock::new(), recoder(ALL));
    for n in 0..3 {
        recoder.take(clock.at(20 * n), &packet(n as u16), 160);
        let id = job(&mut recoder).id;
        recoder.refused(clock.at(20 * n), id, Refusal::Failed);
        assert_eq!(out(&mut recoder), Some(packet(n as u16)));
    }
    recoder.take(clock.at(100), &packet(5), 160);
    assert_eq!(
        (recoder.poll_job(), out(&mut recoder)),
        (None, Some(packet(5)))
    );
    assert_eq!(coded(&mut recoder, clock.at(400), 20)[12..], small(20));
    // That others are ahead is no failure.
    for n in 21..30 {
        recoder.take(clock.at(400), &packet(n), 160);
        let id = job(&mut recoder).id;
        recoder.refused(clock.at(400), id, Refusal::Stale);
        assert_eq!(out(&mut recoder), Some(packet(n)));
    }
    assert_eq!(coded(&mut recoder, clock.at(400), 30)[12..], small(30));
}

#[test]
fn what_is_asked_for_again_goes_as_it_went() {
    let (clock, mut recoder) = (Clock::new(), recoder(ALL));
    let first = coded(&mut recoder, clock.at(0), 10);
    recoder.take(clock.at(20), &packet(11), 160);
    // Native, because it came too late.
    recoder.handle_timeout(clock.at(40));
    assert_eq!(out(&mut recoder), Some(packet(11)));
    let fourth = coded(&mut recoder, clock.at(60), 13);
    for (n, wanted) in [
        (10, first),
        (11, packet(11)),
        (13, fourth),
        (12, packet(12)),
    ] {
        recoder.take(clock.at(80), &packet(n), 160);
        assert_eq!(out(&mut recoder), Some(wanted), "{n}");
    }
    assert_eq!(recoder.stats.repeated, 4);
    // One that waits goes out once.
    recoder.take(clock.at(100), &packet(14), 160);
    recoder.take(clock.at(101), &packet(14), 160);
    let id = job(&mut recoder).id;
    assert_eq!(recoder.poll_job(), None);
    recoder.recoded(clock.at(102), id, small(14));
    assert!(out(&mut recoder).is_some());
    assert_eq!((out(&mut recoder), recoder.stats.dropped), (None, 1));
    // What nobody remembers is not guessed.
    recoder.take(clock.at(120), &packet(400), 160);
    recoder.take(clock.at(120), &packet(10), 160);
    recoder.handle_timeout(clock.at(140));
    assert_eq!(out(&mut recoder), Some(packet(400)));
    assert_eq!((out(&mut recoder), recoder.stats.dropped), (None, 2));
}

#[test]
fn losses_before_a_packet_are_told() {
    let (clock, mut recoder) = (Clock::new(), recoder(ALL));
    coded(&mut recoder, clock.at(0), 65_534);
    recoder.take(clock.at(60), &packet(1), 160);
    assert_eq!(job(&mut recoder).lost_before, 2);
}

#[test]
fn what_is_no_speech_of_one_channel_is_not_asked_for() {
    let (clock, mut recoder) = (Clock::new(), recoder(ALL));
    let mut silence = vec![0xf8, 0xff, 0xfe];
    silence.resize(80, 0);
    let mut stereo = media(3);
    stereo[0] |= 4;
    let mut short = media(4);
    short[0] = 0xe8;
    for (n, payload_type, payload, kept) in [
        (1, OPUS, vec![0xf8, 1, 2], Kept::Dtx),
        (2, OPUS, silence, Kept::Dtx),
        (3, OPUS, stereo, Kept::Kind),
        (4, OPUS, short, Kept::Kind),
        (5, 13, media(5), Kept::Kind),
    ] {
        let packet = rtp(payload_type, n, 0, &payload);
        let before = recoder.stats.kept[kept as usize];
        recoder.take(clock.at(0), &packet, 160);
        assert_eq!(
            (recoder.poll_job(), out(&mut recoder)),
            (None, Some(packet)),
            "{n}"
        );
        assert_eq!(recoder.stats.kept[kept as usize], before + 1, "{n}");
    }
}

#[test]
fn a_low_rate_is_not_coded_down_and_a_high_one_not_enhanced() {
    let (clock, mut down) = (Clock::new(), recoder(ALL));
    // 40 bytes in 20 ms are 16 kbit/s: to 12 is not worth it.
    let low = rtp(OPUS, 1, 0, &[0x48; 40]);
    down.take(clock.at(0), &low, 80);
    assert_eq!((down.poll_job(), out(&mut down)), (None, Some(low)));
    // What is no smaller goes as it came.
    down.take(clock.at(20), &packet(2), 160);
    let mut n = 2;
    let asked = loop {
        if let Some(asked) = down.poll_job() {
            break asked;
        }
        n += 1;
        assert!(n < 60, "a higher rate is never noticed");
        down.take(clock.at(20), &packet(n), 160);
    };
    while out(&mut down).is_some() {}
    down.recoded(clock.at(20), asked.id, media(n));
    assert_eq!(out(&mut down), Some(packet(n)));
    assert_eq!(down.stats.kept[Kept::Larger as usize], 1);

    let mut up = recoder(ENHANCE);
    up.take(clock.at(0), &packet(1), 160);
    assert_eq!(
        (up.poll_job(), out(&mut up)),
        (None, Some(packet(1))),
        "CELT"
    );
    // Narrowband, and frames of 10 ms: nothing for LACE.
    for (n, toc) in [(2, 0x08), (3, 0x41)] {
        let mut other = small(1);
        other[0] = toc;
        up.take(clock.at(0), &rtp(OPUS, n, 960, &other), 80);
        assert_eq!(up.poll_job(), None, "{toc:#x}");
        assert_eq!(out(&mut up), Some(rtp(OPUS, n, 960, &other)));
    }
    assert_eq!(up.stats.kept[Kept::Rate as usize], 3);
    up.take(clock.at(0), &rtp(OPUS, 4, 3840, &small(4)), 80);
    let asked = job(&mut up);
    assert_eq!((asked.rung, asked.key), (None, None));
    up.recoded(clock.at(0), asked.id, media(4));
    assert_eq!(out(&mut up), Some(packet(4)), "it may grow");
    assert_eq!((up.stats.recoded, up.stats.saved), (1, 0));
    // Of another duration than it was: no result.
    up.take(clock.at(0), &rtp(OPUS, 5, 4800, &small(5)), 80);
    let asked = job(&mut up);
    up.recoded(clock.at(0), asked.id, vec![0x50; 90]);
    assert_eq!(out(&mut up).unwrap()[12..], small(5));
}

/// A RED packet with the one before it.
fn red(n: u16) -> Vec<u8> {
    let mut payload = vec![0x80 | OPUS];
    payload.extend(&(960u32 << 10 | 120).to_be_bytes()[1..]);
    payload.push(OPUS);
    payload.extend(media(n - 1));
    payload.extend(media(n));
    rtp(RED, n, u32::from(n) * 960, &payload)
}

#[test]
fn redundancy_is_of_what_was_coded() {
    let (clock, mut recoder) = (Clock::new(), recoder(ALL));
    let mut sent = Vec::new();
    for n in [5, 6] {
        recoder.take(clock.at(0), &red(n), 300);
        let asked = job(&mut recoder);
        assert_eq!(asked.payload, media(n));
        recoder.recoded(clock.at(0), asked.id, small(n));
        sent.push(out(&mut recoder).unwrap());
    }
    let mut alone = vec![OPUS];
    alone.extend(small(5));
    assert_eq!(sent[0], rtp(RED, 5, 5 * 960, &alone));
    let mut both = vec![0x80 | OPUS];
    both.extend(&(960u32 << 10 | 30).to_be_bytes()[1..]);
    both.push(OPUS);
    both.extend(small(5));
    both.extend(small(6));
    assert_eq!(sent[1], rtp(RED, 6, 6 * 960, &both));
}

#[test]
fn only_a_receiver_that_loses_is_constrained() {
    let rule = RecodeRule {
        lossy_only: true,
        ..ALL
    };
    let (clock, mut recoder) = (Clock::new(), recoder(rule));
    assert!(recoder.is_idle(clock.at(0)));
    recoder.report(clock.at(0), 4);
    assert!(recoder.is_idle(clock.at(0)), "1.6 % is below 2 %");
    recoder.report(clock.at(0), 5);
    assert!(!recoder.is_idle(clock.at(0)));
    coded(&mut recoder, clock.at(0), 1);
    recoder.report(clock.at(10_000), 0);
    assert_eq!(coded(&mut recoder, clock.at(29_990), 2)[12..], small(2));
    // Past it all goes as it comes, but what went coded may still be asked for.
    recoder.take(clock.at(30_010), &packet(3), 160);
    assert_eq!(
        (recoder.poll_job(), out(&mut recoder)),
        (None, Some(packet(3)))
    );
    assert!(!recoder.is_idle(clock.at(30_010)));
    recoder.take(clock.at(30_020), &packet(2), 160);
    assert_eq!(out(&mut recoder).unwrap()[12..], small(2));
    recoder.take(clock.at(36_000), &packet(300), 160);
    assert_eq!(out(&mut recoder), Some(packet(300)));
    assert!(recoder.is_idle(clock.at(36_000)));
}

#[test]
fn a_rule_taken_back_ends_it_at_once() {
    let (clock, mut recoder) = (Clock::new(), recoder(ALL));
    coded(&mut recoder, clock.at(0), 1);
    recoder.take(clock.at(20), &packet(2), 160);
    recoder.set_rule(None);
    assert_eq!(
        (recoder.poll_job(), out(&mut recoder)),
        (None, Some(packet(2)))
    );
    recoder.take(clock.at(40), &packet(3), 160);
    assert_eq!(
        (recoder.poll_job(), out(&mut recoder)),
        (None, Some(packet(3)))
    );
    recoder.set_rule(Some(ALL));
    recoder.set_able(false);
    recoder.take(clock.at(60), &packet(4), 160);
    assert_eq!(
        (recoder.poll_job(), out(&mut recoder)),
        (None, Some(packet(4)))
    );
    recoder.set_able(true);
    assert_eq!(coded(&mut recoder, clock.at(80), 5)[12..], small(5));
}

#[derive(Debug, Clone)]
enum Step {
    /// The packet so far ahead of the newest, or behind it.
    Take(i16),
    Wait(u64),
    /// The oldest job, with this much Opus.
    Answer(usize),
    Refuse(bool),
    Report(u8),
    Rule(bool),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => Just(Step::Take(1)),
        4 => (-40i16..6).prop_map(Step::Take),
        1 => (-400i16..400).prop_map(Step::Take),
        6 => (0u64..12).prop_map(Step::Wait),
        8 => (9usize..200).prop_map(Step::Answer),
        1 => any::<bool>().prop_map(Step::Refuse),
        1 => any::<u8>().prop_map(Step::Report),
        1 => any::<bool>().prop_map(Step::Rule),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 500,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// An SRTP index stands for one payload, and a packet leaves once for each time that it came or is counted as dropped.
    #[test]
    fn a_number_never_stands_for_two_payloads(steps in proptest::collection::vec(step(), 1..400), lossy_only: bool) {
        let (clock, mut recoder) = (Clock::new(), recoder(RecodeRule { lossy_only, ..ALL }));
        let (mut ms, mut newest) = (0, 1000u16);
        let mut jobs = VecDeque::new();
        let mut sent: HashMap<u16, Vec<u8>> = HashMap::new();
        let (mut came, mut went) = (0, 0);
        let steps = steps.into_iter().chain([Step::Wait(30)]);
        for step in steps {
            let now = clock.at(ms);
            match step {
                Step::Take(ahead) => {
                    let sequence = newest.wrapping_add_signed(ahead);
                    if ahead > 0 {
                        newest = sequence;
                    }
                    // As the worker does: what needn't be taken goes by.
                    if recoder.is_idle(now) {
                        if recoder.skip(sequence) {
                            let own = packet(sequence);
                            prop_assert_eq!(sent.entry(sequence).or_insert_with(|| own.clone()), &own);
                        } else {
                            came += 1;
                        }
                        continue;
                    }
                    came += 1;
                    recoder.take(now, &packet(sequence), 160);
                }
                Step::Wait(passed) => {
                    ms += passed;
                    recoder.handle_timeout(clock.at(ms));
                }
                Step::Answer(len) => {
                    if let Some(RecodeJob { id, payload, .. }) = jobs.pop_front() {
                        let mut opus = vec![0x48, payload[1]];
                        opus.resize(len, 0x66);
                        recoder.recoded(now, id, opus);
                    }
                }
                Step::Refuse(lasts) => {
                    if let Some(RecodeJob { id, .. }) = jobs.pop_front() {
                        recoder.refused(now, id, if lasts { Refusal::Stereo } else { Refusal::Busy });
                    }
                }
                Step::Report(lost) => recoder.report(now, lost),
                Step::Rule(on) => recoder.set_rule(on.then_some(RecodeRule { lossy_only, ..ALL })),
            }
            jobs.extend(std::iter::from_fn(|| recoder.poll_job()));
            prop_assert!(jobs.len() <= 400);
            while let Some(packet) = out(&mut recoder) {
                went += 1;
                let sequence = u16::from_be_bytes([packet[2], packet[3]]);
                prop_assert_eq!(&packet[..12], &self::packet(sequence)[..12]);
                let again = sent.insert(sequence, packet.clone());
                if let Some(before) = again {
                    prop_assert_eq!(before, packet);
                }
            }
        }
        prop_assert_eq!(went + recoder.stats.dropped, came);
    }
}
