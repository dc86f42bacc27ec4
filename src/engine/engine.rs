//! The engine as the rest of the sidecar sees it: start, ports, what may be used now, how it is.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use auralink_proto::ladder::{Frames, Rung, Rungs};
use crossbeam_channel::{Receiver, Sender};

use crate::breaker::Settings as BreakerSettings;
use crate::job::{Busy, Job, Outcome};
use crate::pool::{
    Command, Item, PortShared, Shared, Shares, Slot, Watcher, count, lock, models_of,
};
use crate::source::{Folders, Source};

/// How an engine is set up.
#[derive(Debug, Clone)]
pub struct EngineConfig {
    /// Codec threads, at least 1.
    pub threads: usize,
    /// Jobs that wait for one thread at most.
    pub queue: usize,
    /// Outcomes that wait for one port at most; more are dropped and counted.
    pub results: usize,
    /// Tracks coded in one batch at most.
    pub batch: usize,
    /// `libonnxruntime.so`; without it there are only Opus rungs.
    pub runtime: Option<PathBuf>,
    /// The folder of the codec's bundle, Lyra v2 or another; without it there are only Opus rungs.
    pub lyra: Option<PathBuf>,
    /// The folder of the voice detector's bundle; without it nothing is coded below L4.
    pub vad: Option<PathBuf>,
    /// Bits a second of the Opus that restored speech is coded with.
    pub local_bitrate: u32,
    /// libopus' encoder complexity for that, 0 to 10.
    pub local_complexity: u8,
    /// A job not done this long after it was sent counts as late.
    pub deadline: Duration,
    /// A thread that is busy with one batch for so long is taken to hang: it gets no more jobs until it is done.
    pub stall: Duration,
    /// A thread that hangs for so long is replaced.
    pub replace: Duration,
    /// When the circuit breakers open and close.
    pub breaker: BreakerSettings,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            threads: 1,
            queue: 256,
            results: 1024,
            batch: 32,
            runtime: None,
            lyra: None,
            vad: None,
            local_bitrate: 64_000,
            local_complexity: 5,
            deadline: Duration::from_millis(20),
            stall: Duration::from_millis(50),
            replace: Duration::from_secs(2),
            breaker: BreakerSettings::default(),
        }
    }
}

/// Why an engine couldn't start. A missing model is no reason: see [`Engine::status`].
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration makes no sense.
    #[error("engine.{0}")]
    Config(&'static str),
    /// The operating system gave no thread.
    #[error("cannot start a codec thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// How the engine is, in words where something is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// What may be used for encoding now.
    pub rungs: Rungs,
    /// What can be decoded: what to advertise.
    pub decodable: Rungs,
    /// Everything configured is there and works.
    pub complete: bool,
    /// What is wrong and what to do, a line each; empty when `complete`.
    pub problems: Vec<String>,
    /// No models and no runtime are configured, and what can't be done without them: among `problems` too.
    pub unconfigured: Vec<String>,
    /// Names and sha256 of the manifests in use: the codec's, the voice detector's.
    pub bundles: Vec<(String, String)>,
    /// The sha256 of the codec's manifest, where it is loaded.
    pub codec: Option<String>,
    /// Codec threads that take jobs now.
    pub threads_up: usize,
}

/// What the engine has counted since its start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Groups coded, by rung: L1 first.
    pub encoded: [u64; 6],
    /// Payloads restored or concealed.
    pub decoded: u64,
    /// Packets coded anew.
    pub recoded: u64,
    /// Packets that another stream of the same source had coded anew already.
    pub shared: u64,
    /// Groups refused as undecodable, stereo or of a wrong duration.
    pub refused: u64,
    /// Jobs that a codec failed at.
    pub failed: u64,
    /// Jobs done after their deadline.
    pub late: u64,
    /// Jobs thrown away unseen because they were far too old, or because the thread that took them had been replaced.
    pub expired: u64,
    /// Jobs not taken because a queue was full or a thread hung.
    pub busy: u64,
    /// Outcomes dropped because nobody took them.
    pub dropped: u64,
    /// Threads started again after a panic or a hang.
    pub restarts: u64,
    /// How often breakers opened, of all threads: each rung's, L1 first, then those of whole threads.
    pub opened: [u64; 7],
}

/// Codec threads and what they share. Dropping it ends them.
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    commands: Sender<Command>,
    watcher: Option<JoinHandle<()>>,
    ports: AtomicU32,
}

/// How long [`Engine::start`] waits for the models.
const LOADING: Duration = Duration::from_secs(10);

impl Engine {
    /// Starts the threads and loads the models; takes as long as that takes (a fraction of a second).
    ///
    /// # Errors
    /// Only where the configuration is impossible or a thread can't be had; a missing model is said by [`Engine::status`].
    pub fn start(config: EngineConfig) -> Result<Self, StartError> {
        let source = Folders::new(&config);
        Self::with(config, Box::new(source))
    }

    /// With models from elsewhere.
    pub(crate) fn with(config: EngineConfig, source: Box<dyn Source>) -> Result<Self, StartError> {
        let fault = [
            (
                !(1..=256).contains(&config.threads),
                "threads has to be 1 to 256",
            ),
            (
                config.queue == 0 || config.results == 0,
                "queue and results have to be at least 1",
            ),
            (config.batch == 0, "batch has to be at least 1"),
            (
                !(6_000..=256_000).contains(&config.local_bitrate),
                "local_bitrate has to be 6000 to 256000",
            ),
            (
                config.local_complexity > 10,
                "local_complexity has to be 0 to 10",
            ),
        ];
        if let Some((_, what)) = fault.into_iter().find(|(wrong, _)| *wrong) {
            return Err(StartError::Config(what));
        }
        let now = Instant::now();
        let shared = Arc::new(Shared::new(config, now));
        let (commands, orders) = crossbeam_channel::bounded(4);
        let (ready, loaded) = crossbeam_channel::bounded(1);
        let watcher = Watcher::new(shared.clone(), source, orders, ready, now);
        let watcher = std::thread::Builder::new()
            .name("codec-watch".to_owned())
            .spawn(move || watcher.run())?;
        // Later is no fault: rungs appear when they are there.
        let _ = loaded.recv_timeout(LOADING);
        Ok(Self {
            shared,
            commands,
            watcher: Some(watcher),
            ports: AtomicU32::new(0),
        })
    }

    /// A port for one media worker. `wake` is called from a codec thread each time after outcomes were put into it; it must not
    /// block.
    #[must_use]
    pub fn port(&self, wake: Arc<dyn Fn() + Send + Sync>) -> Port {
        let (sender, outcomes) = crossbeam_channel::bounded(self.shared.config.results);
        Port {
            port: Arc::new(PortShared {
                id: self.ports.fetch_add(1, Ordering::Relaxed),
                outcomes: sender,
                wake,
            }),
            shared: self.shared.clone(),
            outcomes,
        }
    }

    /// The rungs that may be encoded now: loaded, and with no breaker open. A load of one atomic.
    #[must_use]
    pub fn rungs(&self) -> Rungs {
        self.shared.encodable()
    }

    /// The rungs that can be decoded: what to advertise. Breakers don't count.
    #[must_use]
    pub fn decodable(&self) -> Rungs {
        self.shared.decodable()
    }

    /// The bundle of the neural rungs as peers are told of it: the first 32 bits of its SHA-256. It may not be in use yet.
    #[must_use]
    pub fn models(&self) -> Option<u32> {
        models_of(lock(&self.shared.report).codec.as_deref())
    }

    /// Whether the thread that watches over the others runs. Without it nobody notices a codec that hangs.
    #[must_use]
    pub fn is_watched(&self) -> bool {
        self.watcher
            .as_ref()
            .is_some_and(|watcher| !watcher.is_finished())
    }

    /// How it is, in words.
    #[must_use]
    pub fn status(&self) -> Status {
        let report = lock(&self.shared.report).clone();
        let threads_up = self.shared.threads_up();
        let config = &self.shared.config;
        let bare = config.runtime.is_none() && config.lyra.is_none() && config.vad.is_none();
        // Where nothing is configured, that is all there can be to report of models.
        let unconfigured = if bare {
            report.problems.clone()
        } else {
            Vec::new()
        };
        let mut problems = report.problems;
        let missing = self.shared.config.threads - threads_up;
        if missing > 0 {
            problems.push(format!(
                "{missing} of {} codec threads hang or fell; their tracks go native",
                self.shared.config.threads
            ));
        }
        if !self.is_watched() {
            problems.push("the thread that watches over the codecs has ended".to_owned());
        }
        let rungs = self.rungs();
        for rung in self.decodable().iter() {
            let off = self.shared.slots.iter();
            let off = off.filter(|slot| !slot.allowed().has(rung)).count();
            if off > 0 && (rung >= Rung::L3 || report.bundles.len() == 2) {
                problems.push(format!(
                    "{rung} is off for a while on {off} of {} codec threads: it failed or came late too often",
                    self.shared.config.threads
                ));
            }
        }
        Status {
            rungs,
            decodable: self.decodable(),
            complete: problems.is_empty(),
            problems,
            unconfigured,
            bundles: report.bundles,
            codec: report.codec,
            threads_up,
        }
    }

    /// What it has counted.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }

    /// Looks whether a bundle or the library came, went or changed, and loads it or lets it go; cheap where nothing changed.
    /// Returns at once: the engine's own thread does it.
    pub fn reload(&self) {
        // A full queue holds such a wish already.
        let _ = self.commands.try_send(Command::Reload);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
        let _ = self
            .commands
            .send_timeout(Command::Stop, Duration::from_millis(500));
        // It may be loading a model; nobody should wait for that long. The codec threads end by themselves.
        if let Some(watcher) = self.watcher.take()
            && watcher.is_finished()
        {
            let _ = watcher.join();
        }
    }
}

/// A media worker's end of the engine. Its track keys are its own: two workers may use the same.
pub struct Port {
    shared: Arc<Shared>,
    port: Arc<PortShared>,
    outcomes: Receiver<Outcome>,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port")
            .field("id", &self.port.id)
            .finish_non_exhaustive()
    }
}

impl Port {
    /// Hands a job in. Never blocks.
    ///
    /// # Errors
    /// The job isn't taken where the track's thread is behind or its peer connection has its share of the queue
    /// ([`Busy::Full`]), where the thread hangs ([`Busy::Hangs`]), or where the engine has ended.
    pub fn try_send(&self, job: Job) -> Result<(), Busy> {
        if self.shared.ended.load(Ordering::Relaxed) {
            return Err(Busy::Ended);
        }
        let slot = self.slot(&job).ok_or(Busy::Ended)?;
        // A track that ends is told even to a thread that hangs, and whatever else waits.
        let ends = matches!(job, Job::Close { .. });
        let up = slot.up.load(Ordering::Relaxed) || ends;
        // Nothing may be used there: it would only come back refused.
        let codes = ends || matches!(job, Job::Decode(_)) || slot.allowed() != Rungs::NONE;
        let share = Shares::of(self.port.id, job.track());
        let free = self.shared.config.queue.saturating_sub(slot.jobs.len());
        if up && codes && slot.shares.take(share, free, ends) {
            let item = Item {
                job,
                sent: Instant::now(),
                port: self.port.clone(),
                share,
            };
            if slot.jobs.try_send(item).is_ok() {
                return Ok(());
            }
            slot.shares.give_back(share);
        }
        count(&self.shared.counters.busy);
        Err(if up { Busy::Full } else { Busy::Hangs })
    }

    /// The next outcome, if there is one. Never blocks.
    #[must_use]
    pub fn try_recv(&self) -> Option<Outcome> {
        self.outcomes.try_recv().ok()
    }

    /// As [`Engine::rungs`].
    #[must_use]
    pub fn rungs(&self) -> Rungs {
        self.shared.encodable()
    }

    /// The models that every thread codes with now, as [`Engine::models`] names them; none while they are being replaced.
    #[must_use]
    pub fn models(&self) -> Option<u32> {
        self.shared.models()
    }

    /// The rungs that can be decoded now: as [`Engine::decodable`], none while no codec thread is up.
    #[must_use]
    pub fn decodable(&self) -> Rungs {
        if self.shared.threads_up() == 0 {
            return Rungs::NONE;
        }
        self.shared.decodable()
    }

    /// Frames of the codec that was loaded last: what payloads of L1 and L2 consist of.
    #[must_use]
    pub fn frames(&self) -> Frames {
        self.shared.frames()
    }

    /// The thread that a track, or what it shares with others, is pinned to.
    fn slot(&self, job: &Job) -> Option<&Slot> {
        let slots = &self.shared.slots;
        slots.get(place(self.port.id, job.track(), job.source(), slots.len()))
    }
}

/// Which of so many threads it is. Tracks of different peer connections differ in their high bits only, so that a hash is needed whose
/// every bit depends on all of them.
fn place(port: u32, track: u64, source: Option<u128>, slots: usize) -> usize {
    let mut hasher = DefaultHasher::new();
    match source {
        Some(source) => source.hash(&mut hasher),
        None => (port, track).hash(&mut hasher),
    }
    (hasher.finish() % slots.max(1) as u64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A hundred participants with one microphone each, as a worker numbers their tracks.
    #[test]
    fn tracks_are_spread_over_all_threads() {
        for slots in 2..=16 {
            let mut tracks = vec![0u32; slots];
            for relay in 1..=100u64 {
                tracks[place(0, relay << 16, None, slots)] += 1;
            }
            let mean = 100 / slots as u32;
            let most = tracks.iter().max().unwrap();
            assert!(*most <= 2 * mean + 4, "{tracks:?}");
            assert!(tracks.iter().all(|n| *n > 0), "{tracks:?}");
        }
    }
}
