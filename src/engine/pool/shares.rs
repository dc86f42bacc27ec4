//! How the peer connections whose jobs go to a codec thread share its queue.
//!
//! A share is a peer connection's, with all tracks that it has on this thread. A participant has up to two of them, one to publish
//! and one to subscribe, and so up to two shares.
//!
//! Each may have as many jobs waiting as there are free places: alone it takes half of the queue, two take a third each, and
//! some places are always left for who comes next (dynamic thresholds: Choudhury and Hahne, IEEE/ACM Transactions on Networking
//! 6(2), 1998). So where there is too much to do, those who ask for most are refused first.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::atomic::{AtomicU16, Ordering};

use auralink_proto::relay::relay_of_track;

/// Places in the table. Two peer connections that fall into one have a share together, which is seldom, and does no harm while there is room.
const PLACES: usize = 512;

/// Jobs that wait, by whose they are.
pub(crate) struct Shares([AtomicU16; PLACES]);

impl Default for Shares {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU16::new(0)))
    }
}

impl Shares {
    /// The place of a port's track: that of its peer connection.
    pub(crate) fn of(port: u32, track: u64) -> usize {
        let mut hasher = DefaultHasher::new();
        (port, relay_of_track(track)).hash(&mut hasher);
        hasher.finish() as usize % PLACES
    }

    /// Takes a place for one more job where `free` are left in the queue; `always`: whatever else waits.
    pub(crate) fn take(&self, place: usize, free: usize, always: bool) -> bool {
        let Some(waiting) = self.0.get(place) else {
            return false;
        };
        let before = waiting.fetch_add(1, Ordering::Relaxed);
        let taken = always || usize::from(before) < free;
        if !taken {
            waiting.fetch_sub(1, Ordering::Relaxed);
        }
        taken
    }

    /// The job waits no longer.
    pub(crate) fn give_back(&self, place: usize) {
        if let Some(waiting) = self.0.get(place) {
            waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fills a queue of 256 with what each of `who` asks for, one job each in turn; how many each got.
    fn fill(who: &[u64]) -> Vec<usize> {
        let shares = Shares::default();
        let mut got = vec![0; who.len()];
        for _ in 0..1000 {
            for (n, relay) in who.iter().enumerate() {
                let free = 256 - got.iter().sum::<usize>();
                let place = Shares::of(0, relay << 16);
                got[n] += usize::from(shares.take(place, free, false));
            }
        }
        got
    }

    #[test]
    fn nobody_fills_a_queue_for_the_others() {
        assert_eq!(fill(&[1]), [128]);
        // All tracks of a peer connection have one share.
        assert_eq!(fill(&[1, 1, 1, 1]).iter().sum::<usize>(), 128);
        let two = fill(&[1, 2]);
        assert!(two.iter().all(|n| (85..=86).contains(n)), "{two:?}");
        let many: Vec<u64> = (0..40).collect();
        let many = fill(&many);
        assert!(
            many.iter().sum::<usize>() < 256,
            "a place for who comes next"
        );
        assert!(many.iter().all(|n| (1..=7).contains(n)), "{many:?}");
    }

    #[test]
    fn what_was_given_back_can_be_taken_again() {
        let shares = Shares::default();
        for _ in 0..10_000 {
            assert!(shares.take(3, 1, false));
            assert!(!shares.take(3, 1, false));
            assert!(shares.take(3, 0, true), "the end of a track");
            shares.give_back(3);
            shares.give_back(3);
        }
    }
}
