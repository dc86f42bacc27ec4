//! From groups of originals to coded payloads.

use std::time::Instant;

use auralink_proto::ladder::{Rung, Rungs};

use super::{Desk, Done, Key, Sink};
use crate::codec::{Codec, EncodeTask, FRAME, SAMPLE_RATE};
use crate::gate::Window;
use crate::job::{Encode, Encoded, Outcome, Refusal};
use crate::track::{Family, Sender};

struct Encoding {
    index: usize,
    key: Key,
    track: u64,
    id: u64,
    sender: Box<Sender>,
    pcm: Vec<f32>,
    /// The same at the neural codec's rate, where that is another.
    wide: Vec<f32>,
    unit_ms: u8,
    wanted: Rung,
    rung: Rung,
    gain: i8,
    payload: Vec<u8>,
    refused: Option<Refusal>,
    failed: Option<Rung>,
}

impl Desk {
    pub(super) fn encode(
        &mut self,
        jobs: Vec<(usize, Key, Encode)>,
        allowed: Rungs,
        now: Instant,
        sink: &mut dyn Sink,
    ) {
        let mut work: Vec<Encoding> = Vec::with_capacity(jobs.len());
        let format = self.format();
        let wide_rate = Some(format.sample_rate).filter(|rate| *rate != SAMPLE_RATE);
        for (index, key, job) in jobs {
            let sender = match self.senders.remove(&key) {
                Some((_, sender)) => Ok(sender),
                None => Sender::new().map(Box::new),
            };
            let Ok(mut sender) = sender else {
                sink.done(refused(index, job.track, job.id, Refusal::Failed, None));
                continue;
            };
            let mut pcm = Vec::new();
            match sender.take(&job.packets, job.lost_before, &mut pcm) {
                Ok(_) if !pcm.len().is_multiple_of(FRAME) => {
                    let reason = Refusal::Duration;
                    sink.done(refused(index, job.track, job.id, reason, None));
                    self.keep_sender(key, sender, now);
                }
                Ok(unit_ms) => {
                    let rate = wide_rate.filter(|_| job.rung.is_neural());
                    let mut wide = Vec::new();
                    let before = (unit_ms, job.lost_before);
                    let taken = sender.take_wide(&job.packets, before, rate, &mut wide);
                    if taken.is_err() {
                        wide.clear();
                    }
                    work.push(Encoding {
                        index,
                        key,
                        track: job.track,
                        id: job.id,
                        sender,
                        pcm,
                        wide,
                        unit_ms,
                        wanted: job.rung,
                        rung: job.rung,
                        gain: 0,
                        payload: Vec::new(),
                        refused: None,
                        failed: None,
                    });
                }
                Err(reason) => {
                    sink.done(refused(index, job.track, job.id, reason, None));
                    self.keep_sender(key, sender, now);
                }
            }
        }
        self.listen(&mut work, sink);
        let neural = allowed.has(Rung::L1) || allowed.has(Rung::L2);
        let gated = self.kit.detector.is_some();
        for one in &mut work {
            let gate = &one.sender.gate;
            let mut rung = gate.rung(one.wanted);
            // Nothing proves that it is speech: then it is treated as if it weren't.
            if !gated && rung != Rung::NATIVE {
                rung = rung.max(Rung::L4);
            }
            // Sound at the codec's rate, and whole frames of it: 20 ms alone may be half of one.
            let sound = if wide_rate.is_some() {
                &one.wide
            } else {
                &one.pcm
            };
            let fits = !sound.is_empty() && sound.len().is_multiple_of(format.frame);
            if rung.is_neural() && !(neural && fits && self.kit.neural.is_some()) {
                rung = Rung::L3;
            }
            one.rung = allowed.at_least(rung);
            if one.rung == Rung::NATIVE {
                one.refused = Some(Refusal::Failed);
                continue;
            }
            one.gain = one.sender.level(&mut one.pcm, one.rung);
            one.sender.level_wide(&mut one.wide, format.sample_rate);
            if one
                .sender
                .begin(Family::of(one.rung.codec()), self.kit.neural.as_deref())
                .is_err()
            {
                one.refused = Some(Refusal::Failed);
            }
        }
        // The quick ones first, so that they don't wait for the model.
        let (quick, slow): (Vec<_>, Vec<_>) =
            work.into_iter().partition(|one| !one.rung.is_neural());
        for mut one in quick {
            if one.refused.is_none() {
                self.encode_opus(&mut one);
            }
            self.encoded(one, now, sink);
        }
        if slow.is_empty() {
            return;
        }
        sink.flush();
        for mut one in self.encode_neural(slow, sink) {
            if one.failed.is_some() && one.payload.is_empty() && one.refused.is_none() {
                // The level of L1 and L2 is that of L4, so that the sound is ready for it.
                let stand_in = allowed.at_least(Rung::L4);
                one.rung = stand_in;
                let ready =
                    stand_in != Rung::NATIVE && one.sender.begin(Family::Opus, None).is_ok();
                if ready {
                    self.encode_opus(&mut one);
                } else {
                    one.refused = Some(Refusal::Failed);
                }
            }
            self.encoded(one, now, sink);
        }
        sink.flush();
    }

    /// Shows the detector all windows that have come together.
    fn listen(&mut self, work: &mut [Encoding], sink: &mut dyn Sink) {
        for one in work.iter_mut() {
            one.sender.gate.push(&one.pcm);
        }
        let Some(detector) = &mut self.kit.detector else {
            return;
        };
        sink.running(Rungs::NONE.with(Rung::L1).with(Rung::L2));
        // 60 ms hold two windows at most, and one may be left from before.
        for _ in 0..4 {
            let mut heard = Vec::with_capacity(work.len());
            for one in work.iter_mut() {
                if let Some(pcm) = one.sender.gate.window() {
                    heard.push((&mut one.sender.gate, pcm));
                }
            }
            if heard.is_empty() {
                break;
            }
            let mut memories: Vec<_> = heard
                .iter_mut()
                .map(|(gate, _)| std::mem::take(&mut gate.memory))
                .collect();
            let mut windows: Vec<Window<'_>> = memories
                .iter_mut()
                .zip(&heard)
                .map(|(memory, (_, pcm))| Window {
                    memory,
                    pcm,
                    probability: None,
                })
                .collect();
            detector.listen(&mut windows);
            let probabilities: Vec<_> = windows.iter().map(|w| w.probability).collect();
            for (((gate, pcm), memory), probability) in
                heard.into_iter().zip(memories).zip(probabilities)
            {
                gate.memory = memory;
                // A detector that fails proves nothing: as if it weren't speech.
                gate.heard(&pcm, probability.unwrap_or(0.0));
            }
        }
        sink.running(Rungs::NONE);
    }

    fn encode_opus(&mut self, one: &mut Encoding) {
        let Some(state) = &mut one.sender.opus else {
            one.refused = Some(Refusal::Failed);
            return;
        };
        let mut batch = [EncodeTask::new(state, one.rung, &one.pcm)];
        self.opus.encode(&mut batch);
        let [task] = batch;
        match task.done {
            Ok(()) => one.payload = task.payload,
            Err(error) => {
                tracing::debug!(%error, "Opus could not encode");
                one.failed = Some(one.rung);
                one.refused = Some(Refusal::Failed);
            }
        }
    }

    fn encode_neural(&mut self, mut work: Vec<Encoding>, sink: &mut dyn Sink) -> Vec<Encoding> {
        let Some(neural) = &mut self.kit.neural else {
            return work;
        };
        let rungs = work
            .iter()
            .fold(Rungs::NONE, |rungs, one| rungs.with(one.rung));
        let mut places = Vec::with_capacity(work.len());
        let mut batch = Vec::with_capacity(work.len());
        for (place, one) in work.iter_mut().enumerate() {
            if let (None, Some(state)) = (one.refused, &mut one.sender.lyra) {
                let sound = if one.wide.is_empty() {
                    &one.pcm
                } else {
                    &one.wide
                };
                batch.push(EncodeTask::new(state, one.rung, sound));
                places.push(place);
            }
        }
        let began = Instant::now();
        sink.running(rungs);
        neural.encode(&mut batch);
        sink.running(Rungs::NONE);
        let slow = began.elapsed() > self.settings.slow;
        let results: Vec<_> = batch
            .into_iter()
            .map(|task| (task.payload, task.done))
            .collect();
        for (place, (payload, done)) in places.into_iter().zip(results) {
            let Some(one) = work.get_mut(place) else {
                continue;
            };
            one.failed = slow.then_some(one.rung);
            match done {
                Ok(()) => one.payload = payload,
                Err(error) => {
                    tracing::debug!(%error, "the neural codec could not encode");
                    one.failed = Some(one.rung);
                }
            }
        }
        work
    }

    fn encoded(&mut self, one: Encoding, now: Instant, sink: &mut dyn Sink) {
        let voice = one.sender.voice(self.kit.detector.is_some());
        let done = match one.refused {
            Some(reason) => refused(one.index, one.track, one.id, reason, one.failed),
            None => Done {
                index: one.index,
                rung: Some(one.rung),
                failed: one.failed,
                outcome: Outcome::Encoded(Encoded {
                    track: one.track,
                    id: one.id,
                    rung: one.rung,
                    codec: one.rung.codec(),
                    payload: one.payload,
                    gain: one.gain,
                    unit_ms: one.unit_ms,
                    voice,
                }),
            },
        };
        sink.done(done);
        self.keep_sender(one.key, one.sender, now);
    }
}

fn refused(index: usize, track: u64, id: u64, reason: Refusal, failed: Option<Rung>) -> Done {
    Done {
        index,
        rung: None,
        failed,
        outcome: Outcome::Refused { track, id, reason },
    }
}
