//! A circuit breaker with hysteresis: what keeps failing isn't asked for a while, then tried with a few, then trusted again.
//!
//! Pure state: the time is an argument. One breaker stands for each rung and one for the whole engine ([`Breakers`]).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use auralink_proto::ladder::{Rung, Rungs};

/// When a breaker opens, for how long, and what closes it.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// So many failures within `window` open it.
    pub failures: usize,
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
    /// short enough that nobody listens to it for long.
    fn default() -> Self {
        Self {
            failures: 5,
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

/// One circuit breaker.
#[derive(Debug, Clone)]
pub struct Breaker {
    settings: Settings,
    state: State,
    /// The latest failures while closed; at most `settings.failures`.
    failed: VecDeque<Instant>,
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
            state: State::Closed { since: now },
            failed: VecDeque::new(),
            open_for: settings.open,
            opened: 0,
        }
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
        match &mut self.state {
            State::Closed { since } => {
                if now.saturating_duration_since(*since) >= self.settings.max_open {
                    self.open_for = self.settings.open;
                }
            }
            State::Open { .. } => {}
            State::Trial { passed } => {
                *passed += 1;
                if *passed >= self.settings.trials {
                    self.failed.clear();
                    self.state = State::Closed { since: now };
                }
            }
        }
    }

    /// Something failed or came late. Returns whether this opened it.
    pub fn failed(&mut self, now: Instant) -> bool {
        match self.state {
            State::Closed { .. } => {
                if self.failed.len() >= self.settings.failures.max(1) {
                    self.failed.pop_front();
                }
                self.failed.push_back(now);
                let enough = self.failed.len() >= self.settings.failures.max(1)
                    && self.failed.front().is_some_and(|first| {
                        now.saturating_duration_since(*first) <= self.settings.window
                    });
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
        self.failed.clear();
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

/// The breakers of every coded rung and that of the engine.
#[derive(Debug, Clone)]
pub struct Breakers {
    rungs: [Breaker; 6],
    engine: Breaker,
}

impl Breakers {
    /// All closed. The engine's needs four times the failures of a rung's, because every rung's waiting counts towards it.
    #[must_use]
    pub fn new(settings: Settings, now: Instant) -> Self {
        let engine = Settings {
            failures: settings.failures.saturating_mul(4),
            ..settings
        };
        Self {
            rungs: std::array::from_fn(|_| Breaker::new(settings, now)),
            engine: Breaker::new(engine, now),
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
        self.engine.succeeded(now);
    }

    /// The codec of `rung` failed, or took too long by itself.
    pub fn failed(&mut self, rung: Rung, now: Instant) {
        if let Some(breaker) = self.rung(rung) {
            breaker.failed(now);
        }
        self.engine.failed(now);
    }

    /// A job waited too long for its turn: nothing against its rung, but against the engine.
    pub fn waited(&mut self, now: Instant) {
        self.engine.failed(now);
    }

    /// The codec of `rung` hangs.
    pub fn hangs(&mut self, rung: Rung, now: Instant) {
        if let Some(breaker) = self.rung(rung) {
            breaker.trip(now);
        }
    }

    /// The rungs that may be used now; none where the engine's breaker is open.
    pub fn allowed(&mut self, now: Instant) -> Rungs {
        if !self.engine.allows(now) {
            return Rungs::NONE;
        }
        Rung::CODED
            .into_iter()
            .zip(&mut self.rungs)
            .filter_map(|(rung, breaker)| breaker.allows(now).then_some(rung))
            .fold(Rungs::NONE, Rungs::with)
    }

    /// How often each rung's breaker has opened, L1 first, then the engine's.
    #[must_use]
    pub fn opened(&self) -> [u64; 7] {
        std::array::from_fn(|index| {
            self.rungs
                .get(index)
                .map_or(self.engine.opened(), Breaker::opened)
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
    fn a_rung_falls_alone_and_the_engine_with_all() {
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
}
