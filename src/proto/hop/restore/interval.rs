//! What is counted from one report to the next.

use crate::hop::Report;
use crate::ladder::Rungs;
use std::time::Instant;

/// What a report counts.
#[derive(Debug, Default)]
pub(super) struct Interval {
    /// Packets whose turn came.
    pub(super) turns: u64,
    /// Of those, packets that hadn't come themselves by then, less those that came later.
    pub(super) lost: u64,
    /// Packets of which no copy had come either.
    pub(super) missing: u64,
    pub(super) hop_bytes: u64,
    pub(super) restored_bytes: u64,
    /// When the next report is due.
    pub(super) due: Option<Instant>,
    /// Arrival and send time of the last packet, in 1/65,536 s.
    pub(super) transit: Option<(u32, u32)>,
    /// In 1/16 of 1/65,536 s.
    pub(super) jitter: u32,
}

impl Interval {
    /// A packet sent at `sent` arrived at `now` (RFC 3550 section 6.4.1).
    pub(super) fn arrived(&mut self, now: u32, sent: u32) {
        if let Some((last_now, last_sent)) = self.transit.replace((now, sent)) {
            let way = now.wrapping_sub(last_now);
            let change = way.wrapping_sub(sent.wrapping_sub(last_sent));
            let change = change.cast_signed().unsigned_abs().min(1 << 24);
            self.jitter = self.jitter - (self.jitter >> 4) + change;
        }
    }

    pub(super) fn report(&mut self, ssrc: u32, highest: u64, rungs: Rungs) -> Report {
        let fraction = |lost: u64| {
            let lost = (lost.min(self.turns) * 256)
                .checked_div(self.turns)
                .unwrap_or(0);
            u8::try_from(lost).unwrap_or(u8::MAX)
        };
        let ratio = (self.hop_bytes * 255)
            .checked_div(self.restored_bytes)
            .unwrap_or(255);
        let report = Report {
            ssrc,
            fraction_lost: fraction(self.lost),
            fraction_missing: fraction(self.missing),
            rungs,
            highest: u16::try_from(highest & 0xffff).unwrap_or(0),
            jitter: self.jitter >> 4,
            ratio: u8::try_from(ratio).unwrap_or(u8::MAX),
        };
        *self = Self {
            transit: self.transit,
            jitter: self.jitter,
            ..Self::default()
        };
        report
    }
}
