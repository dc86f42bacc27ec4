//! Packets coded anew: for one stream, and once for all streams of a source.

use std::time::Duration;

use auralink_proto::ladder::Rung;

use super::call::{config, next, port};
use crate::testing::{client, heard, likeness, music, packets_of, signal_to_noise, speech};
use crate::{Direction, Engine, EngineConfig, Job, Outcome, Port, Recode, Recoded, Refusal};

const LONG: Duration = Duration::from_secs(10);

/// Without models: what a sidecar alone has.
fn modest() -> EngineConfig {
    EngineConfig {
        runtime: None,
        lyra: None,
        vad: None,
        ..config()
    }
}

fn job(track: u64, key: Option<u128>, rung: Option<Rung>, payload: &[u8], lost_before: u16) -> Job {
    Job::Recode(Recode {
        track,
        id: track * 100,
        key,
        rung,
        payload: payload.to_vec(),
        lost_before,
    })
}

fn asked(port: &Port, job: Job) -> Result<Recoded, Refusal> {
    let track = job.track();
    port.try_send(job).unwrap();
    match next(port, LONG) {
        Outcome::Recoded(recoded) => {
            assert_eq!((recoded.track, recoded.id), (track, track * 100));
            Ok(recoded)
        }
        Outcome::Refused { reason, .. } => Err(reason),
        other => panic!("{other:?}"),
    }
}

/// Bits a second of packets of 20 ms.
fn rate(packets: &[Vec<u8>]) -> usize {
    packets.iter().map(Vec::len).sum::<usize>() * 8 * 50 / packets.len()
}

#[test]
fn many_subscribers_cost_one_coding() {
    let engine = Engine::start(EngineConfig {
        threads: 3,
        ..modest()
    })
    .unwrap();
    // Two media workers with three subscribers each, of the same numbers.
    let ports = [port(&engine).0, port(&engine).0];
    let packets = client("talker-a", 8, 20);
    let mut got: Vec<Vec<Vec<u8>>> = vec![Vec::new(); 6];
    for (n, packet) in packets.iter().enumerate() {
        // Who is first changes.
        for turn in 0..6 {
            let who = (turn + n) % 6;
            let recode = job(who as u64 / 2, Some(7), Some(Rung::L4), packet, 0);
            let recoded = asked(&ports[who % 2], recode).unwrap();
            assert_eq!(recoded.shared, turn > 0, "packet {n}, subscriber {who}");
            got[who].push(recoded.payload);
        }
    }
    assert!(
        got.iter().all(|of| *of == got[0]),
        "not the same bytes for all"
    );
    let counters = engine.counters();
    let count = packets.len() as u64;
    assert_eq!((counters.recoded, counters.shared), (count, 5 * count));
    let bits = rate(&got[0]);
    assert!((8_000..13_500).contains(&bits), "{bits} bit/s");
    let alike = likeness(&heard(&packets), &heard(&got[0]));
    assert!(alike > 0.9, "{alike}");
    // Another source, and another rung of the same, are other work.
    for (key, rung) in [(8, Rung::L4), (7, Rung::L6)] {
        let other = asked(&ports[0], job(0, Some(key), Some(rung), &packets[9], 0)).unwrap();
        assert!(!other.shared);
    }
}

#[test]
fn enhanced_speech_comes_out_at_the_local_rate() {
    let engine = Engine::start(modest()).unwrap();
    let (port, _) = port(&engine);
    let said = speech("talker-a", 10);
    let pcm: Vec<i16> = said.iter().map(|s| (s * 32_767.0) as i16).collect();
    // As a lean room steers it. The same sound at three times the rate: packets of 48 kHz from 16 kHz samples.
    let pcm: Vec<i16> = pcm.iter().flat_map(|s| [*s; 3]).collect();
    let packets = packets_of(&pcm, 12_000, 40);
    let silk = packets.iter().filter(|p| p[0] >> 3 < 12).count();
    assert!(
        silk * 10 > packets.len() * 9,
        "the client sends no SILK: {silk}"
    );
    let enhanced: Vec<Vec<u8>> = packets
        .iter()
        .map(|packet| {
            let recoded = asked(&port, job(3, None, None, packet, 0)).unwrap();
            assert!(!recoded.shared);
            recoded.payload
        })
        .collect();
    let bits = rate(&enhanced) / 2;
    assert!((45_000..80_000).contains(&bits), "{bits} bit/s");
    let (plain, lace) = (heard(&packets), heard(&enhanced));
    let alike = likeness(&plain, &lace);
    let snr = signal_to_noise(&plain, &lace);
    assert!(alike > 0.9, "{alike}");
    assert!(snr < 25.0, "LACE changed nothing: {snr} dB");
    assert_eq!(engine.counters().recoded, packets.len() as u64);
    // A stream of its own is forgotten with it; nothing comes back for that.
    port.try_send(Job::Close {
        track: 3,
        direction: Direction::Recode,
    })
    .unwrap();
    assert!(asked(&port, job(3, None, None, &packets[0], 0)).is_ok());
}

#[test]
fn streams_that_lost_different_packets_meet_again() {
    let engine = Engine::start(modest()).unwrap();
    let (port, _) = port(&engine);
    let packets = client("talker-a", 3, 20);
    let ask = |track, n: usize, lost| {
        let recode = job(track, Some(7), Some(Rung::L4), &packets[n], lost);
        asked(&port, recode).map(|recoded| recoded.shared)
    };
    assert_eq!((ask(1, 0, 0), ask(2, 0, 0)), (Ok(false), Ok(true)));
    // The first loses 1, the second has it: then 2 follows for the first, and is there for the second.
    assert_eq!(ask(2, 1, 0), Ok(false));
    assert_eq!(ask(1, 2, 1), Ok(false));
    assert_eq!(ask(2, 2, 0), Ok(true));
    // The first loses two and is the first with what follows: the second asks for them in vain.
    assert_eq!(ask(1, 5, 2), Ok(false));
    assert_eq!(ask(2, 3, 0), Err(Refusal::Stale), "the state is past it");
    assert_eq!(ask(2, 4, 0), Err(Refusal::Stale));
    assert_eq!(ask(2, 5, 0), Ok(true));
    // A stream that missed others' packets without knowing catches up, though it is always the first.
    for n in 6..10 {
        ask(1, n, 0).unwrap();
    }
    let late: Vec<_> = (20..24).map(|n| (ask(2, n, 0), ask(1, n, 0))).collect();
    assert_eq!(late[3], (Ok(false), Ok(true)), "{late:?}");
    // A new one joins anywhere.
    assert_eq!((ask(3, 23, 0), ask(3, 24, 0)), (Ok(true), Ok(false)));
}

#[test]
fn the_same_content_again_is_the_next_packet() {
    let engine = Engine::start(modest()).unwrap();
    let (port, _) = port(&engine);
    let packet = &client("talker-a", 2, 20)[60];
    for n in 0..5 {
        for track in 1..3 {
            let recode = job(track, Some(7), Some(Rung::L4), packet, 0);
            assert_eq!(asked(&port, recode).unwrap().shared, track == 2, "{n}");
        }
    }
    assert_eq!(engine.counters().recoded, 5);
}

#[test]
fn what_cannot_be_coded_is_refused_once_for_all() {
    let engine = Engine::start(modest()).unwrap();
    let (port, _) = port(&engine);
    let packet = &client("talker-a", 2, 20)[60];
    let mut stereo = packet.clone();
    stereo[0] |= 4;
    let mut encrypted = packet.clone();
    encrypted.extend([12, 3]);
    for (payload, reason) in [
        (&stereo, Refusal::Stereo),
        (&encrypted, Refusal::Undecodable),
        (&vec![0xff; 60], Refusal::Stereo),
        (&vec![0x1b, 0x3f, 1, 2, 3], Refusal::Undecodable),
    ] {
        for track in [1, 2] {
            let recode = job(track, Some(7), Some(Rung::L4), payload, 0);
            assert_eq!(asked(&port, recode), Err(reason), "{payload:?}");
        }
    }
    let good = job(1, Some(7), Some(Rung::L4), packet, 0);
    assert!(asked(&port, good).is_ok());
}

#[test]
fn the_lowest_rung_is_for_what_is_proved_to_be_speech() {
    let mean = |config: EngineConfig, packets: &[Vec<u8>]| {
        let engine = Engine::start(config).unwrap();
        let (port, _) = port(&engine);
        let made: Vec<Vec<u8>> = packets
            .iter()
            .map(|p| {
                asked(&port, job(1, Some(7), Some(Rung::L3), p, 0))
                    .unwrap()
                    .payload
            })
            .collect();
        // Half a second until the detector is sure.
        rate(&made[50..])
    };
    let speech = client("talker-a", 6, 20);
    let music = packets_of(&music(6), 48_000, 20);
    let (proved, unproved) = (mean(config(), &speech), mean(modest(), &speech));
    let melody = mean(config(), &music);
    assert!(proved < 9_900, "{proved}");
    assert!(unproved * 10 > proved * 11, "{unproved} after {proved}");
    assert!(melody > 10_000, "{melody}");
}

#[test]
fn packets_of_10_and_120_ms_keep_their_length() {
    let engine = Engine::start(modest()).unwrap();
    let (port, _) = port(&engine);
    for (track, ms) in [(4, 10), (5, 120)] {
        let packets = client("talker-a", 4, ms);
        let recoded: Vec<Vec<u8>> = packets
            .iter()
            .map(|packet| {
                let job = job(track, None, Some(Rung::L4), packet, 0);
                asked(&port, job).unwrap().payload
            })
            .collect();
        assert_eq!(heard(&recoded).len(), heard(&packets).len());
        let bytes = |packets: &[Vec<u8>]| packets.iter().map(Vec::len).sum::<usize>();
        assert!(bytes(&recoded) * 2 < bytes(&packets), "{ms} ms");
        let alike = likeness(&heard(&packets), &heard(&recoded));
        assert!(alike > 0.85, "{ms} ms: {alike}");
    }
}
