//! What was done to a stream's packets, so that one which is asked for again (NACK) goes as it did the first time:
//! an SRTP index must not be used for two payloads (RFC 3711 section 9.1).

/// Numbers up to this one of a stream have been used, nobody knows any more for which payloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Floor(pub(crate) u16);

impl Floor {
    /// How far behind the stream it stays: 80 s of 20 ms, beyond what anybody asks for again, and within the half of
    /// the numbers that a number can be told to be behind of.
    const BEHIND: u16 = 4096;

    /// Whether a number is above it.
    pub(crate) fn admits(&mut self, sequence: u16) -> bool {
        let ahead = sequence.wrapping_sub(self.0).cast_signed();
        if ahead <= 0 {
            return false;
        }
        if ahead.unsigned_abs() > 2 * Self::BEHIND {
            self.0 = sequence.wrapping_sub(Self::BEHIND);
        }
        true
    }
}

/// What is done to a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Done {
    /// Its redundancy is shed.
    pub(crate) shed: bool,
    /// It is wrapped as RED.
    pub(crate) wrap: bool,
}

/// What was done to a stream's last packets.
#[derive(Debug, Default)]
pub(crate) struct Past {
    newest: Option<u16>,
    shed: Bits,
    wrap: Bits,
}

impl Past {
    /// Of a stream whose packets up to this one went as they came.
    pub(crate) fn after(newest: Option<u16>) -> Self {
        let bits = || Bits {
            older: newest.map_or(Older::Nothing, |_| Older::All(false)),
            ..Bits::default()
        };
        Self {
            newest,
            shed: bits(),
            wrap: bits(),
        }
    }

    pub(crate) fn newest(&self) -> Option<u16> {
        self.newest
    }

    /// Something was done to some packet.
    pub(crate) fn is_any(&self) -> bool {
        self.shed.is_any() || self.wrap.is_any()
    }

    /// What is to be done to this packet: `now` to a new one. None: nobody knows any more what was, and it must not go.
    pub(crate) fn of(&mut self, sequence: u16, now: Done) -> Option<Done> {
        let newest = *self.newest.get_or_insert(sequence.wrapping_sub(1));
        let ahead = sequence.wrapping_sub(newest).cast_signed();
        if ahead <= 0 {
            let behind = u32::from(ahead.unsigned_abs());
            return Some(Done {
                shed: self.shed.of(behind)?,
                wrap: self.wrap.of(behind)?,
            });
        }
        self.newest = Some(sequence);
        let passed = u32::from(ahead.unsigned_abs());
        self.shed.push(passed, now.shed);
        self.wrap.push(passed, now.wrap);
        Some(now)
    }
}

/// What was decided of all that is older than [`Bits::last`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Older {
    /// There is none.
    #[default]
    Nothing,
    All(bool),
    /// Of some this, of some that.
    Mixed,
}

impl Older {
    fn with(self, decided: bool) -> Self {
        match self {
            Self::Nothing => Self::All(decided),
            Self::All(before) if before == decided => self,
            _ => Self::Mixed,
        }
    }
}

/// One decision about each packet.
#[derive(Debug, Default)]
struct Bits {
    /// Of the last ones; the newest is the lowest bit.
    last: u128,
    /// How many of them there are.
    known: u32,
    older: Older,
}

impl Bits {
    fn is_any(&self) -> bool {
        self.last != 0 || !matches!(self.older, Older::Nothing | Older::All(false))
    }

    fn of(&mut self, behind: u32) -> Option<bool> {
        if behind < self.known {
            return Some(self.last >> behind & 1 == 1);
        }
        match self.older {
            // It was overtaken by the first of all.
            Older::Nothing => {
                self.older = Older::All(false);
                Some(false)
            }
            Older::All(decided) => Some(decided),
            Older::Mixed => None,
        }
    }

    fn push(&mut self, passed: u32, decided: bool) {
        // What was overtaken goes as it would have before the newest.
        let before = self.last & 1 == 1;
        let room = u128::BITS - self.known;
        if passed > room {
            // So many of the oldest fall out, and of what was overtaken all that is more.
            let out = (passed - room).min(self.known);
            let oldest = self.last >> (self.known - out);
            if oldest.count_ones() > 0 {
                self.older = self.older.with(true);
            }
            if oldest.count_ones() < out {
                self.older = self.older.with(false);
            }
            if passed > u128::BITS {
                self.older = self.older.with(before);
            }
        }
        let kept = self.last.checked_shl(passed).unwrap_or(0);
        let between = if before {
            !(u128::MAX.checked_shl(passed).unwrap_or(0))
        } else {
            0
        };
        self.last = (kept | between) & !1 | u128::from(decided);
        self.known = (self.known + passed).min(u128::BITS);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    const SHED: Done = Done {
        shed: true,
        wrap: false,
    };
    const NOT: Done = Done {
        shed: false,
        wrap: false,
    };

    #[test]
    fn what_is_too_old_goes_as_all_before_went_or_not_at_all() {
        let mut past = Past::default();
        for sequence in 0..300 {
            past.of(sequence, SHED);
        }
        assert_eq!(past.of(5, NOT), Some(SHED), "all were");
        for sequence in 300..400 {
            past.of(sequence, NOT);
        }
        assert_eq!(past.of(299, NOT), Some(SHED));
        assert_eq!(past.of(5, NOT), Some(SHED));
        for sequence in 400..500 {
            past.of(sequence, NOT);
        }
        assert_eq!(past.of(299, NOT), None, "some were");
        assert_eq!(past.of(450, SHED), Some(NOT));
        assert!(past.is_any());
    }

    #[test]
    fn what_went_before_a_rule_came_goes_so_again() {
        let mut past = Past::after(Some(10));
        assert_eq!(past.of(10, SHED), Some(NOT));
        assert_eq!(past.of(5, SHED), Some(NOT));
        assert_eq!(past.of(11, SHED), Some(SHED));
        assert_eq!(
            (past.of(11, NOT), past.of(10, SHED)),
            (Some(SHED), Some(NOT))
        );
    }

    #[test]
    fn a_floor_follows_its_stream_around() {
        let mut floor = Floor(60_000);
        assert!(!floor.admits(60_000) && !floor.admits(40_000) && floor.admits(60_001));
        for sequence in (0..200_000u32).map(|n| (60_001 + n) as u16) {
            assert!(floor.admits(sequence));
            assert!(floor.admits(sequence.wrapping_sub(50)) || sequence < 60_060);
        }
    }

    proptest! {
        /// However packets come, none goes in two ways.
        #[test]
        fn a_number_goes_one_way(steps in proptest::collection::vec((-200i32..200, any::<bool>(), any::<bool>()), 1..600)) {
            let mut past = Past::default();
            let mut went: HashMap<i32, Done> = HashMap::new();
            // Numbers don't come again: that is the rollover counter's doing.
            let (mut at, mut newest) = (30_000i32, 30_000i32);
            for (step, shed, wrap) in steps {
                at = (at.max(newest - 400) + step).clamp(1, 60_000);
                newest = newest.max(at);
                if let Some(done) = past.of(u16::try_from(at).unwrap(), Done { shed, wrap }) {
                    let before = went.entry(at).or_insert(done);
                    prop_assert_eq!(*before, done, "{}", at);
                }
            }
        }
    }
}
