//! Packets that went on, so that no number goes on twice with other bytes.

use rustc_hash::FxBuildHasher;
use std::hash::BuildHasher;

/// Packets that went on lately, by sequence number. The next leg's SRTP must not see a number twice with
/// other bytes (RFC 3711 section 9.1): one that was decoded, or made up, and then comes as it was.
#[derive(Debug)]
pub(super) struct Said(Vec<Option<(u16, u64)>>);

/// Ten seconds of 20 ms.
const SAID: usize = 512;

impl Default for Said {
    fn default() -> Self {
        Self(vec![None; SAID])
    }
}

impl Said {
    /// Whether a packet may go on; the same bytes may again.
    pub(super) fn is_new(&mut self, packet: &[u8]) -> bool {
        let Some(sequence) = packet.get(2..4).and_then(|two| two.first_chunk()) else {
            return false;
        };
        let sequence = u16::from_be_bytes(*sequence);
        let bytes = FxBuildHasher.hash_one(packet);
        let Some(slot) = self.0.get_mut(usize::from(sequence) % SAID) else {
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
