//! `auralink models verify DIR`: is a bundle whole, does it run, how fast is it here.

use std::fmt;
use std::path::Path;
use std::time::{Duration, Instant};

use auralink_proto::ladder::{Frames, Rung};

use crate::bundle::{Bundle, BundleError, Kind};
use crate::codec::{Codec, DecodeTask, EncodeTask};
use crate::gate::{Detector, Memory, Silero, WINDOW, Window};
use crate::lyra::Lyra;
use crate::onnx;
use crate::source::tried_codec;

/// Seconds of sound that are timed.
const SECONDS: usize = 4;
/// Streams of the batch that is timed beside single ones.
const BATCH: usize = 8;

/// Why a bundle is no good.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Its files.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Its models, or ONNX Runtime.
    #[error("{0}")]
    Model(String),
}

/// How long one part of a bundle takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Timing {
    /// `encode`, `decode` or `detect`.
    pub part: &'static str,
    /// Streams at once.
    pub batch: usize,
    /// Milliseconds of one thread for a frame of one stream.
    pub ms: f64,
    /// That by the frame's duration: below 1 is faster than it is spoken.
    pub real_time_factor: f64,
}

/// What was found.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The bundle's name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// SPDX.
    pub licence: String,
    /// Of its manifest: what an audit log names it by.
    pub sha256: String,
    /// Name and length of every file; all agree with the manifest.
    pub files: Vec<(String, u64)>,
    /// Of a codec: what the rungs take of it, a line.
    pub rungs: Option<String>,
    /// How fast it is here.
    pub timings: Vec<Timing>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} {} ({}), manifest sha256 {}",
            self.name, self.version, self.licence, self.sha256
        )?;
        for (name, bytes) in &self.files {
            writeln!(f, "  {name}: {bytes} bytes, sha256 as in the manifest")?;
        }
        if let Some(rungs) = &self.rungs {
            writeln!(f, "  {rungs}")?;
        }
        for timing in &self.timings {
            writeln!(
                f,
                "  {} in batches of {}: {:.3} ms a frame, real-time factor {:.4}",
                timing.part, timing.batch, timing.ms, timing.real_time_factor
            )?;
        }
        Ok(())
    }
}

/// Checks the bundle in `folder` and times it with the ONNX Runtime in `runtime`, on this thread.
///
/// # Errors
/// What is wrong first: a file, the manifest, the runtime, a model.
pub fn verify(folder: &Path, runtime: &Path) -> Result<Report, VerifyError> {
    let bundle = Bundle::read(folder)?;
    let environment = onnx::load(runtime).map_err(VerifyError::Model)?;
    let (rate, frame) = (bundle.manifest.sample_rate, bundle.manifest.frame);
    let frames = SECONDS * rate / frame.max(1);
    let rungs = match &bundle.manifest.kind {
        Kind::Codec(codec) => Some(describe(codec.frames, rate, frame)),
        Kind::Vad { .. } => None,
    };
    let pcm = noise(frames * frame);
    let mut timings = Vec::new();
    let mut note = |part, batch, took: Duration| {
        let each = took.as_secs_f64() / (frames * batch) as f64;
        timings.push(Timing {
            part,
            batch,
            ms: each * 1e3,
            real_time_factor: each * rate as f64 / frame as f64,
        });
    };
    for batch in [1, BATCH] {
        if rungs.is_some() {
            let mut codec = Lyra::new(&environment, &bundle)
                .and_then(tried_codec)
                .map_err(VerifyError::Model)?;
            let (encode, decode) = time_codec(&mut codec, &pcm, batch)?;
            note("encode", batch, encode);
            note("decode", batch, decode);
        } else {
            let mut detector = Silero::new(&environment, &bundle).map_err(VerifyError::Model)?;
            note("detect", batch, time_detector(&mut detector, &pcm, batch)?);
        }
    }
    let manifest = bundle.manifest;
    Ok(Report {
        name: manifest.name,
        version: manifest.version,
        licence: manifest.licence,
        sha256: bundle.sha256,
        files: manifest
            .files
            .into_iter()
            .map(|(name, entry)| (name, entry.bytes))
            .collect(),
        rungs,
        timings,
    })
}

/// Frames and rates of a codec, as one reads them.
fn describe(frames: Frames, rate: usize, frame: usize) -> String {
    let ms = frame as f64 * 1e3 / rate as f64;
    let [l1, l2] = [Rung::L1, Rung::L2].map(|rung| {
        let bytes = frames.each(rung.codec()).unwrap_or(0);
        format!(
            "{rung} {bytes} bytes a frame, {:.1} kbit/s",
            bytes as f64 * 8.0 / ms
        )
    });
    format!("{rate} Hz, frames of {frame} samples ({ms:.1} ms); {l1}; {l2}")
}

fn time_codec(
    codec: &mut Lyra,
    pcm: &[f32],
    streams: usize,
) -> Result<(Duration, Duration), VerifyError> {
    let failed = |error: crate::codec::CodecError| VerifyError::Model(error.to_string());
    let mut encoders = (0..streams)
        .map(|_| codec.encoder())
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    let mut decoders = (0..streams)
        .map(|_| codec.decoder())
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    let (mut encode, mut decode) = (Duration::ZERO, Duration::ZERO);
    let each = codec.format().frame;
    for frame in pcm.chunks_exact(each) {
        let began = Instant::now();
        let mut batch: Vec<_> = encoders
            .iter_mut()
            .map(|s| EncodeTask::new(s, Rung::L2, frame))
            .collect();
        codec.encode(&mut batch);
        encode += began.elapsed();
        let mut payloads = Vec::with_capacity(streams);
        for task in batch {
            task.done.map_err(failed)?;
            payloads.push(task.payload);
        }
        let began = Instant::now();
        let mut batch: Vec<_> = decoders
            .iter_mut()
            .zip(&payloads)
            .map(|(s, payload)| DecodeTask::new(s, Rung::L2.codec(), Some(payload), each))
            .collect();
        codec.decode(&mut batch);
        decode += began.elapsed();
        for task in batch {
            task.done.map_err(failed)?;
        }
    }
    Ok((encode, decode))
}

fn time_detector(
    detector: &mut Silero,
    pcm: &[f32],
    streams: usize,
) -> Result<Duration, VerifyError> {
    let mut memories: Vec<Memory> = (0..streams).map(|_| Memory::default()).collect();
    let mut took = Duration::ZERO;
    for pcm in pcm.as_chunks::<WINDOW>().0 {
        let mut windows: Vec<_> = memories
            .iter_mut()
            .map(|memory| Window {
                memory,
                pcm,
                probability: None,
            })
            .collect();
        let began = Instant::now();
        detector.listen(&mut windows);
        took += began.elapsed();
        if windows.iter().any(|window| window.probability.is_none()) {
            return Err(VerifyError::Model(
                "the model gives no probability".to_owned(),
            ));
        }
    }
    Ok(took)
}

/// Something to work on: models take as long for it as for speech.
fn noise(samples: usize) -> Vec<f32> {
    let mut seed = 1u32;
    (0..samples)
        .map(|_| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((seed >> 8) as f32 / (1 << 23) as f32 - 1.0) * 0.1
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{copy_of, lyra_bundle, runtime, vad_bundle};

    #[test]
    fn both_bundles_run_faster_than_they_are_spoken() {
        for (folder, timings) in [(lyra_bundle(), 4), (vad_bundle(), 2)] {
            let report = verify(&folder, &runtime()).unwrap();
            assert_eq!(report.timings.len(), timings);
            for timing in &report.timings {
                assert!(
                    timing.real_time_factor < 0.5 && timing.real_time_factor > 0.0,
                    "{report}"
                );
            }
            assert!(report.to_string().contains("real-time factor"), "{report}");
            let rungs = "16000 Hz, frames of 320 samples (20.0 ms); L1 8 bytes a frame, 3.2 kbit/s; L2 15 bytes a frame, 6.0 kbit/s";
            let codec = timings == 4;
            assert_eq!(report.rungs.as_deref(), codec.then_some(rungs));
        }
    }

    #[test]
    fn a_model_that_onnx_runtime_does_not_take_is_named() {
        use sha2::{Digest, Sha256};
        let folder = copy_of(&vad_bundle());
        // Whole as far as the manifest knows, but no model.
        let text = std::fs::read_to_string(folder.path().join("manifest.yaml")).unwrap();
        let old = std::fs::read(folder.path().join("vad.onnx")).unwrap();
        let cut = &old[..old.len() / 2];
        let digest = |bytes: &[u8]| {
            Sha256::digest(bytes)
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect::<String>()
        };
        let text = text.replace(&digest(&old), &digest(cut)).replace(
            &format!("bytes: {}", old.len()),
            &format!("bytes: {}", cut.len()),
        );
        std::fs::write(folder.path().join("manifest.yaml"), text).unwrap();
        std::fs::write(folder.path().join("vad.onnx"), cut).unwrap();
        let error = verify(folder.path(), &runtime()).unwrap_err();
        assert!(
            matches!(&error, VerifyError::Model(text) if text.starts_with("vad.onnx: ")),
            "{error}"
        );
    }
}
