//! The codec of a bundle on ONNX Runtime, Lyra v2 or another: one pair of sessions serves every stream of a thread; frames of all
//! streams run as one batch.

use auralink_proto::ladder::CodecId;
use ort::environment::Environment;

use crate::bits::{self, Writer};
use crate::bundle::{self, Bundle, Code, Kind, Stages};
use crate::codec::{Codec, CodecError, DecodeTask, EncodeTask, Format};
use crate::onnx::{Row, StatefulGraph};
use crate::quantizer::Quantizer;

/// Concealed speech has faded to silence after so many milliseconds: longer than a gap in a word, shorter than what sounds like a drone.
const FADE_MS: usize = 120;
/// Milliseconds in which it comes back after a loss.
const RETURN_MS: usize = 5;
/// A code of a stage that isn't there: what a decoder's graph is given where less came than it can take.
const NO_CODE: f32 = -1.0;

/// A sender's state of a stream.
#[derive(Debug, Clone)]
pub struct LyraEncoder {
    state: Vec<f32>,
}

/// A receiver's state of a stream.
#[derive(Debug, Clone)]
pub struct LyraDecoder {
    state: Vec<f32>,
    /// Samples concealed in a row.
    concealed: usize,
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

/// What stands between the graphs.
#[derive(Debug)]
enum Between {
    /// The graphs give and take features.
    Quantizer(Quantizer),
    /// The graphs give and take codes, so many below `entries`.
    Codes { stages: usize, entries: usize },
}

/// The codec of a bundle: frames go through the encoder's graph, become codes, and codes come back through the decoder's.
#[derive(Debug)]
pub struct Lyra {
    encoder: StatefulGraph,
    decoder: StatefulGraph,
    between: Between,
    bits: u32,
    rungs: Stages,
    format: Format,
}

impl Lyra {
    /// Builds the sessions of a thread.
    ///
    /// # Errors
    /// In words: what of the bundle this engine can't run.
    pub fn new(environment: &Environment, bundle: &Bundle) -> Result<Self, String> {
        let manifest = &bundle.manifest;
        let Kind::Codec(codec) = &manifest.kind else {
            return Err(format!("{} is no codec", manifest.name));
        };
        let between = match &codec.code {
            Code::Quantizer(books) => {
                let bytes = bundle.file(&books.file);
                Quantizer::new(bytes, books.stages, books.entries, books.dimension)
                    .map(Between::Quantizer)
                    .map_err(|error| format!("{}: {error}", books.file))?
            }
            Code::Codes(codes) => Between::Codes {
                stages: codes.stages,
                entries: codes.entries,
            },
        };
        let (rate, frame) = (manifest.sample_rate, manifest.frame);
        let graph = |part, graph: &bundle::Graph| {
            StatefulGraph::new(environment, part, graph, bundle.file(&graph.file), rate)
        };
        let (encoder, decoder) = (
            graph("encoder", &codec.encoder)?,
            graph("decoder", &codec.decoder)?,
        );
        let (what, width) = match &between {
            Between::Quantizer(quantizer) => ("quantizer.dimension", quantizer.dimension()),
            Between::Codes { stages, .. } => ("codes.stages", *stages),
        };
        for (key, size, what, wanted) in [
            ("encoder.input", encoder.input_size(), "frame", frame),
            ("encoder.output", encoder.output_size(), what, width),
            ("decoder.input", decoder.input_size(), what, width),
            ("decoder.output", decoder.output_size(), "frame", frame),
        ] {
            if size != wanted {
                return Err(format!(
                    "{key}.shape has {size} numbers a stream, {what} says {wanted}: they have to agree"
                ));
            }
        }
        Ok(Self {
            encoder,
            decoder,
            between,
            bits: bundle::bits(codec.code.sizes().1),
            rungs: codec.rungs,
            format: Format {
                sample_rate: rate,
                frame,
                delay: codec.delay,
                wire: codec.frames,
            },
        })
    }

    /// How many stages a rung sends.
    const fn stages(&self, codec: CodecId) -> Option<usize> {
        match codec {
            CodecId::Lyra3 => Some(self.rungs.l1),
            CodecId::Lyra6 => Some(self.rungs.l2),
            _ => None,
        }
    }

    fn check(&self, task: &DecodeTask<'_, LyraDecoder>) -> Result<(), CodecError> {
        if task.samples == 0 || task.samples > self.format.samples(120) {
            return Err(CodecError::Input("no duration that is carried"));
        }
        let Some(payload) = task.payload else {
            return Ok(());
        };
        if !task.samples.is_multiple_of(self.format.frame) {
            return Err(CodecError::Input("not whole frames"));
        }
        let frames = task.samples / self.format.frame;
        let Some(stages) = self.stages(task.codec) else {
            return Err(CodecError::Input("another codec's"));
        };
        if payload.len() == frames * bits::bytes(stages, self.bits) {
            Ok(())
        } else {
            Err(CodecError::Input("another duration than said"))
        }
    }

    /// Takes concealed speech down over [`FADE_MS`] and what comes after it up again in [`RETURN_MS`]. `concealed` are the samples
    /// in a row, these included; `level` is what the last sample was multiplied with.
    fn fade(&self, pcm: &mut [f32], concealed: usize, level: &mut f32) {
        let whole = self.format.samples(FADE_MS);
        let target = 1.0 - concealed.min(whole) as f32 / whole as f32;
        let length = if concealed == 0 {
            self.format.samples(RETURN_MS)
        } else {
            self.format.frame
        };
        let start = *level;
        let mut end = target;
        for (k, sample) in pcm.iter_mut().enumerate() {
            let part = ((k + 1) as f32 / length as f32).min(1.0);
            end = start + (target - start) * part;
            *sample = (*sample * end).clamp(-1.0, 1.0);
        }
        *level = if pcm.len() < length { end } else { target };
    }
}

impl Between {
    /// Appends the bytes of the first `stages` stages of what the encoder gave.
    fn pack(
        &self,
        given: &[f32],
        stages: usize,
        bits: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), CodecError> {
        let entries = match self {
            Self::Quantizer(quantizer) => {
                quantizer.encode(given, stages, out);
                return Ok(());
            }
            Self::Codes { entries, .. } => *entries,
        };
        let mut writer = Writer::new(out, bits);
        for code in given.iter().take(stages) {
            if !(0.0..entries as f32).contains(code) {
                return Err(CodecError::Failed(format!(
                    "the encoder gave a code of {code}; 0 to {} are codes.entries",
                    entries - 1
                )));
            }
            writer.put(*code as u16);
        }
        writer.end();
        Ok(())
    }

    /// What the decoder takes for a frame's bytes, or for none.
    fn unpack(
        &self,
        code: Option<&[u8]>,
        stages: usize,
        bits: u32,
        taken: &mut [f32],
    ) -> Result<(), CodecError> {
        match (self, code) {
            // Zero features conceal better than the last ones repeated.
            (Self::Quantizer(_), None) => taken.fill(0.0),
            (Self::Quantizer(quantizer), Some(code)) => {
                return quantizer.decode(code, stages, taken);
            }
            (Self::Codes { .. }, None) => taken.fill(NO_CODE),
            (Self::Codes { entries, .. }, Some(code)) => {
                taken.fill(NO_CODE);
                for (place, code) in taken.iter_mut().zip(bits::read(code, bits).take(stages)) {
                    if usize::from(code) >= *entries {
                        taken.fill(NO_CODE);
                        return Err(CodecError::Input("a code beyond the codebook"));
                    }
                    *place = f32::from(code);
                }
            }
        }
        Ok(())
    }
}

impl Codec for Lyra {
    type Encoder = LyraEncoder;
    type Decoder = LyraDecoder;

    fn format(&self) -> Format {
        self.format
    }

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
        let (frame, width) = (self.format.frame, self.encoder.output_size());
        let mut steps = 0;
        for task in batch.iter_mut() {
            task.payload.clear();
            task.done = if self.stages(task.rung.codec()).is_none() {
                Err(CodecError::Input("not a rung of this codec"))
            } else if task.pcm.is_empty() || !task.pcm.len().is_multiple_of(frame) {
                Err(CodecError::Input("not whole frames"))
            } else {
                steps = steps.max(task.pcm.len() / frame);
                Ok(())
            };
        }
        let mut given = Vec::new();
        let mut from = 0;
        while from < steps {
            // As many frames at once as every stream that isn't done has left.
            let left = batch.iter().filter(|task| task.done.is_ok());
            let left = left.map(|task| (task.pcm.len() / frame).saturating_sub(from));
            let count = left.filter(|left| *left > 0).min().unwrap_or(1);
            let count = count.min(self.encoder.steps());
            given.resize(width * count * batch.len(), 0.0);
            let mut rows = Vec::with_capacity(batch.len());
            let mut coded = Vec::with_capacity(batch.len());
            for (task, output) in batch.iter_mut().zip(given.chunks_exact_mut(width * count)) {
                if task.done.is_ok()
                    && let Some(input) = task.pcm.get(from * frame..(from + count) * frame)
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
                let Some(stages) = self.stages(rung.codec()) else {
                    continue;
                };
                let mut frames = row.output.chunks_exact(width);
                let packed = row.done.and_then(|()| {
                    frames
                        .try_for_each(|frame| self.between.pack(frame, stages, self.bits, payload))
                });
                if let Err(error) = packed {
                    payload.clear();
                    row.state.fill(0.0);
                    *done = Err(error);
                }
            }
            from += count;
        }
    }

    fn decode(&mut self, batch: &mut [DecodeTask<'_, LyraDecoder>]) {
        let (frame, width) = (self.format.frame, self.decoder.input_size());
        let mut steps = 0;
        for task in batch.iter_mut() {
            task.done = self.check(task);
            if task.done.is_ok() {
                // What is concealed may end within a frame: the rest of that is cut off at the end.
                let frames = task.samples.div_ceil(frame);
                task.pcm.resize(frames * frame, 0.0);
                steps = steps.max(frames);
            }
        }
        let mut taken = Vec::new();
        let mut from = 0;
        while from < steps {
            let left = batch.iter().filter(|task| task.done.is_ok());
            let left = left.map(|task| (task.pcm.len() / frame).saturating_sub(from));
            let count = left.filter(|left| *left > 0).min().unwrap_or(1);
            let count = count.min(self.decoder.steps());
            taken.resize(width * count * batch.len(), 0.0);
            let mut rows = Vec::with_capacity(batch.len());
            let mut ends = Vec::with_capacity(batch.len());
            for (task, taken) in batch.iter_mut().zip(taken.chunks_exact_mut(width * count)) {
                if task.done.is_err() {
                    continue;
                }
                let Some(output) = task.pcm.get_mut(from * frame..(from + count) * frame) else {
                    continue;
                };
                let stages = self.stages(task.codec).unwrap_or(0);
                let each = bits::bytes(stages, self.bits).max(1);
                for (step, taken) in (from..).zip(taken.chunks_exact_mut(width)) {
                    let code = task.payload.and_then(|p| p.chunks_exact(each).nth(step));
                    let unpacked = self.between.unpack(code, stages, self.bits, taken);
                    if task.done.is_ok() {
                        task.done = unpacked;
                    }
                }
                let LyraDecoder {
                    state,
                    concealed,
                    level,
                } = &mut *task.state;
                rows.push(Row {
                    input: taken,
                    state,
                    output,
                    done: Ok(()),
                });
                ends.push((concealed, level, task.payload.is_some(), &mut task.done));
            }
            self.decoder.run(&mut rows);
            for (row, (concealed, level, came, done)) in rows.into_iter().zip(ends) {
                for pcm in row.output.chunks_exact_mut(frame) {
                    *concealed = if came {
                        0
                    } else {
                        concealed.saturating_add(frame)
                    };
                    self.fade(pcm, *concealed, level);
                }
                if let Err(error) = row.done {
                    *done = Err(error);
                }
            }
            from += count;
        }
        for task in batch {
            if task.done.is_err() {
                task.pcm.clear();
                task.state.reset();
            } else {
                task.pcm.truncate(task.samples);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use auralink_proto::ladder::Rung;

    use super::*;
    use crate::codec::FRAME;
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
