//! What is known of the streams under one key: how far their indices have come.

use foldhash::{HashMap, HashMapExt};

/// Indices behind the newest that are told apart: RFC 3711 section 3.3.2 asks for 64 at least, and the restorer of framed packets has
/// 64 places, so that what is older is of no use to it.
const WINDOW: u64 = u64::BITS as u64;

/// The highest index of a stream, and which of those behind it came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    highest: u64,
    /// The highest is the lowest bit.
    came: u64,
}

impl Window {
    pub(super) fn new(index: u64) -> Self {
        Self {
            highest: index,
            came: 0,
        }
    }

    pub(super) fn highest(&self) -> u64 {
        self.highest
    }

    /// Whether it was marked, or is so old that nobody knows.
    pub(super) fn has(&self, index: u64) -> bool {
        match self.highest.checked_sub(index) {
            None => false,
            Some(behind) if behind < WINDOW => self.came >> behind & 1 == 1,
            Some(_) => true,
        }
    }

    /// Moves on to an index that is newer; no effect where it isn't.
    pub(super) fn advance(&mut self, index: u64) {
        if let Some(ahead) = index.checked_sub(self.highest) {
            let ahead = u32::try_from(ahead).unwrap_or(u32::MAX);
            self.came = self.came.checked_shl(ahead).unwrap_or(0);
            self.highest = index;
        }
    }

    /// Advances, and marks an index.
    pub(super) fn mark(&mut self, index: u64) {
        self.advance(index);
        let behind = self.highest - index;
        if behind < WINDOW {
            self.came |= 1 << behind;
        }
    }
}

/// Half of the sequence numbers.
const HALF: u16 = 1 << 15;

/// The packet index that a sequence number most likely has, of a stream whose highest was `highest`
/// (RFC 3711 section 3.3.1). `None`: one that no counter of 32 bits is left for, which ends the key.
///
/// As in libsrtp and Pion, a stream that has not come beyond half of its first round is in it yet: there is no
/// round before, from which an old packet could be.
pub(super) fn guess(highest: Option<u64>, sequence: u16) -> Option<u64> {
    let Some(highest) = highest.filter(|highest| *highest > HALF.into()) else {
        return Some(sequence.into());
    };
    let (round, newest) = (highest >> 16, (highest & 0xffff) as u16);
    let round = if newest < HALF {
        let before = sequence > newest && sequence - newest > HALF;
        round - u64::from(before)
    } else {
        round + u64::from(newest - HALF > sequence)
    };
    (round <= u32::MAX.into()).then_some(round << 16 | u64::from(sequence))
}

/// Streams that come under one key: in the table since the first authentic packet of each.
///
/// Where it is full the streams that nothing was heard of for longest are forgotten. One of them that goes on is
/// taken for a new one: it is understood if its sequence numbers haven't wrapped. Of RTCP its old packets could
/// come again, so that the table has room for more than a call ever has.
#[derive(Debug)]
pub(super) struct Table {
    known: HashMap<u32, Entry>,
    most: usize,
    /// Authentic packets so far, which is what age is measured in.
    turn: u64,
    pub(super) forgotten: u64,
}

#[derive(Debug)]
struct Entry {
    window: Window,
    last: u64,
}

impl Table {
    pub(super) fn new(most: usize) -> Self {
        Self {
            known: HashMap::new(),
            most,
            turn: 0,
            forgotten: 0,
        }
    }

    pub(super) fn get(&self, ssrc: u32) -> Option<&Window> {
        self.known.get(&ssrc).map(|entry| &entry.window)
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.known.len()
    }

    /// A packet with this index was authentic; `mark` remembers that it came.
    pub(super) fn authentic(&mut self, ssrc: u32, index: u64, mark: bool) {
        self.turn += 1;
        if self.known.len() >= self.most && !self.known.contains_key(&ssrc) {
            self.make_room();
        }
        let last = self.turn;
        let entry = self.known.entry(ssrc).or_insert_with(|| Entry {
            window: Window::new(index),
            last,
        });
        entry.last = last;
        if mark {
            entry.window.mark(index);
        } else {
            entry.window.advance(index);
        }
    }

    /// Forgets the quarter that is oldest: at once, because who has keys may send a new stream with each packet.
    fn make_room(&mut self) {
        let mut ages: Vec<u64> = self.known.values().map(|entry| entry.last).collect();
        let quarter = ages.len() / 4;
        let (_, oldest, _) = ages.select_nth_unstable(quarter);
        let oldest = *oldest;
        let before = self.known.len();
        self.known.retain(|_, entry| entry.last > oldest);
        self.forgotten += (before - self.known.len()) as u64;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_index_is_the_nearest_one() {
        for (highest, sequence, index) in [
            (None, 65_535, 65_535),
            (Some(3), 65_535, 65_535),
            (Some(65_535), 0, 65_536),
            (Some(65_535), 32_766, 65_536 + 32_766),
            (Some(65_535), 32_767, 32_767),
            (Some(65_536), 65_535, 65_535),
            (Some(65_536), 1, 65_537),
            (Some(0x3_0005), 0xfff0, 0x2_fff0),
            (Some(0x3_fff0), 5, 0x4_0005),
            (Some(0xffff_ffff_fff0), 0xfff1, 0xffff_ffff_fff1),
        ] {
            assert_eq!(
                guess(highest, sequence),
                Some(index),
                "{highest:?} {sequence}"
            );
        }
        assert_eq!(guess(Some(0xffff_ffff_fff0), 1), None, "the key is used up");
    }

    #[test]
    fn the_oldest_quarter_is_forgotten_and_the_others_stay() {
        let mut table = Table::new(100);
        for ssrc in 0..100 {
            table.authentic(ssrc, 5, true);
        }
        for ssrc in 0..50 {
            table.authentic(ssrc, 6, true);
        }
        table.authentic(1000, 1, true);
        assert_eq!(table.forgotten, 26);
        assert_eq!(table.len(), 75);
        assert!((0..50).all(|ssrc| table.get(ssrc).is_some()));
        assert!((50..76).all(|ssrc| table.get(ssrc).is_none()));
        for ssrc in 0..10_000 {
            table.authentic(ssrc, 6, true);
            assert!(table.len() <= 100);
        }
    }

    proptest! {
        /// Against the words of RFC 3711 section 3.3.1: of the three rounds the one that is nearest.
        #[test]
        fn guesses_are_nearest(highest in 0x1_0000u64..0xff_ffff_ffff, sequence: u16) {
            let index = guess(Some(highest), sequence).unwrap();
            prop_assert_eq!(index & 0xffff, u64::from(sequence));
            let distance = |index: u64| index.abs_diff(highest);
            prop_assert!(distance(index) <= 0x8000);
        }

        /// Nothing comes twice, and nothing new that is within the window is refused.
        #[test]
        fn a_window_knows_what_came(indices in proptest::collection::vec(0u64..400, 1..300)) {
            let mut window = Window::new(indices[0]);
            let mut came = std::collections::HashSet::new();
            for index in indices {
                let highest = came.iter().max().copied().unwrap_or(index);
                let known = window.has(index);
                if came.contains(&index) {
                    prop_assert!(known);
                } else {
                    prop_assert_eq!(known, index + WINDOW <= highest);
                }
                if !known {
                    window.mark(index);
                    came.insert(index);
                }
            }
        }
    }
}
