//! Handshake messages out of their fragments (RFC 6347 section 4.2.3), which come in any order,
//! overlap and repeat themselves: in bounded memory, and in time that their bytes pay for.

/// Type (1), length (3), message number (2), fragment offset (3), fragment length (3).
const HEADER: usize = 12;

/// A part of a message.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fragment<'a> {
    pub(super) kind: u8,
    /// Of the whole message.
    pub(super) length: usize,
    pub(super) number: u16,
    pub(super) offset: usize,
    pub(super) body: &'a [u8],
}

fn first(body: &[u8]) -> Option<(Fragment<'_>, &[u8])> {
    let header = body.first_chunk::<HEADER>()?;
    let [kind, l0, l1, l2, n0, n1, o0, o1, o2, f0, f1, f2] = *header;
    let u24 = |a, b, c| usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c);
    let (bytes, rest) = body.split_at_checked(HEADER + u24(f0, f1, f2))?;
    let fragment = Fragment {
        kind,
        length: u24(l0, l1, l2),
        number: u16::from_be_bytes([n0, n1]),
        offset: u24(o0, o1, o2),
        body: &bytes[HEADER..],
    };
    let fits = fragment.offset + fragment.body.len() <= fragment.length;
    fits.then_some((fragment, rest))
}

/// The fragments of a record's body, up to the first that cannot be one.
pub(super) fn fragments(mut body: &[u8]) -> impl Iterator<Item = Fragment<'_>> {
    std::iter::from_fn(move || {
        let (fragment, rest) = first(body)?;
        body = rest;
        Some(fragment)
    })
}

/// Header of the part of a message of `len` bytes that goes from an offset to its end.
pub(super) fn header(kind: u8, number: u16, len: usize, offset: usize) -> [u8; HEADER] {
    // Bounded far below 2²⁴ by `messages::max_len`.
    let u24 = |n: usize| u32::try_from(n).unwrap_or(0).to_be_bytes();
    let ([_, l0, l1, l2], [_, o0, o1, o2]) = (u24(len), u24(offset));
    let [_, f0, f1, f2] = u24(len - offset);
    let [n0, n1] = number.to_be_bytes();
    [kind, l0, l1, l2, n0, n1, o0, o1, o2, f0, f1, f2]
}

/// One message on its way.
///
/// Nothing in the clear is authentic, so fragments may contradict each other. What came last is
/// believed, and what contradicts it is forgotten: the peer repeats the message until it is
/// answered, a forgery heals with the next repetition, and who forges all the time could as well
/// cut the wire. Were the first believed, one forged byte would end the handshake.
#[derive(Debug, Default)]
pub(super) struct Assembly {
    kind: u8,
    length: usize,
    /// Grows only; bytes that have not come are never read.
    body: Vec<u8>,
    /// A bit for each byte of the message that has come.
    came: Vec<u64>,
    count: usize,
    /// A fragment of it came: a message may be empty.
    begun: bool,
}

impl Assembly {
    /// Takes a fragment of a message that is no longer than its type may be. `false`: nothing is other than it was, so that who has
    /// read the message need not read it again. A datagram has room for a hundred fragments that say nothing.
    pub(super) fn add(&mut self, fragment: &Fragment) -> bool {
        if fragment.body.is_empty() && fragment.length > 0 {
            return false;
        }
        let mut news = false;
        if !self.begun || self.kind != fragment.kind || self.length != fragment.length {
            self.begin(fragment);
            news = true;
        }
        let end = fragment.offset + fragment.body.len();
        let clash = (fragment.offset..end).zip(fragment.body).any(|(at, byte)| {
            let came = self.came[at / 64] & (1 << (at % 64)) != 0;
            came && self.body[at] != *byte
        });
        if clash {
            self.begin(fragment);
        }
        self.body[fragment.offset..end].copy_from_slice(fragment.body);
        for at in fragment.offset..end {
            let (word, bit) = (&mut self.came[at / 64], 1 << (at % 64));
            let first = *word & bit == 0;
            self.count += usize::from(first);
            *word |= bit;
            // What clashed has been forgotten, and comes for the first time.
            news |= first;
        }
        news
    }

    fn begin(&mut self, fragment: &Fragment) {
        self.begun = true;
        self.kind = fragment.kind;
        self.length = fragment.length;
        self.count = 0;
        if self.body.len() < self.length {
            self.body.reserve_exact(self.length - self.body.len());
            self.body.resize(self.length, 0);
        }
        let words = self.length.div_ceil(64);
        self.came.clear();
        self.came.reserve_exact(words);
        self.came.resize(words, 0);
    }

    /// Type and body of the message, if all of it has come.
    pub(super) fn whole(&self) -> Option<(u8, &[u8])> {
        (self.begun && self.count == self.length).then(|| (self.kind, &self.body[..self.length]))
    }

    /// Forgets what came.
    pub(super) fn clear(&mut self) {
        self.begun = false;
    }

    /// Bytes that it takes.
    pub(super) fn held(&self) -> usize {
        self.body.capacity() + 8 * self.came.capacity()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use proptest::prelude::*;

    fn piece(message: &[u8], offset: usize, len: usize) -> Fragment<'_> {
        Fragment {
            kind: 11,
            length: message.len(),
            number: 2,
            offset,
            body: &message[offset..offset + len],
        }
    }

    proptest! {
        #[test]
        fn fragments_in_any_order_make_the_message(
            message in proptest::collection::vec(any::<u8>(), 1..700),
            seed in any::<u64>(),
            size in 1usize..90,
        ) {
            let mut pieces: Vec<(usize, usize)> = (0..message.len())
                .step_by(size)
                // Overlapping the next by some.
                .map(|at| (at, (size + size / 3).min(message.len() - at)))
                .collect();
            // Each comes twice, in an order of its own.
            pieces.extend(pieces.clone());
            pieces.sort_by_key(|(at, len)| (*at as u64 + 1).wrapping_mul(seed | 1).rotate_left(u32::try_from(*len % 60).unwrap()));
            let mut assembly = Assembly::default();
            for (at, len) in pieces {
                assembly.add(&piece(&message, at, len));
            }
            prop_assert_eq!(assembly.whole(), Some((11, &message[..])));
        }

        #[test]
        fn what_the_peer_repeats_wins_over_what_was_forged(
            message in proptest::collection::vec(any::<u8>(), 1..300),
            forged in proptest::collection::vec((any::<u8>(), 0usize..400, proptest::collection::vec(any::<u8>(), 0..50)), 0..20),
            size in 1usize..90,
        ) {
            let mut assembly = Assembly::default();
            for (kind, offset, body) in &forged {
                let length = offset + body.len() + usize::from(*kind);
                assembly.add(&Fragment { kind: 11 + kind % 2, length, number: 2, offset: *offset, body });
            }
            // Once to begin anew, once to be whole.
            for _ in 0..2 {
                for at in (0..message.len()).step_by(size) {
                    assembly.add(&piece(&message, at, size.min(message.len() - at)));
                }
            }
            prop_assert_eq!(assembly.whole(), Some((11, &message[..])));
        }

        #[test]
        fn anything_is_read_without_a_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            for fragment in fragments(&body) {
                prop_assert!(fragment.offset + fragment.body.len() <= fragment.length);
            }
        }
    }

    #[test]
    fn a_record_may_hold_several_fragments() {
        let body = [
            &header(14, 5, 0, 0)[..],
            &header(16, 6, 3, 0),
            b"abc",
            // Longer than what is left.
            &header(15, 7, 9, 0),
            b"abc",
        ]
        .concat();
        let read: Vec<_> = fragments(&body)
            .map(|f| (f.kind, f.number, f.body))
            .collect();
        assert_eq!(read, [(14, 5, &b""[..]), (16, 6, b"abc")]);
    }

    #[test]
    fn what_says_nothing_new_changes_nothing() {
        let message: Vec<u8> = (0..100).collect();
        let mut assembly = Assembly::default();
        assert!(!assembly.add(&piece(&message, 0, 0)));
        assert!(assembly.add(&piece(&message, 0, 60)));
        assert!(assembly.add(&piece(&message, 40, 60)));
        for (offset, len) in [(0, 0), (100, 0), (0, 100), (7, 1)] {
            assert!(!assembly.add(&piece(&message, offset, len)));
        }
        // Nor is the message forgotten over an empty part of one of another length.
        assert!(!assembly.add(&piece(&message[..50], 0, 0)));
        assert_eq!(assembly.whole(), Some((11, &message[..])));
        assert!(assembly.add(&piece(&[7; 100], 50, 1)));
        assert_eq!(assembly.whole(), None);
    }

    #[test]
    fn an_empty_message_is_whole_once_it_came() {
        let mut assembly = Assembly::default();
        assert_eq!(assembly.whole(), None);
        let empty = Fragment {
            kind: 14,
            length: 0,
            number: 5,
            offset: 0,
            body: &[],
        };
        assert!(assembly.add(&empty));
        assert!(!assembly.add(&empty));
        assert_eq!(assembly.whole(), Some((14, &[][..])));
        assembly.clear();
        assert_eq!(assembly.whole(), None);
    }
}
