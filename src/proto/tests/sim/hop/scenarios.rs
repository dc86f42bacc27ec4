//! What a hop has to stand.

use super::engine::Manners;
use super::link::{Link, Plan};
use crate::net::{Netem, for_seeds};
use auralink_proto::hop::{NativeReason, Redundancy};
use auralink_proto::ladder::{Rung, Rungs};
use std::time::Duration;

fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// What the restorer measured.
fn jitter_ms(link: &Link) -> f64 {
    f64::from(link.restorer.jitter()) / 65.536
}

#[test]
fn a_clean_hop_restores_everything_within_a_group_and_the_engines_time() {
    for_seeds(8, |seed| {
        for red in [false, true] {
            let mut link = Link::new(
                seed,
                Plan {
                    red,
                    ..Plan::clean()
                },
            );
            link.run();
            let books = link.account();
            assert_eq!(books.whole, link.spoken(), "{books:?}");
            assert!(books.twice.is_empty());
            // A group is 20 ms behind its first original; 3 ms each for the engines; a lone one at the
            // end of a spurt goes with the DTX packet 20 ms later, at the end of the call after 45 ms.
            let mut latencies = link.latencies(|restored| !restored.native);
            assert!(latencies.pop().unwrap() <= 45 + 3 + 3 + 2, "{latencies:?}");
            assert!(latencies.pop().unwrap() <= 20 + 3 + 3 + 2, "{latencies:?}");
            let natives = link.latencies(|restored| restored.native);
            assert!(*natives.last().unwrap() <= 3 + 3 + 2, "{natives:?}");
            assert!(link.packer.stats.coded > 1000);
            assert_eq!(link.packer.stats.missed + link.restorer.stats.missed, 0);
            assert!(link.hop_bytes * 2 < link.native_bytes());
            let stats = &link.restorer.stats;
            assert!(
                stats.bytes > 0 && stats.bytes * 2 < stats.restored_bytes,
                "{stats:?}"
            );
            assert!(jitter_ms(&link) < 1.0, "{}", jitter_ms(&link));
        }
    });
}

#[test]
fn loss_is_made_good_by_copies_and_explained_where_it_is_not() {
    for_seeds(20, |seed| {
        let mut plan = Plan::clean();
        plan.hop.loss = 0.1;
        plan.encoder.lifts = 0.2;
        plan.red = seed % 2 == 0;
        plan.rung = Rung::CODED[usize::try_from(seed % 6).unwrap()];
        let mut link = Link::new(seed, plan);
        link.run();
        let books = link.account();
        assert!(books.twice.is_empty());
        assert!(books.copied > 30, "{books:?}");
        // 1 % of both lost, and the first seconds without copies; a third of those is concealed.
        let gone = books.concealed + books.missing;
        assert!(gone * 100 <= books.sent * 5, "{books:?}");
        assert!(books.missing * 100 <= books.sent * 3, "{books:?}");
        // A gap shows with the first packet behind it, 51 ms after its first original came if that is
        // alone; then the copy is waited for, 70 ms.
        let latencies = link.latencies(|restored| !restored.copied && !restored.concealed);
        let most = *latencies.last().unwrap();
        assert!(most <= 51 + 70 + 2, "{most} ms");
        // The copy comes 80 ms behind, unless a pause is between; what is lost before it is waited for.
        let latencies = link.latencies(|restored| restored.copied);
        let p80 = latencies[latencies.len() * 4 / 5];
        assert!(p80 <= 26 + 80 + 30 + 2, "{p80} ms");
        assert!(link.packer.copy_distance().is_some());
        let reported: u64 = link
            .seen_reports
            .iter()
            .map(|(_, report)| u64::from(report.fraction_lost))
            .sum();
        let mean = reported / link.seen_reports.len() as u64;
        assert!((13..=40).contains(&mean), "{mean}/256 reported for 10 %");
    });
}

#[test]
fn bursts_up_to_the_distance_lose_nothing() {
    for_seeds(10, |seed| {
        let mut plan = Plan::clean();
        plan.redundancy = Redundancy::Always { distance: 2 };
        // Bursts of two that are further apart than the distance.
        plan.bursts = (0.02, 2);
        let mut link = Link::new(seed, plan);
        link.run();
        let books = link.account();
        assert!(books.copied > 10, "{books:?}");
        assert!(
            books.missing + books.concealed <= books.copied / 5,
            "{books:?}"
        );
    });
}

#[test]
fn without_copies_60_ms_are_made_up_and_the_rest_is_a_gap() {
    for_seeds(10, |seed| {
        let mut plan = Plan::clean();
        plan.redundancy = Redundancy::Never;
        plan.bursts = (0.02, 3);
        let mut link = Link::new(seed, plan);
        link.run();
        let books = link.account();
        assert_eq!(books.copied, 0);
        assert_eq!(books.concealed as u64, link.restorer.stats.concealed);
        // 120 ms are lost each time, less where natives are among them; 60 ms are made up.
        assert!(books.concealed > 10 && books.missing > 10, "{books:?}");
        let made_up = |at: usize| {
            link.heard
                .get(at)
                .is_some_and(|heard| heard.restored.concealed)
        };
        assert!((0..link.heard.len()).any(|at| (at..at + 3).all(made_up)));
        assert!(!(0..link.heard.len()).any(|at| (at..at + 4).all(made_up)));
    });
}

#[test]
fn reordering_duplicates_and_jitter_cost_nothing_but_time() {
    for_seeds(20, |seed| {
        let mut plan = Plan::clean();
        plan.hop = Netem {
            loss: 0.0,
            duplicate: 0.1,
            reorder: 0.0,
            delay: ms(50),
            jitter: ms(25),
        };
        plan.before = Netem {
            loss: 0.0,
            duplicate: 0.02,
            reorder: 0.02,
            delay: ms(5),
            jitter: ms(15),
        };
        let mut link = Link::new(seed, plan);
        link.run();
        let books = link.account();
        assert_eq!(books.missing + books.concealed, 0, "{books:?}");
        assert_eq!(books.sent, books.whole);
        // Evenly between 0 and 25 ms: a third of that from one packet to the next.
        assert!(
            (4.0..14.0).contains(&jitter_ms(&link)),
            "{}",
            jitter_ms(&link)
        );
        let lossy = |report: &auralink_proto::hop::Report| report.fraction_lost > 0;
        assert!(!link.seen_reports.iter().any(|(_, report)| lossy(report)));
        // The speaker's own duplicates go native, as they came; the hop's are dropped.
        assert!(link.restorer.stats.duplicates > 10);
        assert!(link.packer.stats.native(NativeReason::OutOfOrder) > 0);
        assert_eq!(link.packer.stats.dropped + link.restorer.stats.dropped, 0);
    });
}

#[test]
fn everything_at_once_loses_no_more_than_the_network_did() {
    for_seeds(40, |seed| {
        let mut plan = Plan::clean();
        plan.red = seed % 2 == 0;
        plan.hop = Netem::lossy(60, 0.06);
        plan.before = Netem::lossy(20, 0.03);
        plan.bursts = (0.005, 4);
        plan.encoder = Manners {
            delay: ms(2),
            jitter: ms(12),
            refuses: 0.02,
            lifts: 0.1,
            ..Manners::default()
        };
        plan.decoder.jitter = ms(20);
        let mut link = Link::new(seed, plan);
        link.run();
        let books = link.account();
        assert!(books.missing * 100 < books.sent * 12, "{books:?}");
        assert!(books.unread * 500 < books.sent, "{books:?}");
        assert_eq!(link.packer.stats.dropped + link.restorer.stats.dropped, 0);
    });
}

#[test]
fn what_red_carries_makes_good_what_was_lost_before_the_hop() {
    for_seeds(10, |seed| {
        let mut plan = Plan::clean();
        plan.red = true;
        plan.before.loss = 0.1;
        let mut link = Link::new(seed, plan);
        link.run();
        let lost = link.spoken() - link.came.len();
        assert!(lost > 50);
        let recovered = usize::try_from(link.packer.stats.recovered).unwrap();
        assert!(recovered * 10 > lost * 8, "{recovered} of {lost}");
        let books = link.account();
        assert_eq!(books.whole, link.came.len() + recovered);
        assert_eq!(books.missing, 0);
        let still_lost = usize::try_from(link.packer.stats.lost).unwrap();
        // The last packets of the call may be lost without anybody noticing.
        assert!(
            lost - recovered - still_lost <= 3,
            "{lost} {recovered} {still_lost}"
        );
    });
}

#[test]
fn an_engine_that_stops_costs_20_ms_and_comes_back_when_mended() {
    for_seeds(5, |seed| {
        let mut link = Link::new(seed, Plan::clean());
        link.run_until(10_000);
        let before = link.packer.stats;
        link.encoder.manners.stopped = true;
        link.run_until(20_000);
        let during = link.packer.stats;
        assert!(
            during.coded - before.coded <= 2,
            "one may have been under way"
        );
        assert!(during.missed - before.missed >= 3);
        assert!(
            during.missed - before.missed <= 3 + 34,
            "after three misses, three groups a second are tried: {during:?}"
        );
        link.encoder.manners.stopped = false;
        link.run_until(22_000);
        let after = link.packer.stats;
        assert!(after.coded - during.coded > 10, "{after:?}");
        link.run();
        let books = link.account();
        assert_eq!(books.whole, link.spoken(), "{books:?}");
        // The deadline, and the group that filled before it.
        let latencies = link.latencies(|restored| restored.native);
        let most = *latencies.last().unwrap();
        assert!(most <= 20 + 20 + 2, "{most} ms");
    });
}

#[test]
fn an_engine_that_is_too_slow_is_ignored() {
    for_seeds(5, |seed| {
        let mut plan = Plan::clean();
        plan.encoder.delay = ms(25);
        let mut link = Link::new(seed, plan);
        link.run();
        assert_eq!(link.packer.stats.coded, 0);
        assert!(link.packer.stats.late_results > 10);
        assert_eq!(link.packer.stats.late_results, link.packer.stats.missed);
        let books = link.account();
        assert_eq!(books.whole, link.spoken());
        assert!(link.heard.iter().all(|heard| heard.restored.native));
    });
}

#[test]
fn a_decoder_that_stops_is_told_to_the_sender_who_goes_native() {
    for_seeds(5, |seed| {
        let mut link = Link::new(seed, Plan::clean());
        link.run_until(10_000);
        link.decoder.manners.stopped = true;
        let mut rungs = Vec::new();
        while link.packer.rung() != Rung::NATIVE {
            link.run_until(link.now_ms() + 1);
            rungs.push(link.packer.rung());
            assert!(rungs.len() < 1900, "still {:?}", link.packer.rung());
        }
        rungs.dedup();
        // Lyra is given up first, then Opus with it.
        assert_eq!(rungs, [Rung::L2, Rung::L3, Rung::NATIVE]);
        let missed = link.restorer.stats.missed;
        link.run_until(link.now_ms() + 300);
        assert!(
            link.restorer.stats.missed - missed < 5,
            "those that were under way"
        );
        link.run_until(14_000);
        link.decoder.manners.stopped = false;
        link.run_until(20_000);
        assert_eq!(link.packer.rung(), Rung::L2);
        assert!(link.seen_reports.len() > 8);
        let missed = link.restorer.stats.missed;
        link.run();
        assert_eq!(link.restorer.stats.missed, missed);
    });
}

/// As a codec thread that hangs: nothing comes of what it has, and 55 ms later its pool says that it can do nothing.
#[test]
fn what_a_decoder_left_undone_is_sent_again_and_nothing_is_lost() {
    for_seeds(20, |seed| {
        let mut link = Link::new(seed, Plan::clean());
        link.run_until(10_000);
        let stopped = link.now_ms();
        link.decoder.manners.stopped = true;
        link.run_until(stopped + 55);
        let now = link.time();
        link.restorer.set_rungs(now, Rungs::NONE);
        link.run();
        assert!(link.packer.stats.resent > 0);
        // 20 ms for its partner, 20 at most to code it, 55 at the other end, and back, and once more; its first way isn't counted.
        let latest = link.latencies(|_| true).into_iter().max().unwrap();
        assert!(latest <= 20 + 20 + 55 + 50 + 50, "heard after {latest} ms");
        let books = link.account();
        assert_eq!((books.missing, books.concealed), (0, 0), "{books:?}");
        assert!(books.twice.is_empty());
    });
}

#[test]
fn rungs_that_go_are_reported_at_once() {
    let mut link = Link::new(1, Plan::clean());
    link.run_until(10_300);
    let reports = link.seen_reports.len();
    let now = link.time();
    link.restorer.set_rungs(now, Rungs::NONE);
    link.run_until(10_305);
    assert_eq!(link.seen_reports.len(), reports + 1);
    assert_eq!(link.packer.rung(), Rung::L2, "the report is on its way");
    link.run_until(10_360);
    assert_eq!(link.packer.rung(), Rung::NATIVE);
    let coded = link.packer.stats.coded;
    link.run();
    assert_eq!(link.packer.stats.coded, coded);
    assert_eq!(link.account().missing, 0);
}

#[test]
fn the_hop_s_jitter_and_ratio_are_reported() {
    let mut plan = Plan::clean();
    plan.hop.jitter = ms(20);
    let mut link = Link::new(3, plan);
    link.run();
    let (_, last) = link.seen_reports.last().unwrap();
    // Uniform over 20 ms: the mean difference of two is 6.7 ms = 437/65536 s.
    assert!((200..=700).contains(&last.jitter), "{}", last.jitter);
    assert!((40..=200).contains(&last.ratio), "{}", last.ratio);
    let mut still = Link::new(3, Plan::clean());
    still.run();
    let (_, last) = still.seen_reports.last().unwrap();
    assert!(last.jitter <= 66, "{} without jitter", last.jitter);
    assert_eq!(last.fraction_lost, 0);
}
