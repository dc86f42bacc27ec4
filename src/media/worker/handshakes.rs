//! DTLS handshakes beside calls. A record of one costs a hundred times what a packet of media does (signatures, key exchange;
//! docs/benchmarks.md), so that in a join storm, or where somebody begins anew all the time, a turn does some and the others
//! wait: in the order in which they came, few of each peer connection, and what comes when there is no room is lost, as on a
//! network. DTLS sends it again.

use auralink_proto::leg::{Leg, LegState};
use auralink_proto::packet::{Kind, classify};
use auralink_proto::relay::Side;
use auralink_proto::stun::Path;
use std::collections::VecDeque;

/// Datagrams of handshakes in one turn: at a fifth of a millisecond for the dearest they are 3 ms in which no media moves.
pub(super) const A_TURN: usize = 16;

/// Datagrams that wait: 16 turns' worth, so that none waits for longer than 50 ms.
const MOST: usize = A_TURN * 16;

/// Of one peer connection: the longest flight of each of its legs, a certificate in fragments, and it once more.
const MOST_OF_ONE: usize = 8;

/// A datagram that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    /// Whose: its slot, and its number, because a slot may have another owner by then.
    pub(super) key: usize,
    pub(super) id: u64,
    pub(super) side: Side,
    pub(super) path: Path,
    pub(super) datagram: Vec<u8>,
}

/// What a turn may still do, and what waits for the next.
#[derive(Debug, Default)]
pub(super) struct Handshakes {
    left: usize,
    waiting: VecDeque<Waiting>,
}

impl Handshakes {
    /// Whether a datagram may cost this leg what a handshake costs. Whatever its first record is: the record of a handshake
    /// may come behind any other. A leg refuses what comes from where nobody has proved to be before it reads it, so that a
    /// stranger takes nobody's place here; and one that has its keys or is over does no more of a handshake.
    pub(super) fn is_one(leg: &Leg, path: &Path, datagram: &[u8]) -> bool {
        classify(datagram) == Kind::Dtls
            && matches!(leg.state(), LegState::Checking | LegState::Handshaking)
            && (leg.path() == Some(*path) || leg.knows(path))
    }

    /// A turn begins.
    pub(super) fn turn(&mut self) {
        self.left = A_TURN;
    }

    /// Whether a datagram that has just come may be handled in this turn. Nobody overtakes those that wait.
    pub(super) fn admit(&mut self) -> bool {
        let admitted = self.left > 0 && self.waiting.is_empty();
        self.left -= usize::from(admitted);
        admitted
    }

    /// Keeps one for later; `false`: it is lost.
    pub(super) fn defer(&mut self, what: Waiting) -> bool {
        let of_it = self.waiting.iter().filter(|w| w.id == what.id).count();
        let room = self.waiting.len() < MOST && of_it < MOST_OF_ONE;
        if room {
            self.waiting.push_back(what);
        }
        room
    }

    /// The next of those that wait, as long as the turn has time for it.
    pub(super) fn next(&mut self) -> Option<Waiting> {
        if self.left == 0 {
            return None;
        }
        let next = self.waiting.pop_front()?;
        self.left -= 1;
        Some(next)
    }

    /// Whether any wait.
    pub(super) fn any(&self) -> bool {
        !self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waiting(id: u64) -> Waiting {
        let addr = std::net::SocketAddr::from(([127, 0, 0, 1], 1));
        Waiting {
            key: 0,
            id,
            side: Side::Client,
            path: Path {
                local: addr,
                remote: addr,
                tcp: false,
            },
            datagram: vec![22],
        }
    }

    /// One comes with thousands, then another with one.
    #[test]
    fn who_begins_a_thousand_handshakes_keeps_no_other_waiting() {
        let mut handshakes = Handshakes::default();
        handshakes.turn();
        let at_once = (0..1000).filter(|_| handshakes.admit() || handshakes.defer(waiting(1)));
        assert_eq!(at_once.count(), A_TURN + MOST_OF_ONE);
        assert!(!handshakes.admit() && handshakes.defer(waiting(2)));
        handshakes.turn();
        let order: Vec<u64> = std::iter::from_fn(|| handshakes.next())
            .map(|w| w.id)
            .collect();
        assert_eq!(order, [1, 1, 1, 1, 1, 1, 1, 1, 2]);
        assert!(!handshakes.any() && handshakes.admit());
    }

    #[test]
    fn a_turn_does_so_many_and_no_more_than_some_turns_worth_wait() {
        let mut handshakes = Handshakes::default();
        let kept = (0..10_000)
            .filter(|id| handshakes.defer(waiting(*id)))
            .count();
        assert_eq!(kept, MOST);
        for turn in 0..16u64 {
            handshakes.turn();
            let done: Vec<u64> = std::iter::from_fn(|| handshakes.next())
                .map(|w| w.id)
                .collect();
            let first = turn * A_TURN as u64;
            assert_eq!(done, Vec::from_iter(first..first + A_TURN as u64));
            assert!(!handshakes.admit());
        }
        assert!(!handshakes.any());
    }
}
