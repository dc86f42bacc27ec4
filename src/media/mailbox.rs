//! What signalling has told a worker and the worker hasn't taken yet.
//!
//! It is bounded by what the sidecar holds anyway: a description says the whole, so that only the newest of each peer connection
//! waits, however fast somebody renegotiates; connections that strangers opened wait by a number of their own.

use super::{Command, SessionId};
use auralink_proto::description::{PcDescription, Target};
use std::collections::HashMap;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// ICE-TCP connections that wait for a worker's look at their first check: a turn's worth (`COMMANDS_A_TURN`) and as many again.
const MOST_CONNECTIONS: usize = 64;

/// What a peer connection is to become.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) description: Box<PcDescription>,
    /// Server-leg sockets, with the first description of a peer connection.
    pub(super) sockets: Vec<UdpSocket>,
}

/// Between signalling and a worker.
#[derive(Debug, Default)]
pub(super) struct Mailbox {
    wanted: Mutex<HashMap<(SessionId, Target), Wanted>>,
    connections: AtomicUsize,
}

impl Mailbox {
    fn wanted(&self) -> MutexGuard<'_, HashMap<(SessionId, Target), Wanted>> {
        // What it guards is whole between any two statements.
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Leaves what a peer connection is to become; the command that fetches it, where none is on its way.
    pub(super) fn describe(&self, session: SessionId, mut new: Wanted) -> Option<Command> {
        let target = new.description.target;
        let mut wanted = self.wanted();
        let before = wanted.remove(&(session, target));
        let command = before.is_none();
        if let Some(before) = before
            && new.sockets.is_empty()
        {
            new.sockets = before.sockets;
        }
        wanted.insert((session, target), new);
        command.then_some(Command::Describe { session, target })
    }

    /// Fetches what was left.
    pub(super) fn fetch(&self, session: SessionId, target: Target) -> Option<Wanted> {
        self.wanted().remove(&(session, target))
    }

    /// Whether one more connection may wait.
    pub(super) fn admit(&self) -> bool {
        let admitted = self.connections.fetch_add(1, Ordering::Relaxed) < MOST_CONNECTIONS;
        if !admitted {
            self.looked_at();
        }
        admitted
    }

    /// A connection waits no longer.
    pub(super) fn looked_at(&self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::media::tests::description;

    #[test]
    fn only_the_newest_description_waits_and_keeps_the_sockets() {
        let mailbox = Mailbox::default();
        let want = |mid_ext_id, sockets| {
            let description = PcDescription {
                mid_ext_id: Some(mid_ext_id),
                ..description("00abcd")
            };
            Wanted {
                description: Box::new(description),
                sockets,
            }
        };
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(mailbox.describe(7, want(1, vec![socket])).is_some());
        for n in 2..=100 {
            assert!(mailbox.describe(7, want(n, Vec::new())).is_none());
        }
        assert!(mailbox.describe(8, want(1, Vec::new())).is_some());
        assert_eq!(mailbox.wanted().len(), 2);
        let wanted = mailbox.fetch(7, Target::Publisher).unwrap();
        assert_eq!(wanted.description.mid_ext_id, Some(100));
        assert_eq!(wanted.sockets.len(), 1);
        assert!(mailbox.fetch(7, Target::Publisher).is_none());
        assert!(mailbox.describe(7, want(101, Vec::new())).is_some());
    }

    #[test]
    fn connections_wait_by_a_number_of_their_own() {
        let mailbox = Mailbox::default();
        let admitted = (0..1000).filter(|_| mailbox.admit()).count();
        assert_eq!(admitted, MOST_CONNECTIONS);
        mailbox.looked_at();
        assert!(mailbox.admit());
        assert!(!mailbox.admit());
    }
}
