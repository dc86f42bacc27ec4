//! Packets that went on, so that no number goes on twice with other bytes.

use rustc_hash::FxBuildHasher;
use std::hash::BuildHasher;

/// Packets that went on lately, by sequence number. The next leg's SRTP must not see a number twice with
/// other bytes (RFC 3711 section 9.1): one that was decoded, or made up, and then comes as it was.
#[derive(Debug)]
pub(super) struct Said {
    lately: Vec<Option<(u16, u64)>>,
    /// The highest number that went on.
    newest: Option<u16>,
    /// The highest one that nothing is known of, as long as it is within what is told apart.
    unknown: Option<u16>,
}

/// Ten seconds of 20 ms.
const SAID: u16 = 512;

impl Default for Said {
    fn default() -> Self {
        Self {
            lately: vec![None; usize::from(SAID)],
            newest: None,
            unknown: None,
        }
    }
}

impl Said {
    /// Numbers up to this one went on before, nobody knows with which bytes.
    pub(super) fn begin_after(&mut self, sequence: u16) {
        (self.newest, self.unknown) = (Some(sequence), Some(sequence));
    }

    pub(super) fn newest(&self) -> Option<u16> {
        self.newest
    }

    /// Whether a packet may go on; the same bytes may again. What is so old that nobody knows how it went may not.
    pub(super) fn is_new(&mut self, packet: &[u8]) -> bool {
        let Some(sequence) = packet.get(2..4).and_then(|two| two.first_chunk()) else {
            return false;
        };
        let sequence = u16::from_be_bytes(*sequence);
        let behind = |newest: u16| newest.wrapping_sub(sequence).cast_signed();
        if self
            .newest
            .is_some_and(|newest| behind(newest) >= SAID.cast_signed())
            || self.unknown.is_some_and(|unknown| behind(unknown) >= 0)
        {
            return false;
        }
        if self.newest.is_none_or(|newest| behind(newest) < 0) {
            self.newest = Some(sequence);
            // From here on it is too old anyway.
            self.unknown
                .take_if(|unknown| sequence.wrapping_sub(*unknown) > SAID);
        }
        let bytes = FxBuildHasher.hash_one(packet);
        let Some(slot) = self.lately.get_mut(usize::from(sequence % SAID)) else {
            return false;
        };
        match slot {
            Some((known, before)) if *known == sequence => *before == bytes,
            slot => {
                *slot = Some((sequence, bytes));
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn goes(said: &mut Said, sequence: u16, byte: u8) -> bool {
        let [hi, lo] = sequence.to_be_bytes();
        said.is_new(&[0x80, 111, hi, lo, 0, 0, 0, 0, 0, 0, 0, 7, byte])
    }

    #[test]
    fn no_number_goes_on_twice_with_other_bytes() {
        let mut said = Said::default();
        assert!(goes(&mut said, 65_000, 1) && goes(&mut said, 65_000, 1));
        assert!(!goes(&mut said, 65_000, 2));
        assert!(goes(&mut said, 64_990, 1), "it was overtaken");
        // Until it is too old to be told from what went.
        assert!(goes(&mut said, 65_511, 1) && goes(&mut said, 65_000, 1));
        assert!(goes(&mut said, 65_512, 1) && !goes(&mut said, 65_000, 1));
        assert!(goes(&mut said, 100, 1) && !goes(&mut said, 65_000, 1));
        assert_eq!(said.newest(), Some(100));
    }

    #[test]
    fn what_went_before_it_was_there_doesnt_go_again() {
        let mut said = Said::default();
        said.begin_after(65_535);
        assert!(!goes(&mut said, 65_535, 1) && !goes(&mut said, 65_500, 1));
        for sequence in 0..3000 {
            assert!(goes(&mut said, sequence, 1));
        }
        assert!(!goes(&mut said, 65_535, 1));
        assert!(said.unknown.is_none());
    }
}
