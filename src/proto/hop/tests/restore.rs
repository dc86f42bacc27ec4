//! The restorer.

use super::*;
use crate::aic::payload::Body;
use crate::aic::payload::{Part, Redundant};

const NONE: Option<&Redundant<Vec<u8>>> = None;

fn framed(place: u16, original: u16, body: Body<Vec<u8>>, packets: u8) -> Vec<u8> {
    let part = Part {
        sequence: original,
        packets,
        red: false,
        body,
    };
    let mut payload = Vec::new();
    part.write(NONE, Frames::LYRA, &mut payload).unwrap();
    rtp(AIC, place, u32::from(original) * 960, &payload)
}

/// Two originals, coded.
fn coded(place: u16, original: u16) -> Vec<u8> {
    let body = Body::Coded {
        codec: CodecId::Lyra6,
        unit_ms: 20,
        gain: 0,
        payload: vec![6; 30],
    };
    framed(place, original, body, 2)
}

fn native(place: u16, original: u16) -> Vec<u8> {
    let body = Body::Native {
        payload_type: OPUS,
        marker: false,
        trimmed_from: None,
        payload: vec![0x48, 0x0b, 0xe4],
    };
    framed(place, original, body, 1)
}

fn answer(restorer: &mut Restorer, now: Instant) -> u32 {
    let mut jobs = 0;
    while let Some(job) = restorer.poll_job() {
        restorer.decoded(now, job.id, opus(&job));
        jobs += 1;
    }
    jobs
}

#[test]
fn what_is_ready_waits_20_ms_for_what_is_decoded_before_it() {
    let clock = Clock::new();
    let mut restorer = restorer();
    restorer.take(clock.at(0), 0, &coded(1, 1), 100);
    restorer.take(clock.at(5), 0, &native(2, 3), 60);
    assert!(heard(&mut restorer).is_empty());
    assert_eq!(restorer.poll_timeout(), Some(clock.at(25)));
    restorer.handle_timeout(clock.at(24));
    assert!(heard(&mut restorer).is_empty());
    restorer.handle_timeout(clock.at(25));
    assert_eq!(heard(&mut restorer), [3]);
    answer(&mut restorer, clock.at(30));
    assert_eq!(heard(&mut restorer), [1, 2], "late but of use");
}

#[test]
fn a_decoding_that_takes_60_ms_is_skipped() {
    let clock = Clock::new();
    let mut restorer = restorer();
    restorer.take(clock.at(0), 0, &coded(1, 1), 100);
    let slow = restorer.poll_job().unwrap();
    restorer.take(clock.at(40), 0, &coded(2, 3), 100);
    restorer.handle_timeout(clock.at(60));
    assert_eq!(restorer.stats.missed, 1);
    restorer.decoded(clock.at(61), slow.id, opus(&slow));
    assert_eq!(restorer.stats.late_results, 1);
    answer(&mut restorer, clock.at(62));
    assert_eq!(heard(&mut restorer), [3, 4]);
    assert!(restorer.rungs().has(Rung::L2), "once is not twice");
}

#[test]
fn failures_take_the_rungs_of_their_kind_back_for_a_while() {
    let clock = Clock::new();
    let mut restorer = restorer();
    for (ms, place) in [(0, 1), (40, 2)] {
        restorer.take(clock.at(ms), 0, &coded(place, 2 * place), 100);
        let job = restorer.poll_job().unwrap();
        restorer.failed(clock.at(ms + 1), job.id);
    }
    let report = restorer.poll_report(clock.at(41)).unwrap();
    assert_eq!(report.rungs, Rungs::OPUS);
    assert!(restorer.poll_report(clock.at(42)).is_none());
    assert_eq!(named(&mut restorer, clock.at(91)), Some((2, 2)));
    assert_eq!(restorer.poll_timeout(), Some(clock.at(2041)));
    restorer.handle_timeout(clock.at(2041));
    let report = restorer.poll_report(clock.at(2041)).unwrap();
    assert_eq!(report.rungs, Rungs::ALL);
    restorer.take(clock.at(2100), 0, &coded(3, 6), 100);
    let job = restorer.poll_job().unwrap();
    restorer.failed(clock.at(2101), job.id);
    assert_eq!(restorer.rungs(), Rungs::OPUS, "one more is enough");
}

#[test]
fn what_waits_for_a_rung_that_goes_is_given_up_and_asked_for_again() {
    let clock = Clock::new();
    let mut restorer = restorer();
    restorer.take(clock.at(0), 0, &coded(10, 1), 100);
    assert_eq!(answer(&mut restorer, clock.at(1)), 1);
    restorer.take(clock.at(40), 0, &coded(11, 3), 100);
    restorer.take(clock.at(80), 0, &coded(12, 5), 100);
    restorer.take(clock.at(81), 0, &native(13, 7), 60);
    let slow = restorer.poll_job().unwrap();
    assert_eq!(heard(&mut restorer), [1, 2]);
    restorer.set_rungs(clock.at(90), Rungs::OPUS);
    assert_eq!(heard(&mut restorer), [7], "waits for nothing any more");
    assert!(restorer.poll_job().is_none());
    let report = restorer.poll_report(clock.at(90)).unwrap();
    assert_eq!((report.highest, report.unrestored), (13, 3));
    assert_eq!(named(&mut restorer, clock.at(140)), Some((13, 3)));
    restorer.decoded(clock.at(91), slow.id, opus(&slow));
    assert_eq!(restorer.stats.late_results, 1);
    for n in 3..7 {
        restorer.take(clock.at(92), 0, &native(11 + n, n), 60);
    }
    assert_eq!(heard(&mut restorer), [3, 4, 5, 6]);
    restorer.set_rungs(clock.at(200), Rungs::ALL);
    assert_eq!(
        restorer.poll_report(clock.at(200)).unwrap().unrestored,
        7,
        "until something is restored"
    );
    restorer.take(clock.at(210), 0, &coded(18, 8), 100);
    assert_eq!(answer(&mut restorer, clock.at(211)), 1);
    restorer.set_rungs(clock.at(220), Rungs::OPUS);
    assert_eq!(restorer.poll_report(clock.at(220)).unwrap().unrestored, 0);
}

/// Highest number and how many up to it came to nothing, of a report that is due.
fn named(restorer: &mut Restorer, now: Instant) -> Option<(u16, u16)> {
    let report = restorer.poll_report(now)?;
    Some((report.highest, report.unrestored))
}

/// The jobs of `places`, taken at once; an earlier report is out of the way.
fn jobs(restorer: &mut Restorer, now: Instant, places: std::ops::RangeInclusive<u16>) -> Vec<u64> {
    for place in places {
        restorer.take(now, 0, &coded(place, 2 * place), 100);
    }
    restorer.poll_report(now);
    std::iter::from_fn(|| restorer.poll_job().map(|job| job.id)).collect()
}

#[test]
fn a_codec_that_hangs_takes_all_rungs_and_all_that_waits() {
    let clock = Clock::new();
    let mut restorer = restorer();
    let jobs = jobs(&mut restorer, clock.at(0), 10..=12);
    restorer.hangs(clock.at(1), jobs[2]);
    let report = restorer.poll_report(clock.at(1)).unwrap();
    assert_eq!((report.rungs, report.unrestored), (Rungs::NONE, 3));
    assert_eq!(restorer.poll_timeout(), Some(clock.at(51)));
    assert_eq!(named(&mut restorer, clock.at(50)), None);
    assert_eq!(
        named(&mut restorer, clock.at(51)),
        Some((12, 3)),
        "the first may be lost"
    );
    restorer.handle_timeout(clock.at(2001));
    assert_eq!(restorer.rungs(), Rungs::ALL);
}

#[test]
fn failures_are_named_from_the_first_on_whatever_their_order() {
    let clock = Clock::new();
    let mut restorer = restorer();
    let jobs = jobs(&mut restorer, clock.at(0), 10..=13);
    restorer.failed(clock.at(1), jobs[2]);
    assert_eq!(named(&mut restorer, clock.at(1)), Some((13, 2)));
    restorer.failed(clock.at(2), jobs[1]);
    assert_eq!(
        named(&mut restorer, clock.at(2)),
        Some((13, 4)),
        "10 waits for the same codec, which is given up"
    );
    restorer.handle_timeout(clock.at(60));
    assert_eq!(named(&mut restorer, clock.at(60)), Some((13, 4)), "missed");
}

#[test]
fn what_is_restored_ends_what_failed_before_it_and_nothing_else() {
    let clock = Clock::new();
    let mut restorer = restorer();
    for place in 10..=13 {
        restorer.take(clock.at(0), 0, &coded(place, 2 * place), 100);
    }
    restorer.poll_report(clock.at(0));
    let jobs: Vec<_> = std::iter::from_fn(|| restorer.poll_job()).collect();
    restorer.failed(clock.at(1), jobs[1].id);
    restorer.decoded(clock.at(1), jobs[0].id, opus(&jobs[0]));
    assert_eq!(named(&mut restorer, clock.at(1)), Some((13, 3)));
    restorer.decoded(clock.at(2), jobs[3].id, opus(&jobs[3]));
    restorer.failed(clock.at(3), jobs[2].id);
    assert_eq!(
        named(&mut restorer, clock.at(3)),
        None,
        "13 has been played"
    );
}

#[test]
fn no_more_is_named_than_a_receiver_tells_apart() {
    let clock = Clock::new();
    let mut restorer = restorer();
    let job = jobs(&mut restorer, clock.at(0), 10..=10)[0];
    restorer.failed(clock.at(1), job);
    for place in 11..200 {
        restorer.take(clock.at(2), 0, &native(place, 20 + place), 60);
    }
    assert_eq!(named(&mut restorer, clock.at(2)), Some((199, 64)));
    // The sender began anew.
    restorer.take(clock.at(3), 0, &native(400, 500), 60);
    restorer.set_rungs(clock.at(3), Rungs::OPUS);
    assert_eq!(named(&mut restorer, clock.at(3)), Some((400, 0)));
}

#[test]
fn a_result_with_the_wrong_number_of_packets_is_a_failure() {
    let clock = Clock::new();
    let mut restorer = restorer();
    restorer.take(clock.at(0), 0, &coded(1, 1), 100);
    let job = restorer.poll_job().unwrap();
    let mut short = opus(&job);
    short.packets.pop();
    restorer.decoded(clock.at(1), job.id, short);
    assert_eq!((restorer.stats.failed, restorer.stats.restored), (1, 0));
}

#[test]
fn a_gap_is_waited_for_30_ms() {
    let clock = Clock::new();
    let mut restorer = restorer();
    restorer.take(clock.at(0), 0, &native(1, 1), 60);
    restorer.take(clock.at(40), 0, &native(3, 3), 60);
    assert_eq!(heard(&mut restorer), [1]);
    assert_eq!(restorer.poll_timeout(), Some(clock.at(70)));
    restorer.take(clock.at(69), 0, &native(2, 2), 60);
    assert_eq!(heard(&mut restorer), [2, 3]);
    restorer.take(clock.at(80), 0, &native(5, 5), 60);
    restorer.handle_timeout(clock.at(110));
    assert_eq!(heard(&mut restorer), [5]);
    assert_eq!(restorer.stats.lost, 1);
    // Late: a native packet is of use, a coded one isn't.
    restorer.take(clock.at(120), 0, &native(4, 4), 60);
    assert_eq!(heard(&mut restorer), [4]);
    restorer.take(clock.at(121), 0, &native(7, 8), 60);
    restorer.handle_timeout(clock.at(151));
    restorer.take(clock.at(152), 0, &coded(6, 6), 60);
    assert_eq!((heard(&mut restorer), restorer.stats.late), (vec![8], 1));
    assert!(restorer.poll_job().is_none());
}

#[test]
fn a_gap_is_made_up_only_where_nothing_else_was_between() {
    for (second, timestamp, made_up, gaps) in [
        (5u16, 5 * 960u32, 2, 0),
        (9, 9 * 960, 3, 3),
        // A pause: three originals, but more time.
        (6, 40_000, 0, 3),
    ] {
        let clock = Clock::new();
        let mut restorer = restorer();
        restorer.take(clock.at(0), 0, &coded(1, 1), 100);
        answer(&mut restorer, clock.at(1));
        let mut packet = coded(3, second);
        packet[4..8].copy_from_slice(&timestamp.to_be_bytes());
        restorer.take(clock.at(80), 0, &packet, 100);
        restorer.handle_timeout(clock.at(110));
        let jobs = answer(&mut restorer, clock.at(111));
        assert_eq!(jobs, 1 + u32::from(made_up > 0), "{second}");
        assert_eq!(
            (restorer.stats.concealed, restorer.stats.gaps),
            (made_up, gaps)
        );
        let mut expected: Vec<u16> = vec![1, 2];
        expected.extend((3..).take(usize::try_from(made_up).unwrap()));
        expected.extend([second, second + 1]);
        assert_eq!(heard(&mut restorer), expected);
    }
}

#[test]
fn what_is_made_up_has_the_contributing_sources_of_its_neighbour() {
    let clock = Clock::new();
    let with_csrc = |mut packet: Vec<u8>| {
        packet[0] |= 1;
        packet.splice(12..12, [0, 0, 0, 9]);
        packet
    };
    let mut restorer = restorer();
    restorer.take(clock.at(0), 0, &with_csrc(coded(1, 1)), 100);
    answer(&mut restorer, clock.at(1));
    restorer.take(clock.at(80), 0, &with_csrc(coded(3, 5)), 100);
    restorer.handle_timeout(clock.at(110));
    answer(&mut restorer, clock.at(111));
    let mut out = Vec::new();
    for _ in 0..6 {
        restorer.poll_packet(&mut out).unwrap();
        assert_eq!(out[0], 0x91);
        assert_eq!(out[12..16], [0, 0, 0, 9]);
    }
    assert_eq!(restorer.stats.concealed, 2);
}

#[test]
fn a_sender_that_begins_anew_is_followed() {
    let clock = Clock::new();
    for second in [1000u16, 40_000, 100] {
        let mut restorer = restorer();
        for n in 0..4 {
            restorer.take(clock.at(0), 0, &native(500 + n, n), 60);
        }
        for n in 0..20 {
            let ms = 100 + u64::from(n) * 20;
            restorer.take(clock.at(ms), 0, &native(second + n, 100 + n), 60);
        }
        restorer.handle_timeout(clock.at(700));
        let heard = heard(&mut restorer);
        assert_eq!(heard[..4], [0, 1, 2, 3]);
        let expected = if second > 500 && second < 33_000 {
            20
        } else {
            13
        };
        assert_eq!(heard.len(), 4 + expected, "{second}: {heard:?}");
        assert_eq!(heard.last(), Some(&119));
    }
}

#[test]
fn what_cannot_be_read_is_counted() {
    let clock = Clock::new();
    let mut restorer = restorer();
    restorer.take(clock.at(0), 0, &[0x80, AIC], 60);
    restorer.take(clock.at(0), 0, &rtp(AIC, 1, 0, &[0x40]), 60);
    restorer.take(clock.at(0), 0, &rtp(AIC, 2, 0, &[0x50, 0, 1, 0, 9]), 60);
    let other_copy = [0x41, 0, 9, 0, 0xf0, 0x21, 0, 2, 7, 7, 0x58, 1];
    restorer.take(clock.at(0), 0, &rtp(AIC, 3, 0, &other_copy), 60);
    let stats = restorer.stats;
    assert_eq!(
        (stats.unreadable, stats.unknown_codec, stats.unknown_copy),
        (3, 1, 1)
    );
    restorer.handle_timeout(clock.at(30));
    assert_eq!(
        restorer.poll_job().unwrap().payload,
        [0x58, 1],
        "the rest is used"
    );
}

#[test]
fn nothing_grows_when_nobody_polls_or_answers() {
    let clock = Clock::new();
    let mut restorer = restorer();
    for n in 0..60_000u16 {
        let packet = if n % 3 == 0 {
            native(n, n)
        } else {
            coded(n, n)
        };
        restorer.take(clock.at(u64::from(n) / 64), 0, &packet, 100);
    }
    let mut jobs = 0;
    while restorer.poll_job().is_some() {
        jobs += 1;
    }
    assert!(jobs <= 128, "{jobs}");
    assert!(heard(&mut restorer).len() <= 256);
    assert!(restorer.stats.dropped + restorer.stats.missed > 30_000);
}

#[test]
fn reports_come_each_second_while_packets_do() {
    let clock = Clock::new();
    let mut restorer = restorer();
    assert!(restorer.poll_report(clock.at(0)).is_none());
    restorer.set_rungs(clock.at(0), Rungs::OPUS);
    assert!(restorer.poll_report(clock.at(0)).is_none(), "no stream yet");
    let mut reports = Vec::new();
    for n in 0..100u16 {
        // One of four is lost.
        if n % 4 != 3 {
            restorer.take(clock.at(u64::from(n) * 40), 0, &native(n, n), 60);
        }
        restorer.handle_timeout(clock.at(u64::from(n) * 40));
        reports.extend(restorer.poll_report(clock.at(u64::from(n) * 40)));
    }
    assert!((4..=5).contains(&reports.len()), "{reports:?}");
    for report in &reports[1..] {
        assert!((58..=70).contains(&report.fraction_lost), "{report:?}");
        assert!((48..=80).contains(&report.fraction_missing), "{report:?}");
        assert_eq!((report.ssrc, report.rungs), (7, Rungs::OPUS));
    }
    let _ = reports;
    assert!(restorer.poll_report(clock.at(6000)).is_some());
    assert!(
        restorer.poll_report(clock.at(9000)).is_none(),
        "nothing came"
    );
}
