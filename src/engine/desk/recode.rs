//! From Opus to Opus: enhanced at the local rate for one stream, or at a low rung for all subscribers of a track at once.
//!
//! Subscribers get the same Opus packets under different RTP headers and at slightly different times. So what is coded is found
//! again by the packet itself: the first that asks has it coded, the others get a copy.

use std::collections::VecDeque;
use std::hash::{Hash, Hasher};
use std::time::Instant;

use auralink_proto::ladder::{Rung, Rungs};
use rustc_hash::{FxHashMap, FxHasher};

use super::{Desk, Done, IDLE, Key, Kit, MOST_TRACKS, Settings, Sink};
use crate::codec::{Codec, CodecError, EncodeTask};
use crate::gate::Window;
use crate::job::{Outcome, Recode, Recoded, Refusal};
use crate::opus::{Enhancement, Opus, SpeechEncoder};
use crate::track::Sender;

/// Packets that are kept for those who ask later: 2.5 s of 20 ms, more than any of them is worth after its 20 ms.
const KEPT: usize = 128;
/// Streams that share a source; further ones get their packets as they came.
const MOST_STREAMS: usize = 4096;
/// Refusals in a row because others are ahead; then the stream's packets are believed to be the newest. Two in a row happen where
/// streams lost different packets.
const STALE: u8 = 2;

/// What is coded anew, and to what: states are shared by streams for which both are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Name {
    Shared(u128, Option<Rung>),
    Own(Key, Option<Rung>),
}

/// One packet's result.
struct Made {
    number: u64,
    hash: u64,
    source: Vec<u8>,
    result: Result<Vec<u8>, Refusal>,
}

/// A stream that asks.
struct Stream {
    /// Number of the packet that it got last.
    last: u64,
    stale: u8,
    used: Instant,
}

/// The state of a source and what was made of it.
pub(super) struct Source {
    hearer: Sender,
    encoder: SpeechEncoder,
    made: VecDeque<Made>,
    /// Number of the newest in `made`; the first is 1.
    newest: u64,
    streams: FxHashMap<Key, Stream>,
    used: Instant,
}

/// What serving takes from the thread.
struct At<'a> {
    allowed: Rungs,
    now: Instant,
    kit: &'a mut Kit,
    sink: &'a mut dyn Sink,
}

/// What a stream's packet is to the source.
enum Place {
    /// Made already: its number and what it became.
    Made(u64, Result<Vec<u8>, Refusal>),
    /// The next; so many before it were lost by everybody.
    New(u16),
    /// Before the newest, and never asked for.
    Old,
}

impl Source {
    fn new(rung: Option<Rung>, settings: &Settings, now: Instant) -> Result<Self, CodecError> {
        let (hearer, encoder) = match rung {
            Some(_) => (Sender::new()?, Opus.encoder()?),
            None => (
                Sender::hearing(Enhancement::Lace)?,
                SpeechEncoder::new(settings.bitrate, settings.complexity)?,
            ),
        };
        Ok(Self {
            hearer,
            encoder,
            made: VecDeque::new(),
            newest: 0,
            streams: FxHashMap::default(),
            used: now,
        })
    }

    pub(super) fn forget_models(&mut self) {
        self.hearer.forget_models();
    }

    /// Somebody asked lately; streams that didn't are forgotten.
    pub(super) fn is_used(&mut self, now: Instant) -> bool {
        self.streams
            .retain(|_, stream| now.saturating_duration_since(stream.used) < IDLE);
        now.saturating_duration_since(self.used) < IDLE
    }

    fn place(&self, key: &Key, hash: u64, job: &Recode) -> Place {
        let stream = self.streams.get(key);
        let last = stream.map_or(0, |stream| stream.last);
        // What a stream got already is another packet of the same content: silence, say.
        let newer = self.made.iter().rev();
        let found = newer
            .take_while(|made| made.number > last)
            .find(|made| made.hash == hash && made.source == job.payload);
        if let Some(made) = found {
            return Place::Made(made.number, made.result.clone());
        }
        let Some(stream) = stream else {
            let alone = self.newest == 0;
            return Place::New(if alone { job.lost_before } else { 0 });
        };
        // Others had packets that this stream didn't get; those it knows to have lost explain it.
        let skipped = self.newest - stream.last;
        if skipped <= u64::from(job.lost_before) {
            let lost = u64::from(job.lost_before) - skipped;
            return Place::New(u16::try_from(lost).unwrap_or(u16::MAX));
        }
        if stream.stale < STALE {
            Place::Old
        } else {
            Place::New(0)
        }
    }

    /// Finds or makes what a stream asks for.
    fn serve(&mut self, index: usize, key: Key, job: &Recode, at: &mut At<'_>) -> Done {
        self.used = at.now;
        let hash = hash(&job.payload);
        if self.streams.len() >= MOST_STREAMS && !self.streams.contains_key(&key) {
            return refused(index, job, Refusal::Failed, None);
        }
        let (number, result, rung, failed, shared) = match self.place(&key, hash, job) {
            Place::Old => {
                if let Some(stream) = self.streams.get_mut(&key) {
                    stream.stale += 1;
                }
                return refused(index, job, Refusal::Stale, None);
            }
            Place::Made(number, result) => (number, result, None, None, true),
            Place::New(lost) => {
                let (result, rung, failed) = self.make(job, lost, at);
                self.newest += 1;
                // A source of one stream has nobody else to ask.
                if job.key.is_some() {
                    if self.made.len() >= KEPT {
                        self.made.pop_front();
                    }
                    self.made.push_back(Made {
                        number: self.newest,
                        hash,
                        source: job.payload.clone(),
                        result: result.clone(),
                    });
                }
                (self.newest, result, rung, failed, false)
            }
        };
        let stream = Stream {
            last: number,
            stale: 0,
            used: at.now,
        };
        self.streams.insert(key, stream);
        match result {
            Ok(payload) => Done {
                index,
                rung,
                failed,
                outcome: Outcome::Recoded(Recoded {
                    track: job.track,
                    id: job.id,
                    payload,
                    shared,
                }),
            },
            Err(reason) => refused(index, job, reason, failed),
        }
    }

    /// Codes the next packet: the result, the rung used, and one that failed at it.
    #[allow(clippy::type_complexity)]
    fn make(
        &mut self,
        job: &Recode,
        lost: u16,
        at: &mut At<'_>,
    ) -> (Result<Vec<u8>, Refusal>, Option<Rung>, Option<Rung>) {
        let mut pcm = Vec::new();
        let packet = std::slice::from_ref(&job.payload);
        if let Err(reason) = self.hearer.take(packet, lost, &mut pcm) {
            return (Err(reason), None, None);
        }
        let wanted = match job.rung {
            Some(wanted) => self.gated(wanted.max(Rung::L3), &pcm, at),
            // Opus doesn't say at which rate; as at the end of a hop it counts as L4.
            None => Rung::L4,
        };
        let rung = at.allowed.at_least(wanted);
        if rung == Rung::NATIVE {
            return (Err(Refusal::Failed), None, None);
        }
        let coded = if job.rung.is_some() {
            let mut batch = [EncodeTask::new(&mut self.encoder, rung, &pcm)];
            Opus.encode(&mut batch);
            let [task] = batch;
            task.done.map(|()| task.payload)
        } else {
            self.encoder.encode(&pcm)
        };
        match coded {
            Ok(payload) => (Ok(payload), Some(rung), None),
            Err(error) => {
                tracing::debug!(%error, "Opus could not encode");
                (Err(Refusal::Failed), None, Some(rung))
            }
        }
    }

    /// The rung for this sound: what isn't speech, or isn't proved to be, takes L4 at least.
    fn gated(&mut self, wanted: Rung, pcm: &[f32], at: &mut At<'_>) -> Rung {
        if wanted >= Rung::L4 {
            return wanted;
        }
        let Some(detector) = &mut at.kit.detector else {
            return Rung::L4;
        };
        let gate = &mut self.hearer.gate;
        gate.push(pcm);
        at.sink.running(Rungs::NONE.with(Rung::L1).with(Rung::L2));
        while let Some(heard) = gate.window() {
            let mut windows = [Window {
                memory: &mut gate.memory,
                pcm: &heard,
                probability: None,
            }];
            detector.listen(&mut windows);
            let [window] = windows;
            let probability = window.probability.unwrap_or(0.0);
            gate.heard(&heard, probability);
        }
        at.sink.running(Rungs::NONE);
        gate.rung(wanted)
    }
}

fn hash(payload: &[u8]) -> u64 {
    let mut hasher = FxHasher::default();
    payload.hash(&mut hasher);
    hasher.finish()
}

impl Desk {
    pub(super) fn recode(
        &mut self,
        jobs: Vec<(usize, Key, Recode)>,
        allowed: Rungs,
        now: Instant,
        sink: &mut dyn Sink,
    ) {
        for (index, key, job) in jobs {
            let name = match job.key {
                Some(source) => Name::Shared(source, job.rung),
                None => Name::Own(key, job.rung),
            };
            // Taken out, because what serves it borrows the models.
            let source = self.sources.remove(&name);
            let Some(mut source) = source.or_else(|| self.open(name, now)) else {
                sink.done(refused(index, &job, Refusal::Failed, None));
                continue;
            };
            let mut at = At {
                allowed,
                now,
                kit: &mut self.kit,
                sink,
            };
            let done = source.serve(index, key, &job, &mut at);
            self.sources.insert(name, source);
            sink.done(done);
        }
    }

    fn open(&self, name: Name, now: Instant) -> Option<Box<Source>> {
        let (Name::Shared(_, rung) | Name::Own(_, rung)) = name;
        let room = self.sources.len() < MOST_TRACKS / 4;
        room.then(|| Source::new(rung, &self.settings, now).ok())
            .flatten()
            .map(Box::new)
    }

    /// A stream has ended: what was its alone goes.
    pub(super) fn forget_source(&mut self, key: Key) {
        self.sources
            .retain(|name, _| !matches!(name, Name::Own(own, _) if *own == key));
    }
}

fn refused(index: usize, job: &Recode, reason: Refusal, failed: Option<Rung>) -> Done {
    Done {
        index,
        rung: None,
        failed,
        outcome: Outcome::Refused {
            track: job.track,
            id: job.id,
            reason,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::job::{Direction, Job};

    /// Counts what was coded, copied and refused.
    #[derive(Default)]
    struct Counts([usize; 3]);

    impl Sink for Counts {
        fn running(&mut self, _: Rungs) {}
        fn done(&mut self, done: Done) {
            let place = match done.outcome {
                Outcome::Recoded(recoded) => usize::from(recoded.shared),
                Outcome::Refused { .. } => 2,
                other => panic!("{other:?}"),
            };
            self.0[place] += 1;
        }
        fn flush(&mut self) {}
    }

    fn ask(track: u64, source: Option<u128>, packet: &[u8]) -> (Key, Job) {
        let job = Recode {
            track,
            id: 0,
            key: source,
            rung: Some(Rung::L4),
            payload: packet.to_vec(),
            lost_before: 0,
        };
        (Key { port: 0, track }, Job::Recode(job))
    }

    #[test]
    fn sources_that_end_or_fall_silent_are_forgotten_and_bounded() {
        let slow = Duration::from_secs(10);
        let mut desk = Desk::new(64_000, 5, slow, Kit::default());
        let packets = crate::testing::client("talker-a", 2, 20);
        let packet = &packets[60];
        let (now, mut counts) = (Instant::now(), Counts::default());
        let jobs = vec![
            ask(1, Some(7), packet),
            ask(2, Some(7), packet),
            ask(3, None, packet),
        ];
        desk.work(jobs, Rungs::ALL, now, &mut counts);
        assert_eq!((desk.tracks(), counts.0), (2, [2, 1, 0]));
        // The end of one stream is not that of what others share.
        let close = |track| {
            let direction = Direction::Recode;
            (Key { port: 0, track }, Job::Close { track, direction })
        };
        desk.work((1..4).map(close).collect(), Rungs::ALL, now, &mut counts);
        assert_eq!(desk.tracks(), 1);
        desk.work(Vec::new(), Rungs::ALL, now + IDLE, &mut counts);
        assert_eq!(desk.tracks(), 0);
        // A stranger's streams don't take all memory; what has no room goes as it came.
        let many = (0..MOST_TRACKS as u64 / 4 + 5).map(|track| ask(track, None, packet));
        let mut counts = Counts::default();
        desk.work(many.collect(), Rungs::ALL, now + IDLE, &mut counts);
        assert_eq!(
            (desk.tracks(), counts.0),
            (MOST_TRACKS / 4, [MOST_TRACKS / 4, 0, 5])
        );
        // Nothing may be used: the breakers are open.
        let mut counts = Counts::default();
        desk.work(
            vec![ask(1, None, packet)],
            Rungs::NONE,
            now + IDLE,
            &mut counts,
        );
        assert_eq!(counts.0, [0, 0, 1]);
    }
}
