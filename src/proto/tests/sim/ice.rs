//! Paths come, go, are nominated twice and restarted, and media goes on.

use crate::media::rtp;
use crate::net::{Netem, for_seeds};
use crate::sdp::{CLIENT_AUDIO_SSRC, Described, OPUS, SERVER_AUDIO_SSRC};
use crate::world::{Options, World, addr, back, client_addr, front, server_addr};
use auralink_proto::description::Target;
use auralink_proto::relay::{RelayEvent, Side};
use auralink_proto::stun::Path;
use is::Sha1HmacProvider;
use is::stun::{StunMessage, TransId};
use std::time::Duration;

/// Talks for so long and returns the longest time without a packet at server and client.
fn longest_gaps(
    world: &mut World,
    seconds: u64,
    mut at: impl FnMut(&mut World, u64),
) -> [Duration; 2] {
    let start = world.now;
    world.client.rtp.clear();
    world.server.rtp.clear();
    for n in 0..seconds * 50 {
        let sequence = u16::try_from(n).unwrap();
        let (a, b) = (
            rtp(OPUS, sequence, sequence.into(), CLIENT_AUDIO_SSRC, b"up"),
            rtp(OPUS, sequence, sequence.into(), SERVER_AUDIO_SSRC, b"down"),
        );
        if world.client.path.is_some() {
            world.client.send_rtp(&a);
        }
        world.server.send_rtp(&b);
        at(world, n);
        world.run_ms(20);
    }
    let end = world.now;
    [&world.server.rtp, &world.client.rtp].map(|received| {
        let mut last = start;
        let mut longest = Duration::ZERO;
        for at in received.iter().map(|(at, _)| *at).chain([end]) {
            longest = longest.max(at - last);
            last = at;
        }
        longest
    })
}

fn creds_of(sdp: &str) -> (String, String) {
    let read = Described::read(sdp);
    (read.ufrag, read.pwd)
}

#[test]
fn an_ice_restart_is_one_on_both_legs_and_media_goes_on() {
    for target in [Target::Publisher, Target::Subscriber] {
        for_seeds(5, |seed| {
            let mut world = World::connected(
                seed,
                Options {
                    target,
                    client_link: Netem::lossy(20, 0.03),
                    ..Options::default()
                },
            );
            let before = (
                creds_of(world.at_client.last().unwrap()),
                creds_of(world.at_server.last().unwrap()),
            );
            let gaps = longest_gaps(&mut world, 20, |world, n| {
                // Three restarts, the last two in quick succession.
                if matches!(n, 200 | 500 | 530) {
                    match world.options.target {
                        Target::Publisher => world.client.restart(),
                        Target::Subscriber => world.server.restart(),
                    }
                    world.offer();
                }
            });
            let after = (
                creds_of(world.at_client.last().unwrap()),
                creds_of(world.at_server.last().unwrap()),
            );
            assert_ne!(before.0, after.0, "the client is told new credentials");
            assert_ne!(before.1, after.1, "so is the server");
            let report = world.report();
            // Ordinary loss leaves holes of a few packets; a restart adds none.
            assert!(
                gaps[0] < Duration::from_millis(300),
                "{target:?} up {gaps:?} {report}"
            );
            assert!(
                gaps[1] < Duration::from_millis(300),
                "{target:?} down {gaps:?} {report}"
            );
            assert!(world.client.ice_state.is_connected(), "{report}");
            assert!(world.server.ice_state.is_connected(), "{report}");
            // And it lasts: consent is proved with the new credentials.
            world.run(Duration::from_secs(90));
            assert!(!world.relay().is_closed(), "{}", world.report());
        });
    }
}

#[test]
fn a_repeated_offer_restarts_nothing_and_reads_the_same() {
    let mut world = World::connected(20, Options::default());
    let first = (
        world.at_client.last().cloned(),
        world.at_server.last().cloned(),
    );
    for _ in 0..3 {
        world.offer();
        world.run_ms(500);
        let again = (
            world.at_client.last().cloned(),
            world.at_server.last().cloned(),
        );
        assert_eq!(first, again);
    }
    assert_eq!(world.at_client.len(), 4);
}

#[test]
fn a_client_that_changes_networks_is_found_again() {
    for_seeds(5, |seed| {
        let mut world = World::connected(seed, Options::default());
        let new = addr("192.0.2.44:6000");
        let gaps = longest_gaps(&mut world, 20, |world, n| {
            if n == 250 {
                // Wi-Fi is gone; two seconds later there is a mobile network, and livekit-client
                // restarts ICE over it.
                world.dead.insert(client_addr());
            }
            if n == 350 {
                world.client.move_to(&[new]);
                world.offer();
            }
        });
        let limit = Duration::from_millis(2000 + 600);
        assert!(
            gaps[0] < limit && gaps[1] < limit,
            "{gaps:?} {}",
            world.report()
        );
        assert_eq!(
            world.relay().leg(Side::Client).path().map(|p| p.remote),
            Some(new)
        );
    });
}

#[test]
fn a_nat_that_rebinds_is_followed_by_the_next_check() {
    // Same ICE session, the client's packets come from another port from now on: peer-reflexive.
    let mut world = World::connected(21, Options::default());
    let rebound = Path {
        local: front(),
        remote: addr("198.51.100.2:61000"),
        tcp: false,
    };
    world.dead.insert(client_addr());
    world.run(Duration::from_secs(4));
    let remote = world.client.remote.clone().unwrap();
    let nominate = check(&remote.ufrag, &remote.pwd, 1_845_501_695, true);
    world.inject(Side::Client, rebound, &nominate);
    assert_eq!(
        world.relay().leg(Side::Client).path(),
        Some(rebound),
        "{}",
        world.report()
    );
    let seen = world
        .events
        .iter()
        .any(|(_, event)| *event == RelayEvent::PathSeen(rebound));
    assert!(
        seen,
        "the worker is told, so that media from there finds the session"
    );
}

/// A binding request as a controlling client sends it.
pub(crate) fn check(ufrag: &str, pwd: &str, priority: u32, nominate: bool) -> Vec<u8> {
    let username = format!("{ufrag}:client");
    let message =
        StunMessage::binding_request(&username, TransId::new(), true, 7, priority, nominate);
    let mut bytes = vec![0; 256];
    let len = message
        .to_bytes(Some(pwd.as_bytes()), &mut bytes, |key, parts| {
            is::DefaultSha1HmacProvider.sha1_hmac(key, parts)
        })
        .unwrap();
    bytes.truncate(len);
    bytes
}

#[test]
fn nominating_every_pair_again_and_again_settles_on_the_best_as_firefox_expects() {
    let mut world = World::connected(22, Options::default());
    let remote = world.client.remote.clone().unwrap();
    let path = |port| Path {
        local: front(),
        remote: addr(&format!("198.51.100.2:{port}")),
        tcp: false,
    };
    let mut changes = 0;
    let mut last = None;
    // The real client nominated its own path with the priority of a host candidate.
    let best = 2_130_706_431;
    for round in 0..200 {
        for (n, port) in [7001, 7002, 7003, 7004].into_iter().enumerate() {
            let priority = best - if n == 2 { 0 } else { 100_000 * (n as u32 + 1) };
            world.inject(
                Side::Client,
                path(port),
                &check(&remote.ufrag, &remote.pwd, priority, true),
            );
            let now = world.relay().leg(Side::Client).path();
            if round > 0 && last != now {
                changes += 1;
            }
            last = now;
        }
        world.run_ms(150);
    }
    assert_eq!(last, Some(path(7003)));
    assert_eq!(changes, 0, "media does not hop between paths");
}

#[test]
fn checks_from_many_paths_never_take_media_away_from_the_nominated_one() {
    let mut world = World::connected(23, Options::default());
    let remote = world.client.remote.clone().unwrap();
    let selected = world.relay().leg(Side::Client).path();
    for n in 0..500u32 {
        let from = addr(&format!("192.0.2.{}:{}", n % 250, 1000 + n));
        let path = Path {
            local: front(),
            remote: from,
            tcp: false,
        };
        world.inject(
            Side::Client,
            path,
            &check(&remote.ufrag, &remote.pwd, 4_000_000_000, false),
        );
        world.run_ms(10);
    }
    assert_eq!(world.relay().leg(Side::Client).path(), selected);
    let sent = crate::media::talk(&mut world, 5);
    assert_eq!(crate::media::plain(&world.client.rtp), sent.down);
    assert_eq!(crate::media::plain(&world.server.rtp), sent.up);
}

#[test]
fn the_sidecar_is_the_only_peer_that_either_end_ever_hears() {
    for target in [Target::Publisher, Target::Subscriber] {
        let mut world = World::connected(
            24,
            Options {
                target,
                client_locals: vec![client_addr(), addr("10.99.0.5:5001")],
                ..Options::default()
            },
        );
        crate::media::talk(&mut world, 20);
        assert_eq!(world.client.heard, [front()]);
        assert_eq!(world.server.heard, [back()]);
        let up = world.relay().flow_from(Side::Client).stats.rtp_packets;
        let down = world.relay().flow_from(Side::Server).stats.rtp_packets;
        assert_eq!((up, down), (20, 20));
        // Nor does a word of the other's transport stand in what an end is told.
        let client_secrets = [
            "198.51.100.2",
            "10.99.0.5",
            &world.client.creds.pass,
            &world.client.creds.ufrag,
        ];
        let server_secrets = [
            "10.1.0.2",
            &world.server.creds.pass,
            &world.server.creds.ufrag,
        ];
        let holds = |frames: &[Vec<u8>], secret: &str| {
            frames
                .iter()
                .any(|frame| frame.windows(secret.len()).any(|w| w == secret.as_bytes()))
        };
        for secret in client_secrets {
            assert!(!holds(&world.frames_at_server, secret), "{secret}");
        }
        for secret in server_secrets {
            assert!(!holds(&world.frames_at_client, secret), "{secret}");
        }
        assert!(!holds(&world.frames_at_client, &world.server.fingerprint));
        assert!(!holds(&world.frames_at_server, &world.client.fingerprint));
    }
    assert_ne!(server_addr(), back());
}
