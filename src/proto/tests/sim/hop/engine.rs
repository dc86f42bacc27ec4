//! Engines that carry the number of an original in place of its speech, with codec bytes of the
//! right length, so that what was restored can be told from what was said.

use super::source::speech;
use crate::net::Rng;
use auralink_proto::hop::{DecodeJob, Decoded, EncodeJob, Encoded, Packer, Refusal, Restorer};
use auralink_proto::ladder::{CodecId, Rung};
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// How an engine behaves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Manners {
    pub(super) delay: Duration,
    /// At most so much more.
    pub(super) jitter: Duration,
    /// Takes jobs and does nothing.
    pub(super) stopped: bool,
    /// Probability that a group is refused.
    pub(super) refuses: f64,
    /// Probability that a group is lifted to L4, as a speech gate does.
    pub(super) lifts: f64,
}

impl Default for Manners {
    fn default() -> Self {
        Self {
            delay: Duration::from_millis(3),
            jitter: Duration::ZERO,
            stopped: false,
            refuses: 0.0,
            lifts: 0.0,
        }
    }
}

/// One side's engine; jobs come back in order.
#[derive(Debug)]
pub(super) struct Engine<J> {
    pub(super) manners: Manners,
    queue: VecDeque<(Instant, J)>,
    free_at: Option<Instant>,
    pub(super) jobs: u64,
}

impl<J> Engine<J> {
    pub(super) fn new(manners: Manners) -> Self {
        Self {
            manners,
            queue: VecDeque::new(),
            free_at: None,
            jobs: 0,
        }
    }

    fn ask(&mut self, now: Instant, job: J, rng: &mut Rng) {
        self.jobs += 1;
        if self.manners.stopped {
            return;
        }
        let jitter = u64::try_from(self.manners.jitter.as_micros()).unwrap();
        let delay = self.manners.delay + Duration::from_micros(rng.next() % (jitter + 1));
        let due = (now + delay).max(self.free_at.unwrap_or(now));
        self.free_at = Some(due);
        self.queue.push_back((due, job));
    }

    fn done(&mut self, now: Instant) -> Option<J> {
        let due = self.queue.front().is_some_and(|(due, _)| *due <= now);
        due.then(|| self.queue.pop_front())
            .flatten()
            .map(|(_, job)| job)
    }
}

/// Which original an Opus payload of [`speech`] is.
fn number(media: &[u8]) -> [u8; 2] {
    let number = [media[1], media[2]];
    assert_eq!(
        media,
        speech(u16::from_be_bytes(number)),
        "not what was said"
    );
    number
}

impl Engine<EncodeJob> {
    pub(super) fn turn(&mut self, now: Instant, packer: &mut Packer, rng: &mut Rng) {
        while let Some(job) = packer.poll_job() {
            self.ask(now, job, rng);
        }
        while let Some(job) = self.done(now) {
            if rng.chance(self.manners.refuses) {
                packer.refused(now, job.id, Refusal::Undecodable);
                continue;
            }
            let rung = if rng.chance(self.manners.lifts) {
                Rung::L4
            } else {
                job.rung
            };
            packer.encoded(now, job.id, encode(&job, rung));
        }
    }
}

fn encode(job: &EncodeJob, rung: Rung) -> Encoded {
    let codec = rung.codec();
    let mut payload = Vec::new();
    for media in &job.packets {
        let [hi, lo] = number(media);
        let frame: &[u8] = match codec {
            CodecId::Lyra3 => &[hi, lo, 3, 3, 3, 3, 3, 3],
            CodecId::Lyra6 => &[hi, lo, 3, 3, 3, 3, 3, 3, 6, 6, 6, 6, 6, 6, 6],
            _ => &[hi, lo, 9],
        };
        payload.extend(frame);
    }
    Encoded {
        codec,
        payload,
        gain: -7,
        unit_ms: 20,
        voice: true,
        rung,
    }
}

impl Engine<DecodeJob> {
    pub(super) fn turn(&mut self, now: Instant, restorer: &mut Restorer, rng: &mut Rng) {
        while let Some(job) = restorer.poll_job() {
            self.ask(now, job, rng);
        }
        while let Some(job) = self.done(now) {
            restorer.decoded(now, job.id, decode(&job));
        }
    }
}

/// What a concealed original holds.
pub(super) const MADE_UP: &[u8] = b"made up";

fn decode(job: &DecodeJob) -> Decoded {
    assert_eq!(job.gain, -7);
    assert_eq!(job.unit_ms, 20);
    let count = usize::from(job.count);
    let packets = if job.lost {
        assert!(job.payload.is_empty());
        vec![MADE_UP.to_vec(); count]
    } else {
        let frame = match job.codec {
            CodecId::Lyra3 => 8,
            CodecId::Lyra6 => 15,
            _ => 3,
        };
        assert_eq!(job.payload.len(), frame * count);
        let frames = job.payload.chunks(frame);
        frames
            .map(|frame| speech(u16::from_be_bytes([frame[0], frame[1]])))
            .collect()
    };
    Decoded {
        levels: vec![30; count],
        packets,
        voice: true,
    }
}
