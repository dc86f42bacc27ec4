//! A circuit breaker with hysteresis: what keeps failing isn't asked for a while, then tried with a few, then trusted again.
//!
//! Pure state: the time is an argument. Each codec thread has one breaker for each rung and one for all it does ([`Breakers`]):
//! what hangs or is slow on one thread says nothing of the others. It judges by the share that failed, because a busy thread
//! has more accidents in a second than an idle one and is no worse for it.

use std::time::{Duration, Instant};

use auralink_proto::ladder::{Rung, Rungs};

/// When a breaker opens, for how long, and what closes it.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// So many failures within `window` open it, ...
    pub failures: u32,
    /// ... if they are at least this share of what was done in it, from 0 to 1.
    pub share: f32,
    /// See `failures`.
    pub window: Duration,
    /// How long it stays open at first; twice as long after each trial that fails.
    pub open: Duration,
    /// The longest it stays open. So long closed without opening, it starts from `open` again.
    pub max_open: Duration,
    /// So many successes in a row close it after `open`; one failure opens it again.
    pub trials: u32,
}

impl Default for Settings {
    /// Five groups late or failed within two seconds are a fifth of a second of one track: long enough to be no accident,
    /// short enough that nobody listens to it for long. And they are a tenth of what one track says in that time.
    fn default() -> Self {
        Self {
            failures: 5,
            share: 0.1,
            window: Duration::from_secs(2),
            open: Duration::from_secs(2),
            max_open: Duration::from_secs(60),
            trials: 10,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed { since: Instant },
    Open { until: Instant },
    Trial { passed: u32 },
}

/// Into so many parts the window is cut: what falls out of it does so a tenth at a time.
const PARTS: u32 = 10;

/// What was done and what of it failed, in the last while.
#[derive(Debug, Clone, Default)]
struct Tally {
    parts: [(u32, u32); PARTS as usize],
    /// Which part is the present one, counted from the breaker's beginning.
    at: u64,
}

impl Tally {
    /// Counts something done in the part numbered `at`.
    fn count(&mut self, at: u64, failed: bool) {
        self.forget(at);
        let place = (at % u64::from(PARTS)) as usize;
        if let Some((done, failures)) = self.parts.get_mut(place) {
            *done = done.saturating_add(1);
            *failures = failures.saturating_add(u32::from(failed));
        }
    }

    /// Empties the parts that have passed between the last and the one numbered `at`.
    fn forget(&mut self, at: u64) {
        for passed in 1..=at.saturating_sub(self.at).min(u64::from(PARTS)) {
            let place = (self.at + passed) % u64::from(PARTS);
            if let Some(part) = self.parts.get_mut(place as usize) {
                *part = (0, 0);
            }
        }
        self.at = self.at.max(at);
    }

    /// How much was done, and how much of it failed.
    fn sum(&self) -> (u32, u32) {
        let add =
            |a: (u32, u32), b: &(u32, u32)| (a.0.saturating_add(b.0), a.1.saturating_add(b.1));
        self.parts.iter().fold((0, 0), add)
    }
}

/// One circuit breaker.
#[derive(Debug, Clone)]
pub struct Breaker {
    settings: Settings,
    start: Instant,
    state: State,
    /// Of what was done while closed.
    tally: Tally,
    /// How long it is to stay open next time.
    open_for: Duration,
    opened: u64,
}

impl Breaker {
    /// A closed one.
    #[must_use]
    pub fn new(settings: Settings, now: Instant) -> Self {
        Self {
            settings,
            start: now,
            state: State::Closed { since: now },
            tally: Tally::default(),
            open_for: settings.open,
            opened: 0,
        }
    }

    /// The part of the window that `now` lies in.
    fn part(&self, now: Instant) -> u64 {
        let part = (self.settings.window / PARTS).as_micros().max(1);
        let passed = now.saturating_duration_since(self.start).as_micros();
        u64::try_from(passed / part).unwrap_or(u64::MAX)
    }

    /// What it stands for may be used now. Past its time an open breaker lets a trial begin.
    pub fn allows(&mut self, now: Instant) -> bool {
        if let State::Open { until } = self.state
            && now >= until
        {
            self.state = State::Trial { passed: 0 };
        }
        !matches!(self.state, State::Open { .. })
    }

    /// Something was done in time. A success that was asked for before it opened changes nothing.
    pub fn succeeded(&mut self, now: Instant) {
        let part = self.part(now);
        match &mut self.state {
            State::Closed { since } => {
                self.tally.count(part, false);
                if now.saturating_duration_since(*since) >= self.settings.max_open {
                    self.open_for = self.settings.open;
                }
            }
            State::Open { .. } => {}
            State::Trial { passed } => {
                *passed += 1;
                if *passed >= self.settings.trials {
                    self.tally = Tally::default();
                    self.state = State::Closed { since: now };
                }
            }
        }
    }

    /// Something failed or came late. Returns whether this opened it.
    pub fn failed(&mut self, now: Instant) -> bool {
        match self.state {
            State::Closed { .. } => {
                self.tally.count(self.part(now), true);
                let (done, failed) = self.tally.sum();
                let enough = failed >= self.settings.failures.max(1)
                    && f64::from(failed) >= f64::from(done) * f64::from(self.settings.share);
                if enough {
                    self.trip(now);
                }
                enough
            }
            State::Trial { .. } => {
                self.trip(now);
                true
            }
            State::Open { .. } => false,
        }
    }

    /// Opens it whatever came before: what it stands for hangs. Does nothing while open.
    pub fn trip(&mut self, now: Instant) {
        if matches!(self.state, State::Open { .. }) {
            return;
        }
        self.tally = Tally::default();
        self.state = State::Open {
            until: now + self.open_for,
        };
        self.open_for = (self.open_for * 2).min(self.settings.max_open);
        self.opened += 1;
    }

    /// How often it has opened.
    #[must_use]
    pub const fn opened(&self) -> u64 {
        self.opened
    }
}

/// The breakers of one codec thread: of every coded rung, and of all it does.
#[derive(Debug, Clone)]
pub struct Breakers {
    rungs: [Breaker; 6],
    all: Breaker,
}

impl Breakers {
    /// All closed. That of the thread needs four times the failures of a rung's, because every rung's waiting counts towards it.
    #[must_use]
    pub fn new(settings: Settings, now: Instant) -> Self {
        let all = Settings {
            failures: settings.failures.saturating_mul(4),
            ..settings
        };
        Self {
            rungs: std::array::from_fn(|_| Breaker::new(settings, now)),
            all: Breaker::new(all, now),
        }
    }

    fn rung(&mut self, rung: Rung) -> Option<&mut Breaker> {
        usize::from(rung.number())
            .checked_sub(1)
            .and_then(|index| self.rungs.get_mut(index))
    }

    /// A job on `rung` was done in time.
    pub fn succeeded(&mut self, rung: Rung, now: Instant) {
        if let Some(breaker) = self.rung(rung) {
            breaker.succeeded(now);
        }
        self.all.succeeded(now);
    }

    /// The codec of `rung` failed, or took too long by itself.
    pub fn failed(&mut self, rung: Rung, now: Instant) {
        if let Some(breaker) = self.rung(rung) {
            breaker.failed(now);
        }
        self.all.failed(now);
    }

    /// A job waited too long for its turn: nothing against its rung, but against the thread.
    pub fn waited(&mut self, now: Instant) {
        self.all.failed(now);
    }

    /// The codec of `rung` hangs.
    pub fn hangs(&mut self, rung: Rung, now: Instant) {
        if let Some(breaker) = self.rung(rung) {
            breaker.trip(now);
        }
    }

    /// The rungs that may be used now; none where the thread's own breaker is open.
    pub fn allowed(&mut self, now: Instant) -> Rungs {
        if !self.all.allows(now) {
            return Rungs::NONE;
        }
        Rung::CODED
            .into_iter()
            .zip(&mut self.rungs)
            .filter_map(|(rung, breaker)| breaker.allows(now).then_some(rung))
            .fold(Rungs::NONE, Rungs::with)
    }

    /// How often each rung's breaker has opened, L1 first, then the thread's.
    #[must_use]
    pub fn opened(&self) -> [u64; 7] {
        std::array::from_fn(|index| {
            self.rungs
                .get(index)
                .map_or(self.all.opened(), Breaker::opened)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn breaker(now: Instant) -> Breaker {
        Breaker::new(
            Settings {
                failures: 3,
                share: 0.1,
                window: MS * 1000,
                open: MS * 500,
                max_open: MS * 1500,
                trials: 4,
            },
            now,
        )
    }

    #[test]
    fn opens_on_failures_close_together_only() {
        let now = Instant::now();
        let mut b = breaker(now);
        for k in 0..10 {
            assert!(!b.failed(now + MS * 600 * k), "spread out: {k}");
            assert!(b.allows(now + MS * 600 * k));
        }
        let now = now + MS * 20_000;
        assert!(!b.failed(now));
        b.succeeded(now);
        assert!(!b.failed(now + MS * 400), "the first two within the window");
        assert!(b.failed(now + MS * 900));
        assert!(!b.allows(now + MS * 900));
        assert_eq!(b.opened(), 1);
    }

    #[test]
    fn a_trial_closes_it_or_opens_it_for_longer() {
        let now = Instant::now();
        let mut b = breaker(now);
        b.trip(now);
        assert!(!b.allows(now + MS * 499));
        b.succeeded(now + MS * 499);
        assert!(!b.allows(now + MS * 499), "a late success of before");
        assert!(b.allows(now + MS * 500));
        for _ in 0..3 {
            b.succeeded(now + MS * 510);
        }
        assert!(b.failed(now + MS * 520), "one failure ends the trial");
        assert!(!b.allows(now + MS * (520 + 999)), "twice as long");
        assert!(b.allows(now + MS * (520 + 1000)));
        for _ in 0..4 {
            b.succeeded(now + MS * 1530);
        }
        assert!(!b.failed(now + MS * 1540), "closed: one failure is none");
        b.trip(now + MS * 1550);
        assert!(!b.allows(now + MS * (1550 + 1499)), "at most max_open");
        assert!(b.allows(now + MS * (1550 + 1500)));
    }

    #[test]
    fn a_long_quiet_time_forgets_how_long_it_was_open() {
        let now = Instant::now();
        let mut b = breaker(now);
        b.trip(now);
        assert!(b.allows(now + MS * 500));
        for k in 0..4 {
            b.succeeded(now + MS * (500 + k));
        }
        b.succeeded(now + MS * 5000);
        b.trip(now + MS * 5000);
        assert!(b.allows(now + MS * 5500), "as the first time");
    }

    #[test]
    fn a_rung_falls_alone_and_the_thread_with_all() {
        let now = Instant::now();
        let settings = Settings {
            failures: 3,
            ..Settings::default()
        };
        let mut all = Breakers::new(settings, now);
        for _ in 0..3 {
            all.failed(Rung::L2, now);
        }
        assert!(!all.allowed(now).has(Rung::L2));
        assert!(all.allowed(now).has(Rung::L1) && all.allowed(now).has(Rung::L3));
        for _ in 0..9 {
            all.waited(now);
        }
        assert_eq!(all.allowed(now), Rungs::NONE);
        assert_eq!(all.opened(), [0, 1, 0, 0, 0, 0, 1]);
        assert_eq!(all.allowed(now + settings.open), Rungs::ALL);
    }

    /// A thread that does 1,000 jobs a second, one of a thousand late; and one of a hundred.
    #[test]
    fn a_late_job_now_and_then_is_no_reason_to_stop() {
        let start = Instant::now();
        for each in [1000, 100] {
            let mut breakers = Breakers::new(Settings::default(), start);
            for n in 0..60_000u32 {
                let now = start + MS * n;
                assert!(breakers.allowed(now).has(Rung::L2), "one late of {each}");
                if n % each == each - 1 {
                    breakers.waited(now);
                } else {
                    breakers.succeeded(Rung::L2, now);
                }
            }
            assert_eq!(breakers.opened(), [0; 7]);
        }
    }

    /// The same for failures of a rung; where every fifth fails, however many there are, it stops.
    #[test]
    fn a_share_of_failures_opens_it_whatever_the_load() {
        let start = Instant::now();
        for a_second in [25u32, 250, 2500] {
            let mut breakers = Breakers::new(Settings::default(), start);
            let mut opened = None;
            for n in 0..a_second * 10 {
                let now = start + Duration::from_secs(1) * n / a_second;
                if !breakers.allowed(now).has(Rung::L2) {
                    opened = Some(now - start);
                    break;
                }
                if n % 5 == 4 {
                    breakers.failed(Rung::L2, now);
                } else {
                    breakers.succeeded(Rung::L2, now);
                }
            }
            assert!(
                opened.is_some_and(|after| after <= MS * 1000),
                "{a_second} a second: {opened:?}"
            );
        }
    }

    /// One pause of 21 ms while 20 jobs wait: in a thread that has work the pause is an accident.
    #[test]
    fn one_pause_of_a_busy_thread_does_not_stop_it() {
        let start = Instant::now();
        let mut breakers = Breakers::new(Settings::default(), start);
        for n in 0..1000u32 {
            breakers.succeeded(Rung::L2, start + MS * n);
        }
        let now = start + MS * 1021;
        for _ in 0..20 {
            breakers.waited(now);
        }
        assert_eq!(breakers.allowed(now), Rungs::ALL);
    }

    #[test]
    fn what_is_past_the_window_counts_no_more() {
        let start = Instant::now();
        let mut b = breaker(start);
        // Long ago much went well; now everything fails.
        for n in 0..10_000u32 {
            b.succeeded(start + MS * n / 10);
        }
        for n in 0..3u32 {
            assert!(b.allows(start + MS * (5000 + n)));
            b.failed(start + MS * (5000 + n));
        }
        assert!(!b.allows(start + MS * 5002));
    }
}
