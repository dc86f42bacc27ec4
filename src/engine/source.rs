//! Where models come from: bundles in folders and ONNX Runtime, looked at again when asked to.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::bundle::Bundle;
use crate::codec::{Codec, CodecError, DecodeTask, EncodeTask};
use crate::desk::Kit;
use crate::engine::EngineConfig;
use crate::gate::{Detector, Gate, Silero, WINDOW, Window};
use crate::lyra::{Lyra, LyraDecoder, LyraEncoder};
use crate::onnx;
use auralink_proto::ladder::Rung;

/// What files look like from outside: enough to notice a change.
pub(crate) type Stamp = Vec<(PathBuf, Option<(u64, SystemTime)>)>;

/// What makes the models of a thread.
pub(crate) trait Source: Send {
    /// Cheap; differs from the last where [`Source::load`] would give something else.
    fn stamp(&self) -> Stamp;
    /// Reads everything anew; says what is wrong, a line each.
    fn load(&mut self) -> Vec<String>;
    /// Name and sha256 of what is loaded.
    fn bundles(&self) -> Vec<(String, String)>;
    /// The sha256 of the codec's bundle, if it is loaded.
    fn codec(&self) -> Option<String>;
    /// Models for one thread, tried out; adds to `problems` what can't be had.
    fn kit(&mut self, problems: &mut Vec<String>) -> Kit;
}

/// The folders of the configuration.
#[derive(Debug)]
pub(crate) struct Folders {
    runtime: Option<PathBuf>,
    lyra: (Option<PathBuf>, Option<Bundle>),
    vad: (Option<PathBuf>, Option<Bundle>),
}

impl Folders {
    pub(crate) fn new(config: &EngineConfig) -> Self {
        Self {
            runtime: config.runtime.clone(),
            lyra: (config.lyra.clone(), None),
            vad: (config.vad.clone(), None),
        }
    }
}

impl Source for Folders {
    fn stamp(&self) -> Stamp {
        let mut stamp = Stamp::new();
        stamp.extend(self.runtime.as_deref().map(look));
        for folder in [&self.lyra.0, &self.vad.0].into_iter().flatten() {
            stamp.push(look(folder));
            let Ok(entries) = std::fs::read_dir(folder) else {
                continue;
            };
            // A bundle is a handful of files; a folder that isn't one shouldn't cost more.
            stamp.extend(entries.flatten().take(64).map(|entry| look(&entry.path())));
        }
        stamp.sort();
        stamp
    }

    fn load(&mut self) -> Vec<String> {
        let mut problems = Vec::new();
        if self.runtime.is_none() {
            problems.push("no ONNX Runtime is configured: L1 and L2 are out; run `make models` and name libonnxruntime.so".to_owned());
        }
        for (what, (folder, bundle)) in [
            (
                "bundle of a codec is configured: L1 and L2 are out",
                &mut self.lyra,
            ),
            (
                "voice detector is configured: nothing is coded below L4",
                &mut self.vad,
            ),
        ] {
            *bundle = None;
            match folder.as_deref().map(Bundle::read) {
                None => problems.push(format!("no {what}; run `make models` and name its folder")),
                Some(Ok(read)) => *bundle = Some(read),
                Some(Err(error)) => problems.push(error.to_string()),
            }
        }
        problems
    }

    fn bundles(&self) -> Vec<(String, String)> {
        [&self.lyra.1, &self.vad.1]
            .into_iter()
            .flatten()
            .map(|bundle| (bundle.manifest.name.clone(), bundle.sha256.clone()))
            .collect()
    }

    fn codec(&self) -> Option<String> {
        self.lyra.1.as_ref().map(|bundle| bundle.sha256.clone())
    }

    fn kit(&mut self, problems: &mut Vec<String>) -> Kit {
        let mut kit = Kit::default();
        let Some(runtime) = &self.runtime else {
            return kit;
        };
        if self.lyra.1.is_none() && self.vad.1.is_none() {
            return kit;
        }
        let environment = match onnx::load(runtime) {
            Ok(environment) => environment,
            Err(error) => {
                problems.push(error);
                return kit;
            }
        };
        if let Some(bundle) = &self.lyra.1 {
            match Lyra::new(&environment, bundle).and_then(tried_codec) {
                Ok(lyra) => kit.neural = Some(Box::new(lyra)),
                Err(error) => problems.push(format!(
                    "the {} bundle can't be used: {error}",
                    bundle.manifest.name
                )),
            }
        }
        if let Some(bundle) = &self.vad.1 {
            match Silero::new(&environment, bundle).and_then(tried_detector) {
                Ok(silero) => kit.detector = Some(Box::new(silero)),
                Err(error) => problems.push(format!(
                    "the {} bundle can't be used: {error}",
                    bundle.manifest.name
                )),
            }
        }
        kit
    }
}

fn look(path: &Path) -> (PathBuf, Option<(u64, SystemTime)>) {
    let seen = std::fs::metadata(path)
        .ok()
        .and_then(|m| Some((m.len(), m.modified().ok()?)));
    (path.to_owned(), seen)
}

/// Runs it on both rungs, alone and in a batch, with what came and what didn't: the first run is the slowest, and a model that fails
/// or has other sizes than its manifest says should be known before a call meets it.
pub(crate) fn tried_codec<C>(mut codec: C) -> Result<C, String>
where
    C: Codec<Encoder = LyraEncoder, Decoder = LyraDecoder>,
{
    let format = codec.format();
    // As many frames as a packet of 40 ms has.
    let samples = (format.samples(40) / format.frame).max(1) * format.frame;
    let silence = vec![0.0; samples];
    let mut run = |streams: usize, rung: Rung| {
        let states = |_| Ok((codec.encoder()?, codec.decoder()?));
        let states: Result<Vec<_>, CodecError> = (0..streams).map(states).collect();
        let (mut encoders, mut decoders): (Vec<_>, Vec<_>) = states?.into_iter().unzip();
        let mut batch: Vec<_> = encoders
            .iter_mut()
            .map(|state| EncodeTask::new(state, rung, &silence))
            .collect();
        codec.encode(&mut batch);
        let mut payloads = Vec::with_capacity(streams);
        for task in batch {
            task.done?;
            payloads.push(task.payload);
        }
        for lost in [false, true] {
            let mut batch: Vec<_> = decoders
                .iter_mut()
                .zip(&payloads)
                .map(|(state, payload)| {
                    let payload = (!lost).then_some(payload.as_slice());
                    DecodeTask::new(state, rung.codec(), payload, samples)
                })
                .collect();
            codec.decode(&mut batch);
            batch.into_iter().try_for_each(|task| task.done)?;
        }
        Ok(())
    };
    for (streams, rung) in [(1, Rung::L2), (2, Rung::L2), (1, Rung::L1)] {
        run(streams, rung).map_err(|error: CodecError| {
            format!("a trial of {streams} streams on {rung} failed: {error}")
        })?;
    }
    Ok(codec)
}

fn tried_detector<D: Detector>(mut detector: D) -> Result<D, String> {
    let mut gate = Gate::default();
    let mut windows = [Window {
        memory: &mut gate.memory,
        pcm: &[0.0; WINDOW],
        probability: None,
    }];
    detector.listen(&mut windows);
    let [window] = windows;
    window
        .probability
        .map(|_| detector)
        .ok_or_else(|| "the model gives no probability".to_owned())
}
