//! What waits for the other leg.

use crate::leg::Received;
use std::collections::VecDeque;

/// What was heard before the other leg was ready: bounded, because the second leg follows the
/// first within a few round trips. A key frame or an SCTP INIT lost here would cost a second.
const MAX_EARLY_PACKETS: usize = 256;
const MAX_EARLY_BYTES: usize = 256 * 1024;

#[derive(Debug, Default)]
pub(super) struct Early {
    pub(super) packets: VecDeque<(Received, Vec<u8>)>,
    bytes: usize,
}

impl Early {
    pub(super) fn push(&mut self, what: Received, bytes: &[u8]) -> bool {
        if self.packets.len() >= MAX_EARLY_PACKETS || self.bytes + bytes.len() > MAX_EARLY_BYTES {
            return false;
        }
        self.bytes += bytes.len();
        self.packets.push_back((what, bytes.to_vec()));
        true
    }
}
