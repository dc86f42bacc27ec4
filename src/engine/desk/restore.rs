//! From coded payloads, and lost ones, back to originals.

use std::time::Instant;

use auralink_proto::ladder::{CodecId, Rung, Rungs};

use super::{Desk, Done, Key, Sink};
use crate::codec::{CodecError, DecodeTask};
use crate::job::{Decode, Decoded, Outcome};
use crate::track::{Family, Receiver};

struct Restoring {
    index: usize,
    key: Key,
    track: u64,
    id: u64,
    receiver: Box<Receiver>,
    job: Decode,
    family: Family,
    pcm: Vec<f32>,
    /// What the codec before makes up at a switch, to fade over from.
    tail: Vec<f32>,
    good: bool,
    failed: Option<Rung>,
}

impl Restoring {
    /// The rung that its codec stands for; Opus doesn't say at which rate, so that it counts as L4.
    fn rung(&self) -> Rung {
        match (self.family, self.job.codec) {
            (Family::Neural, CodecId::Lyra3) => Rung::L1,
            (Family::Neural, _) => Rung::L2,
            (Family::Opus, _) => Rung::L4,
        }
    }
}

impl Desk {
    pub(super) fn restore(
        &mut self,
        jobs: Vec<(usize, Key, Decode)>,
        now: Instant,
        sink: &mut dyn Sink,
    ) {
        let (mut quick, mut slow) = (Vec::new(), Vec::new());
        let rate = self.format().sample_rate;
        for (index, key, job) in jobs {
            let mut receiver = self
                .receivers
                .remove(&key)
                .map_or_else(|| Box::new(Receiver::new(rate)), |(_, receiver)| receiver);
            let Some((family, samples)) = receiver.accept(&job) else {
                sink.done(failed(index, job.track, job.id, None));
                self.keep_receiver(key, receiver, now);
                continue;
            };
            let mut tail = self.switch(&mut receiver, family, job.gain);
            let before = receiver.rate();
            let good = receiver.begin(family, self.kit.neural.as_deref()).is_ok();
            if receiver.rate() != before {
                tail.clear();
            }
            let one = Restoring {
                index,
                key,
                track: job.track,
                id: job.id,
                receiver,
                pcm: Vec::with_capacity(samples),
                tail,
                family,
                job,
                good,
                failed: None,
            };
            if family == Family::Neural {
                slow.push(one)
            } else {
                quick.push(one)
            }
        }
        for mut one in quick {
            if one.good {
                one.good = one
                    .receiver
                    .decode_opus(&mut self.opus, &one.job, &mut one.pcm);
            }
            self.restored(one, now, sink);
        }
        if slow.is_empty() {
            return;
        }
        sink.flush();
        for one in self.decode_neural(slow, sink) {
            self.restored(one, now, sink);
        }
        sink.flush();
    }

    /// Where the codec changes, the one before goes on for a moment, to fade over from.
    fn switch(&mut self, receiver: &mut Receiver, family: Family, gain: i8) -> Vec<f32> {
        let mut tail = Vec::new();
        if receiver.family().is_none_or(|before| before == family) {
            return tail;
        }
        match (family, &mut self.kit.neural) {
            (Family::Opus, Some(neural)) => receiver.tail_neural(neural.as_mut(), &mut tail),
            (Family::Neural, _) => receiver.tail_opus(&mut tail),
            (Family::Opus, None) => {}
        }
        receiver.turn(gain, &mut tail);
        tail
    }

    fn decode_neural(&mut self, mut work: Vec<Restoring>, sink: &mut dyn Sink) -> Vec<Restoring> {
        let Some(neural) = &mut self.kit.neural else {
            for one in &mut work {
                one.good = false;
            }
            return work;
        };
        let rungs = work
            .iter()
            .fold(Rungs::NONE, |rungs, one| rungs.with(one.rung()));
        let mut places = Vec::with_capacity(work.len());
        let mut batch = Vec::with_capacity(work.len());
        for (place, one) in work.iter_mut().enumerate() {
            let samples = one.receiver.samples(&one.job);
            let Some(state) = one.receiver.lyra.as_mut().filter(|_| one.good) else {
                one.good = false;
                continue;
            };
            let payload = (!one.job.lost).then_some(one.job.payload.as_slice());
            batch.push(DecodeTask::new(state, one.job.codec, payload, samples));
            places.push(place);
        }
        let began = Instant::now();
        sink.running(rungs);
        neural.decode(&mut batch);
        sink.running(Rungs::NONE);
        let slow = began.elapsed() > self.settings.slow;
        let results: Vec<_> = batch
            .into_iter()
            .map(|task| (task.pcm, task.done))
            .collect();
        for (place, (pcm, done)) in places.into_iter().zip(results) {
            let Some(one) = work.get_mut(place) else {
                continue;
            };
            one.failed = slow.then_some(one.rung());
            match done {
                Ok(()) => one.pcm = pcm,
                Err(error) => {
                    tracing::debug!(%error, "the neural codec could not decode");
                    one.good = false;
                    // What a stranger sends is nothing against the codec.
                    if matches!(error, CodecError::Failed(_)) {
                        one.failed = Some(one.rung());
                    }
                }
            }
        }
        work
    }

    fn restored(&mut self, mut one: Restoring, now: Instant, sink: &mut dyn Sink) {
        let rung = one.rung();
        let packets = if one.good {
            one.receiver.finish(
                &one.job,
                one.family,
                &mut one.pcm,
                &one.tail,
                (self.settings.bitrate, self.settings.complexity),
            )
        } else {
            None
        };
        sink.done(match packets {
            Some((packets, levels, voice)) => Done {
                index: one.index,
                rung: Some(rung),
                failed: one.failed,
                outcome: Outcome::Decoded(Decoded {
                    track: one.track,
                    id: one.id,
                    packets,
                    levels,
                    voice,
                }),
            },
            None => failed(one.index, one.track, one.id, one.failed),
        });
        self.keep_receiver(one.key, one.receiver, now);
    }
}

fn failed(index: usize, track: u64, id: u64, failed: Option<Rung>) -> Done {
    Done {
        index,
        rung: None,
        failed,
        outcome: Outcome::Failed { track, id },
    }
}
