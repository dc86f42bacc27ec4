//! Handshakes over any network and beside any forgery, in both roles, and what they may cost.

use crate::dtls_pair::{CLIENT, Pair, SERVER, cut, fragment, record};
use crate::net::{Rng, for_seeds};
use auralink_proto::dtls::MAX_HELD;
use std::time::Duration;

#[test]
fn fragments_of_any_size_come_in_any_order() {
    for size in [1, 2, 13, 100, 700, 5000] {
        for order in 0..5u64 {
            for packed in [1, 40] {
                let mut pair = Pair::new();
                let mut rng = Rng::new(order * 10 + size as u64);
                let mut next = 0;
                pair.exchange(|_, sent| {
                    let mut records = cut(&sent, size, &mut next);
                    match order {
                        0 => {}
                        1 => records.reverse(),
                        2 => records.extend(records.clone()),
                        _ => {
                            records.extend(records.clone());
                            records.sort_by_cached_key(|_| rng.next());
                        }
                    }
                    records.chunks(packed).map(<[_]>::concat).collect()
                });
                assert!(pair.up(), "size {size}, order {order}, {packed} a datagram");
                for end in &pair.ends {
                    assert!(end.held <= MAX_HELD && end.dtls.held() == 0);
                }
            }
        }
    }
}

#[test]
fn every_handshake_succeeds_at_10_and_at_30_percent_loss() {
    for loss in [0.1, 0.3] {
        for_seeds(300, |seed| {
            let mut pair = Pair::new();
            let up = pair.run(&mut Rng::new(seed), loss, 30, |_, _| {});
            assert!(up, "{loss}: {:?}", [pair.ends[0].up, pair.ends[1].up]);
        });
    }
}

/// What a stranger may write in the peer's name without knowing what it says.
fn forgery(rng: &mut Rng) -> Vec<u8> {
    let len = rng.below(300);
    let body = rng.bytes(len);
    let number = rng.next() % 100;
    match rng.below(8) {
        // A part of a message, or all of one that makes no sense.
        0..=3 => {
            let kind = [1, 2, 3, 11, 12, 13, 15, 16][rng.below(8)];
            let offset = rng.below(2) * rng.below(300);
            let total = offset + body.len() + rng.below(2) * rng.below(9000);
            let message = u16::try_from(rng.below(8)).unwrap();
            record(
                22,
                0,
                number,
                &fragment(kind, message, total, offset, &body),
            )
        }
        4 => record(20, u8::from(rng.chance(0.5)), number, &[1]),
        5 => record(21, u8::from(rng.chance(0.5)), number, &[2, 40]),
        6 => record(22, 1, number, &body[..body.len().min(100)]),
        _ => record(23, u8::from(rng.chance(0.5)), number, &body),
    }
}

#[test]
fn forgeries_beside_it_do_not_keep_a_handshake_from_succeeding() {
    for_seeds(60, |seed| {
        let mut pair = Pair::new();
        let up = pair.run(&mut Rng::new(seed), 0.1, 30, |pair, rng| {
            for end in &mut pair.ends {
                for _ in 0..4 {
                    let datagram = forgery(rng);
                    end.receive(pair.now, &datagram);
                }
            }
        });
        assert!(up, "{:?}", [pair.ends[0].up, pair.ends[1].up]);
        for end in &pair.ends {
            assert!(end.held <= MAX_HELD, "{}", end.held);
        }
    });
}

#[test]
fn whoever_is_first_with_a_client_hello_is_not_believed() {
    let mut pair = Pair::new();
    let hello = pair.take(CLIENT).concat();
    // Another's random value, in the peer's name.
    for n in 0..100 {
        let mut forged = hello.clone();
        forged[30] ^= n + 1;
        pair.ends[SERVER].receive(pair.now, &forged);
    }
    // Each answer is the same, whatever was said.
    let answers = pair.take(SERVER);
    assert!(
        answers
            .iter()
            .all(|answer| answer[11..] == answers[0][11..])
    );
    pair.ends[CLIENT].receive(pair.now, &answers[0]);
    pair.exchange(|_, sent| sent);
    assert!(pair.up());
}

#[test]
fn a_finished_and_data_may_overtake_what_comes_before_them() {
    let mut pair = Pair::new();
    pair.exchange(|_, mut sent| {
        sent.reverse();
        sent
    });
    assert!(pair.up());

    // The server's first data is there before its last flight.
    let mut pair = Pair::new();
    let mut last = Vec::new();
    pair.exchange(|from, sent| {
        if from == SERVER && sent.iter().any(|datagram| datagram[0] == 20) {
            last = sent;
            return Vec::new();
        }
        sent
    });
    assert!(pair.ends[SERVER].up && !pair.ends[CLIENT].up);
    assert!(!pair.ends[CLIENT].dtls.write(pair.now, b"too early"));
    assert!(pair.ends[SERVER].dtls.write(pair.now, b"early"));
    for datagram in [pair.take(SERVER), last].concat() {
        pair.ends[CLIENT].receive(pair.now, &datagram);
    }
    assert!(pair.ends[CLIENT].up);
    assert_eq!(pair.ends[CLIENT].data, [b"early"]);
}

#[test]
fn a_lost_last_flight_is_repeated_at_a_bounded_rate_until_the_client_is_complete() {
    let mut pair = Pair::new();
    let mut asking = Vec::new();
    pair.exchange(|from, sent| {
        if from == SERVER && sent.iter().any(|datagram| datagram[0] == 20) {
            return Vec::new();
        }
        if from == CLIENT && !sent.is_empty() {
            asking = sent.clone();
        }
        sent
    });
    assert!(pair.ends[SERVER].up && !pair.ends[CLIENT].up);
    // A second of asking, a thousand times.
    let mut repeated = Vec::new();
    for _ in 0..1000 {
        pair.tick(Duration::from_millis(1));
        for datagram in &asking {
            pair.ends[SERVER].receive(pair.now, datagram);
        }
        repeated.extend(pair.take(SERVER));
    }
    assert!((5..=11).contains(&repeated.len()), "{}", repeated.len());
    let bytes: usize = repeated.iter().map(Vec::len).sum();
    assert!(bytes < 1500, "{bytes}");
    // What is no part of the client's last flight asks for nothing.
    pair.tick(Duration::from_secs(1));
    let others = [
        record(22, 0, 50, &fragment(1, 0, 200, 0, &[1; 200])),
        record(22, 0, 51, &fragment(11, 9, 200, 0, &[1; 200])),
        record(22, 0, 52, &fragment(16, 2, 200, 0, &[1; 200])),
        record(20, 0, 53, &[1]),
        record(21, 0, 54, &[2, 40]),
        record(23, 0, 55, b"data"),
        record(22, 1, 56, &[7; 300]),
    ];
    for datagram in &others {
        pair.ends[SERVER].receive(pair.now, datagram);
    }
    assert_eq!(pair.take(SERVER), Vec::<Vec<u8>>::new());
    // The repeated one completes the client.
    pair.ends[CLIENT].receive(pair.now, &repeated[4]);
    assert!(pair.ends[CLIENT].up);
    // For an hour nobody says that it has come.
    let mut count = repeated.len();
    for _ in 0..3600 {
        pair.tick(Duration::from_secs(1));
        for datagram in &asking {
            pair.ends[SERVER].receive(pair.now, datagram);
        }
        count += pair.take(SERVER).len();
    }
    assert_eq!(count, 64);
}

#[test]
fn nothing_is_repeated_any_more_once_the_client_has_sent_data() {
    let mut pair = Pair::new();
    let mut asking = Vec::new();
    pair.exchange(|from, sent| {
        if from == CLIENT && !sent.is_empty() {
            asking = sent.clone();
        }
        sent
    });
    pair.ends[CLIENT].dtls.write(pair.now, b"data");
    pair.exchange(|_, sent| sent);
    assert_eq!(pair.ends[SERVER].data, [b"data"]);
    pair.tick(Duration::from_secs(1));
    for datagram in &asking {
        pair.ends[SERVER].receive(pair.now, datagram);
    }
    assert_eq!(pair.take(SERVER), Vec::<Vec<u8>>::new());
}

#[test]
fn records_in_the_clear_change_nothing_once_it_is_complete() {
    let mut pair = Pair::connected();
    let mut rng = Rng::new(1);
    for n in 0..20_000 {
        for end in &mut pair.ends {
            end.receive(pair.now, &forgery(&mut rng));
            // Of epoch 1, but not encrypted: the library would take it for a new epoch.
            end.receive(pair.now, &record(20, 1, n, &[1]));
        }
        assert!(pair.ends.iter().all(|end| end.dtls.held() == 0));
    }
    let said: usize = [CLIENT, SERVER]
        .map(|end| pair.take(end).len())
        .iter()
        .sum();
    assert!(said <= 1, "{said}");
    for (from, to) in [(CLIENT, SERVER), (SERVER, CLIENT)] {
        assert!(pair.ends[from].dtls.write(pair.now, b"still there"));
        pair.exchange(|_, sent| sent);
        assert_eq!(pair.ends[to].data, [b"still there"]);
    }
}

#[test]
fn a_peer_with_keys_gets_no_second_handshake_and_no_echo() {
    for (from, to) in [(CLIENT, SERVER), (SERVER, CLIENT)] {
        let mut pair = Pair::connected();
        let mut keys = pair.keys(from);
        let good = keys.seal(23, b"good");
        pair.ends[to].receive(pair.now, &good);
        assert_eq!(pair.ends[to].data, [b"good"], "these are the keys");
        // One message in as many fragments as fit, backwards, in every record of a flood; its
        // number is the one that the library awaits next.
        let number = [6, 7][to];
        for n in (0..60_000usize).rev().step_by(100) {
            let fragments: Vec<u8> = (0..100)
                .flat_map(|k| fragment(1, number, 60_000, n.saturating_sub(k), &[7]))
                .collect();
            let datagram = keys.seal(22, &fragments);
            pair.ends[to].receive(pair.now, &datagram);
            let small = keys.seal(22, &fragment(1, number, 60_000, n, &[7]));
            pair.ends[to].receive(pair.now, &small);
        }
        for alert in [[1, 100], [2, 40], [1, 41], [9, 9]] {
            let datagram = keys.seal(21, &alert);
            pair.ends[to].receive(pair.now, &datagram);
        }
        assert_eq!(pair.take(to), Vec::<Vec<u8>>::new());
        let good = keys.seal(23, b"and on");
        pair.ends[to].receive(pair.now, &good);
        assert_eq!(pair.ends[to].data, [&b"good"[..], b"and on"]);
        let bye = keys.seal(21, &[1, 0]);
        pair.ends[to].receive(pair.now, &bye);
        assert!(pair.ends[to].closed);
        assert_eq!(pair.take(to).len(), 1, "close_notify is answered");
        pair.ends[to].receive(pair.now, &keys.seal(23, b"too late"));
        assert_eq!(pair.ends[to].data.len(), 2);
    }
}

#[test]
fn a_peer_with_keys_is_bounded_before_its_finished_too() {
    let mut pair = Pair::new();
    let mut last = Vec::new();
    // The server never gets the client's Finished.
    pair.exchange(|from, sent| {
        let cut: Vec<_> = cut(&sent, 9000, &mut 100).into_iter().collect();
        let (finished, others): (Vec<_>, Vec<_>) = cut.into_iter().partition(|r| r[4] == 1);
        if from == CLIENT {
            last.extend(finished);
            return others;
        }
        others.into_iter().chain(finished).collect()
    });
    assert!(!pair.up() && !last.is_empty());
    let mut keys = pair.keys(CLIENT);
    keys.number = 1;
    // Message 5 would be the Finished.
    for n in (0..4000usize).rev() {
        let pieces: Vec<u8> = (0..7)
            .flat_map(|k| fragment(1, 6, 40_000, n * 7 + k, &[7]))
            .collect();
        let datagram = keys.seal(22, &pieces);
        pair.ends[SERVER].receive(pair.now, &datagram);
    }
    for datagram in &last {
        pair.ends[SERVER].receive(pair.now, datagram);
    }
    assert!(pair.ends[SERVER].up);
}

#[test]
fn a_pion_server_whose_request_for_a_cookie_was_lost_is_asked_so_that_it_answers() {
    let mut pair = Pair::new();
    let hello = pair.take(CLIENT).concat();
    pair.tick(Duration::from_millis(250));
    assert_eq!(pair.take(CLIENT).len(), 1);
    pair.tick(Duration::from_millis(500));
    let [whole, part] = &pair.take(CLIENT)[..] else {
        panic!("the hello, and a part of it");
    };
    // But for the numbers of the records.
    assert_eq!(whole[11..], hello[11..]);
    let offset = usize::from(u16::from_be_bytes([part[20], part[21]]));
    assert!(offset > 0 && part[13..19] == hello[13..19]);
    assert_eq!(part[25..], hello[25 + offset..]);
    assert!(part[5..11] > whole[5..11]);
    // Once there is an answer, flights come as they are.
    pair.ends[SERVER].receive(pair.now, whole);
    pair.ends[SERVER].receive(pair.now, part);
    let answers = pair.take(SERVER);
    assert_eq!(answers.len(), 1);
    pair.ends[CLIENT].receive(pair.now, &answers[0]);
    assert_eq!(pair.take(CLIENT).len(), 1);
    pair.tick(Duration::from_millis(250));
    assert_eq!(pair.take(CLIENT).len(), 1);
}
