//! What the tests share: where real bundles and real speech are, and how sound is compared.

use std::path::{Path, PathBuf};

use opusic_c::{Application, Bitrate, Channels, Encoder, SampleRate};
use ort::environment::Environment;

use crate::codec::SAMPLE_RATE;
use crate::opus::{Decoder, Enhancement};

fn cache() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME").map_or_else(
        || PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"),
        PathBuf::from,
    );
    base.join("auralink")
}

fn made(path: PathBuf) -> PathBuf {
    assert!(
        path.exists(),
        "{} is missing: run `make models`",
        path.display()
    );
    path
}

/// The Lyra bundle that `make models` made.
pub(crate) fn lyra_bundle() -> PathBuf {
    made(cache().join("models/lyra2"))
}

/// Lyra with its quantizer in the graphs: `lyra2-codes` or `lyra2-24k`.
pub(crate) fn codes_bundle(name: &str) -> PathBuf {
    made(cache().join("models").join(name))
}

/// The voice detector's bundle that `make models` made.
pub(crate) fn vad_bundle() -> PathBuf {
    made(cache().join("models/silero-vad"))
}

/// ONNX Runtime as `make models` fetched it.
pub(crate) fn runtime() -> PathBuf {
    made(cache().join("onnxruntime/libonnxruntime.so"))
}

/// ONNX Runtime, loaded.
pub(crate) fn environment() -> Environment {
    crate::onnx::load(&runtime()).unwrap()
}

/// A folder's plain files in a temporary one.
pub(crate) fn copy_of(folder: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

/// The first `seconds` of recorded speech, 48 kHz mono.
fn recording(name: &str, seconds: usize) -> Vec<i16> {
    let settings = cache().join("env");
    let text = std::fs::read_to_string(&settings)
        .unwrap_or_else(|error| panic!("{}: {error}: run `make setup`", settings.display()));
    let folder = text
        .lines()
        .find_map(|line| line.strip_prefix("AURALINK_SPEECH="))
        .expect("AURALINK_SPEECH is set: run `make setup`");
    let path = Path::new(folder).join(name).with_extension("wav");
    let bytes = std::fs::read(&path)
        .unwrap_or_else(|error| panic!("{}: {error}: run `make setup`", path.display()));
    let (head, samples) = bytes.split_at(44);
    assert_eq!(
        &head[20..26],
        [1, 0, 1, 0, 0x80, 0xbb],
        "16 bit, mono, 48 kHz"
    );
    let samples = samples
        .as_chunks::<2>()
        .0
        .iter()
        .map(|b| i16::from_le_bytes(*b));
    samples.take(48_000 * seconds).collect()
}

/// 48 kHz sound as a stock client sends it: fullband Opus, a packet each `ms`.
pub(crate) fn packets_of(pcm: &[i16], bitrate: u32, ms: usize) -> Vec<Vec<u8>> {
    let mut encoder = Encoder::new(Channels::Mono, SampleRate::Hz48000, Application::Voip).unwrap();
    encoder.set_bitrate(Bitrate::Value(bitrate)).unwrap();
    pcm.chunks_exact(48 * ms)
        .map(|chunk| {
            let chunk: Vec<f32> = chunk.iter().map(|s| f32::from(*s) / 32768.0).collect();
            let mut packet = vec![0; 1500];
            let length = encoder.encode_float_to_slice(&chunk, &mut packet).unwrap();
            packet.truncate(length);
            packet
        })
        .collect()
}

/// Real speech as a stock client sends it: Opus 48 kbps, a packet each `ms`.
pub(crate) fn client(name: &str, seconds: usize, ms: usize) -> Vec<Vec<u8>> {
    packets_of(&recording(name, seconds), 48_000, ms)
}

/// What packets sound like, 16 kHz.
pub(crate) fn heard<'a>(packets: impl IntoIterator<Item = &'a Vec<u8>>) -> Vec<f32> {
    let mut decoder = Decoder::new(Enhancement::None).unwrap();
    let mut pcm = Vec::new();
    for packet in packets {
        decoder.decode(packet, &mut pcm).unwrap();
    }
    pcm
}

/// Real speech at 16 kHz.
pub(crate) fn speech(name: &str, seconds: usize) -> Vec<f32> {
    heard(&packets_of(&recording(name, seconds), 256_000, 20))
}

/// Music that is none of a speech codec's business: chords of decaying harmonics with a beat, 48 kHz.
pub(crate) fn music(seconds: usize) -> Vec<i16> {
    let chords = [
        [220.0, 277.2, 329.6],
        [196.0, 246.9, 293.7],
        [174.6, 220.0, 261.6],
        [164.8, 207.7, 246.9],
    ];
    (0..48_000 * seconds)
        .map(|k| {
            let t = k as f64 / 48_000.0;
            let beat = t % 0.5;
            let chord = chords[(t / 2.0) as usize % 4];
            let tone: f64 = chord
                .iter()
                .flat_map(|f| {
                    (1..6).map(move |h| {
                        (std::f64::consts::TAU * f * f64::from(h) * t).sin() / f64::from(h)
                    })
                })
                .sum();
            (tone * (-3.0 * beat).exp() * 5000.0) as i16
        })
        .collect()
}

/// Root mean square in dBFS.
pub(crate) fn level(pcm: &[f32]) -> f32 {
    10.0 * (pcm.iter().map(|x| x * x).sum::<f32>() / pcm.len() as f32 + 1e-12).log10()
}

/// dB of `wanted` over what differs, at the delay up to 40 ms where they agree best.
pub(crate) fn signal_to_noise(wanted: &[f32], got: &[f32]) -> f32 {
    (0..SAMPLE_RATE / 25)
        .step_by(2)
        .map(|delay| {
            let pairs = wanted.iter().zip(got.iter().skip(delay));
            let (signal, noise) = pairs.fold((0.0f64, 1e-9f64), |(s, n), (a, b)| {
                (s + f64::from(a * a), n + f64::from((a - b).powi(2)))
            });
            (10.0 * (signal / noise).log10()) as f32
        })
        .fold(f32::MIN, f32::max)
}

/// Energy in dB of 16 bands up to 8 kHz in frames of 20 ms, by Goertzel at each band's middle.
fn bands(pcm: &[f32]) -> Vec<[f32; 16]> {
    pcm.chunks_exact(320)
        .map(|frame| {
            std::array::from_fn(|band| {
                let power: f32 = (0..5)
                    .map(|k| {
                        let f = (band as f32 * 500.0 + 50.0 + 100.0 * k as f32) / 16_000.0;
                        let c = 2.0 * (std::f32::consts::TAU * f).cos();
                        let (a, b) = frame
                            .iter()
                            .fold((0.0, 0.0), |(a, b), x| (x + c * a - b, a));
                        a * a + b * b - c * a * b
                    })
                    .sum();
                10.0 * (power / 320.0 + 1e-4).log10()
            })
        })
        .collect()
}

/// How alike two sounds are to the ear, roughly: the correlation of their band energies over time, 1 being equal, at the delay
/// up to 40 ms where it is best. It doesn't ask for equal waveforms, which a neural codec doesn't give.
pub(crate) fn likeness(wanted: &[f32], got: &[f32]) -> f32 {
    let wanted = bands(wanted);
    (0..SAMPLE_RATE / 25)
        .step_by(40)
        .map(|delay| {
            let got = bands(&got[delay.min(got.len())..]);
            let pairs: Vec<(f32, f32)> = wanted
                .iter()
                .flatten()
                .copied()
                .zip(got.iter().flatten().copied())
                .collect();
            let n = pairs.len() as f32;
            let (ma, mb) = pairs
                .iter()
                .fold((0.0, 0.0), |(a, b), p| (a + p.0 / n, b + p.1 / n));
            let (ab, aa, bb) = pairs
                .iter()
                .fold((0.0, 1e-9, 1e-9), |(ab, aa, bb), (a, b)| {
                    (
                        ab + (a - ma) * (b - mb),
                        aa + (a - ma).powi(2),
                        bb + (b - mb).powi(2),
                    )
                });
            ab / (aa * bb).sqrt()
        })
        .fold(f32::MIN, f32::max)
}
