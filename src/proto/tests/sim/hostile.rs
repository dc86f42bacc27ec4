//! What strangers send is counted and forgotten.

use crate::media::{plain, rtp, talk};
use crate::net::{Rng, for_seeds};
use crate::sdp::{CLIENT_AUDIO_SSRC, OPUS};
use crate::world::{Options, World, addr, back, client_addr, front, server_addr};
use auralink_proto::description::Target;
use auralink_proto::leg::LegState;
use auralink_proto::relay::Side;
use auralink_proto::stun::Path;
use std::time::Duration;

/// One datagram of the kinds that pass a first glance.
fn garbage(rng: &mut Rng, overheard: &[Vec<u8>]) -> Vec<u8> {
    let len = rng.below(1500);
    let mut bytes = rng.bytes(len);
    match rng.below(12) {
        0 => {}
        1 => bytes.insert(0, 0),
        // A STUN binding request or response with a right magic cookie and length.
        2 | 3 => {
            let kind = [[0, 1], [1, 1], [1, 0x11], [0, 0x11]][rng.below(4)];
            bytes.resize(len / 4 * 4, 0);
            let body = u16::try_from(bytes.len()).unwrap().to_be_bytes();
            let mut head = kind.to_vec();
            head.extend(body);
            head.extend([0x21, 0x12, 0xa4, 0x42]);
            head.extend(rng.bytes(12));
            bytes.splice(0..0, head);
        }
        // A DTLS record of any type and epoch whose length is right.
        4 | 5 => {
            let kind = [20, 21, 22, 23, 25, 63][rng.below(6)];
            let mut head = vec![
                kind,
                254,
                253,
                0,
                u8::from(rng.chance(0.3)),
                0,
                0,
                0,
                0,
                0,
                rng.bytes(1)[0],
            ];
            head.extend(u16::try_from(bytes.len()).unwrap().to_be_bytes());
            bytes.splice(0..0, head);
        }
        // Plaintext alerts: close_notify, handshake_failure.
        6 => {
            let (level, what) = [(1, 0), (2, 0), (2, 40), (2, 20)][rng.below(4)];
            return vec![
                21,
                254,
                253,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                rng.bytes(1)[0],
                0,
                2,
                level,
                what,
            ];
        }
        // A handshake message of any type.
        7 => {
            let kind = rng.below(24);
            let mut head = vec![22, 254, 253, 0, 0, 0, 0, 0, 0, 0, rng.bytes(1)[0]];
            head.extend(u16::try_from(bytes.len() + 12).unwrap().to_be_bytes());
            let n = u16::try_from(bytes.len()).unwrap().to_be_bytes();
            head.extend([
                u8::try_from(kind).unwrap(),
                0,
                n[0],
                n[1],
                0,
                rng.bytes(1)[0] & 7,
                0,
                0,
                0,
                0,
                n[0],
                n[1],
            ]);
            bytes.splice(0..0, head);
        }
        8 => return rtp(OPUS, 7, 7, CLIENT_AUDIO_SSRC, &bytes),
        9 => {
            let mut rtcp = vec![0x80, 200 + rng.bytes(1)[0] % 8];
            rtcp.extend(bytes);
            return rtcp;
        }
        // Something real, cut or bent.
        _ => {
            if !overheard.is_empty() {
                bytes = overheard[rng.below(overheard.len())].clone();
                let at = rng.below(bytes.len());
                if rng.chance(0.5) {
                    bytes.truncate(at);
                } else {
                    bytes[at] ^= 1 << rng.below(8);
                }
            }
        }
    }
    bytes
}

fn stranger(rng: &mut Rng, side: Side) -> Path {
    let (local, real) = match side {
        Side::Client => (front(), client_addr()),
        Side::Server => (back(), server_addr()),
    };
    // Every third comes with the real peer's address.
    let remote = if rng.chance(0.3) {
        real
    } else {
        addr(&format!(
            "192.0.2.{}:{}",
            rng.below(250),
            1 + rng.below(60000)
        ))
    };
    Path {
        local,
        remote,
        tcp: side == Side::Client && rng.chance(0.1),
    }
}

fn pester(world: &mut World, rng: &mut Rng, count: usize) {
    let overheard: Vec<Vec<u8>> = world
        .sent
        .iter()
        .rev()
        .take(50)
        .map(|s| s.3.clone())
        .collect();
    for _ in 0..count {
        let side = if rng.chance(0.5) {
            Side::Client
        } else {
            Side::Server
        };
        let path = stranger(rng, side);
        let bytes = garbage(rng, &overheard);
        world.inject(side, path, &bytes);
    }
}

#[test]
fn garbage_changes_nothing_in_a_running_call() {
    for_seeds(10, |seed| {
        let mut world = World::connected(seed, Options::default());
        let mut rng = Rng::new(seed + 1000);
        let paths = [Side::Client, Side::Server].map(|side| world.relay().leg(side).path());
        for _ in 0..20 {
            pester(&mut world, &mut rng, 200);
            world.run_ms(200);
        }
        let after = [Side::Client, Side::Server].map(|side| world.relay().leg(side).path());
        assert_eq!(paths, after, "{}", world.report());
        assert!(
            world.server.rtp.is_empty() && world.client.rtp.is_empty(),
            "seed {seed}"
        );
        assert!(world.server.data.is_empty() && world.client.data.is_empty());
        assert!(
            !world.client.closed && !world.server.closed,
            "{}",
            world.report()
        );
        let sent = talk(&mut world, 20);
        assert_eq!(plain(&world.server.rtp), sent.up, "{}", world.report());
        assert_eq!(plain(&world.client.rtp), sent.down, "{}", world.report());
        let dropped = world
            .relay()
            .flow_from(Side::Client)
            .stats
            .dropped_unauthentic;
        assert!(dropped > 0, "it is counted");
    });
}

#[test]
fn garbage_from_strangers_does_not_keep_a_call_from_coming_up() {
    for_seeds(20, |seed| {
        let target = [Target::Publisher, Target::Subscriber][(seed % 2) as usize];
        let mut world = World::new(
            seed,
            Options {
                target,
                answer_active: seed % 4 < 2,
                ..Options::default()
            },
        );
        let mut rng = Rng::new(seed + 2000);
        world.join();
        for _ in 0..200 {
            world.run_ms(5);
            // Only strangers: who can write in the peer's name could also cut the wire.
            for side in [Side::Client, Side::Server] {
                let bytes = garbage(&mut rng, &[]);
                let mut path = stranger(&mut rng, side);
                path.remote.set_port(9);
                world.inject(side, path, &bytes);
            }
        }
        let up = [Side::Client, Side::Server]
            .iter()
            .all(|side| world.relay().leg(*side).state() == LegState::Established);
        assert!(up && world.up(), "{}", world.report());
    });
}

#[test]
fn noise_in_the_peers_name_does_not_end_a_handshake() {
    // Blind spoofing: unreadable records, alerts and odd handshake messages that belong to no
    // flight, from the address that the handshake really comes from.
    for_seeds(20, |seed| {
        let mut world = World::new(
            seed,
            Options {
                answer_active: seed % 2 == 0,
                ..Options::default()
            },
        );
        let mut rng = Rng::new(seed + 3000);
        world.join();
        for n in 0..40u8 {
            world.run_ms(5);
            for (side, local, remote) in [
                (Side::Client, front(), client_addr()),
                (Side::Server, back(), server_addr()),
            ] {
                let path = Path {
                    local,
                    remote,
                    tcp: false,
                };
                let alert = vec![21, 254, 253, 0, 0, 0, 0, 0, 0, 1, n, 0, 2, 2, 40];
                let close = vec![21, 254, 253, 0, 0, 0, 0, 0, 0, 2, n, 0, 2, 1, 0];
                let unreadable = [&[22, 254, 253][..], &rng.bytes(30)].concat();
                let short = vec![22, 254, 253, 0, 0, 0, 0, 0, 0, 0, 1, 0, 3, 1, 2, 3];
                let data = [
                    &[23, 254, 253, 0, 0, 0, 0, 0, 0, 0, 3, 0, 8][..],
                    &rng.bytes(8),
                ]
                .concat();
                for noise in [alert, close, unreadable, short, data] {
                    world.inject(side, path, &noise);
                }
            }
        }
        assert!(world.run_until(20, World::up), "{}", world.report());
        world.run_ms(500);
        assert!(!world.relay().is_closed(), "{}", world.report());
    });
}

#[test]
fn forged_media_before_and_after_the_handshake_reaches_nobody() {
    let mut world = World::new(30, Options::default());
    world.join();
    world.run_ms(42);
    let path = Path {
        local: front(),
        remote: client_addr(),
        tcp: false,
    };
    for n in 0..2000u16 {
        let forged = rtp(OPUS, n, 0, 0x1000_0000 + u32::from(n), &[7; 60]);
        world.inject(Side::Client, path, &forged);
    }
    assert!(world.run_until(5, World::up));
    for n in 0..2000u16 {
        let forged = rtp(OPUS, n, 0, 0x1000_0000 + u32::from(n), &[7; 60]);
        world.inject(Side::Client, path, &forged);
    }
    world.run(Duration::from_secs(1));
    assert!(world.server.rtp.is_empty());
    // The first ones came before the client's first check.
    assert_eq!(dropped(&world, Side::Client), [2000, 2000, 0, 0]);
}

/// Resident memory of this process in bytes.
fn resident() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages = statm.split(' ').nth(1).expect("resident pages");
    pages.parse::<usize>().expect("a number") * 4096
}

#[test]
fn forged_packets_of_ever_new_streams_leave_nothing_behind() {
    let mut world = World::connected(31, Options::default());
    let path = Path {
        local: front(),
        remote: client_addr(),
        tcp: false,
    };
    let before = resident();
    for n in 0..400_000u32 {
        let forged = rtp(OPUS, 1, 0, n.wrapping_mul(2_654_435_761), &[7; 40]);
        world.inject(Side::Client, path, &forged);
        if n % 2 == 0 {
            let mut report = vec![0x80, 201, 0, 1];
            report.extend(n.wrapping_mul(2_654_435_761).to_be_bytes());
            report.extend([1; 30]);
            world.inject(Side::Client, path, &report);
        }
    }
    let grown = resident().saturating_sub(before);
    // Other tests of this process take some at the same time.
    assert!(
        grown < 30 << 20,
        "{} MiB after 600,000 packets",
        grown >> 20
    );
    let sent = talk(&mut world, 5);
    assert_eq!(plain(&world.server.rtp), sent.up);
}

fn dropped(world: &World, side: Side) -> [u64; 4] {
    let stats = world.relay().flow_from(side).stats;
    [
        stats.dropped_unproved,
        stats.dropped_unauthentic,
        stats.dropped_replayed,
        stats.dropped_malformed,
    ]
}

#[test]
fn rtcp_in_the_clear_reaches_nobody() {
    // As between an edge and its origin: GCM's is refused by its tag.
    let mut world = World::connected(
        32,
        Options {
            client_profiles: vec![crate::world::CM],
            server_profiles: vec![crate::world::CM],
            ..Options::default()
        },
    );
    // BYE of a stream, in the name of anyone, without encryption: its E bit is 0.
    let mut bye = vec![0x81, 203, 0, 1];
    bye.extend(CLIENT_AUDIO_SSRC.to_be_bytes());
    bye.extend([0, 0, 0, 1]);
    bye.extend([0; 10]);
    for (side, local, real) in [
        (Side::Server, back(), server_addr()),
        (Side::Client, front(), client_addr()),
    ] {
        for remote in [addr("192.0.2.9:9"), real] {
            let path = Path {
                local,
                remote,
                tcp: false,
            };
            world.inject(side, path, &bye);
        }
    }
    world.run_ms(200);
    assert!(world.client.rtcp.is_empty() && world.server.rtcp.is_empty());
    for side in [Side::Server, Side::Client] {
        assert_eq!(dropped(&world, side), [1, 1, 0, 0], "{side:?}");
    }
}

#[test]
fn what_has_the_right_keys_is_taken_on_proved_paths_only() {
    let mut world = World::connected(33, Options::default());
    let sent = talk(&mut world, 3);
    assert_eq!(plain(&world.server.rtp), sent.up);
    let before = (world.server.rtp.len(), world.client.rtp.len());
    let paths = [Side::Client, Side::Server].map(|side| world.relay().leg(side).path());
    // Overheard, and sent once more from elsewhere.
    let overheard: Vec<Vec<u8>> = world.sent.iter().map(|sent| sent.3.clone()).collect();
    for (side, local) in [(Side::Client, front()), (Side::Server, back())] {
        for datagram in &overheard {
            let path = Path {
                local,
                remote: addr("192.0.2.9:9"),
                tcp: false,
            };
            // Checks are answered wherever they come from: that is how a path is proved.
            if datagram[0] > 3 {
                world.inject(side, path, datagram);
            }
        }
    }
    world.run_ms(200);
    assert_eq!((world.server.rtp.len(), world.client.rtp.len()), before);
    for side in [Side::Client, Side::Server] {
        let [unproved, ..] = dropped(&world, side);
        assert!(unproved > 6, "{side:?}: {unproved}");
    }
    let after = [Side::Client, Side::Server].map(|side| world.relay().leg(side).path());
    assert_eq!(paths, after);
}

#[test]
fn rtcp_that_is_played_again_reaches_nobody() {
    for profile in [crate::world::CM, crate::world::GCM] {
        let mut world = World::connected(
            34,
            Options {
                client_profiles: vec![profile],
                server_profiles: vec![profile],
                ..Options::default()
            },
        );
        let path = Path {
            local: front(),
            remote: client_addr(),
            tcp: false,
        };
        let report = crate::media::receiver_report(1, CLIENT_AUDIO_SSRC, 0);
        let protected = world.client.send_rtcp(&report);
        world.run_ms(100);
        assert_eq!(world.server.rtcp.len(), 1);
        for _ in 0..5 {
            world.inject(Side::Client, path, &protected);
        }
        world.run_ms(100);
        assert_eq!(world.server.rtcp.len(), 1);
        assert_eq!(dropped(&world, Side::Client), [0, 0, 5, 0]);
    }
}
