//! Models that sleep, fail, give NaN, panic, are truncated or vanish: nobody waits for them.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use auralink_proto::ladder::{Rung, Rungs};

use super::call::{config, group, next, payload, port};
use crate::breaker::Settings;
use crate::codec::{Codec, CodecError, DecodeTask, EncodeTask};
use crate::desk::{Kit, Neural};
use crate::lyra::{LyraDecoder, LyraEncoder};
use crate::source::{Folders, Source, Stamp};
use crate::testing::{client, copy_of, lyra_bundle, runtime, vad_bundle};
use crate::{Busy, Encoded, Engine, EngineConfig, Job, Outcome};

const MS: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, PartialEq)]
#[repr(u8)]
enum Fault {
    None,
    Error,
    Sleep,
    Hang,
    Panic,
}

/// The real codec with a switch.
struct Faulty {
    real: Neural,
    fault: Arc<AtomicU8>,
}

impl Faulty {
    fn strikes(&self) -> bool {
        let fault = self.fault.load(Ordering::Relaxed);
        if fault == Fault::Sleep as u8 {
            std::thread::sleep(MS * 40);
        } else if fault == Fault::Hang as u8 {
            while self.fault.load(Ordering::Relaxed) == Fault::Hang as u8 {
                std::thread::sleep(MS);
            }
        } else if fault == Fault::Panic as u8 {
            panic!("a codec that panics, as this test wants it");
        }
        fault == Fault::Error as u8
    }
}

impl Codec for Faulty {
    type Encoder = LyraEncoder;
    type Decoder = LyraDecoder;

    fn encoder(&self) -> Result<LyraEncoder, CodecError> {
        self.real.encoder()
    }

    fn decoder(&self) -> Result<LyraDecoder, CodecError> {
        self.real.decoder()
    }

    fn encode(&mut self, batch: &mut [EncodeTask<'_, LyraEncoder>]) {
        if self.strikes() {
            for task in batch {
                task.done = Err(CodecError::Failed("the result is no number".to_owned()));
            }
        } else {
            self.real.encode(batch);
        }
    }

    fn decode(&mut self, batch: &mut [DecodeTask<'_, LyraDecoder>]) {
        if self.strikes() {
            for task in batch {
                task.done = Err(CodecError::Failed("the result is no number".to_owned()));
            }
        } else {
            self.real.decode(batch);
        }
    }
}

/// Models that can't even be looked at.
struct PanickingSource(Arc<AtomicUsize>);

impl Source for PanickingSource {
    fn stamp(&self) -> Stamp {
        Stamp::new()
    }
    fn load(&mut self) -> Vec<String> {
        self.0.fetch_add(1, Ordering::Relaxed);
        panic!("a source that panics, as this test wants it");
    }
    fn bundles(&self) -> Vec<(String, String)> {
        Vec::new()
    }
    fn codec(&self) -> Option<String> {
        None
    }
    fn kit(&mut self, _: &mut Vec<String>) -> Kit {
        panic!("a source that panics, as this test wants it");
    }
}

#[test]
fn a_watcher_that_panics_goes_on_watching_and_says_so() {
    let loads = Arc::new(AtomicUsize::new(0));
    let source = PanickingSource(loads.clone());
    let engine = Engine::with(EngineConfig::default(), Box::new(source)).unwrap();
    assert_eq!(loads.load(Ordering::Relaxed), 1);
    assert!(engine.is_watched());
    for said in ["loading the models", "making a codec thread's models"] {
        until(said, MS * 3000, || {
            let problems = engine.status().problems;
            problems.iter().any(|problem| problem.contains(said))
        });
    }
    until("codec threads are up", MS * 3000, || {
        engine.status().threads_up == 1
    });
    assert_eq!(engine.rungs(), Rungs::OPUS);
}

struct FaultySource {
    folders: Folders,
    fault: Arc<AtomicU8>,
    kits: Arc<AtomicUsize>,
    /// Only the first thread's models obey the switch.
    first_only: bool,
}

impl Source for FaultySource {
    fn stamp(&self) -> Stamp {
        self.folders.stamp()
    }
    fn load(&mut self) -> Vec<String> {
        self.folders.load()
    }
    fn bundles(&self) -> Vec<(String, String)> {
        self.folders.bundles()
    }
    fn codec(&self) -> Option<String> {
        self.folders.codec()
    }
    fn kit(&mut self, problems: &mut Vec<String>) -> Kit {
        let made = self.kits.fetch_add(1, Ordering::Relaxed);
        let mut kit = self.folders.kit(problems);
        if self.first_only && made > 0 {
            return kit;
        }
        let fault = self.fault.clone();
        kit.neural = kit
            .neural
            .map(|real| Box::new(Faulty { real, fault }) as Neural);
        kit
    }
}

/// An engine whose Lyra obeys the switch; its breakers are quick.
fn faulty() -> (Engine, Arc<AtomicU8>) {
    faulty_threads(1)
}

/// With so many threads, of which the first has the Lyra that obeys the switch.
fn faulty_threads(threads: usize) -> (Engine, Arc<AtomicU8>) {
    let fault = Arc::new(AtomicU8::new(0));
    let config = EngineConfig {
        threads,
        deadline: MS * 30,
        stall: MS * 60,
        replace: MS * 400,
        breaker: Settings {
            failures: 3,
            share: 0.1,
            window: MS * 2000,
            open: MS * 300,
            max_open: MS * 600,
            trials: 3,
        },
        ..config()
    };
    let source = FaultySource {
        folders: Folders::new(&config),
        fault: fault.clone(),
        kits: Arc::default(),
        first_only: threads > 1,
    };
    (Engine::with(config, Box::new(source)).unwrap(), fault)
}

fn until(what: &str, most: Duration, mut holds: impl FnMut() -> bool) -> Duration {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < most, "{what}: not within {most:?}");
        std::thread::sleep(MS);
    }
    start.elapsed()
}

fn coded(outcome: Outcome) -> Encoded {
    match outcome {
        Outcome::Encoded(encoded) => encoded,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_codec_that_fails_is_replaced_by_opus_and_comes_back() {
    let (engine, fault) = faulty();
    let (port, _) = port(&engine);
    let packets = client("talker-a", 4, 20);
    let mut groups = packets.chunks_exact(2).enumerate().cycle();
    let mut send = |rung| {
        let (id, packets) = groups.next().unwrap();
        port.try_send(group(1, id as u64, rung, packets)).unwrap();
        coded(next(&port, MS * 5000))
    };
    assert_eq!(send(Rung::L2).codec, Rung::L2.codec());
    fault.store(Fault::Error as u8, Ordering::Relaxed);
    for _ in 0..3 {
        assert_eq!(send(Rung::L2).rung, Rung::L4, "another codec stands in");
    }
    assert!(!engine.rungs().has(Rung::L2), "the breaker is open");
    assert!(
        engine.decodable().has(Rung::L2),
        "what is advertised doesn't change"
    );
    assert!(!engine.status().complete);
    assert!(send(Rung::L2).rung >= Rung::L3, "not even tried");
    fault.store(Fault::None as u8, Ordering::Relaxed);
    until("half open", MS * 2000, || engine.rungs().has(Rung::L2));
    for _ in 0..4 {
        assert!(send(Rung::L2).rung.is_neural());
    }
    assert_eq!(engine.rungs(), Rungs::ALL);
    assert_eq!(engine.counters().opened[1], 1);
}

#[test]
fn a_codec_that_fails_on_one_thread_stops_no_other() {
    let (engine, fault) = faulty_threads(2);
    let (port, _) = port(&engine);
    let packets = client("talker-a", 4, 20);
    let mut groups = packets.chunks_exact(2).enumerate().cycle();
    let mut send = |track| {
        let (id, packets) = groups.next().unwrap();
        port.try_send(group(track, id as u64, Rung::L2, packets))
            .unwrap();
        coded(next(&port, MS * 5000)).rung
    };
    fault.store(Fault::Error as u8, Ordering::Relaxed);
    let (mut failing, mut well) = (Vec::new(), Vec::new());
    for track in (1..=12).map(|relay| relay << 16) {
        if send(track).is_neural() {
            well.push(track);
        } else {
            failing.push(track);
        }
    }
    assert!(
        !failing.is_empty() && !well.is_empty(),
        "twelve tracks on two threads"
    );
    for _ in 0..3 {
        assert!(!send(failing[0]).is_neural());
    }
    until("its breaker is open", MS * 500, || {
        !engine.status().complete
    });
    let problems = engine.status().problems;
    assert!(
        problems
            .iter()
            .any(|p| p.contains("L2 is off for a while on 1 of 2")),
        "{problems:?}"
    );
    assert!(engine.rungs().has(Rung::L2));
    for track in well {
        assert!(send(track).is_neural(), "track {track} is another thread's");
    }
}

#[test]
fn a_codec_that_is_slow_opens_its_breaker_and_nothing_else() {
    let (engine, fault) = faulty();
    let (port, _) = port(&engine);
    let packets = client("talker-a", 4, 20);
    fault.store(Fault::Sleep as u8, Ordering::Relaxed);
    for (id, packets) in packets.chunks_exact(2).enumerate().take(4) {
        port.try_send(group(1, id as u64, Rung::L2, packets))
            .unwrap();
        coded(next(&port, MS * 5000));
    }
    assert!(!engine.rungs().has(Rung::L2));
    assert!(
        engine.rungs().has(Rung::L3) && engine.rungs().has(Rung::L4),
        "{:?}",
        engine.rungs()
    );
    assert!(engine.counters().late >= 3);
}

#[test]
fn a_codec_that_hangs_stalls_nobody_and_its_thread_is_replaced() {
    let (engine, fault) = faulty();
    let (port, _) = port(&engine);
    let packets = client("talker-a", 4, 20);
    port.try_send(group(1, 0, Rung::L2, &packets[..2])).unwrap();
    coded(next(&port, MS * 5000));
    fault.store(Fault::Hang as u8, Ordering::Relaxed);
    port.try_send(group(1, 1, Rung::L2, &packets[2..4]))
        .unwrap();
    let noticed = until("no more jobs are taken", MS * 500, || {
        let began = Instant::now();
        let answer = port.try_send(group(1, 2, Rung::L4, &packets[4..6]));
        // A hand-in that waited for the codec would wait until its thread is replaced.
        assert!(began.elapsed() < MS * 400, "handing in never blocks");
        answer == Err(Busy::Hangs)
    });
    assert!(
        noticed < MS * 400,
        "not before its thread is replaced: after {noticed:?}"
    );
    assert!(!engine.rungs().has(Rung::L2) && engine.status().threads_up == 0);
    // It still hangs: another thread takes its place, and Opus goes on.
    until("replaced", MS * 3000, || engine.status().threads_up == 1);
    while port.try_recv().is_some() {}
    port.try_send(group(1, 9, Rung::L4, &packets[6..8]))
        .unwrap();
    until(
        "Opus again",
        MS * 2000,
        || matches!(port.try_recv(), Some(Outcome::Encoded(e)) if e.id == 9),
    );
    assert_eq!(engine.counters().restarts, 1);
    fault.store(Fault::None as u8, Ordering::Relaxed);
    until("half open", MS * 2000, || engine.rungs().has(Rung::L2));
    port.try_send(group(1, 10, Rung::L2, &packets[8..10]))
        .unwrap();
    let one = coded(next(&port, MS * 5000));
    assert_eq!(
        one.id, 10,
        "what the old thread still has to say is late, and nothing to anybody"
    );
    assert!(one.rung.is_neural(), "{one:?} {:?}", engine.status());
}

#[test]
fn a_codec_that_panics_is_put_up_again() {
    let (engine, fault) = faulty();
    let (port, _) = port(&engine);
    let packets = client("talker-a", 4, 20);
    fault.store(Fault::Panic as u8, Ordering::Relaxed);
    port.try_send(group(1, 0, Rung::L2, &packets[..2])).unwrap();
    until("noticed", MS * 100, || engine.status().threads_up == 0);
    fault.store(Fault::None as u8, Ordering::Relaxed);
    until("put up again", MS * 3000, || {
        engine.status().threads_up == 1
    });
    assert_eq!(engine.counters().restarts, 1);
    until("trusted again", MS * 2000, || engine.rungs().has(Rung::L2));
    port.try_send(group(1, 1, Rung::L2, &packets[2..4]))
        .unwrap();
    let one = coded(next(&port, MS * 5000));
    port.try_send(Job::Decode(payload(&one, 2))).unwrap();
    assert!(matches!(next(&port, MS * 5000), Outcome::Decoded(_)));
}

#[test]
fn a_truncated_bundle_leaves_opus_and_is_noticed_when_mended() {
    let folder = copy_of(&lyra_bundle());
    let model = folder.path().join("decoder.onnx");
    let whole = std::fs::read(&model).unwrap();
    File::options()
        .write(true)
        .open(&model)
        .unwrap()
        .set_len(100_000)
        .unwrap();
    let engine = Engine::start(EngineConfig {
        lyra: Some(folder.path().to_owned()),
        ..config()
    })
    .unwrap();
    assert_eq!(
        (engine.rungs(), engine.decodable()),
        (Rungs::OPUS, Rungs::OPUS)
    );
    let status = engine.status();
    assert!(
        status
            .problems
            .iter()
            .any(|p| p.contains("decoder.onnx: it has 100000 bytes")),
        "{status:?}"
    );
    std::fs::write(&model, &whole).unwrap();
    engine.reload();
    until("mended", MS * 10_000, || engine.rungs() == Rungs::ALL);
    assert!(engine.status().complete, "{:?}", engine.status());
    // And gone again in the middle of a call.
    let (port, _) = port(&engine);
    let packets = client("talker-a", 2, 20);
    port.try_send(group(1, 0, Rung::L2, &packets[..2])).unwrap();
    assert!(coded(next(&port, MS * 5000)).rung.is_neural());
    // Another bundle, as far as anybody can tell: peers that speak of the first must not be taken to mean it.
    let manifest = folder.path().join("manifest.yaml");
    let first = port.models();
    assert!(first.is_some() && first == engine.models());
    let text = std::fs::read_to_string(&manifest).unwrap();
    std::fs::write(&manifest, format!("{text}# another\n")).unwrap();
    engine.reload();
    // Nothing between the old and the new ones but none.
    let replaced = || {
        let now = port.models();
        assert!(now.is_none() || now == first || now == engine.models());
        now.is_some() && now != first
    };
    until("replaced", MS * 10_000, replaced);
    std::fs::remove_file(manifest).unwrap();
    engine.reload();
    until("gone", MS * 5000, || engine.decodable() == Rungs::OPUS);
    assert_eq!((port.models(), engine.models()), (None, None));
    port.try_send(group(1, 1, Rung::L2, &packets[2..4]))
        .unwrap();
    assert!(
        !coded(next(&port, MS * 5000)).rung.is_neural(),
        "the call goes on"
    );
}

#[test]
fn without_anything_there_is_opus_and_the_reason() {
    fn nowhere(what: &str) -> Option<PathBuf> {
        Some(Path::new("/nowhere").join(what))
    }
    let cases = [
        (EngineConfig::default(), "no ONNX Runtime is configured"),
        (
            EngineConfig {
                runtime: nowhere("libonnxruntime.so"),
                lyra: Some(lyra_bundle()),
                vad: Some(vad_bundle()),
                ..EngineConfig::default()
            },
            "make models",
        ),
        (
            EngineConfig {
                runtime: Some(runtime()),
                lyra: nowhere("lyra2"),
                vad: Some(vad_bundle()),
                ..EngineConfig::default()
            },
            "/nowhere/lyra2",
        ),
        (
            EngineConfig {
                runtime: Some(runtime()),
                lyra: Some(lyra_bundle()),
                vad: nowhere("vad"),
                ..EngineConfig::default()
            },
            "/nowhere/vad",
        ),
    ];
    for (config, words) in cases {
        let engine = Engine::start(EngineConfig {
            deadline: MS * 5000,
            ..config.clone()
        })
        .unwrap();
        let status = engine.status();
        // ONNX Runtime may have been loaded by another test of this process; then it doesn't matter that the path is wrong.
        let loaded_before = config.runtime == nowhere("libonnxruntime.so") && status.complete;
        if loaded_before {
            continue;
        }
        assert_eq!(engine.rungs(), Rungs::OPUS, "{words}");
        assert!(
            status.problems.iter().any(|p| p.contains(words)),
            "{words}: {status:?}"
        );
        let (port, _) = port(&engine);
        let packets = client("talker-a", 1, 20);
        port.try_send(group(1, 0, Rung::L2, &packets[..2])).unwrap();
        assert_eq!(
            coded(next(&port, MS * 5000)).rung,
            if config.vad == Some(vad_bundle()) && config.runtime == Some(runtime()) {
                Rung::L3
            } else {
                Rung::L4
            },
            "{words}"
        );
    }
}

#[test]
fn a_full_queue_is_an_answer_and_dropped_outcomes_are_counted() {
    let (engine, fault) = faulty();
    let (port, _) = port(&engine);
    let packets = client("talker-a", 1, 20);
    fault.store(Fault::Hang as u8, Ordering::Relaxed);
    let mut answers = Vec::new();
    for id in 0..2000 {
        answers.push(port.try_send(group(1, id, Rung::L2, &packets[..2])));
    }
    let taken = answers.iter().filter(|a| a.is_ok()).count();
    // As many as are left for the others; what the thread had taken before is no longer in the queue.
    let most = 128 + EngineConfig::default().batch;
    assert!((128..=most).contains(&taken), "{taken}");
    assert_eq!(engine.counters().busy, 2000 - taken as u64);
    // Somebody else gets in, and may have half of what is left, and so may the next.
    let relay = |n: u64| n << 16;
    let of = |track| {
        let jobs = (0..2000).filter(|id| {
            let job = group(track, *id, Rung::L2, &packets[..2]);
            port.try_send(job).is_ok()
        });
        jobs.count()
    };
    let others = [of(relay(1)), of(relay(2)), of(relay(3))];
    // More where the thread that hung was replaced in between, and the next one has taken a batch.
    let least = [64, 32, 16];
    for (got, least) in others.into_iter().zip(least) {
        assert!((least..=most / 2).contains(&got), "{others:?}");
    }
    fault.store(Fault::None as u8, Ordering::Relaxed);
    drop(engine);
    assert_eq!(
        port.try_send(group(1, 0, Rung::L2, &packets[..2])),
        Err(Busy::Ended)
    );
}

#[test]
fn impossible_settings_are_refused() {
    for config in [
        EngineConfig {
            threads: 0,
            ..EngineConfig::default()
        },
        EngineConfig {
            queue: 0,
            ..EngineConfig::default()
        },
        EngineConfig {
            local_complexity: 11,
            ..EngineConfig::default()
        },
        EngineConfig {
            local_bitrate: 1,
            ..EngineConfig::default()
        },
    ] {
        assert!(Engine::start(config).is_err());
    }
}
