//! What a listener gets of recorded speech on each rung: `ladder [OPTION=VALUE]... IN.wav... OUT_FOLDER` (scripts/ladder.py runs and scores it).
//!
//! Each file (48 kHz, mono, 16 bit) goes the way of a call: Opus from the client, in groups of 40 ms through [`Encode`], [`Decode`],
//! and the Opus that comes of it decoded as a client does. For every rung `OUT_FOLDER/NAME-RUNG.wav` is written and a line of JSON
//! printed: the rungs really used (a share each), coded bytes a second (copies not counted), the mean gain, and the shares of hop packets
//! that were lost and that were concealed because no copy came either. `native` is the client's Opus decoded.
//!
//! Options: `rungs=native,L1,...`, `gain=DB` (applied to the file first), `client=BITS` a second (32000), `local=BITS` a second and
//! `complexity=0..10` of the Opus for the listener (the engine's defaults), `packet=20|40` ms (40). `loss=PERCENT` of hop packets is
//! evenly random, or in bursts of a mean of `burst=PACKETS`; `copies=DISTANCE` sends a copy of each packet that many behind, as
//! docs/protocol.md has it: of L2 each frame's prefix, of other rungs the same bytes.

// A tool of the measurements: it ends at the first thing that is wrong.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use auralink_engine::{Decode, Encode, Encoded, Engine, EngineConfig, Job, Outcome, Port};
use auralink_proto::ladder::{CodecId, Rung};
use opusic_c::{Application, Bitrate, Channels, Decoder, Encoder, SampleRate};

const RATE: u32 = 48_000;
const PACKET: usize = 960;

struct Options {
    rungs: Vec<String>,
    gain: f32,
    /// Packets of 20 ms in a hop packet.
    group: usize,
    loss: Loss,
    client: u32,
    engine: EngineConfig,
}

/// What the hop does to its packets.
#[derive(Clone, Copy)]
struct Loss {
    /// Share of them that is lost.
    share: f64,
    /// Mean length of a burst, in packets; at 1 losses are independent.
    burst: f64,
    /// Packets between one and its copy; none if 0.
    copies: usize,
}

fn main() {
    let mut options = Options {
        rungs: ["native", "L1", "L2", "L3", "L4", "L5", "L6"]
            .map(String::from)
            .to_vec(),
        gain: 0.0,
        group: 2,
        loss: Loss {
            share: 0.0,
            burst: 1.0,
            copies: 0,
        },
        client: 32_000,
        engine: EngineConfig {
            runtime: Some(cache().join("onnxruntime/libonnxruntime.so")),
            lyra: Some(cache().join("models/lyra2")),
            vad: Some(cache().join("models/silero-vad")),
            // Nothing is to be late here, however loaded the machine.
            deadline: Duration::from_secs(60),
            stall: Duration::from_secs(60),
            replace: Duration::from_secs(120),
            ..EngineConfig::default()
        },
    };
    let mut files: Vec<PathBuf> = Vec::new();
    for argument in std::env::args().skip(1) {
        match argument.split_once('=') {
            Some(("rungs", list)) => options.rungs = list.split(',').map(String::from).collect(),
            Some(("gain", db)) => options.gain = db.parse().expect("gain=DB"),
            Some(("packet", ms)) => options.group = ms.parse::<usize>().expect("packet=20|40") / 20,
            Some(("loss", percent)) => {
                options.loss.share = percent.parse::<f64>().expect("loss=PERCENT") / 100.0;
            }
            Some(("burst", packets)) => {
                options.loss.burst = packets.parse().expect("burst=PACKETS")
            }
            Some(("copies", distance)) => {
                options.loss.copies = distance.parse().expect("copies=DISTANCE");
            }
            Some(("client", bits)) => options.client = bits.parse().expect("client=BITS"),
            Some(("local", bits)) => {
                options.engine.local_bitrate = bits.parse().expect("local=BITS");
            }
            Some(("complexity", number)) => {
                options.engine.local_complexity = number.parse().expect("complexity=0..10");
            }
            Some((other, _)) => panic!("{other}= is no option; see the head of ladder.rs"),
            None => files.push(PathBuf::from(argument)),
        }
    }
    let out = files
        .pop()
        .expect("usage: ladder [OPTION=VALUE]... IN.wav... OUT_FOLDER");
    std::fs::create_dir_all(&out).expect("OUT_FOLDER can be made");
    let engine = Engine::start(options.engine.clone()).unwrap();
    let status = engine.status();
    assert!(status.complete, "{:?}: run `make models`", status.problems);
    let port = engine.port(Arc::new(|| {}));
    let mut track = 0;
    for file in &files {
        let packets = client(&read(file), &options);
        for rung in &options.rungs {
            track += 1;
            let name = file.file_stem().unwrap().to_string_lossy();
            let mut run = Run::new(&port, track, options.group, options.loss);
            let restored = match rung.as_str() {
                "native" => packets.clone(),
                rung => run.through(rung_of(rung), &packets),
            };
            write(&out.join(format!("{name}-{rung}.wav")), &listen(&restored));
            println!("{}", run.report(&name, rung, packets.len()));
        }
    }
}

fn cache() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"),
        PathBuf::from,
    );
    base.join("auralink")
}

fn rung_of(name: &str) -> Rung {
    let found = Rung::CODED.into_iter().find(|r| r.to_string() == name);
    found.unwrap_or_else(|| panic!("{name} is no rung: native, L1 to L6"))
}

/// One file on one rung.
struct Run<'a> {
    port: &'a Port,
    track: u64,
    group: usize,
    loss: Loss,
    seed: u64,
    used: [usize; 6],
    bytes: usize,
    gain: i64,
    groups: usize,
    lost: usize,
    concealed: usize,
}

/// What the hop carries of a group.
enum Sent {
    Coded(Encoded),
    /// Looks encrypted, as one packet in 4,000 does: it goes as it came, and is never lost here.
    Native(Vec<Vec<u8>>),
}

impl<'a> Run<'a> {
    fn new(port: &'a Port, track: u64, group: usize, loss: Loss) -> Self {
        Self {
            port,
            track,
            group,
            loss,
            // Another pattern for each file, the same on every run.
            seed: track.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1,
            used: [0; 6],
            bytes: 0,
            gain: 0,
            groups: 0,
            lost: 0,
            concealed: 0,
        }
    }

    /// A client's packets over the hop: what the listener's side is sent.
    fn through(&mut self, rung: Rung, packets: &[Vec<u8>]) -> Vec<Vec<u8>> {
        let sent = self.encode(rung, packets);
        let lost = self.losses(sent.len());
        let mut restored = Vec::new();
        // What a lost one is to be replaced by: as much, of the same codec.
        let mut before = CodecId::Lyra6;
        for (at, group) in sent.iter().enumerate() {
            let coded = match group {
                Sent::Coded(coded) => coded,
                Sent::Native(packets) => {
                    restored.extend_from_slice(packets);
                    continue;
                }
            };
            let mut job = Decode {
                track: self.track,
                id: at as u64,
                codec: coded.codec,
                payload: coded.payload.clone(),
                gain: coded.gain,
                unit_ms: coded.unit_ms,
                count: self.group as u8,
                lost: false,
            };
            if lost[at] {
                self.lost += 1;
                let carrier = at + self.loss.copies;
                if self.loss.copies > 0 && lost.get(carrier) == Some(&false) {
                    (job.codec, job.payload) = copy(coded);
                } else {
                    self.concealed += 1;
                    (job.codec, job.payload, job.lost) = (before, Vec::new(), true);
                }
            }
            before = job.codec;
            let outcome = self.done(Job::Decode(job));
            let Outcome::Decoded(decoded) = outcome else {
                panic!("group {at} of {rung}: {outcome:?}");
            };
            restored.extend(decoded.packets);
        }
        restored
    }

    fn encode(&mut self, rung: Rung, packets: &[Vec<u8>]) -> Vec<Sent> {
        let mut sent = Vec::new();
        for (id, group) in packets.chunks_exact(self.group).enumerate() {
            let outcome = self.done(Job::Encode(Encode {
                track: self.track,
                id: id as u64,
                rung,
                packets: group.to_vec(),
                lost_before: 0,
            }));
            self.groups += 1;
            sent.push(match outcome {
                Outcome::Encoded(coded) => {
                    self.used[usize::from(coded.rung.number()) - 1] += 1;
                    self.bytes += coded.payload.len();
                    self.gain += i64::from(coded.gain);
                    Sent::Coded(coded)
                }
                Outcome::Refused { .. } => Sent::Native(group.to_vec()),
                other => panic!("group {id} on {rung}: {other:?}"),
            });
        }
        sent
    }

    /// Which of so many packets are lost: two states, of which the bad one loses all (Gilbert). The first is never.
    fn losses(&mut self, count: usize) -> Vec<bool> {
        let Loss { share, burst, .. } = self.loss;
        let mut lost = vec![false];
        while lost.len() < count {
            let random = self.random();
            let chance = match lost.last() {
                Some(true) if burst > 1.0 => 1.0 - 1.0 / burst,
                _ if burst > 1.0 => share / (burst * (1.0 - share)),
                _ => share,
            };
            lost.push(random < chance);
        }
        lost
    }

    fn done(&self, job: Job) -> Outcome {
        self.port.try_send(job).unwrap();
        let began = Instant::now();
        loop {
            if let Some(outcome) = self.port.try_recv() {
                return outcome;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "no outcome");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// xorshift64*, 0 to 1.
    fn random(&mut self) -> f64 {
        self.seed ^= self.seed >> 12;
        self.seed ^= self.seed << 25;
        self.seed ^= self.seed >> 27;
        (self.seed.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn report(&self, name: &str, rung: &str, packets: usize) -> String {
        let groups = self.groups.max(1) as f64;
        let used: Vec<String> = (1..)
            .zip(self.used)
            .filter(|(_, n)| *n > 0)
            .map(|(number, n)| format!("\"L{number}\": {:.3}", n as f64 / groups))
            .collect();
        format!(
            "{{\"clip\": \"{name}\", \"rung\": \"{rung}\", \"seconds\": {:.2}, \"used\": {{{}}}, \"kbps\": {:.2}, \"gain\": {:.1}, \"lost\": {:.3}, \"concealed\": {:.3}}}",
            packets as f64 / 50.0,
            used.join(", "),
            self.bytes as f64 * 8.0 / (groups * 20.0 * self.group as f64),
            self.gain as f64 / groups,
            self.lost as f64 / groups,
            self.concealed as f64 / groups
        )
    }
}

/// What a copy carries: of L2 each frame's first 16 stages, which are L1's frame.
fn copy(coded: &Encoded) -> (CodecId, Vec<u8>) {
    const LYRA6: usize = 15;
    const LYRA3: usize = 8;
    if coded.codec != CodecId::Lyra6 {
        return (coded.codec, coded.payload.clone());
    }
    let frames = coded.payload.chunks_exact(LYRA6);
    let prefixes = frames.flat_map(|frame| frame[..LYRA3].to_vec());
    (CodecId::Lyra3, prefixes.collect())
}

/// What a stock client sends: Opus, 20 ms.
fn client(pcm: &[f32], options: &Options) -> Vec<Vec<u8>> {
    let mut encoder = Encoder::new(Channels::Mono, SampleRate::Hz48000, Application::Voip).unwrap();
    encoder.set_bitrate(Bitrate::Value(options.client)).unwrap();
    let factor = 10f32.powf(options.gain / 20.0);
    pcm.chunks_exact(PACKET)
        .map(|chunk| {
            let chunk: Vec<f32> = chunk.iter().map(|x| x * factor).collect();
            let mut packet = vec![0; 1500];
            let length = encoder.encode_float_to_slice(&chunk, &mut packet).unwrap();
            packet.truncate(length);
            packet
        })
        .collect()
}

/// What a stock client hears, without its jitter buffer.
fn listen(packets: &[Vec<u8>]) -> Vec<f32> {
    let mut decoder = Decoder::new(Channels::Mono, SampleRate::Hz48000).unwrap();
    let mut pcm = Vec::new();
    let mut block = [0.0; PACKET];
    for packet in packets {
        let length = decoder
            .decode_float_to_slice(packet, &mut block, false)
            .unwrap();
        assert_eq!(length, PACKET, "a packet of 20 ms");
        pcm.extend_from_slice(&block);
    }
    pcm
}

fn read(path: &Path) -> Vec<f32> {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (head, samples) = bytes.split_at(44);
    assert_eq!(
        &head[20..28],
        [1, 0, 1, 0, 0x80, 0xbb, 0, 0],
        "{}: needed: 16 bit, mono, 48 kHz",
        path.display()
    );
    let samples = samples.as_chunks::<2>().0.iter();
    samples
        .map(|b| f32::from(i16::from_le_bytes(*b)) / 32768.0)
        .collect()
}

fn write(path: &Path, pcm: &[f32]) {
    let size = pcm.len() as u32 * 2;
    let mut bytes = Vec::with_capacity(pcm.len() * 2 + 44);
    bytes.extend_from_slice(b"RIFF");
    bytes.extend((size + 36).to_le_bytes());
    bytes.extend_from_slice(b"WAVEfmt \x10\0\0\0\x01\0\x01\0");
    bytes.extend(RATE.to_le_bytes());
    bytes.extend((RATE * 2).to_le_bytes());
    bytes.extend_from_slice(b"\x02\0\x10\0data");
    bytes.extend(size.to_le_bytes());
    for x in pcm {
        bytes.extend(((x.clamp(-1.0, 1.0) * 32767.0).round() as i16).to_le_bytes());
    }
    std::fs::write(path, bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}
