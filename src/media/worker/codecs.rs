//! A worker and the codec engine: jobs out, outcomes in. Neither side waits for the other.

use super::{Out, Pc, State, now};
use auralink_engine as engine;
use auralink_engine::{Busy, Port};
use auralink_proto::coding::{EngineRungs, Job, Outcome};
use auralink_proto::hop::{Decoded, Encoded, Refusal};
use auralink_proto::relay::{Scratch, relay_of_track};

/// Outcomes that are taken in one turn: a millisecond's work. What is left waits for the next.
pub(super) const OUTCOMES_A_TURN: usize = 256;

/// What the engine can do now.
pub(super) fn rungs(port: &Port) -> EngineRungs {
    EngineRungs {
        encodes: port.rungs(),
        decodes: port.decodable(),
        frames: port.frames(),
        models: port.models(),
    }
}

/// Hands a relay's jobs to the engine; what it doesn't take is answered at once.
pub(super) fn jobs(pc: &mut Pc, port: &Port, scratch: &mut Scratch, out: &mut Out) {
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
            Job::Close(track) => {
                for direction in [
                    engine::Direction::Encode,
                    engine::Direction::Decode,
                    engine::Direction::Recode,
                ] {
                    // A queue that is full drops it; the engine forgets idle tracks itself.
                    let _ = port.try_send(engine::Job::Close { track, direction });
                }
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
        while *left > 0
            && let Some(outcome) = self.codecs.try_recv()
        {
            *left -= 1;
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
