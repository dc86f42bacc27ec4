//! Calls come up, whatever the network does.

use crate::net::{Netem, for_seeds};
use crate::world::{CM, GCM, Options, World, client_addr, server_addr};
use auralink_proto::description::Target;
use auralink_proto::leg::{CloseReason, LegState};
use auralink_proto::relay::{RelayEvent, Side};
use std::cell::Cell;
use std::time::Duration;

fn assert_up(world: &World) {
    assert!(world.up(), "{}", world.report());
    for side in [Side::Client, Side::Server] {
        assert_eq!(world.relay().leg(side).state(), LegState::Established);
    }
    let established = |side| {
        world
            .events
            .iter()
            .filter(|(_, event)| matches!(event, RelayEvent::Established(s, _) if *s == side))
            .count()
    };
    assert_eq!(
        (established(Side::Client), established(Side::Server)),
        (1, 1)
    );
}

#[test]
fn a_call_comes_up_within_a_few_round_trips() {
    for target in [Target::Publisher, Target::Subscriber] {
        for answer_active in [true, false] {
            let mut world = World::new(
                1,
                Options {
                    target,
                    answer_active,
                    ..Options::default()
                },
            );
            world.join();
            let up = world.run_until(5, World::up);
            assert!(up, "{target:?} {answer_active}: {}", world.report());
            // Signalling 42 ms each way, then ICE and two round trips of DTLS at 40 ms.
            let took = world.elapsed();
            assert!(
                took < Duration::from_millis(500),
                "{target:?} {answer_active} {took:?}"
            );
            // The last flight is still on its way to the sidecar.
            world.run_ms(200);
            assert_up(&world);
        }
    }
}

/// DTLS's retransmissions double from 250 ms (ours) and 1 s (theirs); at 30 % loss a handful of
/// them may be needed, and they end before this.
const LOSSY_JOIN: u64 = 60;

fn lossy(seed: u64, loss: f64) -> [bool; 2] {
    [Target::Publisher, Target::Subscriber].map(|target| {
        let mut world = World::new(
            seed,
            Options {
                target,
                answer_active: seed.is_multiple_of(2),
                client_link: Netem::lossy(25, loss),
                server_link: Netem::lossy(2, loss),
                ..Options::default()
            },
        );
        world.join();
        let up = world.run_until(LOSSY_JOIN, World::up);
        if up {
            assert_up(&world);
        } else {
            eprintln!("{}", world.report());
        }
        up
    })
}

#[test]
fn calls_come_up_at_10_percent_loss() {
    for_seeds(40, |seed| assert_eq!(lossy(seed, 0.1), [true, true]));
}

#[test]
fn calls_come_up_at_30_percent_loss() {
    // A flight is sent eight times: each of the dozen flights of a call has a chance of 0.3⁸ to be
    // lost for good, and it is more for one that needs all its datagrams.
    let failed = Cell::new(0);
    for_seeds(40, |seed| {
        let lost = lossy(seed, 0.3).iter().filter(|up| !**up).count();
        failed.set(failed.get() + lost);
        assert!(failed.get() <= 1, "{} joins failed", failed.get());
    });
}

#[test]
fn a_client_hello_may_overtake_the_answer_but_media_waits_for_it() {
    // The client answers and dials at once; its answer, with its fingerprint, crawls.
    let crawl = Duration::from_millis(1500);
    let mut world = World::new(
        2,
        Options {
            target: Target::Subscriber,
            client_signal: [crawl, Duration::from_millis(20)],
            ..Options::default()
        },
    );
    world.join();
    assert!(
        world.run_until(1, |w| w.client.established_at.is_some()),
        "{}",
        world.report()
    );
    let plain = crate::media::rtp(111, 1, 960, crate::sdp::CLIENT_AUDIO_SSRC, b"early");
    world.client.send_rtp(&plain);
    world.client.send_data(world.now, b"early data");
    world.run_ms(100);
    assert_eq!(
        world.relay().leg(Side::Client).state(),
        LegState::Handshaking,
        "without a fingerprint there are no keys"
    );
    assert!(world.server.rtp.is_empty() && world.server.data.is_empty());
    assert!(world.run_until(5, World::up), "{}", world.report());
    world.run_ms(300);
    assert_up(&world);
    assert_eq!(world.server.data, [b"early data"]);
}

#[test]
fn a_server_hello_of_the_answerer_may_overtake_its_answer() {
    // LiveKit answers `active` and its ClientHello goes straight to the server leg.
    let mut world = World::new(
        3,
        Options {
            server_signal: [Duration::from_millis(1), Duration::from_millis(900)],
            ..Options::default()
        },
    );
    world.join();
    assert!(world.run_until(10, World::up), "{}", world.report());
    world.run_ms(300);
    assert_up(&world);
}

#[test]
fn a_wrong_certificate_closes_the_call_and_no_media_passes() {
    for side in [Side::Client, Side::Server] {
        for target in [Target::Publisher, Target::Subscriber] {
            for answer_active in [true, false] {
                let mut world = World::new(
                    4,
                    Options {
                        target,
                        answer_active,
                        false_fingerprint: Some(side),
                        ..Options::default()
                    },
                );
                world.join();
                // The liar may believe that it is connected: it sends as soon as it can.
                let mut sequence = 0u16;
                for _ in 0..200 {
                    world.run_ms(20);
                    sequence += 1;
                    let plain = crate::media::rtp(111, sequence, 960, 7, b"voice");
                    for peer in [&mut world.client, &mut world.server] {
                        if peer.established_at.is_some() && peer.path.is_some() && !peer.closed {
                            peer.send_rtp(&plain);
                        }
                    }
                }
                let closed = world.events.iter().find_map(|(_, event)| match event {
                    RelayEvent::Closed(side, reason) => Some((*side, reason.clone())),
                    _ => None,
                });
                assert_eq!(
                    closed,
                    Some((side, CloseReason::Fingerprint)),
                    "{}",
                    world.report()
                );
                assert!(world.relay().is_closed());
                let (client, server) = (&world.client, &world.server);
                assert!(client.rtp.is_empty() && server.rtp.is_empty());
                assert!(client.data.is_empty() && server.data.is_empty());
                let liar = if side == Side::Client { client } else { server };
                assert!(liar.closed || liar.established_at.is_none(), "it is told");
            }
        }
    }
}

#[test]
fn every_pair_of_srtp_profiles_works() {
    for client in [vec![GCM, CM], vec![CM, GCM], vec![CM], vec![GCM]] {
        for server in [vec![GCM, CM], vec![CM], vec![GCM]] {
            let mut world = World::connected(
                5,
                Options {
                    client_profiles: client.clone(),
                    server_profiles: server.clone(),
                    ..Options::default()
                },
            );
            let sent = crate::media::talk(&mut world, 10);
            assert_eq!(
                crate::media::plain(&world.server.rtp),
                sent.up,
                "{client:?} {server:?}"
            );
            assert_eq!(
                crate::media::plain(&world.client.rtp),
                sent.down,
                "{client:?} {server:?}"
            );
        }
    }
}

#[test]
fn a_close_notify_of_either_end_reaches_the_other() {
    for side in [Side::Client, Side::Server] {
        let mut world = World::connected(6, Options::default());
        let now = world.now;
        match side {
            Side::Client => world.client.close(now),
            Side::Server => world.server.close(now),
        }
        world.run_ms(200);
        let other = if side == Side::Client {
            &world.server
        } else {
            &world.client
        };
        assert!(other.closed, "{}", world.report());
        let ends: Vec<_> = world
            .events
            .iter()
            .filter(|(_, event)| matches!(event, RelayEvent::Closed(..)))
            .map(|(_, event)| event)
            .collect();
        assert_eq!(ends, [&RelayEvent::Closed(side, CloseReason::PeerClosed)]);
        // Nothing is due any more, nothing is sent any more.
        let sent = world.sent.len();
        world.run(Duration::from_secs(60));
        assert_eq!(world.sent.len(), sent);
    }
}

#[test]
fn ending_the_relay_tells_both_ends() {
    let mut world = World::connected(7, Options::default());
    world.close_relay();
    world.run_ms(100);
    assert!(world.client.closed && world.server.closed);
}

#[test]
fn lost_consent_ends_the_call_after_the_time_that_policy_gives() {
    for (gone, side) in [(client_addr(), Side::Client), (server_addr(), Side::Server)] {
        let mut world = World::connected(
            8,
            Options {
                consent_timeout: Duration::from_secs(10),
                ..Options::default()
            },
        );
        // Minutes of silence are fine as long as checks come.
        world.run(Duration::from_secs(180));
        assert!(!world.relay().is_closed(), "{}", world.report());
        let gone_at = world.elapsed();
        world.dead.insert(gone);
        assert!(
            world.run_until(120, |w| w.relay().is_closed()),
            "{}",
            world.report()
        );
        let (at, event) = world.events.last().unwrap();
        assert_eq!(event, &RelayEvent::Closed(side, CloseReason::ConsentLost));
        let after = *at - gone_at;
        // A full agent first has to notice that its checks stay unanswered.
        assert!(after >= Duration::from_secs(6), "{after:?}");
        assert!(after <= Duration::from_secs(45), "{after:?}");
    }
}

#[test]
fn a_short_outage_ends_nothing() {
    let mut world = World::connected(
        9,
        Options {
            consent_timeout: Duration::from_secs(20),
            ..Options::default()
        },
    );
    for gone in [client_addr(), server_addr()] {
        world.dead.insert(gone);
        world.run(Duration::from_secs(8));
        world.dead.clear();
        world.run(Duration::from_secs(8));
        world.client.rtp.clear();
        world.server.rtp.clear();
        let sent = crate::media::talk(&mut world, 10);
        assert_eq!(
            crate::media::plain(&world.server.rtp),
            sent.up,
            "{}",
            world.report()
        );
        assert_eq!(
            crate::media::plain(&world.client.rtp),
            sent.down,
            "{}",
            world.report()
        );
    }
}
