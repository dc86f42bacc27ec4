//! Two ends of a DTLS handshake and a link that the input commands: it loses, repeats, reorders and
//! cuts what they send, changes it, and speaks in their names, with their keys once there are some.
//!
//! Input: for each datagram a byte that says what becomes of it, and what that takes.
#![cfg_attr(fuzzing, no_main)]
#![allow(dead_code)]

#[path = "../../src/proto/tests/sim/dtls_pair.rs"]
mod dtls_pair;
#[path = "../../src/proto/tests/sim/net.rs"]
mod net;

use auralink_fuzz::fuzz_target;
use auralink_proto::dtls::MAX_HELD;
use dtls_pair::{CLIENT, Keys, Pair, SERVER, cut, record};
use std::time::Duration;

/// Commands of one input: a handshake needs some ten.
const MAX_COMMANDS: usize = 400;

fuzz_target!(|data: &[u8]| {
    let mut pair = Pair::new();
    let mut rest = data.iter().copied();
    let mut way: Vec<(usize, Vec<u8>)> = Vec::new();
    let mut next = 1000;
    let (mut forged, mut sealed) = (false, false);
    let mut keys: Option<[Keys; 2]> = None;
    for _ in 0..MAX_COMMANDS {
        for from in [CLIENT, SERVER] {
            way.extend(pair.take(from).into_iter().map(|datagram| (from, datagram)));
        }
        if keys.is_none() && pair.up() {
            keys = Some([SERVER, CLIENT].map(|end| pair.keys(end)));
        }
        let Some(command) = rest.next() else {
            break;
        };
        let argument = usize::from(command >> 4);
        match command & 15 {
            // The next datagram is lost, comes twice, comes last.
            0 if !way.is_empty() => drop(way.remove(0)),
            1 if !way.is_empty() => way.insert(0, way[0].clone()),
            2 if !way.is_empty() => way.rotate_left(1),
            3 => way.reverse(),
            // It is cut into fragments.
            4 if !way.is_empty() => {
                let (from, datagram) = way.remove(0);
                let size = [1, 3, 10, 40, 100, 200, 400, 1000][argument & 7];
                let pieces = cut(&[datagram], size, &mut next).into_iter();
                if argument & 8 == 0 {
                    way.splice(0..0, pieces.map(|piece| (from, piece)));
                } else {
                    way.splice(0..0, pieces.rev().map(|piece| (from, piece)));
                }
            }
            // A byte of it changes, or it ends early.
            5 if !way.is_empty() => {
                let at = usize::from(rest.next().unwrap_or(0)) << 4 | argument;
                let datagram = &mut way[0].1;
                let len = datagram.len();
                if let Some(byte) = datagram.get_mut(at % len.max(1)) {
                    *byte ^= rest.next().unwrap_or(1);
                }
                forged = true;
            }
            6 if !way.is_empty() => {
                let datagram = &mut way[0].1;
                datagram.truncate(datagram.len() * argument / 16);
                forged = true;
            }
            // Somebody says something.
            7 => {
                let len = usize::from(rest.next().unwrap_or(0));
                let datagram: Vec<u8> = rest.by_ref().take(len).collect();
                way.insert(0, (argument & 1, datagram));
                forged = true;
            }
            8 => {
                let [kind, number, len] = [(); 3].map(|()| rest.next().unwrap_or(0));
                let body: Vec<u8> = rest.by_ref().take(usize::from(len)).collect();
                let epoch = (argument >> 1 & 1) as u8;
                let record = record(20 + kind % 4, epoch, u64::from(number), &body);
                way.insert(0, (argument & 1, record));
                forged = true;
            }
            // Somebody who has the keys.
            9 => {
                let [kind, len] = [(); 2].map(|()| rest.next().unwrap_or(0));
                let body: Vec<u8> = rest.by_ref().take(usize::from(len)).collect();
                if let Some(keys) = &mut keys {
                    let datagram = keys[argument & 1].seal(20 + kind % 4, &body);
                    way.insert(0, (argument & 1, datagram));
                    sealed = true;
                }
            }
            10 => pair.tick(Duration::from_millis(10 << (argument & 3))),
            _ if !way.is_empty() => {
                let (from, datagram) = way.remove(0);
                pair.ends[1 - from].receive(pair.now, &datagram);
            }
            _ => pair.tick(Duration::from_millis(10)),
        }
    }
    for end in &pair.ends {
        assert!(end.held <= MAX_HELD, "{} bytes held", end.held);
    }
    // From here on the link is good.
    for (from, datagram) in way {
        pair.ends[1 - from].receive(pair.now, &datagram);
    }
    let up = pair.up() || pair.run(&mut net::Rng::new(1), 0.0, 40, |_, _| {});
    assert!(up || forged, "an honest handshake failed");
    // Who has keys may say goodbye.
    if !up || sealed {
        return;
    }
    let keys = [SERVER, CLIENT].map(|end| pair.ends[end].dtls.srtp_keys().expect("keys").material);
    assert_eq!(keys[0], keys[1]);
    assert!(pair.ends.iter().all(|end| end.dtls.held() == 0));
    for (from, to) in [(CLIENT, SERVER), (SERVER, CLIENT)] {
        pair.ends[to].data.clear();
        assert!(pair.ends[from].dtls.write(pair.now, b"data"));
        pair.exchange(|_, sent| sent);
        assert_eq!(pair.ends[to].data, [b"data"]);
    }
});
