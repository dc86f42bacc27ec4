//! A worker and the codec engine: jobs out, outcomes in. Neither side waits for the other.

use super::{Out, Pc, State, now};
use auralink_engine as engine;
use auralink_engine::{Busy, Port};
use auralink_proto::coding::{EngineRungs, Job, Outcome, Way};
use auralink_proto::hop::{Decoded, Encoded, Refusal};
use auralink_proto::relay::{Scratch, relay_of_track};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Outcomes that are taken in one turn: a millisecond's work. What is left waits for the next.
pub(super) const OUTCOMES_A_TURN: usize = 256;

/// Tracks that are still to be closed wait so long where nothing else happens.
pub(super) const CLOSES_AGAIN: Duration = Duration::from_millis(5);

/// What the engine can do now.
pub(super) fn rungs(port: &Port) -> EngineRungs {
    EngineRungs {
        encodes: port.rungs(),
        decodes: port.decodable(),
        frames: port.frames(),
        models: port.models(),
    }
}

/// Tracks that ended and that the engine hasn't been told of. A large room that ends has hundreds: they go a few at a time, so
/// that they leave the queues to the speech of others, and one that finds a queue full goes later.
#[derive(Debug, Default)]
pub(super) struct Closes {
    waiting: VecDeque<(Instant, u64, engine::Direction)>,
}

impl Closes {
    /// So many a turn: a thirty-second of a codec thread's queue of 256.
    const A_TURN: usize = 8;

    /// By then the engine has forgotten an idle track itself.
    const OLD: Duration = Duration::from_secs(120);

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    fn push(&mut self, now: Instant, track: u64, direction: engine::Direction) {
        self.waiting.push_back((now, track, direction));
    }

    /// Tells the engine of some of them.
    fn send(&mut self, now: Instant, mut send: impl FnMut(engine::Job) -> bool) {
        while let Some((since, ..)) = self.waiting.front()
            && now.saturating_duration_since(*since) > Self::OLD
        {
            self.waiting.pop_front();
        }
        for _ in 0..Self::A_TURN.min(self.waiting.len()) {
            let Some((since, track, direction)) = self.waiting.pop_front() else {
                return;
            };
            if !send(engine::Job::Close { track, direction }) {
                // Its thread is behind; others' may not be.
                self.waiting.push_back((since, track, direction));
            }
        }
    }
}

/// Hands a relay's jobs to the engine; what it doesn't take is answered at once.
pub(super) fn jobs(
    pc: &mut Pc,
    port: &Port,
    closes: &mut Closes,
    scratch: &mut Scratch,
    out: &mut Out,
) {
    while let Some(job) = pc.relay.poll_job() {
        let (job, instead) = match job {
            Job::Encode(track, job) => {
                let instead = |refusal| Outcome::Refused(track, job.id, refusal);
                (
                    engine::Job::Encode(engine::Encode {
                        track,
                        id: job.id,
                        rung: job.rung,
                        packets: job.packets,
                        lost_before: job.lost_before,
                    }),
                    instead(Refusal::Busy),
                )
            }
            Job::Decode(track, job) => (
                engine::Job::Decode(engine::Decode {
                    track,
                    id: job.id,
                    codec: job.codec,
                    payload: job.payload,
                    gain: job.gain,
                    unit_ms: job.unit_ms,
                    count: job.count,
                    lost: job.lost,
                }),
                Outcome::Failed(track, job.id),
            ),
            Job::Recode(track, job) => (
                engine::Job::Recode(engine::Recode {
                    track,
                    id: job.id,
                    key: job.key,
                    rung: job.rung,
                    payload: job.payload,
                    lost_before: job.lost_before,
                }),
                Outcome::Refused(track, job.id, Refusal::Busy),
            ),
            Job::Close(track, way) => {
                let direction = match way {
                    Way::Encode => engine::Direction::Encode,
                    Way::Decode => engine::Direction::Decode,
                    Way::Recode => engine::Direction::Recode,
                };
                closes.push(now().instant, track, direction);
                continue;
            }
        };
        let Err(busy) = port.try_send(job) else {
            continue;
        };
        let instead = match instead {
            Outcome::Failed(track, id) if busy == Busy::Hangs => Outcome::Hangs(track, id),
            instead => instead,
        };
        pc.relay.outcome(now(), instead, scratch, out);
    }
}

impl State {
    /// Takes what the engine has done, and follows what it can do.
    pub(super) fn outcomes(&mut self, left: &mut usize) {
        let port = &self.codecs;
        if !self.closes.is_empty() {
            self.closes
                .send(now().instant, |close| port.try_send(close).is_ok());
        }
        while *left > 0
            && let Some(outcome) = self.codecs.try_recv()
        {
            *left -= 1;
            self.at = None;
            let outcome = translate(outcome);
            let Some(key) = self.by_id.get(&relay_of_track(outcome.track())).copied() else {
                continue;
            };
            if let Some(pc) = self.pcs.get_mut(key) {
                self.at = Some(key);
                pc.relay
                    .outcome(now(), outcome, &mut self.scratch, &mut self.out);
                self.after(key);
            }
        }
        self.at = None;
        self.more |= *left == 0;
        let rungs = rungs(&self.codecs);
        if rungs != self.rungs {
            self.rungs = rungs;
            // Those that don't code yet as well: they may begin to.
            let keys: Vec<usize> = self.pcs.iter().map(|(key, _)| key).collect();
            for key in keys {
                if let Some(pc) = self.pcs.get_mut(key) {
                    self.at = Some(key);
                    pc.relay.set_engine(now().instant, rungs);
                    self.after(key);
                }
            }
        }
    }
}

fn translate(outcome: engine::Outcome) -> Outcome {
    match outcome {
        engine::Outcome::Encoded(done) => Outcome::Encoded(
            done.track,
            done.id,
            Encoded {
                codec: done.codec,
                payload: done.payload,
                gain: done.gain,
                unit_ms: done.unit_ms,
                voice: done.voice,
                rung: done.rung,
            },
        ),
        engine::Outcome::Refused { track, id, reason } => {
            let refusal = match reason {
                engine::Refusal::Undecodable => Refusal::Undecodable,
                engine::Refusal::Stereo => Refusal::Stereo,
                engine::Refusal::Duration => Refusal::Duration,
                engine::Refusal::Failed => Refusal::Failed,
                engine::Refusal::Stale => Refusal::Stale,
            };
            Outcome::Refused(track, id, refusal)
        }
        engine::Outcome::Recoded(done) => Outcome::Recoded(done.track, done.id, done.payload),
        engine::Outcome::Decoded(done) => Outcome::Decoded(
            done.track,
            done.id,
            Decoded {
                packets: done.packets,
                levels: done.levels,
                voice: done.voice,
            },
        ),
        engine::Outcome::Failed { track, id } => Outcome::Failed(track, id),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn of_many_tracks_that_end_at_once_none_is_lost_and_few_go_in_a_turn() {
        let start = Instant::now();
        let mut closes = Closes::default();
        for track in 0..512 {
            closes.push(start, track, engine::Direction::Decode);
        }
        // A queue of so many places that is emptied every 20 turns.
        let (mut room, mut told, mut turns) = (0, HashSet::new(), 0);
        while !closes.is_empty() {
            turns += 1;
            if turns % 20 == 0 {
                room = 100;
            }
            let mut sent = 0;
            closes.send(start, |job| {
                let takes = room > 0;
                room -= i32::from(takes);
                sent += usize::from(takes);
                takes && told.insert(job.track())
            });
            assert!(sent <= Closes::A_TURN && turns < 1000);
        }
        assert_eq!(told.len(), 512);
    }

    #[test]
    fn what_the_engine_has_forgotten_itself_is_dropped() {
        let start = Instant::now();
        let mut closes = Closes::default();
        closes.push(start, 1, engine::Direction::Encode);
        closes.send(start, |_| false);
        assert!(!closes.is_empty());
        closes.send(start + Closes::OLD * 2, |_| false);
        assert!(closes.is_empty());
    }
}
