//! So many at a time, a number that may change while they are held.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A limit, and how many are held of it. A semaphore can't be lowered while its permits are held; this one can.
#[derive(Debug)]
pub struct Quota {
    most: AtomicUsize,
    held: AtomicUsize,
}

/// One of a [`Quota`], for as long as it lives.
#[derive(Debug)]
pub struct Permit(Arc<Quota>);

impl Quota {
    /// At most so many.
    #[must_use]
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self {
            most: AtomicUsize::new(most),
            held: AtomicUsize::new(0),
        })
    }

    /// From now on at most so many. Those that are held stay, where they are more: there are new ones when enough have gone.
    pub fn set(&self, most: usize) {
        self.most.store(most, Ordering::Relaxed);
    }

    /// One more, if there is one.
    pub fn take(self: &Arc<Self>) -> Option<Permit> {
        let most = self.most.load(Ordering::Relaxed);
        self.held
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                (held < most).then_some(held + 1)
            })
            .ok()
            .map(|_| Permit(self.clone()))
    }

    /// How many could be taken.
    #[must_use]
    pub fn free(&self) -> usize {
        let most = self.most.load(Ordering::Relaxed);
        most.saturating_sub(self.held.load(Ordering::Relaxed))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.held.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_moves_while_permits_are_held() {
        let quota = Quota::new(2);
        let [a, b] = [quota.take().unwrap(), quota.take().unwrap()];
        assert!(quota.take().is_none());
        quota.set(3);
        let c = quota.take().unwrap();
        quota.set(1);
        assert_eq!((quota.take().is_none(), quota.free()), (true, 0));
        drop((a, b));
        assert!(quota.take().is_none(), "one is held, and one is the most");
        drop(c);
        assert!(quota.take().is_some());
        assert_eq!(quota.free(), 1);
    }
}
