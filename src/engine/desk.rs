//! What one codec thread does with the jobs that wait for it: the tracks' state, and batches over them.

mod encode;
mod recode;
mod restore;

use std::time::{Duration, Instant};

use auralink_proto::ladder::{Rung, Rungs};
use rustc_hash::{FxHashMap, FxHashSet};

use crate::codec::{Codec, Format};
use crate::gate::Detector;
use crate::job::{Direction, Job, Outcome};
use crate::lyra::{LyraDecoder, LyraEncoder};
use crate::opus::Opus;
use crate::track::{Receiver, Sender};

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
/// Streams of one thread; a quarter as many sources come on top. A stream's state is up to 130 kB with Lyra, so these are half a
/// gigabyte, and eight times that with the largest states that a bundle may have; CPU ends long before.
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
    sources: FxHashMap<recode::Name, Box<recode::Source>>,
    swept: Option<Instant>,
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
            sources: FxHashMap::default(),
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
        for source in self.sources.values_mut() {
            source.forget_models();
        }
    }

    /// What the neural codec's speech is measured in; Lyra's without one.
    fn format(&self) -> Format {
        let neural = self.kit.neural.as_ref();
        neural.map_or(Format::LYRA, |neural| neural.format())
    }

    /// How many streams it knows.
    #[cfg(test)]
    pub(crate) fn tracks(&self) -> usize {
        self.senders.len() + self.receivers.len() + self.sources.len()
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
            let (mut recode, mut gone) = (Vec::new(), Vec::new());
            for (index, key, job) in waiting {
                // Not batched: those of a track needn't wait for each other.
                let job = match job {
                    Job::Recode(job) => {
                        recode.push((index, key, job));
                        continue;
                    }
                    job => job,
                };
                let direction = match &job {
                    Job::Encode(_) => Direction::Encode,
                    Job::Decode(_) => Direction::Decode,
                    Job::Recode(_) => Direction::Recode,
                    Job::Close { direction, .. } => *direction,
                };
                if !taken.insert((key, direction)) {
                    later.push((index, key, job));
                    continue;
                }
                match job {
                    Job::Encode(job) => encode.push((index, key, job)),
                    Job::Decode(job) => restore.push((index, key, job)),
                    Job::Recode(_) => {}
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
                    Job::Close {
                        direction: Direction::Recode,
                        ..
                    } => gone.push(key),
                }
            }
            self.recode(recode, allowed, now, sink);
            for key in gone {
                self.forget_source(key);
            }
            self.encode(encode, allowed, now, sink);
            self.restore(restore, now, sink);
            waiting = later;
        }
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
        self.sources.retain(|_, source| source.is_used(now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::group;

    struct Nobody;

    impl Sink for Nobody {
        fn running(&mut self, _: Rungs) {}
        fn done(&mut self, done: Done) {
            assert!(matches!(done.outcome, Outcome::Encoded(_)));
        }
        fn flush(&mut self) {}
    }

    #[test]
    fn tracks_that_end_or_fall_silent_are_forgotten() {
        let mut desk = Desk::new(64_000, 5, SWEEP, Kit::default());
        let packets = crate::testing::client("talker-a", 1, 20);
        let now = Instant::now();
        let job = |track| {
            let key = Key { port: 0, track };
            (key, group(track, 0, Rung::L4, &packets[..2]))
        };
        desk.work((0..10).map(job).collect(), Rungs::ALL, now, &mut Nobody);
        assert_eq!(desk.tracks(), 10);
        let close = |track| {
            let key = Key { port: 0, track };
            (
                key,
                Job::Close {
                    track,
                    direction: Direction::Encode,
                },
            )
        };
        desk.work((0..4).map(close).collect(), Rungs::ALL, now, &mut Nobody);
        assert_eq!(desk.tracks(), 6);
        // The others stay while they speak; two minutes after their last word they go.
        desk.work(vec![job(9)], Rungs::ALL, now + IDLE / 2, &mut Nobody);
        assert_eq!(desk.tracks(), 6);
        desk.work(vec![job(9)], Rungs::ALL, now + IDLE, &mut Nobody);
        assert_eq!(desk.tracks(), 1);
    }
}
