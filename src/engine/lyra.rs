//! Lyra v2 on ONNX Runtime: one pair of sessions serves every stream of a thread; frames of all streams run as one batch.

use auralink_proto::ladder::{CodecId, Rung};
use ort::environment::Environment;

use crate::bundle::{Bundle, Kind};
use crate::codec::{Codec, CodecError, DecodeTask, EncodeTask, FRAME, SAMPLE_RATE};
use crate::onnx::{Row, StatefulGraph};
use crate::quantizer::Quantizer;

/// Frames after which concealed speech has faded to silence: longer than a gap in a word, shorter than what sounds like a drone.
const FADE_FRAMES: u16 = 6;
/// Samples in which it comes back after a loss: 5 ms.
const RETURN: usize = SAMPLE_RATE / 200;

/// Quantizer stages of each of the two rates; the few are a prefix of the many.
#[must_use]
pub const fn stages(codec: CodecId) -> Option<usize> {
    match codec {
        CodecId::Lyra3 => Some(16),
        CodecId::Lyra6 => Some(30),
        _ => None,
    }
}

/// A sender's state of a stream.
#[derive(Debug, Clone)]
pub struct LyraEncoder {
    state: Vec<f32>,
}

/// A receiver's state of a stream.
#[derive(Debug, Clone)]
pub struct LyraDecoder {
    state: Vec<f32>,
    /// Frames concealed in a row.
    concealed: u16,
    /// What the last sample was multiplied with.
    level: f32,
}

impl LyraEncoder {
    /// Begins anew.
    pub fn reset(&mut self) {
        self.state.fill(0.0);
    }
}

impl LyraDecoder {
    /// Begins anew.
    pub fn reset(&mut self) {
        self.state.fill(0.0);
        self.concealed = 0;
        self.level = 1.0;
    }
}

/// A codec of 16 kHz and 20 ms frames whose features a residual quantizer codes: Lyra v2, or another one with the same bundle format.
#[derive(Debug)]
pub struct Lyra {
    encoder: StatefulGraph,
    decoder: StatefulGraph,
    quantizer: Quantizer,
}

impl Lyra {
    /// Builds the sessions of a thread.
    ///
    /// # Errors
    /// In words: what of the bundle this engine can't run.
    pub fn new(environment: &Environment, bundle: &Bundle) -> Result<Self, String> {
        let manifest = &bundle.manifest;
        let Kind::Codec {
            encoder,
            decoder,
            quantizer: books,
        } = &manifest.kind
        else {
            return Err(format!("{} is no codec", manifest.name));
        };
        if (manifest.sample_rate, manifest.frame) != (SAMPLE_RATE, FRAME) {
            return Err(format!(
                "{} has frames of {} samples at {} Hz; this engine runs codecs with {FRAME} at {SAMPLE_RATE} Hz",
                manifest.name, manifest.frame, manifest.sample_rate
            ));
        }
        if books.kind != "residual" || books.entries != 16 || books.stages < 30 {
            return Err(format!(
                "{}: the quantizer has to be residual, with 16 entries a stage and at least 30 stages",
                manifest.name
            ));
        }
        let quantizer = Quantizer::new(bundle.file(&books.file), books.stages, books.dimension)?;
        let graph =
            |graph| StatefulGraph::new(environment, graph, bundle.file(&graph.file), SAMPLE_RATE);
        let (encoder, decoder) = (graph(encoder)?, graph(decoder)?);
        let features = quantizer.dimension();
        if (encoder.input_size(), encoder.output_size()) != (FRAME, features)
            || (decoder.input_size(), decoder.output_size()) != (features, FRAME)
        {
            return Err(format!(
                "{}: encoder and decoder have to go from {FRAME} samples to {features} features and back",
                manifest.name
            ));
        }
        Ok(Self {
            encoder,
            decoder,
            quantizer,
        })
    }
}

impl Codec for Lyra {
    type Encoder = LyraEncoder;
    type Decoder = LyraDecoder;

    fn encoder(&self) -> Result<LyraEncoder, CodecError> {
        Ok(LyraEncoder {
            state: vec![0.0; self.encoder.state_size()],
        })
    }

    fn decoder(&self) -> Result<LyraDecoder, CodecError> {
        Ok(LyraDecoder {
            state: vec![0.0; self.decoder.state_size()],
            concealed: 0,
            level: 1.0,
        })
    }

    fn encode(&mut self, batch: &mut [EncodeTask<'_, LyraEncoder>]) {
        let dimension = self.quantizer.dimension();
        let mut steps = 0;
        for task in batch.iter_mut() {
            task.payload.clear();
            task.done = if stages(task.rung.codec()).is_none() {
                Err(CodecError::Input("not a rung of this codec"))
            } else if task.pcm.is_empty() || !task.pcm.len().is_multiple_of(FRAME) {
                Err(CodecError::Input("not whole frames of 20 ms"))
            } else {
                steps = steps.max(task.pcm.len() / FRAME);
                Ok(())
            };
        }
        let mut features = vec![0.0; dimension * batch.len()];
        for step in 0..steps {
            let mut rows = Vec::with_capacity(batch.len());
            let mut coded = Vec::with_capacity(batch.len());
            for (task, output) in batch.iter_mut().zip(features.chunks_exact_mut(dimension)) {
                if task.done.is_ok()
                    && let Some(input) = task.pcm.chunks_exact(FRAME).nth(step)
                {
                    rows.push(Row {
                        input,
                        state: &mut task.state.state,
                        output,
                        done: Ok(()),
                    });
                    coded.push((task.rung, &mut task.payload, &mut task.done));
                }
            }
            self.encoder.run(&mut rows);
            for (row, (rung, payload, done)) in rows.into_iter().zip(coded) {
                match (row.done, stages(rung.codec())) {
                    (Ok(()), Some(stages)) => self.quantizer.encode(row.output, stages, payload),
                    (Err(error), _) => {
                        payload.clear();
                        *done = Err(error);
                    }
                    (Ok(()), None) => {}
                }
            }
        }
    }

    fn decode(&mut self, batch: &mut [DecodeTask<'_, LyraDecoder>]) {
        let dimension = self.quantizer.dimension();
        let mut steps = 0;
        for task in batch.iter_mut() {
            task.done = check(task);
            if task.done.is_ok() {
                task.pcm.resize(task.samples, 0.0);
                steps = steps.max(task.samples / FRAME);
            }
        }
        let mut features = vec![0.0; dimension * batch.len()];
        for step in 0..steps {
            let mut rows = Vec::with_capacity(batch.len());
            let mut ends = Vec::with_capacity(batch.len());
            for (task, features) in batch.iter_mut().zip(features.chunks_exact_mut(dimension)) {
                if task.done.is_err() {
                    continue;
                }
                let Some(output) = task.pcm.chunks_exact_mut(FRAME).nth(step) else {
                    continue;
                };
                // Zero features conceal better than the last ones repeated.
                features.fill(0.0);
                let stages = stages(task.codec).unwrap_or(0);
                let code = task
                    .payload
                    .and_then(|p| p.chunks_exact(stages.div_ceil(2)).nth(step));
                if let Some(code) = code {
                    task.done = self.quantizer.decode(code, stages, features);
                }
                let LyraDecoder {
                    state,
                    concealed,
                    level,
                } = &mut *task.state;
                rows.push(Row {
                    input: features,
                    state,
                    output,
                    done: Ok(()),
                });
                ends.push((concealed, level, code.is_some(), &mut task.done));
            }
            self.decoder.run(&mut rows);
            for (row, (concealed, level, came, done)) in rows.into_iter().zip(ends) {
                *concealed = if came { 0 } else { concealed.saturating_add(1) };
                fade(row.output, *concealed, level);
                if let Err(error) = row.done {
                    *done = Err(error);
                }
            }
        }
        for task in batch {
            if task.done.is_err() {
                task.pcm.clear();
                task.state.reset();
            }
        }
    }
}

fn check(task: &DecodeTask<'_, LyraDecoder>) -> Result<(), CodecError> {
    let frames = task.samples / FRAME;
    if task.samples == 0 || !task.samples.is_multiple_of(FRAME) {
        return Err(CodecError::Input("not whole frames of 20 ms"));
    }
    let Some(payload) = task.payload else {
        return Ok(());
    };
    let Some(stages) = stages(task.codec) else {
        return Err(CodecError::Input("another codec's"));
    };
    if payload.len() == frames * stages.div_ceil(2) {
        Ok(())
    } else {
        Err(CodecError::Input("another duration than said"))
    }
}

/// Takes concealed speech down over [`FADE_FRAMES`] frames and what comes after it up again in 5 ms. `level` is what the last
/// sample was multiplied with.
fn fade(pcm: &mut [f32], concealed: u16, level: &mut f32) {
    let target = 1.0 - f32::from(concealed.min(FADE_FRAMES)) / f32::from(FADE_FRAMES);
    let length = if concealed == 0 { RETURN } else { FRAME };
    let start = *level;
    for (k, sample) in pcm.iter_mut().enumerate() {
        let part = ((k + 1) as f32 / length as f32).min(1.0);
        *sample = (*sample * (start + (target - start) * part)).clamp(-1.0, 1.0);
    }
    *level = target;
}

/// What a rung of this codec costs.
#[must_use]
pub fn frame_bytes(rung: Rung) -> Option<usize> {
    stages(rung.codec()).map(|stages| stages.div_ceil(2))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{environment, level, likeness, lyra_bundle, speech};

    fn lyra() -> Lyra {
        Lyra::new(&environment(), &Bundle::read(&lyra_bundle()).unwrap()).unwrap()
    }

    fn encode(codec: &mut Lyra, rung: Rung, frames: usize, pcm: &[f32]) -> Vec<Vec<u8>> {
        let mut state = codec.encoder().unwrap();
        pcm.chunks_exact(FRAME * frames)
            .map(|group| {
                let mut batch = [EncodeTask::new(&mut state, rung, group)];
                codec.encode(&mut batch);
                let [task] = batch;
                task.done.unwrap();
                task.payload
            })
            .collect()
    }

    /// Decodes; an empty payload is one that was lost.
    fn decode(codec: &mut Lyra, id: CodecId, frames: usize, payloads: &[Vec<u8>]) -> Vec<f32> {
        let mut state = codec.decoder().unwrap();
        let mut pcm = Vec::new();
        for payload in payloads {
            let payload = (!payload.is_empty()).then_some(payload.as_slice());
            let mut batch = [DecodeTask::new(&mut state, id, payload, FRAME * frames)];
            codec.decode(&mut batch);
            let [task] = batch;
            task.done.unwrap();
            pcm.extend(task.pcm);
        }
        pcm
    }

    #[test]
    fn speech_comes_out_as_it_went_in() {
        let mut codec = lyra();
        let pcm = speech("talker-a", 15);
        let mut found = Vec::new();
        for (rung, id, bytes) in [
            (Rung::L1, CodecId::Lyra3, 8),
            (Rung::L2, CodecId::Lyra6, 15),
        ] {
            let payloads = encode(&mut codec, rung, 2, &pcm);
            assert!(payloads.iter().all(|p| p.len() == 2 * bytes));
            found.push(likeness(&pcm, &decode(&mut codec, id, 2, &payloads)));
        }
        assert!(found[0] > 0.9 && found[1] > found[0], "L1, L2: {found:?}");
        let other = speech("talker-b", 15);
        let unlike = likeness(&pcm, &other);
        assert!(unlike < 0.6, "somebody else's speech is unlike: {unlike}");
    }

    #[test]
    fn a_batch_is_as_one_by_one() {
        let mut codec = lyra();
        let pcm = speech("talker-a", 4);
        let parts: Vec<&[f32]> = pcm.chunks_exact(pcm.len() / 5).collect();
        let single: Vec<Vec<Vec<u8>>> = parts
            .iter()
            .enumerate()
            .map(|(k, part)| encode(&mut codec, [Rung::L1, Rung::L2][k % 2], 1, part))
            .collect();
        let mut states: Vec<_> = parts.iter().map(|_| codec.encoder().unwrap()).collect();
        let (mut same, mut all) = (0, 0);
        for step in 0..single[0].len() {
            let mut batch: Vec<_> = states
                .iter_mut()
                .zip(&parts)
                .enumerate()
                .map(|(k, (state, part))| {
                    let frame = &part[step * FRAME..(step + 1) * FRAME];
                    EncodeTask::new(state, [Rung::L1, Rung::L2][k % 2], frame)
                })
                .collect();
            codec.encode(&mut batch);
            for (task, single) in batch.iter().zip(&single) {
                assert_eq!(task.done, Ok(()));
                assert_eq!(task.payload.len(), single[step].len());
                all += task.payload.len();
                same += task
                    .payload
                    .iter()
                    .zip(&single[step])
                    .filter(|(a, b)| a == b)
                    .count();
            }
        }
        // Rounding differs with the size of a batch, and a residual quantizer carries a difference on.
        assert!(same * 100 > all * 97, "{same} of {all} bytes");
    }

    #[test]
    fn the_low_rate_is_a_prefix_of_the_high() {
        let mut codec = lyra();
        let pcm = speech("talker-b", 3);
        let low = encode(&mut codec, Rung::L1, 1, &pcm);
        let high = encode(&mut codec, Rung::L2, 1, &pcm);
        assert!(low.iter().zip(&high).all(|(l, h)| h.starts_with(l)));
    }

    #[test]
    fn a_loss_fades_and_comes_back() {
        let mut codec = lyra();
        let pcm = speech("talker-a", 8);
        let mut payloads = encode(&mut codec, Rung::L2, 1, &pcm);
        let whole = decode(&mut codec, CodecId::Lyra6, 1, &payloads);
        let (from, to) = (200, 230);
        payloads[from..to].fill(Vec::new());
        let holed = decode(&mut codec, CodecId::Lyra6, 1, &payloads);
        let frames = |pcm: &[f32], a: usize, b: usize| level(&pcm[a * FRAME..b * FRAME]);
        assert_eq!(whole[..from * FRAME], holed[..from * FRAME]);
        assert!(frames(&holed, from + 7, to) < -100.0, "silent after 120 ms");
        let back = likeness(&whole[(to + 5) * FRAME..], &holed[(to + 5) * FRAME..]);
        assert!(back > 0.95, "as before 100 ms after the loss: {back}");
        let seam = &holed[(to - 1) * FRAME..(to + 1) * FRAME];
        let step = seam
            .windows(2)
            .map(|w| (w[1] - w[0]).abs())
            .fold(0.0, f32::max);
        let usual = whole
            .windows(2)
            .map(|w| (w[1] - w[0]).abs())
            .fold(0.0, f32::max);
        assert!(step <= usual, "no click: {step} beside {usual}");
    }

    #[test]
    fn what_is_not_its_own_is_refused_and_the_rest_of_the_batch_done() {
        let mut codec = lyra();
        let mut states: Vec<_> = (0..4).map(|_| codec.decoder().unwrap()).collect();
        let cases: [(CodecId, Option<&[u8]>, bool); 4] = [
            (CodecId::Lyra6, Some(&[1; 15]), true),
            (CodecId::Lyra6, Some(&[1; 14]), false),
            (CodecId::Opus, Some(&[1; 15]), false),
            (CodecId::Lyra3, None, true),
        ];
        let mut batch: Vec<_> = states
            .iter_mut()
            .zip(cases)
            .map(|(state, (id, payload, _))| DecodeTask::new(state, id, payload, FRAME))
            .collect();
        codec.decode(&mut batch);
        for (task, (.., good)) in batch.iter().zip(cases) {
            assert_eq!(task.done.is_ok(), good, "{:?}", task.payload);
            assert_eq!(task.pcm.len(), if good { FRAME } else { 0 });
        }
    }

    #[test]
    fn a_result_that_is_no_number_fails_once_and_poisons_nothing() {
        let mut codec = lyra();
        let pcm = speech("talker-a", 2);
        let (mut sick, mut well) = (codec.encoder().unwrap(), codec.encoder().unwrap());
        let broken = [f32::NAN; FRAME];
        let mut batch = [
            EncodeTask::new(&mut sick, Rung::L2, &broken),
            EncodeTask::new(&mut well, Rung::L2, &pcm[..FRAME]),
        ];
        codec.encode(&mut batch);
        let [first, second] = batch;
        assert!(matches!(first.done, Err(CodecError::Failed(_))) && first.payload.is_empty());
        assert_eq!((second.done, second.payload.len()), (Ok(()), 15));
        // From the beginning again, as a new stream.
        let mut fresh = codec.encoder().unwrap();
        let frame = &pcm[20 * FRAME..21 * FRAME];
        let mut batch = [
            EncodeTask::new(&mut sick, Rung::L2, frame),
            EncodeTask::new(&mut fresh, Rung::L2, frame),
        ];
        codec.encode(&mut batch);
        assert_eq!(batch[0].done, Ok(()));
        assert_eq!(batch[0].payload, batch[1].payload);
    }
}
