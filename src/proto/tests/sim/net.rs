//! A network of which every accident is drawn from a seed.

use std::time::Duration;

/// SplitMix64 (Steele, Lea and Flood, 2014): small, seedable with any number, and the same on
/// every machine.
#[derive(Debug, Clone)]
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `bound` − 1.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).unwrap_or(0)
    }

    /// True with the probability given.
    pub(crate) fn chance(&mut self, probability: f64) -> bool {
        // 53 bits are all that an f64 holds.
        #[allow(clippy::cast_precision_loss)]
        let unit = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        unit < probability
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next().to_le_bytes()[0]).collect()
    }
}

/// What one link does to datagrams, alike in both directions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Netem {
    /// Probability that a datagram is lost.
    pub(crate) loss: f64,
    /// Probability that it comes twice.
    pub(crate) duplicate: f64,
    /// Probability that it is overtaken by what is sent within the next 40 ms.
    pub(crate) reorder: f64,
    /// Way in one direction.
    pub(crate) delay: Duration,
    /// At most so much more, uniformly.
    pub(crate) jitter: Duration,
}

/// How much later a reordered datagram comes.
const LATE: Duration = Duration::from_millis(40);

impl Netem {
    /// A lossless link.
    pub(crate) fn clean(delay_ms: u64) -> Self {
        Self {
            loss: 0.0,
            duplicate: 0.0,
            reorder: 0.0,
            delay: Duration::from_millis(delay_ms),
            jitter: Duration::ZERO,
        }
    }

    /// A link that does everything at once.
    pub(crate) fn lossy(delay_ms: u64, loss: f64) -> Self {
        Self {
            loss,
            duplicate: loss / 3.0,
            reorder: loss / 3.0,
            delay: Duration::from_millis(delay_ms),
            jitter: Duration::from_millis(delay_ms / 2),
        }
    }

    /// When each copy of a datagram arrives, counted from now.
    pub(crate) fn arrivals(&self, rng: &mut Rng) -> Vec<Duration> {
        let copies = 1 + usize::from(rng.chance(self.duplicate));
        let mut arrivals = Vec::new();
        for _ in 0..copies {
            if rng.chance(self.loss) {
                continue;
            }
            let jitter = u64::try_from(self.jitter.as_micros()).unwrap_or(0);
            let jitter = rng.next() % (jitter + 1);
            let late = if rng.chance(self.reorder) {
                LATE
            } else {
                Duration::ZERO
            };
            arrivals.push(self.delay + Duration::from_micros(jitter) + late);
        }
        arrivals
    }
}

/// Runs a scenario for seeds 0 to `count` − 1, or for the one in `AURALINK_SEED`, and names the
/// seed of the one that fails. The seed decides what the network does and when; keys and
/// transaction ids are drawn by the libraries themselves.
pub(crate) fn for_seeds(count: u64, scenario: impl Fn(u64)) {
    struct Named(u64);
    impl Drop for Named {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("failed with AURALINK_SEED={}", self.0);
            }
        }
    }
    let only = std::env::var("AURALINK_SEED")
        .ok()
        .map(|seed| seed.parse().expect("AURALINK_SEED is a number"));
    for seed in only.map_or(0..count, |seed: u64| seed..seed + 1) {
        let named = Named(seed);
        scenario(seed);
        drop(named);
    }
}
