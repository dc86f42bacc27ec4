//! The line of restored packets, and the engine's jobs that some of them wait for.

use super::types::{DecodeJob, Decoded, Restored};
use super::{Restorer, write};
use crate::hop::window::Frame;
use crate::hop::{IP_UDP, TAG};
use crate::ladder::{CodecId, Rung, Rungs};
use std::time::Instant;

/// Jobs, frames in line and restored packets that nobody has polled or answered.
const MAX_LINE: usize = 128;

/// Jobs of a codec in a row that failed or came too late before its rungs are taken back.
pub(super) const FAILURES: u32 = 2;

#[derive(Debug)]
pub(super) enum Slot {
    Waiting {
        id: u64,
        deadline: Instant,
        codec: CodecId,
        frame: Frame,
        count: u8,
        unit_ms: u8,
        concealed: bool,
    },
    Ready {
        since: Instant,
        packets: Vec<(Vec<u8>, Restored)>,
    },
}

/// How the engine does with the codecs of one kind.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Health {
    pub(super) failures: u32,
    pub(super) resting_until: Option<Instant>,
}

impl Restorer {
    pub(super) fn ask(&mut self, now: Instant, job: DecodeJob, frame: Frame, concealed: bool) {
        self.next_id += 1;
        if self.line.len() >= MAX_LINE || self.jobs.len() >= MAX_LINE {
            self.stats.dropped += 1;
            return;
        }
        self.line.push_back(Slot::Waiting {
            id: job.id,
            deadline: now + self.config.timing.decode_deadline,
            codec: job.codec,
            count: job.count,
            unit_ms: job.unit_ms,
            frame,
            concealed,
        });
        self.jobs.push_back(job);
    }

    /// Puts a native packet in line.
    pub(super) fn pass(&mut self, now: Instant, frame: &Frame) {
        let Some(packet) = write::native(&self.config, frame) else {
            return;
        };
        self.stats.natives += 1;
        let restored = Restored {
            rung: Rung::NATIVE,
            native: true,
            copied: frame.copied,
            concealed: false,
        };
        if self.line.len() >= MAX_LINE {
            self.stats.dropped += 1;
            return;
        }
        self.line.push_back(Slot::Ready {
            since: now,
            packets: vec![(packet, restored)],
        });
    }

    /// The next job for the engine.
    pub fn poll_job(&mut self) -> Option<DecodeJob> {
        self.jobs.pop_front()
    }

    /// The engine did job `id`.
    pub fn decoded(&mut self, now: Instant, id: u64, decoded: Decoded) {
        let Some(at) = self.position(id) else {
            self.stats.late_results += 1;
            return;
        };
        let Some(Slot::Waiting {
            codec,
            frame,
            count,
            unit_ms,
            concealed,
            ..
        }) = self.line.get(at)
        else {
            return;
        };
        if decoded.packets.len() != usize::from(*count) || decoded.packets.iter().any(Vec::is_empty)
        {
            self.failed(now, id);
            return;
        }
        let codec = *codec;
        if !concealed {
            self.unrestored.restored(frame.place);
        }
        let restored = Restored {
            rung: frame.rung.unwrap_or(Rung::NATIVE),
            native: false,
            copied: frame.copied && !concealed,
            concealed: *concealed,
        };
        let packets: Vec<_> = write::decoded(&self.config, frame, *unit_ms, &decoded)
            .into_iter()
            .map(|packet| (packet, restored))
            .collect();
        self.stats.restored += packets.len() as u64;
        if restored.concealed {
            self.stats.concealed += packets.len() as u64;
        }
        if let Some(slot) = self.line.get_mut(at) {
            *slot = Slot::Ready {
                since: now,
                packets,
            };
        }
        *self.health(codec) = Health::default();
        self.settle(now);
    }

    /// The engine couldn't do job `id`, or its queue was full.
    pub fn failed(&mut self, now: Instant, id: u64) {
        match self.position(id) {
            Some(at) => {
                self.stats.failed += 1;
                self.drop_job(now, at);
                self.settle(now);
            }
            None => self.stats.late_results += 1,
        }
    }

    /// The engine takes no jobs of this stream, job `id` the first of them: what it has is given up, and all rungs are taken back
    /// for a while.
    pub fn hangs(&mut self, now: Instant, id: u64) {
        if self.position(id).is_none() {
            self.stats.late_results += 1;
            return;
        }
        let until = now + self.config.timing.rest;
        for health in [&mut self.neural, &mut self.opus] {
            health.failures = FAILURES;
            health.resting_until.get_or_insert(until);
        }
        self.interval.due = Some(now);
        self.give_up_without(Rungs::NONE);
        self.settle(now);
    }

    /// The first place that waits for a codec without a rung in `rungs`.
    pub(super) fn waits_in_vain(&self, rungs: Rungs) -> Option<u64> {
        let places = self.line.iter().filter_map(|slot| match slot {
            Slot::Waiting {
                codec,
                frame,
                concealed: false,
                ..
            } if !has(rungs, *codec) => Some(frame.place),
            _ => None,
        });
        places.min()
    }

    fn position(&self, id: u64) -> Option<usize> {
        let is_it =
            |slot: &Slot| matches!(slot, Slot::Waiting { id: waiting, .. } if *waiting == id);
        self.line.iter().position(is_it)
    }

    fn health(&mut self, codec: CodecId) -> &mut Health {
        match codec {
            CodecId::Lyra3 | CodecId::Lyra6 => &mut self.neural,
            _ => &mut self.opus,
        }
    }

    pub(super) fn drop_job(&mut self, now: Instant, at: usize) {
        let Some(codec) = self.take_out(at) else {
            return;
        };
        let rest = self.config.timing.rest;
        let health = self.health(codec);
        health.failures = health.failures.saturating_add(1);
        if health.failures >= FAILURES && health.resting_until.is_none() {
            health.resting_until = Some(now + rest);
            self.interval.due = Some(now);
        }
        if self.unrestored.is_news() {
            self.interval.due = Some(now);
        }
    }

    /// Takes the job at `at` out of the line.
    fn take_out(&mut self, at: usize) -> Option<CodecId> {
        let Slot::Waiting {
            id,
            codec,
            frame,
            concealed,
            ..
        } = self.line.remove(at)?
        else {
            return None;
        };
        self.jobs.retain(|job| job.id != id);
        if !concealed {
            self.unrestored.failed(frame.place);
        }
        Some(codec)
    }

    /// Takes the jobs out of the line that none of `rungs` needs.
    pub(super) fn give_up_without(&mut self, rungs: Rungs) {
        let lost = |slot: &Slot| match slot {
            Slot::Waiting { codec, .. } => !has(rungs, *codec),
            Slot::Ready { .. } => false,
        };
        while let Some(at) = self.line.iter().position(lost) {
            self.stats.failed += 1;
            self.take_out(at);
        }
    }

    /// Moves what is ready and has waited enough for what should go before it.
    pub(super) fn settle(&mut self, now: Instant) {
        let wait = self.config.timing.ready_wait;
        let mut at = 0;
        while let Some(slot) = self.line.get(at) {
            match slot {
                Slot::Ready { since, .. } if at == 0 || *since + wait <= now => {
                    let Some(Slot::Ready { packets, .. }) = self.line.remove(at) else {
                        return;
                    };
                    for packet in packets {
                        if !self.said.is_new(&packet.0) {
                            self.stats.duplicates += 1;
                            continue;
                        }
                        let bytes = (packet.0.len() + IP_UDP + TAG) as u64;
                        self.interval.restored_bytes += bytes;
                        self.stats.restored_bytes += bytes;
                        if self.out.len() >= MAX_LINE {
                            self.out.pop_front();
                            self.stats.dropped += 1;
                        }
                        self.out.push_back(packet);
                    }
                }
                _ => at += 1,
            }
        }
    }

    /// Writes the next restored RTP packet into `out`.
    pub fn poll_packet(&mut self, out: &mut Vec<u8>) -> Option<Restored> {
        let (packet, restored) = self.out.pop_front()?;
        out.clear();
        out.extend(packet);
        Some(restored)
    }
}

fn has(rungs: Rungs, codec: CodecId) -> bool {
    rungs.iter().any(|rung| rung.codec() == codec)
}
