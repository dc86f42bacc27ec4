//! A track from one engine to another: real packets in, real packets out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use auralink_proto::ladder::{CodecId, Rung, Rungs};

use crate::agc::factor;
use crate::codec::{FRAME, SAMPLE_RATE};
use crate::opus::{Decoder, Enhancement};
use crate::testing::{
    client, heard, level, likeness, lyra_bundle, music, packets_of, runtime, speech, vad_bundle,
};
use crate::{
    Decode, Decoded, Direction, Encode, Encoded, Engine, EngineConfig, Job, Outcome, Port, Refusal,
};

/// Everything there; slow machines and debug builds don't trip it.
pub(super) fn config() -> EngineConfig {
    EngineConfig {
        runtime: Some(runtime()),
        lyra: Some(lyra_bundle()),
        vad: Some(vad_bundle()),
        deadline: Duration::from_secs(5),
        stall: Duration::from_secs(10),
        ..EngineConfig::default()
    }
}

pub(super) fn port(engine: &Engine) -> (Port, Arc<AtomicU64>) {
    let wakes = Arc::new(AtomicU64::new(0));
    let counter = wakes.clone();
    let port = engine.port(Arc::new(move || {
        counter.fetch_add(1, Ordering::Relaxed);
    }));
    (port, wakes)
}

/// The next outcome; the test fails where there is none within `most`.
pub(super) fn next(port: &Port, most: Duration) -> Outcome {
    let end = Instant::now() + most;
    loop {
        if let Some(outcome) = port.try_recv() {
            return outcome;
        }
        assert!(Instant::now() < end, "no outcome within {most:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

const LONG: Duration = Duration::from_secs(10);

pub(crate) fn group(track: u64, id: u64, rung: Rung, packets: &[Vec<u8>]) -> Job {
    Job::Encode(Encode {
        track,
        id,
        rung,
        packets: packets.to_vec(),
        lost_before: 0,
    })
}

pub(super) fn encode(port: &Port, id: u64, rung: Rung, packets: &[Vec<u8>]) -> Encoded {
    port.try_send(group(7, id, rung, packets)).unwrap();
    match next(port, LONG) {
        Outcome::Encoded(encoded) => {
            assert_eq!((encoded.track, encoded.id), (7, id));
            encoded
        }
        other => panic!("{other:?}"),
    }
}

pub(super) fn payload(coded: &Encoded, count: usize) -> Decode {
    Decode {
        track: coded.track,
        id: coded.id,
        codec: coded.codec,
        payload: coded.payload.clone(),
        gain: coded.gain,
        unit_ms: coded.unit_ms,
        count: count as u8,
        lost: false,
    }
}

pub(super) fn decode(port: &Port, job: Decode) -> Decoded {
    let (id, count) = (job.id, usize::from(job.count));
    port.try_send(Job::Decode(job)).unwrap();
    match next(port, LONG) {
        Outcome::Decoded(decoded) => {
            assert_eq!(
                (decoded.id, decoded.packets.len(), decoded.levels.len()),
                (id, count, count)
            );
            decoded
        }
        other => panic!("{other:?}"),
    }
}

/// Packets through the hop in groups of `size`, the rung by group; what was used, and the packets that came out.
fn hop(
    packets: &[Vec<u8>],
    size: usize,
    rung: impl Fn(usize) -> Rung,
) -> (Vec<Encoded>, Vec<Decoded>) {
    hop_with(config(), packets, size, rung)
}

/// The same with an engine of its own.
pub(super) fn hop_with(
    config: EngineConfig,
    packets: &[Vec<u8>],
    size: usize,
    rung: impl Fn(usize) -> Rung,
) -> (Vec<Encoded>, Vec<Decoded>) {
    let engine = Engine::start(config).unwrap();
    let (port, _) = port(&engine);
    let mut coded = Vec::new();
    let mut restored = Vec::new();
    for (k, group) in packets.chunks_exact(size).enumerate() {
        let one = encode(&port, k as u64, rung(k), group);
        restored.push(decode(&port, payload(&one, size)));
        coded.push(one);
    }
    (coded, restored)
}

pub(super) fn sound(restored: &[Decoded]) -> Vec<f32> {
    heard(restored.iter().flat_map(|d| &d.packets))
}

#[test]
fn speech_crosses_every_rung() {
    let packets = client("talker-a", 12, 20);
    let said = heard(&packets);
    let mut before = 0.0;
    for rung in Rung::CODED {
        let (coded, restored) = hop(&packets, 2, |_| rung);
        let used: Vec<Rung> = coded.iter().map(|c| c.rung).collect();
        let pauses = used.iter().filter(|r| **r == Rung::L1).count();
        assert!(
            used.iter()
                .all(|r| *r == rung || (rung == Rung::L2 && *r == Rung::L1)),
            "{rung}: {used:?}"
        );
        assert!(
            rung == Rung::L1 || pauses * 2 < used.len(),
            "{rung}: {pauses} pauses"
        );
        assert!(
            coded
                .iter()
                .all(|c| c.unit_ms == 20 && c.codec == c.rung.codec())
        );
        assert!(rung.levels() || coded.iter().all(|c| c.gain == 0));
        assert!(
            coded.iter().filter(|c| c.voice).count() * 3 > coded.len(),
            "somebody speaks"
        );
        let like = likeness(&said, &sound(&restored));
        assert!(
            like > 0.88 && like > before - 0.02,
            "{rung}: {like} after {before}"
        );
        before = like;
        let bytes: usize = coded.iter().map(|c| c.payload.len()).sum();
        let rate = bytes as f32 * 8.0 / 12.0;
        assert!(rate < rung.bitrate() as f32 * 1.1, "{rung}: {rate} bit/s");
    }
}

#[test]
fn originals_of_10_and_120_ms_cross_as_well() {
    for (ms, size) in [(10, 4), (10, 2), (120, 1)] {
        let packets = client("talker-a", 6, ms);
        let said = heard(&packets);
        for rung in [Rung::L2, Rung::L4] {
            let (coded, restored) = hop(&packets, size, |_| rung);
            assert!(coded.iter().all(|c| usize::from(c.unit_ms) == ms));
            let mut listener = Decoder::new(Enhancement::None).unwrap();
            for packet in restored.iter().flat_map(|d| &d.packets) {
                let samples = listener.decode(packet, &mut Vec::new()).unwrap();
                assert_eq!(samples, ms * SAMPLE_RATE / 1000);
            }
            let like = likeness(&said, &sound(&restored));
            assert!(like > 0.85, "{size} of {ms} ms, {rung}: {like}");
        }
    }
}

#[test]
fn levels_are_those_of_the_sound() {
    let packets = client("talker-a", 6, 40);
    let said = heard(&packets);
    let (coded, restored) = hop(&packets, 1, |_| Rung::L4);
    assert!(coded.iter().all(|c| c.unit_ms == 40));
    let mut apart = 0.0;
    for (d, original) in restored.iter().zip(said.chunks_exact(2 * FRAME)) {
        apart +=
            (f32::from(d.levels[0]) + level(original).max(-127.0)).abs() / restored.len() as f32;
    }
    assert!(apart < 3.0, "{apart} dB apart on average");
    assert!(restored.iter().any(|d| d.voice));
}

#[test]
fn quiet_speech_keeps_its_level_and_is_as_good() {
    let loud = speech("talker-a", 10);
    let wide = |db: f32| -> Vec<Vec<u8>> {
        // 16 to 48 kHz by repetition is fine here: what is above 8 kHz never reaches a rung.
        let pcm: Vec<i16> = loud
            .iter()
            .flat_map(|x| [(x * factor(db) * 32767.0) as i16; 3])
            .collect();
        packets_of(&pcm, 64_000, 20)
    };
    let mut like = Vec::new();
    for db in [0.0, -26.0] {
        let packets = wide(db);
        let said = heard(&packets);
        let (coded, restored) = hop(&packets, 2, |_| Rung::L2);
        let got = sound(&restored);
        let off = level(&got) - level(&said);
        assert!(off.abs() < 2.5, "{db} dB: {off} dB louder");
        assert!(
            db == 0.0 || coded.last().unwrap().gain > 10,
            "{:?}",
            coded.last()
        );
        let loudened: Vec<f32> = got.iter().map(|x| x * factor(-db)).collect();
        like.push(likeness(&loud, &loudened));
    }
    assert!(like[1] > like[0] - 0.04, "{like:?}");
}

#[test]
fn a_switch_does_not_click() {
    switch_does_not_click(&config());
}

/// From the neural codec to Opus and back, over and over.
pub(super) fn switch_does_not_click(config: &EngineConfig) {
    let packets = client("talker-a", 12, 20);
    // A rung of either family in turn, every 0.4 s.
    let (_, switching) = hop_with(config.clone(), &packets, 2, |k| {
        if k / 10 % 2 == 0 { Rung::L2 } else { Rung::L3 }
    });
    let (_, lyra) = hop_with(config.clone(), &packets, 2, |_| Rung::L2);
    let (_, opus) = hop_with(config.clone(), &packets, 2, |_| Rung::L3);
    // A click is what a second difference is large in: all frequencies at once.
    let jumps = |pcm: &[f32]| -> Vec<f32> {
        pcm.chunks_exact(2 * FRAME)
            .map(|group| {
                group
                    .windows(3)
                    .map(|w| (w[0] - 2.0 * w[1] + w[2]).abs())
                    .fold(0.0, f32::max)
            })
            .collect()
    };
    let found = jumps(&sound(&switching));
    let usual: Vec<f32> = jumps(&sound(&lyra))
        .into_iter()
        .zip(jumps(&sound(&opus)))
        .map(|(a, b)| a.max(b))
        .collect();
    let mut worst = 0.0f32;
    for (k, jump) in found.iter().enumerate() {
        // The local encoder delays: look at the neighbours too.
        let around = usual[k.saturating_sub(1)..(k + 2).min(usual.len())]
            .iter()
            .copied()
            .fold(0.003, f32::max);
        worst = worst.max(jump / around);
    }
    assert!(worst < 2.0, "a jump of {worst} times what is usual there");
    let like = likeness(&heard(&packets), &sound(&switching));
    assert!(like > 0.88, "{like}");
}

#[test]
fn music_is_lifted_and_silence_costs_little() {
    let tune = packets_of(&music(6), 64_000, 20);
    let (coded, _) = hop(&tune, 2, |_| Rung::L2);
    let late = coded.iter().skip(13).filter(|c| c.rung < Rung::L4).count();
    assert_eq!(
        late, 0,
        "half a second after its onset no music is below L4"
    );
    let mut talk = client("talker-a", 4, 20);
    talk.extend(packets_of(&vec![0i16; 48_000 * 4], 64_000, 20));
    let (coded, restored) = hop(&talk, 2, |_| Rung::L2);
    let tail = coded.len() - 50;
    assert!(coded[tail..].iter().all(|c| c.rung == Rung::L1 && !c.voice));
    assert!(
        restored[tail..]
            .iter()
            .flat_map(|d| &d.levels)
            .all(|level| *level > 60)
    );
}

#[test]
fn losses_are_concealed_and_fade() {
    let engine = Engine::start(config()).unwrap();
    let (port, _) = port(&engine);
    let lost = |id: u64| Decode {
        track: 7,
        id,
        codec: CodecId::Lyra6,
        payload: Vec::new(),
        gain: 0,
        unit_ms: 20,
        count: 2,
        lost: true,
    };
    port.try_send(Job::Decode(lost(0))).unwrap();
    assert_eq!(
        next(&port, LONG),
        Outcome::Failed { track: 7, id: 0 },
        "nothing came before"
    );
    for rung in [Rung::L2, Rung::L4] {
        let packets = client("talker-a", 4, 20);
        let mut levels = Vec::new();
        for (k, group) in packets.chunks_exact(2).enumerate() {
            let coded = encode(&port, k as u64, rung, group);
            decode(&port, payload(&coded, 2));
        }
        for k in 0..10 {
            levels.extend(decode(&port, lost(k)).levels);
        }
        assert!(levels[18] > 60, "{rung}: {levels:?}");
        port.try_send(Job::Close {
            track: 7,
            direction: Direction::Decode,
        })
        .unwrap();
    }
}

#[test]
fn what_cannot_be_coded_is_refused_with_the_reason() {
    let engine = Engine::start(config()).unwrap();
    let (port, wakes) = port(&engine);
    let good = client("talker-a", 1, 20);
    let mut stereo = good[10].clone();
    stereo[0] |= 0x04;
    let mut encrypted = good[11].clone();
    encrypted.extend([0xa5; 12]);
    encrypted.extend([12, 3]);
    let ten = {
        let mut packet = good[12].clone();
        packet[0] = (packet[0] & 0x07) | 30 << 3; // CELT fullband 10 ms
        packet
    };
    let cases: Vec<(Vec<Vec<u8>>, Refusal)> = vec![
        (vec![], Refusal::Duration),
        (vec![vec![]], Refusal::Duration),
        (vec![vec![0xf8, 0xff]], Refusal::Duration),
        (vec![ten], Refusal::Duration),
        (good[..4].to_vec(), Refusal::Duration),
        (vec![stereo], Refusal::Stereo),
        (vec![encrypted], Refusal::Undecodable),
        (vec![vec![0x03, 0xff, 0xff, 0xff]], Refusal::Undecodable),
    ];
    for (id, (packets, reason)) in (0..).zip(cases) {
        port.try_send(group(1, id, Rung::L2, &packets)).unwrap();
        let outcome = next(&port, LONG);
        assert_eq!(
            outcome,
            Outcome::Refused {
                track: 1,
                id,
                reason
            },
            "{packets:?}"
        );
    }
    for job in [
        (CodecId::Native, 20, 1),
        (CodecId::Lyra6, 30, 1),
        (CodecId::Lyra6, 20, 0),
        (CodecId::Lyra6, 20, 9),
        (CodecId::Lyra6, 20, 1),
    ] {
        let (codec, unit_ms, count) = job;
        port.try_send(Job::Decode(Decode {
            track: 1,
            id: 5,
            codec,
            payload: vec![1; 14],
            gain: 0,
            unit_ms,
            count,
            lost: false,
        }))
        .unwrap();
        assert_eq!(
            next(&port, LONG),
            Outcome::Failed { track: 1, id: 5 },
            "{job:?}"
        );
    }
    assert!(wakes.load(Ordering::Relaxed) >= 13);
    assert_eq!(
        engine.rungs(),
        Rungs::ALL,
        "a stranger's nonsense is nothing against a codec"
    );
    assert_eq!(engine.counters().refused, 8);
}

#[test]
fn many_tracks_at_once_each_keep_their_order_and_state() {
    let engine = Engine::start(EngineConfig {
        threads: 2,
        ..config()
    })
    .unwrap();
    let ports: Vec<Port> = (0..2).map(|_| port(&engine).0).collect();
    let voices = [client("talker-a", 5, 20), client("talker-b", 5, 20)];
    const TRACKS: u64 = 6;
    let groups = 50usize;
    let mut coded: Vec<Vec<Encoded>> = vec![Vec::new(); 2 * TRACKS as usize];
    for k in 0..groups {
        for (p, port) in ports.iter().enumerate() {
            for track in 0..TRACKS {
                let packets = &voices[(p + track as usize) % 2][k * 2..k * 2 + 2];
                port.try_send(group(track, k as u64, Rung::L2, packets))
                    .unwrap();
            }
        }
        if k % 5 == 4 {
            for (p, port) in ports.iter().enumerate() {
                for _ in 0..5 * TRACKS {
                    let Outcome::Encoded(one) = next(port, LONG) else {
                        panic!()
                    };
                    coded[p * TRACKS as usize + one.track as usize].push(one);
                }
            }
        }
    }
    for track in &coded {
        assert!(track.iter().map(|c| c.id).eq(0..groups as u64), "in order");
    }
    // The same speech in the same place gives the same code but for rounding.
    let bytes = |c: &[Encoded]| {
        c.iter()
            .flat_map(|c| c.payload.clone())
            .collect::<Vec<u8>>()
    };
    let (first, same, other) = (bytes(&coded[0]), bytes(&coded[2]), bytes(&coded[1]));
    let alike = |a: &[u8], b: &[u8]| {
        a.iter().zip(b).filter(|(a, b)| a == b).count() as f32 / a.len() as f32
    };
    assert!(alike(&first, &same) > 0.9 && alike(&first, &other) < 0.5);
    assert_eq!(
        engine.counters().encoded[0] + engine.counters().encoded[1],
        2 * TRACKS * groups as u64
    );
}

#[test]
fn the_clock_of_the_sound_is_kept() {
    // Restored sound is as long as the original, and not later than libopus' own delay on both sides.
    let packets = client("talker-a", 6, 20);
    let said = heard(&packets);
    for rung in [Rung::L2, Rung::L4] {
        let got = sound(&hop(&packets, 2, |_| rung).1);
        assert_eq!(got.len(), said.len());
        let envelope = |pcm: &[f32]| {
            pcm.chunks_exact(16)
                .map(|c| c.iter().map(|x| x.abs()).sum::<f32>())
                .collect::<Vec<f32>>()
        };
        let (a, b) = (envelope(&said), envelope(&got));
        let best = (0..40usize)
            .max_by_key(|delay| {
                a.iter()
                    .zip(b.iter().skip(*delay))
                    .map(|(a, b)| f64::from(a * b))
                    .sum::<f64>() as i64
                    * 1000
            })
            .unwrap();
        assert!(best <= 16, "{rung}: {best} ms late");
        assert_eq!(SAMPLE_RATE, 16_000);
    }
}
