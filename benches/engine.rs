//! `cargo bench -p auralink-engine`: what the codecs cost, and how many duplex neural tracks one codec thread carries.
//!
//! The tracks are real speech as a stock client sends it, in groups of 40 ms spread evenly over time, each through an encode job on
//! L2 and a decode job of what came of it: first speech that never pauses in either direction, then one side of a conversation, whose client
//! sends nothing in pauses (DTX). A job is late 20 ms after it was handed in. Needs `make setup` and `make models`.
//! Numbers of tracks after `--` are tried instead of the usual ones, however many come late: `cargo bench -p auralink-engine -- 40 60`.

// A bench is there to print, and has nobody to spare.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use auralink_engine::codec::{Codec, DecodeTask, EncodeTask, FRAME};
use auralink_engine::opus::{Decoder, Enhancement, Opus};
use auralink_engine::{
    BreakerSettings, Decode, Encode, Encoded, Engine, EngineConfig, Job, Outcome, Port, verify,
};
use auralink_proto::ladder::{CodecId, Rung};
use opusic_c::{Application, Bitrate, Channels, Encoder, SampleRate};

const GROUP: Duration = Duration::from_millis(40);
const DEADLINE: Duration = Duration::from_millis(20);
const SECONDS: usize = 6;

fn cache() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"),
        PathBuf::from,
    );
    base.join("auralink")
}

/// Opus 48 kbps, 20 ms, of a recording; with DTX, packets that a client doesn't send have a byte or two.
fn packets(name: &str, dtx: bool) -> Vec<Vec<u8>> {
    let env = std::fs::read_to_string(cache().join("env")).expect("run `make setup`");
    let folder = env
        .lines()
        .find_map(|line| line.strip_prefix("AURALINK_SPEECH="))
        .expect("run `make setup`");
    let bytes = std::fs::read(PathBuf::from(folder).join(name)).expect("run `make setup`");
    let pcm: Vec<f32> = bytes[44..]
        .as_chunks::<2>()
        .0
        .iter()
        .map(|b| f32::from(i16::from_le_bytes(*b)) / 32768.0)
        .collect();
    let mut encoder = Encoder::new(Channels::Mono, SampleRate::Hz48000, Application::Voip).unwrap();
    encoder.set_bitrate(Bitrate::Value(48_000)).unwrap();
    encoder.set_dtx(dtx).unwrap();
    pcm.chunks_exact(960)
        .take(30 * 50)
        .map(|chunk| {
            let mut packet = vec![0; 1500];
            let length = encoder.encode_float_to_slice(chunk, &mut packet).unwrap();
            packet.truncate(length);
            packet
        })
        .collect()
}

fn opus(packets: &[Vec<u8>]) {
    let mut pcm = Vec::new();
    let mut decoder = Decoder::new(Enhancement::None).unwrap();
    let began = Instant::now();
    for packet in packets {
        decoder.decode(packet, &mut pcm).unwrap();
    }
    let each = |took: Duration, frames: usize| took.as_secs_f64() * 1e6 / frames as f64;
    println!(
        "opus 48k to 16 kHz PCM: {:.0} µs a 20 ms frame",
        each(began.elapsed(), packets.len())
    );
    let groups: Vec<&[f32]> = pcm.chunks_exact(2 * FRAME).collect();
    for rung in [Rung::L3, Rung::L4, Rung::L5, Rung::L6] {
        let mut codec = Opus;
        let mut state = codec.encoder().unwrap();
        let began = Instant::now();
        let coded: Vec<Vec<u8>> = groups
            .iter()
            .map(|group| {
                let mut batch = [EncodeTask::new(&mut state, rung, group)];
                codec.encode(&mut batch);
                let [task] = batch;
                task.payload
            })
            .collect();
        let encode = each(began.elapsed(), groups.len());
        let mut state = codec.decoder().unwrap();
        let began = Instant::now();
        for payload in &coded {
            codec.decode(&mut [DecodeTask::new(
                &mut state,
                CodecId::Opus,
                Some(payload),
                2 * FRAME,
            )]);
        }
        println!(
            "{rung}: encode {encode:.0} µs, decode with LACE {:.0} µs a 40 ms packet",
            each(began.elapsed(), groups.len())
        );
    }
    let mut local = auralink_engine::opus::SpeechEncoder::local(16_000, 64_000, 5).unwrap();
    let began = Instant::now();
    for frame in pcm.chunks_exact(FRAME) {
        local.encode(frame).unwrap();
    }
    println!(
        "local Opus 64k: {:.0} µs a 20 ms frame",
        each(began.elapsed(), pcm.len() / FRAME)
    );
}

/// CPU time of the codec thread so far. What paces the tracks isn't in it.
fn cpu() -> Duration {
    cpu_of_codec_threads().into_iter().sum()
}

/// An engine whose codec thread is the only one.
fn start(config: EngineConfig) -> Engine {
    // That of the engine before ends by itself.
    while !cpu_of_codec_threads().is_empty() {
        std::thread::sleep(Duration::from_millis(20));
    }
    Engine::start(config).unwrap()
}

fn cpu_of_codec_threads() -> Vec<Duration> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let read = |folder: &std::path::Path, file: &str| std::fs::read_to_string(folder.join(file));
    tasks
        .map(|task| task.path())
        .filter(|task| read(task, "comm").is_ok_and(|name| name.trim() == "codec-0"))
        .map(|task| {
            let text = read(&task, "schedstat").unwrap_or_default();
            let nanos = text.split_whitespace().next();
            Duration::from_nanos(nanos.and_then(|n| n.parse().ok()).unwrap_or(0))
        })
        .collect()
}

/// CPU time that a second of a duplex track takes where so many come at once: how late anything is doesn't matter, so that a machine
/// with other work can be measured too.
fn lockstep(port: &Port, tracks: usize, packets: &[Vec<u8>]) -> Duration {
    let groups: Vec<&[Vec<u8>]> = packets.chunks_exact(2).collect();
    let wait = || loop {
        if let Some(outcome) = port.try_recv() {
            return outcome;
        }
        std::thread::sleep(Duration::from_micros(100));
    };
    let steps = 1600 / tracks.max(8);
    let mut before = Duration::ZERO;
    for step in 0..steps + 10 {
        if step == 10 {
            // The first runs are the slowest, and no part of any call.
            before = cpu();
        }
        for track in 0..tracks {
            let group = groups[(step + track * 37) % groups.len()];
            let job = encode(track as u64, 0, group);
            port.try_send(job).expect("the queue is long enough");
        }
        let done: Vec<Outcome> = (0..tracks).map(|_| wait()).collect();
        let mut open = 0;
        for outcome in done {
            if let Outcome::Encoded(coded) = outcome {
                let job = decode(coded, 0, 2);
                port.try_send(job).expect("the queue is long enough");
                open += 1;
            }
        }
        for _ in 0..open {
            wait();
        }
    }
    (cpu() - before).div_f64((steps * tracks) as f64 * GROUP.as_secs_f64())
}

fn encode(track: u64, id: u64, group: &[Vec<u8>]) -> Job {
    Job::Encode(Encode {
        track,
        id,
        rung: Rung::L2,
        packets: group.to_vec(),
        lost_before: 0,
    })
}

fn decode(coded: Encoded, id: u64, count: usize) -> Job {
    Job::Decode(Decode {
        track: coded.track,
        id,
        codec: coded.codec,
        payload: coded.payload,
        gain: coded.gain,
        unit_ms: coded.unit_ms,
        count: count as u8,
        lost: false,
    })
}

struct Found {
    /// Part of the groups that were coded.
    busy: f64,
    late: f64,
    p50: Duration,
    p99: Duration,
    /// Cores that the codec thread used.
    cores: f64,
}

/// What of a group is coded: packets of a pause (DTX) are a byte or two and go as they are, as in a call.
fn spoken(group: &[Vec<u8>]) -> &[Vec<u8>] {
    let pause = |packet: &Vec<u8>| packet.len() <= 2;
    match group {
        [first, rest @ ..] if pause(first) => spoken(rest),
        [rest @ .., last] if pause(last) => spoken(rest),
        all => all,
    }
}

/// `tracks` duplex tracks at the pace of speech. Groups of which nothing was sent (DTX) make no jobs.
fn duplex(port: &Port, tracks: usize, packets: &[Vec<u8>]) -> Found {
    let groups: Vec<&[Vec<u8>]> = packets.chunks_exact(2).collect();
    let total = tracks * SECONDS * 1000 / GROUP.as_millis() as usize;
    // Every track says something else.
    let group = |id: usize| groups[(id / tracks + id % tracks * 37) % groups.len()];
    let mut sent = vec![Instant::now(); total * 2];
    let mut took = Vec::with_capacity(total * 2);
    let mut late = 0;
    let before = cpu();
    let start = Instant::now();
    let (mut next, mut open, mut jobs) = (0, 0, 0);
    while next < total || open > 0 {
        while let Some(outcome) = port.try_recv() {
            let (_, id) = outcome.of();
            let now = Instant::now();
            let delay = now - sent[id as usize];
            took.push(delay);
            late += usize::from(
                delay > DEADLINE
                    || matches!(outcome, Outcome::Refused { .. } | Outcome::Failed { .. }),
            );
            open -= 1;
            if let Outcome::Encoded(coded) = outcome {
                let count = spoken(group(id as usize)).len();
                let id = id + total as u64;
                sent[id as usize] = now;
                let job = decode(coded, id, count);
                if port.try_send(job).is_ok() {
                    open += 1
                } else {
                    late += 1
                }
            }
        }
        let due = start + GROUP.mul_f64(next as f64 / tracks as f64);
        let now = Instant::now();
        if next < total && now >= due {
            let group = spoken(group(next));
            if group.is_empty() {
                next += 1;
                continue;
            }
            sent[next] = now;
            jobs += 2;
            let job = encode((next % tracks) as u64, next as u64, group);
            if port.try_send(job).is_ok() {
                open += 1
            } else {
                late += 1
            }
            next += 1;
        } else {
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    let cores = (cpu() - before).as_secs_f64() / start.elapsed().as_secs_f64();
    took.sort_unstable();
    let at = |share: f64| {
        took.get((took.len() as f64 * share) as usize)
            .copied()
            .unwrap_or_default()
    };
    Found {
        late: late as f64 / f64::from(jobs),
        busy: f64::from(jobs) / (total * 2) as f64,
        p50: at(0.5),
        p99: at(0.99),
        cores,
    }
}

fn main() {
    // `cargo test --benches` only wants to know that it builds.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let runtime = cache().join("onnxruntime/libonnxruntime.so");
    let bundles = [
        cache().join("models/lyra2"),
        cache().join("models/silero-vad"),
    ];
    for bundle in &bundles {
        match verify(bundle, &runtime) {
            Ok(report) => print!("{report}"),
            Err(error) => panic!("{error}"),
        }
    }
    let steady = packets("talker-a.wav", false);
    opus(&steady);
    let config = || EngineConfig {
        runtime: Some(runtime.clone()),
        lyra: Some(bundles[0].clone()),
        vad: Some(bundles[1].clone()),
        queue: 1024,
        results: 4096,
        // Nothing is thrown away unseen, so that the CPU time is that of all the work.
        deadline: Duration::from_secs(2),
        stall: Duration::from_secs(10),
        // What is measured is how late it gets, not how it saves itself.
        breaker: BreakerSettings {
            failures: u32::MAX / 8,
            ..BreakerSettings::default()
        },
        ..EngineConfig::default()
    };
    println!("\nCPU of the codec thread for a second of a duplex L2 track, so many at once");
    {
        let engine = start(config());
        let port = engine.port(Arc::new(|| {}));
        for tracks in [1, 4, 8, 16] {
            let took = lockstep(&port, tracks, &steady).as_secs_f64();
            println!("{tracks}: {:.1} ms", took * 1e3);
        }
    }
    let given: Vec<usize> = std::env::args().filter_map(|a| a.parse().ok()).collect();
    for (what, packets) in [
        ("speech that never pauses", steady),
        ("conversation", packets("dialogue-a.wav", true)),
    ] {
        println!(
            "\nduplex L2 tracks on one codec thread, {what}, 40 ms groups, deadline {DEADLINE:?}"
        );
        println!("| tracks | coded | late | p50 ms | p99 ms | cores | CPU ms a second and track |");
        println!("| ------ | ----- | ---- | ------ | ------ | ----- | ------------------------- |");
        let usual = vec![10, 20, 30, 40, 50, 60, 70, 80];
        let counts = if given.is_empty() {
            usual
        } else {
            given.clone()
        };
        for tracks in counts {
            let engine = start(config());
            let port = engine.port(Arc::new(|| {}));
            let found = duplex(&port, tracks, &packets);
            println!(
                "| {tracks:6} | {:3.0} % | {:3.1} % | {:6.1} | {:6.1} | {:5.2} | {:25.1} |",
                found.busy * 100.0,
                found.late * 100.0,
                found.p50.as_secs_f64() * 1e3,
                found.p99.as_secs_f64() * 1e3,
                found.cores,
                found.cores * 1e3 / tracks as f64
            );
            if found.late > 0.05 && given.is_empty() {
                break;
            }
        }
    }
}
