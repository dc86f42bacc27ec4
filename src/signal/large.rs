//! Room for messages that are longer than a stranger's may be: LiveKit's own, of all sessions together.
//!
//! What LiveKit says at once has no bound of its own: a JoinResponse lists everybody in the room, each with up to 512 KiB of metadata
//! and 64 KiB of attributes (`limit.max_metadata_size`, `max_attributes_size`). A session has room for an ordinary message by itself;
//! a longer one waits, unread, until there is room for it among those of all, and keeps it until its client has taken the message.
//! So memory is bounded whatever clients do that join a large room and don't read. Who has kept others waiting for too long ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, sleep_until};

/// What a permit stands for, in bytes: permits are counted with 32 bits.
const UNIT: usize = 1 << 10;

/// How often an overdue client is looked at: does anybody wait for its room?
const LOOK: Duration = Duration::from_millis(200);

/// The room of all sessions.
pub(super) struct Large {
    free: Arc<Semaphore>,
    units: u32,
    waiting: AtomicUsize,
    patience: Duration,
}

/// Room for one message, given back when this is dropped.
#[derive(Debug)]
pub(super) struct Room {
    _permit: OwnedSemaphorePermit,
}

/// One who waits.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Large {
    /// Room for so many bytes. A client has `patience` to take what it was sent while others wait for its room.
    pub(super) fn new(bytes: usize, patience: Duration) -> Arc<Large> {
        let most = Semaphore::MAX_PERMITS.min(u32::MAX as usize);
        // At most a `u32`.
        let units = bytes.div_ceil(UNIT).clamp(1, most) as u32;
        Arc::new(Large {
            free: Arc::new(Semaphore::new(units as usize)),
            units,
            waiting: AtomicUsize::new(0),
            patience,
        })
    }

    /// Waits, in turn, for room for a message of so many bytes; whoever asks for more than there is gets all of it. Nobody asks
    /// twice for one message: two who have a part of it each would wait for ever.
    pub(super) async fn room(&self, bytes: usize) -> Room {
        // At most `units`.
        let units = bytes.div_ceil(UNIT).min(self.units as usize) as u32;
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let waiting = Waiting(&self.waiting);
        let Ok(permit) = self.free.clone().acquire_many_owned(units).await else {
            // Nobody closes it.
            return std::future::pending().await;
        };
        drop(waiting);
        Room { _permit: permit }
    }

    /// Returns once a client that has had its message since then keeps others waiting for longer than it may.
    pub(super) async fn overdue(self: Arc<Self>, since: Instant) {
        sleep_until(since + self.patience).await;
        while self.waiting.load(Ordering::Relaxed) == 0 {
            sleep(LOOK).await;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use tokio::time::timeout;

    /// For what must not happen: none of it depends on the time.
    const LONG: Duration = Duration::from_millis(100);

    #[tokio::test]
    async fn room_is_given_in_turn_and_comes_back() {
        let large = Large::new(100 * UNIT, LONG);
        let first = large.room(60 * UNIT).await;
        let mut second = Box::pin(large.room(60 * UNIT));
        assert!(timeout(LONG, &mut second).await.is_err());
        // What would fit waits behind it: else a large one would wait for ever.
        let mut third = Box::pin(large.room(UNIT));
        assert!(timeout(LONG, &mut third).await.is_err());
        assert_eq!(large.waiting.load(Ordering::Relaxed), 2);
        drop(first);
        let (second, third) = (second.await, third.await);
        assert_eq!(large.free.available_permits(), 39);
        assert_eq!(large.waiting.load(Ordering::Relaxed), 0);
        drop((second, third));
        assert_eq!(large.free.available_permits(), 100);
        // More than there is: all of it, and nobody who gives up stays in the count.
        let all = large.room(usize::MAX).await;
        assert_eq!(large.free.available_permits(), 0);
        assert!(timeout(LONG, large.room(1)).await.is_err());
        assert_eq!(large.waiting.load(Ordering::Relaxed), 0);
        drop(all);
    }

    #[tokio::test]
    async fn only_who_keeps_others_waiting_is_overdue() {
        let patience = Duration::from_millis(100);
        let large = Large::new(UNIT, patience);
        let since = Instant::now();
        let room = large.room(UNIT).await;
        let alone = large.clone().overdue(since);
        assert!(timeout(6 * patience, alone).await.is_err());
        let since = Instant::now();
        let mut waits = Box::pin(large.room(UNIT));
        let overdue = large.clone().overdue(since);
        tokio::select! {
            biased;
            _ = &mut waits => unreachable!(),
            () = overdue => {}
        }
        assert!(since.elapsed() >= patience);
        drop(room);
        waits.await;
    }
}
