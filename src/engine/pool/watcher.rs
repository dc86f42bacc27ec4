//! The thread that watches over the codec threads: it loads models, notices who hangs or fell, and puts up a new one.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use auralink_proto::ladder::Rungs;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::{Report, Shared, Thread, count, from_bits, lock, pair};
use crate::desk::Kit;
use crate::source::{Source, Stamp};

/// How often the watcher looks.
const TICK: Duration = Duration::from_millis(5);
/// What passes between two looks where nothing is wrong.
const MOST_BETWEEN_LOOKS: Duration = Duration::from_millis(10);
/// A thread that fell is put up again after so long at first, twice as long each time ...
const BACKOFF: Duration = Duration::from_millis(100);
/// ... up to this, and as at first again once it has run for so long.
const MOST_BACKOFF: Duration = Duration::from_secs(10);
/// Threads that hang and were replaced can't be ended: so many at most, then no more are put up.
const MOST_LOST: usize = 8;

/// What the watcher is told.
pub(crate) enum Command {
    Reload,
    Stop,
}

/// The watcher's books about a slot.
struct Watched {
    thread: Option<JoinHandle<()>>,
    since: Instant,
    backoff: Duration,
    /// When to put up a new one.
    due: Option<Instant>,
    /// A hang that was already told to the breakers.
    told: Option<At>,
    /// What the thread is at, and since when by the watcher's clock.
    at: (At, Duration),
}

/// What a codec thread was seen at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// It has nothing to do.
    Rest,
    /// The batch with this `busy` mark.
    Batch(u64),
    /// Jobs wait, but after so many batches it takes none.
    Between(u64),
}

impl Watched {
    /// For how long the thread has been at the same.
    fn at(&mut self, at: At, clock: Duration) -> Duration {
        if self.at.0 != at {
            self.at = (at, clock);
        }
        match at {
            At::Rest => Duration::ZERO,
            At::Batch(_) | At::Between(_) => clock.saturating_sub(self.at.1),
        }
    }
}

/// The thread that watches over the others and loads their models.
pub(crate) struct Watcher {
    shared: Arc<Shared>,
    source: Box<dyn Source>,
    commands: Receiver<Command>,
    /// Models were loaded, or not; nobody listens after the first time.
    ready: Sender<()>,
    watched: Vec<Watched>,
    lost: Vec<JoinHandle<()>>,
    stamp: Stamp,
    /// Time that passed between looks, no more than [`MOST_BETWEEN_LOOKS`] each: where this thread got no time, the others got none either, and
    /// nobody hangs.
    clock: Duration,
    last_look: Instant,
}

impl Watcher {
    pub(crate) fn new(
        shared: Arc<Shared>,
        source: Box<dyn Source>,
        commands: Receiver<Command>,
        ready: Sender<()>,
        now: Instant,
    ) -> Self {
        let watched = shared
            .slots
            .iter()
            .map(|_| Watched {
                thread: None,
                since: now,
                backoff: BACKOFF,
                due: Some(now),
                told: None,
                at: (At::Rest, Duration::ZERO),
            })
            .collect();
        Self {
            shared,
            source,
            commands,
            ready,
            watched,
            lost: Vec::new(),
            stamp: Stamp::new(),
            clock: Duration::ZERO,
            last_look: now,
        }
    }

    pub(crate) fn run(mut self) {
        self.caught("loading the models", |watcher| {
            watcher.load();
            watcher.look(Instant::now());
            watcher
                .shared
                .set_models(models_of(watcher.source.codec().as_deref()));
        });
        let _ = self.ready.try_send(());
        loop {
            match self.commands.recv_timeout(TICK) {
                Ok(Command::Reload) => {
                    self.caught("reloading the models", |watcher| {
                        if watcher.source.stamp() != watcher.stamp {
                            // Until every thread has the new ones before it, no session may take them for the old.
                            watcher.shared.set_models(None);
                            watcher.load();
                            watcher.equip();
                            watcher
                                .shared
                                .set_models(models_of(watcher.source.codec().as_deref()));
                        }
                    });
                }
                Ok(Command::Stop) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
            self.caught("watching over the codecs", |watcher| {
                watcher.look(Instant::now());
            });
        }
    }

    /// Does what may panic: models come from files, and a library loads them. The codecs need their watcher whatever they are.
    fn caught(&mut self, what: &str, work: impl FnOnce(&mut Self)) {
        if catch_unwind(AssertUnwindSafe(|| work(self))).is_err() {
            tracing::error!("{what} panicked");
            let problem = format!("{what} panicked; the log says where");
            let mut report = lock(&self.shared.report);
            if !report.problems.contains(&problem) {
                report.problems.push(problem);
            }
        }
    }

    /// Reads the bundles. The stamp is taken first: what changes meanwhile is noticed the next time.
    fn load(&mut self) {
        self.stamp = self.source.stamp();
        let problems = self.source.load();
        *lock(&self.shared.report) = Report {
            problems,
            bundles: self.source.bundles(),
            codec: self.source.codec(),
        };
    }

    /// Gives every thread that runs models of its own.
    fn equip(&mut self) {
        for index in 0..self.watched.len() {
            let kit = self.kit_if_any();
            if let Some(slot) = self.shared.slots.get(index) {
                let _ = slot.kits.send(kit);
            }
        }
    }

    /// A thread's models; without them it has Opus.
    fn kit_if_any(&mut self) -> Kit {
        let mut kit = Kit::default();
        self.caught("making a codec thread's models", |watcher| {
            kit = watcher.kit();
        });
        kit
    }

    fn kit(&mut self) -> Kit {
        let mut problems = Vec::new();
        let kit = self.source.kit(&mut problems);
        let mut encode = Rungs::OPUS;
        let mut decode = Rungs::OPUS;
        if let Some(neural) = &kit.neural {
            let frames = neural.format().wire.to_bits();
            self.shared.frames.store(frames, Ordering::Relaxed);
            decode = Rungs::ALL;
            if kit.detector.is_some() {
                encode = Rungs::ALL;
            }
        }
        self.shared
            .loaded
            .store(pair(encode, decode), Ordering::Relaxed);
        let mut report = lock(&self.shared.report);
        for problem in problems {
            if !report.problems.contains(&problem) {
                report.problems.push(problem);
            }
        }
        kit
    }

    fn look(&mut self, now: Instant) {
        self.lost.retain(|thread| !thread.is_finished());
        let passed = now.saturating_duration_since(self.last_look);
        self.clock += passed.min(MOST_BETWEEN_LOOKS);
        self.last_look = now;
        for index in 0..self.watched.len() {
            self.look_at(index, now);
        }
        for slot in &self.shared.slots {
            slot.look_at_breakers(now);
        }
        self.shared.publish();
    }

    fn look_at(&mut self, index: usize, now: Instant) {
        let (shared, clock) = (self.shared.clone(), self.clock);
        let (Some(slot), Some(watched)) = (shared.slots.get(index), self.watched.get_mut(index))
        else {
            return;
        };
        let finished = watched.thread.take_if(|thread| thread.is_finished());
        if let Some(thread) = finished {
            slot.up.store(false, Ordering::Relaxed);
            if thread.join().is_err() {
                tracing::error!(thread = index, "a codec thread fell; it is put up again");
                // Whatever ran is what it fell over.
                let running = from_bits(slot.running.load(Ordering::Relaxed));
                let mut breakers = lock(&slot.breakers);
                running.iter().for_each(|rung| breakers.hangs(rung, now));
            }
            Self::again(watched, now);
        }
        let at = match slot.busy.load(Ordering::Relaxed) {
            0 if slot.queue.is_empty() => At::Rest,
            0 => At::Between(slot.batches.load(Ordering::Relaxed)),
            busy => At::Batch(busy),
        };
        let for_so_long = watched.at(at, clock);
        if watched.thread.is_some() {
            let hangs = for_so_long > shared.config.stall;
            slot.up.store(!hangs, Ordering::Relaxed);
            if hangs && watched.told != Some(at) {
                watched.told = Some(at);
                let running = from_bits(slot.running.load(Ordering::Relaxed));
                tracing::warn!(
                    thread = index,
                    ms = for_so_long.as_millis() as u64,
                    "a codec thread hangs; its tracks go native"
                );
                let mut breakers = lock(&slot.breakers);
                running.iter().for_each(|rung| breakers.hangs(rung, now));
            }
            if hangs && for_so_long > shared.config.replace && self.lost.len() < MOST_LOST {
                slot.generation.fetch_add(1, Ordering::Relaxed);
                self.lost.extend(watched.thread.take());
                Self::again(watched, now);
            }
        }
        if watched.due.is_some_and(|due| now >= due) {
            self.put_up(index, now);
        }
    }

    fn again(watched: &mut Watched, now: Instant) {
        if now.saturating_duration_since(watched.since) > MOST_BACKOFF {
            watched.backoff = BACKOFF;
        }
        watched.due = Some(now + watched.backoff);
        watched.backoff = (watched.backoff * 2).min(MOST_BACKOFF);
    }

    fn put_up(&mut self, index: usize, now: Instant) {
        let (kit, clock) = (self.kit_if_any(), self.clock);
        let (Some(slot), Some(watched)) =
            (self.shared.slots.get(index), self.watched.get_mut(index))
        else {
            return;
        };
        // Models that were meant for the one before.
        slot.equip.try_iter().for_each(drop);
        slot.busy.store(0, Ordering::Relaxed);
        slot.running.store(0, Ordering::Relaxed);
        let thread = Thread {
            shared: self.shared.clone(),
            index,
            generation: slot.generation.load(Ordering::Relaxed),
        };
        let started = std::thread::Builder::new()
            .name(format!("codec-{index}"))
            .spawn(move || thread.run(kit));
        match started {
            Ok(thread) => {
                if thread_was_there(watched) {
                    count(&self.shared.counters.restarts);
                }
                watched.thread = Some(thread);
                watched.since = now;
                watched.at = (At::Rest, clock);
                watched.due = None;
                slot.up.store(true, Ordering::Relaxed);
            }
            Err(error) => {
                tracing::error!(%error, "no codec thread can be had");
                Self::again(watched, now);
            }
        }
    }
}

/// How a neural bundle is named to peers: the first 32 bits of its SHA-256.
pub(crate) fn models_of(sha256: Option<&str>) -> Option<u32> {
    u32::from_str_radix(sha256?.get(..8)?, 16).ok()
}

/// Its waiting time has grown, so that it isn't the first.
fn thread_was_there(watched: &Watched) -> bool {
    watched.backoff > BACKOFF
}
