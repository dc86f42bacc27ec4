//! What one codec thread does with the jobs that wait for it: the tracks' state, and batches over them.

use std::time::{Duration, Instant};

use auralink_proto::ladder::{Rung, Rungs};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::codec::{Codec, DecodeTask, EncodeTask};
use crate::gate::{Detector, Window};
use crate::job::{Decoded, Direction, Encoded, Job, Outcome, Refusal};
use crate::lyra::{LyraDecoder, LyraEncoder};
use crate::opus::Opus;
use crate::track::{Family, Receiver, Sender};

/// The neural codec of a thread.
pub(crate) type Neural = Box<dyn Codec<Encoder = LyraEncoder, Decoder = LyraDecoder>>;

/// The models of a thread; what is missing there is none of.
#[derive(Default)]
pub(crate) struct Kit {
    pub(crate) neural: Option<Neural>,
    pub(crate) detector: Option<Box<dyn Detector>>,
}

/// Forget a track after so long without a job: a worker that died can't close its tracks.
const IDLE: Duration = Duration::from_secs(120);
/// Look for idle tracks so often.
const SWEEP: Duration = Duration::from_secs(10);
/// Streams of one thread. A stream's state is up to 130 kB, so these are half a gigabyte; CPU ends long before.
const MOST_TRACKS: usize = 4096;

/// Whose job it is: a port's track in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) port: u32,
    pub(crate) track: u64,
}

/// What became of the job numbered `index` in the batch.
pub(crate) struct Done {
    pub(crate) index: usize,
    pub(crate) outcome: Outcome,
    /// The rung that it was done on.
    pub(crate) rung: Option<Rung>,
    /// A rung whose codec failed at it or was far too slow, whether or not another stood in.
    pub(crate) failed: Option<Rung>,
}

/// Where outcomes go, and who watches over the thread.
pub(crate) trait Sink {
    /// A model is about to run for these rungs; none: it is done.
    fn running(&mut self, rungs: Rungs);
    /// A job is done.
    fn done(&mut self, done: Done);
    /// Those done so far should be seen by who waits for them.
    fn flush(&mut self);
}

struct Settings {
    bitrate: u32,
    complexity: u8,
    /// A model that takes longer for one batch is out of order.
    slow: Duration,
}

/// One thread's tracks and models.
pub(crate) struct Desk {
    settings: Settings,
    kit: Kit,
    opus: Opus,
    senders: FxHashMap<Key, (Instant, Box<Sender>)>,
    receivers: FxHashMap<Key, (Instant, Box<Receiver>)>,
    swept: Option<Instant>,
}

struct Encoding {
    index: usize,
    key: Key,
    track: u64,
    id: u64,
    sender: Box<Sender>,
    pcm: Vec<f32>,
    unit_ms: u8,
    wanted: Rung,
    rung: Rung,
    gain: i8,
    payload: Vec<u8>,
    refused: Option<Refusal>,
    failed: Option<Rung>,
}

struct Restoring {
    index: usize,
    key: Key,
    track: u64,
    id: u64,
    receiver: Box<Receiver>,
    job: crate::job::Decode,
    family: Family,
    pcm: Vec<f32>,
    /// What the codec before makes up at a switch, to fade over from.
    tail: Vec<f32>,
    good: bool,
    failed: Option<Rung>,
}

impl Desk {
    pub(crate) fn new(bitrate: u32, complexity: u8, slow: Duration, kit: Kit) -> Self {
        Self {
            settings: Settings {
                bitrate,
                complexity,
                slow,
            },
            kit,
            opus: Opus,
            senders: FxHashMap::default(),
            receivers: FxHashMap::default(),
            swept: None,
        }
    }

    /// Other models from now on. The tracks' states of the neural codec begin anew: those of another model mean nothing.
    pub(crate) fn equip(&mut self, kit: Kit) {
        self.kit = kit;
        for (_, sender) in self.senders.values_mut() {
            sender.forget_models();
        }
        for (_, receiver) in self.receivers.values_mut() {
            receiver.forget_models();
        }
    }

    /// How many streams it knows.
    #[cfg(test)]
    pub(crate) fn tracks(&self) -> usize {
        self.senders.len() + self.receivers.len()
    }

    /// Does the jobs, those of one track in their order, the first of all tracks together. `allowed` are the rungs that may be used.
    pub(crate) fn work(
        &mut self,
        jobs: Vec<(Key, Job)>,
        allowed: Rungs,
        now: Instant,
        sink: &mut dyn Sink,
    ) {
        self.sweep(now);
        let mut waiting: Vec<(usize, Key, Job)> = jobs
            .into_iter()
            .enumerate()
            .map(|(index, (key, job))| (index, key, job))
            .collect();
        while !waiting.is_empty() {
            let mut taken = FxHashSet::default();
            let (mut encode, mut restore, mut later) = (Vec::new(), Vec::new(), Vec::new());
            for (index, key, job) in waiting {
                let direction = match &job {
                    Job::Encode(_) => Direction::Encode,
                    Job::Decode(_) => Direction::Decode,
                    Job::Close { direction, .. } => *direction,
                };
                if !taken.insert((key, direction)) {
                    later.push((index, key, job));
                    continue;
                }
                match job {
                    Job::Encode(job) => encode.push((index, key, job)),
                    Job::Decode(job) => restore.push((index, key, job)),
                    Job::Close {
                        direction: Direction::Encode,
                        ..
                    } => {
                        self.senders.remove(&key);
                    }
                    Job::Close {
                        direction: Direction::Decode,
                        ..
                    } => {
                        self.receivers.remove(&key);
                    }
                }
            }
            self.encode(encode, allowed, now, sink);
            self.restore(restore, now, sink);
            waiting = later;
        }
    }

    fn encode(
        &mut self,
        jobs: Vec<(usize, Key, crate::job::Encode)>,
        allowed: Rungs,
        now: Instant,
        sink: &mut dyn Sink,
    ) {
        let mut work: Vec<Encoding> = Vec::with_capacity(jobs.len());
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
                Ok(unit_ms) => work.push(Encoding {
                    index,
                    key,
                    track: job.track,
                    id: job.id,
                    sender,
                    pcm,
                    unit_ms,
                    wanted: job.rung,
                    rung: job.rung,
                    gain: 0,
                    payload: Vec::new(),
                    refused: None,
                    failed: None,
                }),
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
            if rung.is_neural() && !(neural && self.kit.neural.is_some()) {
                rung = Rung::L3;
            }
            one.rung = allowed.at_least(rung);
            if one.rung == Rung::NATIVE {
                one.refused = Some(Refusal::Failed);
                continue;
            }
            one.gain = one.sender.level(&mut one.pcm, one.rung);
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
                batch.push(EncodeTask::new(state, one.rung, &one.pcm));
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

    fn restore(
        &mut self,
        jobs: Vec<(usize, Key, crate::job::Decode)>,
        now: Instant,
        sink: &mut dyn Sink,
    ) {
        let (mut quick, mut slow) = (Vec::new(), Vec::new());
        for (index, key, job) in jobs {
            let mut receiver = self
                .receivers
                .remove(&key)
                .map_or_else(Box::default, |(_, receiver)| receiver);
            let Some((family, samples)) = receiver.accept(&job) else {
                sink.done(failed(index, job.track, job.id, None));
                self.keep_receiver(key, receiver, now);
                continue;
            };
            let tail = self.switch(&mut receiver, family, job.gain);
            let good = receiver.begin(family, self.kit.neural.as_deref()).is_ok();
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
            let Some(state) = one.receiver.lyra.as_mut().filter(|_| one.good) else {
                one.good = false;
                continue;
            };
            let payload = (!one.job.lost).then_some(one.job.payload.as_slice());
            let samples = Receiver::samples(&one.job);
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
                    if matches!(error, crate::codec::CodecError::Failed(_)) {
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

    fn keep_sender(&mut self, key: Key, sender: Box<Sender>, now: Instant) {
        if self.senders.len() < MOST_TRACKS / 2 {
            self.senders.insert(key, (now, sender));
        }
    }

    fn keep_receiver(&mut self, key: Key, receiver: Box<Receiver>, now: Instant) {
        if self.receivers.len() < MOST_TRACKS / 2 {
            self.receivers.insert(key, (now, receiver));
        }
    }

    fn sweep(&mut self, now: Instant) {
        if self
            .swept
            .is_some_and(|at| now.saturating_duration_since(at) < SWEEP)
        {
            return;
        }
        self.swept = Some(now);
        self.senders
            .retain(|_, (used, _)| now.saturating_duration_since(*used) < IDLE);
        self.receivers
            .retain(|_, (used, _)| now.saturating_duration_since(*used) < IDLE);
    }
}

impl Restoring {
    /// The rung that its codec stands for; Opus doesn't say at which rate, so that it counts as L4.
    fn rung(&self) -> Rung {
        match (self.family, self.job.codec) {
            (Family::Neural, auralink_proto::ladder::CodecId::Lyra3) => Rung::L1,
            (Family::Neural, _) => Rung::L2,
            (Family::Opus, _) => Rung::L4,
        }
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

fn failed(index: usize, track: u64, id: u64, failed: Option<Rung>) -> Done {
    Done {
        index,
        rung: None,
        failed,
        outcome: Outcome::Failed { track, id },
    }
}
