//! The codec threads, what they share with everybody else, and how outcomes leave them.

mod shares;
mod watcher;

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use auralink_proto::ladder::{Frames, Rung, Rungs};
use crossbeam_channel::{Receiver, Sender, select_biased};

use crate::breaker::Breakers;
use crate::desk::{Desk, Done, Key, Kit, Sink};
use crate::engine::{Counters, EngineConfig};
use crate::job::{Job, Outcome, Refusal};

pub(crate) use shares::Shares;
pub(crate) use watcher::{Command, Watcher, models_of};

/// A job so many deadlines old isn't worth doing.
const EXPIRED: u32 = 4;

/// A media worker's end, as the threads see it.
pub(crate) struct PortShared {
    pub(crate) id: u32,
    pub(crate) outcomes: Sender<Outcome>,
    pub(crate) wake: Arc<dyn Fn() + Send + Sync>,
}

/// A job on its way.
pub(crate) struct Item {
    pub(crate) job: Job,
    pub(crate) sent: Instant,
    pub(crate) port: Arc<PortShared>,
    /// The place in [`Shares`] of its peer connection, whose share of the queue it takes.
    pub(crate) share: usize,
}

/// One thread's place: its queue outlives the thread itself.
pub(crate) struct Slot {
    pub(crate) jobs: Sender<Item>,
    queue: Receiver<Item>,
    kits: Sender<Kit>,
    equip: Receiver<Kit>,
    /// It takes jobs: it runs and doesn't hang.
    pub(crate) up: AtomicBool,
    /// Grows when the thread is replaced; who has an older number ends.
    generation: AtomicU64,
    /// Microseconds after `Shared::start` at which its batch began, plus 1; 0: it waits.
    busy: AtomicU64,
    /// Batches begun: jobs that wait while it stands still wait for a thread that has stopped.
    batches: AtomicU64,
    /// Bits of the rungs that a model runs for now.
    running: AtomicU16,
    breakers: Mutex<Breakers>,
    /// Bits of the rungs that its breakers allow.
    allowed: AtomicU16,
    /// How many jobs of each peer connection wait for it.
    pub(crate) shares: Shares,
}

impl Slot {
    /// The rungs that its breakers allow.
    pub(crate) fn allowed(&self) -> Rungs {
        from_bits(self.allowed.load(Ordering::Relaxed))
    }

    /// Asks the breakers anew.
    fn look_at_breakers(&self, now: Instant) {
        let allowed = lock(&self.breakers).allowed(now);
        self.allowed.store(bits(allowed), Ordering::Relaxed);
    }
}

/// What everybody shares.
pub(crate) struct Shared {
    pub(crate) config: EngineConfig,
    start: Instant,
    pub(crate) slots: Vec<Slot>,
    /// Rungs that may be encoded, and above them those that can be decoded.
    rungs: AtomicU32,
    /// The first 32 bits of the SHA-256 of the neural bundle that every thread runs, above them 1; 0: none, or it is
    /// being replaced.
    models: AtomicU64,
    /// Encodable as far as models go, and decodable, the same way.
    loaded: AtomicU32,
    /// [`Frames::to_bits`] of the codec that was loaded last.
    frames: AtomicU32,
    pub(crate) counters: Counts,
    pub(crate) ended: AtomicBool,
    pub(crate) report: Mutex<Report>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared")
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// What [`crate::Engine::status`] tells.
#[derive(Debug, Default, Clone)]
pub(crate) struct Report {
    pub(crate) problems: Vec<String>,
    pub(crate) bundles: Vec<(String, String)>,
    pub(crate) codec: Option<String>,
}

/// [`Counters`], counting.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    encoded: [AtomicU64; 6],
    decoded: AtomicU64,
    recoded: AtomicU64,
    shared: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    late: AtomicU64,
    expired: AtomicU64,
    pub(crate) busy: AtomicU64,
    dropped: AtomicU64,
    restarts: AtomicU64,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What it guards is whole between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn bits(rungs: Rungs) -> u16 {
    rungs.iter().fold(0, |bits, rung| bits | 1 << rung.number())
}

fn from_bits(bits: u16) -> Rungs {
    let set = Rung::CODED
        .into_iter()
        .filter(|rung| bits & 1 << rung.number() != 0);
    set.fold(Rungs::NONE, Rungs::with)
}

fn pair(encode: Rungs, decode: Rungs) -> u32 {
    u32::from(bits(encode)) | u32::from(bits(decode)) << 16
}

impl Shared {
    pub(crate) fn new(config: EngineConfig, now: Instant) -> Self {
        let slots = (0..config.threads)
            .map(|_| {
                let (jobs, queue) = crossbeam_channel::bounded(config.queue);
                let (kits, equip) = crossbeam_channel::unbounded();
                Slot {
                    jobs,
                    queue,
                    kits,
                    equip,
                    up: AtomicBool::new(false),
                    generation: AtomicU64::new(0),
                    busy: AtomicU64::new(0),
                    batches: AtomicU64::new(0),
                    running: AtomicU16::new(0),
                    breakers: Mutex::new(Breakers::new(config.breaker, now)),
                    allowed: AtomicU16::new(bits(Rungs::ALL)),
                    shares: Shares::default(),
                }
            })
            .collect();
        Self {
            start: now,
            slots,
            rungs: AtomicU32::new(pair(Rungs::NONE, Rungs::OPUS)),
            models: AtomicU64::new(0),
            loaded: AtomicU32::new(pair(Rungs::OPUS, Rungs::OPUS)),
            frames: AtomicU32::new(Frames::LYRA.to_bits()),
            counters: Counts::default(),
            ended: AtomicBool::new(false),
            report: Mutex::default(),
            config,
        }
    }

    pub(crate) fn encodable(&self) -> Rungs {
        from_bits(self.rungs.load(Ordering::Relaxed) as u16)
    }

    pub(crate) fn decodable(&self) -> Rungs {
        from_bits((self.rungs.load(Ordering::Relaxed) >> 16) as u16)
    }

    pub(crate) fn frames(&self) -> Frames {
        Frames::from_bits(self.frames.load(Ordering::Relaxed)).unwrap_or(Frames::LYRA)
    }

    pub(crate) fn models(&self) -> Option<u32> {
        let models = self.models.load(Ordering::Acquire);
        (models >> 32 == 1).then_some(models as u32)
    }

    fn set_models(&self, models: Option<u32>) {
        let models = models.map_or(0, |models| 1 << 32 | u64::from(models));
        self.models.store(models, Ordering::Release);
    }

    pub(crate) fn threads_up(&self) -> usize {
        self.slots
            .iter()
            .filter(|slot| slot.up.load(Ordering::Relaxed))
            .count()
    }

    pub(crate) fn counters(&self) -> Counters {
        let c = &self.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counters {
            encoded: c.encoded.each_ref().map(get),
            decoded: get(&c.decoded),
            recoded: get(&c.recoded),
            shared: get(&c.shared),
            refused: get(&c.refused),
            failed: get(&c.failed),
            late: get(&c.late),
            expired: get(&c.expired),
            busy: get(&c.busy),
            dropped: get(&c.dropped),
            restarts: get(&c.restarts),
            opened: self.slots.iter().fold([0; 7], |mut sum, slot| {
                let opened = lock(&slot.breakers).opened();
                sum.iter_mut().zip(opened).for_each(|(sum, n)| *sum += n);
                sum
            }),
        }
    }

    /// Says what may be used now: what any thread that is up may use. Where a track's own thread may not, another rung stands
    /// in or the job is refused.
    fn publish(&self) {
        let loaded = self.loaded.load(Ordering::Relaxed);
        let up = |slot: &&Slot| slot.up.load(Ordering::Relaxed);
        let allowed = self
            .slots
            .iter()
            .filter(up)
            .fold(0, |bits, slot| bits | slot.allowed.load(Ordering::Relaxed));
        let encode = from_bits(loaded as u16 & allowed);
        let decode = from_bits((loaded >> 16) as u16);
        self.rungs.store(pair(encode, decode), Ordering::Relaxed);
    }

    /// What a thread may code with.
    fn usable(&self, slot: &Slot) -> Rungs {
        from_bits(self.loaded.load(Ordering::Relaxed) as u16).and(slot.allowed())
    }

    fn micros(&self, now: Instant) -> u64 {
        now.saturating_duration_since(self.start).as_micros() as u64
    }
}

/// How much of its time a thread works, and how long it waits for more jobs because of that: a batch costs less than its jobs one
/// by one, but while there is time for them one by one nobody should wait.
struct Pace {
    /// Share of the last while, 0 to 1.
    busy: f32,
    last: Instant,
}

impl Pace {
    /// What counts as the last while.
    const WHILE: Duration = Duration::from_millis(200);
    /// From this share on it waits, ...
    const EASY: f32 = 0.4;
    /// ... and at this for as long as it ever does.
    const FULL: f32 = 0.8;
    const LONGEST: Duration = Duration::from_millis(5);

    const fn new(now: Instant) -> Self {
        Self {
            busy: 0.0,
            last: now,
        }
    }

    /// How long a job may wait for company, from when it was sent.
    fn wait(&self) -> Duration {
        let part = (self.busy - Self::EASY) / (Self::FULL - Self::EASY);
        Self::LONGEST.mul_f32(part.clamp(0.0, 1.0))
    }

    /// It has worked from `began` to `now`.
    fn worked(&mut self, began: Instant, now: Instant) {
        let passed = now.saturating_duration_since(self.last).as_secs_f32();
        let worked = now.saturating_duration_since(began).as_secs_f32();
        if passed > 0.0 {
            let fresh = 1.0 - (-passed / Self::WHILE.as_secs_f32()).exp();
            self.busy += fresh * ((worked / passed).min(1.0) - self.busy);
        }
        self.last = now;
    }
}

/// The thread's side of its slot.
struct Thread {
    shared: Arc<Shared>,
    index: usize,
    generation: u64,
}

impl Thread {
    fn run(self, kit: Kit) {
        let Some(slot) = self.shared.slots.get(self.index) else {
            return;
        };
        let config = &self.shared.config;
        let mut desk = Desk::new(
            config.local_bitrate,
            config.local_complexity,
            config.deadline,
            kit,
        );
        let mut items = Vec::with_capacity(config.batch);
        let mut pace = Pace::new(Instant::now());
        loop {
            select_biased! {
                recv(slot.equip) -> kit => match kit {
                    Ok(kit) => desk.equip(kit),
                    Err(_) => return,
                },
                recv(slot.queue) -> item => match item {
                    Ok(item) => items.push(item),
                    Err(_) => return,
                },
                default(Duration::from_millis(100)) => {}
            }
            if self.shared.ended.load(Ordering::Relaxed) || !self.is_current(slot) {
                // What it took on its last look is nobody else's any more.
                Outbox::new(&self.shared, slot, self.generation).refuse(&mut items);
                return;
            }
            if items.is_empty() {
                continue;
            }
            let more = config.batch.saturating_sub(1);
            if let Some(first) = items.first()
                && slot.queue.len() < more
            {
                let until = first.sent + pace.wait().min(config.deadline / 4);
                while items.len() < config.batch
                    && let Ok(item) = slot.queue.recv_deadline(until)
                {
                    items.push(item);
                }
            }
            let more = config.batch.saturating_sub(items.len());
            items.extend(slot.queue.try_iter().take(more));
            let now = Instant::now();
            slot.busy
                .store(self.shared.micros(now) + 1, Ordering::Relaxed);
            slot.batches.fetch_add(1, Ordering::Relaxed);
            let mut outbox = Outbox::new(&self.shared, slot, self.generation);
            let (fresh, jobs) = outbox.sort(&mut items, now);
            outbox.items = fresh;
            desk.work(jobs, self.shared.usable(slot), now, &mut outbox);
            outbox.flush();
            if !self.is_current(slot) {
                return;
            }
            slot.busy.store(0, Ordering::Relaxed);
            pace.worked(now, Instant::now());
        }
    }

    fn is_current(&self, slot: &Slot) -> bool {
        slot.generation.load(Ordering::Relaxed) == self.generation
    }
}

/// Takes a batch's outcomes to the ports they are for, and their stories to breakers and counters.
struct Outbox<'a> {
    shared: &'a Shared,
    slot: &'a Slot,
    generation: u64,
    /// Sender's time and port of each job of the batch.
    items: Vec<(Instant, Arc<PortShared>)>,
    waiting: Vec<Arc<PortShared>>,
}

impl<'a> Outbox<'a> {
    fn new(shared: &'a Shared, slot: &'a Slot, generation: u64) -> Self {
        Self {
            shared,
            slot,
            generation,
            items: Vec::new(),
            waiting: Vec::new(),
        }
    }

    /// Answers what is too old, and gives the rest in the form that the desk wants.
    #[allow(clippy::type_complexity)]
    fn sort(
        &mut self,
        items: &mut Vec<Item>,
        now: Instant,
    ) -> (Vec<(Instant, Arc<PortShared>)>, Vec<(Key, Job)>) {
        let oldest = self.shared.config.deadline * EXPIRED;
        let (mut fresh, mut jobs) = (
            Vec::with_capacity(items.len()),
            Vec::with_capacity(items.len()),
        );
        for Item {
            job,
            sent,
            port,
            share,
        } in items.drain(..)
        {
            self.slot.shares.give_back(share);
            if now.saturating_duration_since(sent) > oldest
                && let Some(outcome) = undone(&job)
            {
                // Nothing against the engine: its thread hung, which was told, or the jobs before it were late, which was too.
                count(&self.shared.counters.expired);
                self.send(outcome, &port);
                continue;
            }
            let key = Key {
                port: port.id,
                track: job.track(),
            };
            fresh.push((sent, port));
            jobs.push((key, job));
        }
        (fresh, jobs)
    }

    /// Answers jobs that nobody will do, for a thread that ends. What another thread is doing by now, and its breakers, are left
    /// alone.
    fn refuse(&mut self, items: &mut Vec<Item>) {
        for Item {
            job, port, share, ..
        } in items.drain(..)
        {
            self.slot.shares.give_back(share);
            // The end of a track needs no answer: whose thread was replaced is forgotten with it, or for being idle.
            if let Some(outcome) = undone(&job) {
                count(&self.shared.counters.expired);
                self.send(outcome, &port);
            }
        }
        self.wake();
    }

    fn wake(&mut self) {
        for port in self.waiting.drain(..) {
            (port.wake)();
        }
    }

    fn is_current(&self) -> bool {
        self.slot.generation.load(Ordering::Relaxed) == self.generation
    }

    fn send(&mut self, outcome: Outcome, port: &Arc<PortShared>) {
        if port.outcomes.try_send(outcome).is_err() {
            count(&self.shared.counters.dropped);
        }
        if !self.waiting.iter().any(|waiting| waiting.id == port.id) {
            self.waiting.push(port.clone());
        }
    }
}

/// The answer to a job that isn't done.
fn undone(job: &Job) -> Option<Outcome> {
    let refused = |track, id| Outcome::Refused {
        track,
        id,
        reason: Refusal::Failed,
    };
    match job {
        Job::Encode(job) => Some(refused(job.track, job.id)),
        Job::Recode(job) => Some(refused(job.track, job.id)),
        Job::Decode(job) => Some(Outcome::Failed {
            track: job.track,
            id: job.id,
        }),
        Job::Close { .. } => None,
    }
}

impl Sink for Outbox<'_> {
    fn running(&mut self, rungs: Rungs) {
        if self.is_current() {
            self.slot.running.store(bits(rungs), Ordering::Relaxed);
        }
    }

    fn done(&mut self, done: Done) {
        // It hung and was replaced: that was told then, and what it says now is long too late.
        if !self.is_current() {
            return;
        }
        let now = Instant::now();
        let Some((sent, port)) = self.items.get(done.index).cloned() else {
            return;
        };
        let counters = &self.shared.counters;
        match &done.outcome {
            Outcome::Encoded(encoded) => {
                let place = usize::from(encoded.rung.number()).wrapping_sub(1);
                if let Some(counter) = counters.encoded.get(place) {
                    count(counter);
                }
            }
            Outcome::Decoded(_) => count(&counters.decoded),
            Outcome::Recoded(recoded) if recoded.shared => count(&counters.shared),
            Outcome::Recoded(_) => count(&counters.recoded),
            Outcome::Refused {
                reason: Refusal::Failed,
                ..
            }
            | Outcome::Failed { .. } => count(&counters.failed),
            Outcome::Refused { .. } => count(&counters.refused),
        }
        let late = now.saturating_duration_since(sent) > self.shared.config.deadline;
        if late {
            count(&counters.late);
        }
        {
            let mut breakers = lock(&self.slot.breakers);
            match (done.failed, done.rung) {
                (Some(rung), _) => breakers.failed(rung, now),
                // Where nothing was coded, nothing took too long: copies of one late packet, for every subscriber
                // of a large room, say no more than that packet does.
                (None, Some(_)) if late => breakers.waited(now),
                (None, Some(rung)) => breakers.succeeded(rung, now),
                (None, None) => {}
            }
        }
        self.send(done.outcome, &port);
    }

    fn flush(&mut self) {
        self.wake();
        self.slot.look_at_breakers(Instant::now());
        self.shared.publish();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::job::{Direction, Encode};

    #[test]
    fn a_thread_that_was_replaced_while_it_slept_gives_back_what_it_woke_up_to() {
        let config = EngineConfig {
            threads: 1,
            ..EngineConfig::default()
        };
        let shared = Arc::new(Shared::new(config, Instant::now()));
        let slot = &shared.slots[0];
        let (sender, outcomes) = crossbeam_channel::bounded(4);
        let wakes = Arc::new(AtomicU64::new(0));
        let counter = wakes.clone();
        let port = Arc::new(PortShared {
            id: 0,
            outcomes: sender,
            wake: Arc::new(move || count(&counter)),
        });
        let track = 5 << 16;
        let share = Shares::of(port.id, track);
        let encode = Job::Encode(Encode {
            track,
            id: 7,
            rung: Rung::L3,
            packets: Vec::new(),
            lost_before: 0,
        });
        let close = Job::Close {
            track,
            direction: Direction::Encode,
        };
        for job in [encode, close] {
            assert!(slot.shares.take(share, 1, true));
            let item = Item {
                job,
                sent: Instant::now(),
                port: port.clone(),
                share,
            };
            assert!(slot.jobs.try_send(item).is_ok());
            let replaced = Thread {
                shared: shared.clone(),
                index: 0,
                generation: 0,
            };
            slot.generation.store(1, Ordering::Relaxed);
            replaced.run(Kit::default());
            assert!(
                slot.shares.take(share, 1, false),
                "a place that nobody takes"
            );
            slot.shares.give_back(share);
        }
        let refused = outcomes.try_recv().unwrap();
        assert!(
            matches!(
                refused,
                Outcome::Refused {
                    id: 7,
                    reason: Refusal::Failed,
                    ..
                }
            ),
            "{refused:?}"
        );
        assert!(outcomes.try_recv().is_err());
        assert_eq!(wakes.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn jobs_wait_for_company_only_where_time_is_short() {
        let start = Instant::now();
        // Batches of `worked` ms, one each 10 ms, for a second.
        let after = |worked: u64| {
            let mut pace = Pace::new(start);
            for k in 1..=100 {
                let end = start + Duration::from_millis(10 * k);
                pace.worked(end - Duration::from_millis(worked), end);
            }
            pace.wait()
        };
        assert_eq!(after(1), Duration::ZERO);
        assert_eq!(after(3), Duration::ZERO);
        assert!(after(6) > Duration::from_millis(2) && after(6) < Duration::from_millis(3));
        assert!(after(9) > Pace::LONGEST.mul_f32(0.99) && after(9) <= Pace::LONGEST);
    }
}
