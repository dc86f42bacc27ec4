//! What is counted from one report to the next.

use crate::aic::Hint;
use crate::hop::Report;
use crate::hop::window::SPAN;
use crate::ladder::Rungs;
use std::time::{Duration, Instant};

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
    /// When to look whether a report is due.
    pub(super) due: Option<Instant>,
    /// Looks since the last report at which there was nothing to say.
    quiet: u8,
    /// What the last report said, and how often it is to be said again: a report may be lost.
    said: Option<Rungs>,
    again: u8,
    /// Arrival and send time of the last packet, in 1/65,536 s.
    pub(super) transit: Option<(u32, u32)>,
    /// In 1/16 of 1/65,536 s.
    pub(super) jitter: u32,
}

/// How often it is looked.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Rungs that changed are told so many times: at once and at the next looks. A report may be lost.
const TIMES: u8 = 4;

/// Where speech is to be sent again it can't wait for the next look: the second time is so soon.
const AGAIN: Duration = Duration::from_millis(50);

/// A hop that loses nothing says so at every so many looks: a report each second would be 3 % of the
/// speech that it speaks of.
const QUIET_LOOKS: u8 = 5;

impl Interval {
    /// Whether a look at `now` makes a report: something was lost, the rungs changed, there is other news, or
    /// nothing was said for long.
    pub(super) fn wants(&mut self, now: Instant, rungs: Rungs, news: bool) -> bool {
        self.due = None;
        self.quiet = self.quiet.saturating_add(1);
        if self.said != Some(rungs) {
            self.said = Some(rungs);
            self.again = TIMES;
        }
        if self.again > 0 || news || self.lost > 0 || self.quiet >= QUIET_LOOKS {
            self.again = self.again.saturating_sub(1);
            return true;
        }
        self.due = Some(now + LOOK_EVERY);
        false
    }

    /// A packet sent at `sent` arrived at `now` (RFC 3550 section 6.4.1).
    pub(super) fn arrived(&mut self, now: u32, sent: u32) {
        if let Some((last_now, last_sent)) = self.transit.replace((now, sent)) {
            let way = now.wrapping_sub(last_now);
            let change = way.wrapping_sub(sent.wrapping_sub(last_sent));
            let change = Hint::sent_difference(change).unsigned_abs();
            self.jitter = self.jitter - (self.jitter >> 4) + change;
        }
    }

    pub(super) fn report(
        &mut self,
        now: Instant,
        ssrc: u32,
        highest: u64,
        rungs: Rungs,
        unrestored: Option<u64>,
    ) -> Report {
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
            unrestored: unrestored.map_or(0, |from| {
                u16::try_from((highest.saturating_sub(from) + 1).min(SPAN)).unwrap_or(0)
            }),
        };
        *self = Self {
            transit: self.transit,
            jitter: self.jitter,
            said: self.said,
            again: self.again,
            due: (self.again == TIMES - 1 && unrestored.is_some()).then(|| now + AGAIN),
            ..Self::default()
        };
        report
    }
}
