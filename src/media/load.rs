//! Which worker a new session goes to: the one that was given the fewest.
//!
//! What workers publish once a second says what they carry, but in a join storm a thousand sessions come between two looks.
//! So what was given is counted, when it is given; a session that never comes about gives its place back like one that ends.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Places given, by worker.
#[derive(Debug)]
pub(super) struct Load(Arc<Mutex<Vec<usize>>>);

/// A session's place on a worker; dropping it gives it back.
#[derive(Debug)]
pub struct Place {
    worker: usize,
    given: Arc<Mutex<Vec<usize>>>,
}

impl Load {
    pub(super) fn new(workers: usize) -> Self {
        Self(Arc::new(Mutex::new(vec![0; workers])))
    }

    /// A place on the worker that has given the fewest; the first of several.
    pub(super) fn place(&self) -> Place {
        let mut given = lock(&self.0);
        let worker = given.iter_mut().enumerate().min_by_key(|(_, n)| **n);
        let worker = worker.map_or(0, |(worker, n)| {
            *n += 1;
            worker
        });
        Place {
            worker,
            given: self.0.clone(),
        }
    }

    /// Places given, by worker.
    pub(super) fn given(&self) -> Vec<usize> {
        lock(&self.0).clone()
    }
}

impl Place {
    /// On which worker it is.
    #[must_use]
    pub fn worker(&self) -> usize {
        self.worker
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(n) = lock(&self.given).get_mut(self.worker) {
            *n = n.saturating_sub(1);
        }
    }
}

fn lock(given: &Mutex<Vec<usize>>) -> MutexGuard<'_, Vec<usize>> {
    // What it guards is whole between any two statements.
    given.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_join_storm_spreads_over_all_workers() {
        let load = Arc::new(Load::new(4));
        let joins: Vec<_> = (0..40)
            .map(|_| {
                let load = load.clone();
                std::thread::spawn(move || load.place())
            })
            .collect();
        let places: Vec<Place> = joins.into_iter().map(|join| join.join().unwrap()).collect();
        assert_eq!(load.given(), [10, 10, 10, 10]);
        // Whole workers fall empty, and fill again first.
        let stay: Vec<Place> = places.into_iter().filter(|p| p.worker() % 2 == 0).collect();
        assert_eq!(load.given(), [10, 0, 10, 0]);
        let more: Vec<Place> = (0..20).map(|_| load.place()).collect();
        assert_eq!(load.given(), [10, 10, 10, 10]);
        drop((stay, more));
        assert_eq!(load.given(), [0, 0, 0, 0]);
    }
}
