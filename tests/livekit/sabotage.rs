//! The fault switch: do the tests notice when a call dies? With `AURALINK_TEST_FAULT=kill-media[:SEED[:CALL]]` each test loses the media
//! of one of its participants, drawn by chance, at a moment of the call drawn by chance, and has to fail. scripts/faults.py runs all
//! tests that way and says which don't. Nothing of it is in the product: the kernel drops the participant's packets
//! (tests/tools/no_media.py), whatever kind of client it is. Its signalling goes on, and nobody is told.

use crate::client::BEGINS;
use crate::harness::{Process, root, setting};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// In the last seconds of a call its end isn't told from a death: buffers play on, and one leaves before the other.
const BLIND: f64 = 2.5;

/// The file in a test's folder that says whose media was killed, and when.
const STRUCK: &str = "fault.txt";
/// The one that names everybody whose media could have been.
const PARTICIPANTS: &str = "participants.txt";

/// ICE-TCP ports of all servers and sidecars of this process.
static ICE_TCP: Mutex<Vec<u16>> = Mutex::new(Vec::new());

/// Media can be had on this TCP port too.
pub(crate) fn ice_tcp(port: u16) {
    ICE_TCP
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .push(port);
}

struct Participant {
    name: String,
    log: PathBuf,
    pid: u32,
    cgroup: PathBuf,
    /// For so many seconds of the call a death has to be noticed.
    seconds: f64,
    /// The call that it was in, once that has begun.
    call: Option<usize>,
}

impl Participant {
    fn runs(&self) -> bool {
        // A zombie has no descriptors any more.
        fs::read_dir(format!("/proc/{}/fd", self.pid)).is_ok_and(|mut all| all.next().is_some())
    }
}

struct Shared {
    test: &'static str,
    dir: PathBuf,
    seed: u64,
    call: usize,
    stop: AtomicBool,
    participants: Mutex<Vec<Participant>>,
}

/// The fault of one test.
pub(crate) struct Sabotage {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
    count: AtomicU32,
}

impl Sabotage {
    /// None where the switch isn't set.
    pub(crate) fn asked(test: &'static str, dir: &Path) -> Option<Self> {
        let asked = std::env::var("AURALINK_TEST_FAULT").ok()?;
        let mut words = asked.split(':');
        let kind = words.next();
        let numbers: Option<Vec<u64>> = words.map(|word| word.parse().ok()).collect();
        let (Some("kill-media"), Some(0..=2)) = (kind, numbers.as_ref().map(Vec::len)) else {
            panic!("AURALINK_TEST_FAULT={asked}: it takes kill-media[:SEED[:CALL]], numbers");
        };
        let number = |at: usize| numbers.iter().flatten().nth(at).copied();
        Some(Self {
            shared: Arc::new(Shared {
                test,
                dir: dir.to_owned(),
                seed: number(0).unwrap_or(0),
                call: usize::try_from(number(1).unwrap_or(0)).unwrap(),
                stop: AtomicBool::new(false),
                participants: Mutex::default(),
            }),
            thread: Mutex::default(),
            count: AtomicU32::new(0),
        })
    }

    /// The command, run so that its media can be taken from it, and where that is done.
    pub(crate) fn exposed(&self, command: &Command) -> (Command, PathBuf) {
        let count = self.count.fetch_add(1, Ordering::Relaxed);
        let cgroup = cgroups().join(format!(
            "auralink-{}-{}-{count}",
            std::process::id(),
            self.shared.test
        ));
        fs::create_dir(&cgroup).unwrap_or_else(|error| {
            panic!("{}: {error} (it needs root)", cgroup.display());
        });
        // Sockets belong to the group in which they are made: the process has to be in it from its start.
        let mut exposed = Command::new("sh");
        exposed
            .args(["-c", "echo $$ > \"$0\"/cgroup.procs && exec \"$@\""])
            .arg(&cgroup)
            .arg(command.get_program())
            .args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => exposed.env(name, value),
                None => exposed.env_remove(name),
            };
        }
        (exposed, cgroup)
    }

    /// This participant is one of those that may be struck, in so many seconds from when its call begins.
    pub(crate) fn enlist(&self, name: &str, process: &Process, cgroup: PathBuf, seconds: f64) {
        let mut participants = self.shared.participants();
        participants.push(Participant {
            name: name.to_owned(),
            log: process.log.clone(),
            pid: process.pid(),
            cgroup,
            seconds: (seconds - BLIND).max(0.3 * seconds),
            call: None,
        });
        let names: Vec<_> = participants.iter().map(|one| one.name.as_str()).collect();
        fs::write(self.shared.dir.join(PARTICIPANTS), names.join("\n")).unwrap();
        drop(participants);
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        thread.get_or_insert_with(|| {
            let shared = Arc::clone(&self.shared);
            std::thread::spawn(move || shared.watch())
        });
    }
}

impl Drop for Sabotage {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thread) = thread.take() {
            let _ = thread.join();
        }
        for participant in self.shared.participants().iter() {
            // Empty unless the test left something behind, and then it says so itself.
            let _ = fs::remove_dir(&participant.cgroup);
        }
    }
}

impl Shared {
    fn participants(&self) -> std::sync::MutexGuard<'_, Vec<Participant>> {
        self.participants
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Waits for the call, strikes once.
    fn watch(&self) {
        let mut calls = 0;
        while !self.stopped() {
            std::thread::sleep(Duration::from_millis(20));
            let mut participants = self.participants();
            let begins = |one: &Participant| {
                let log = fs::read_to_string(&one.log).unwrap_or_default();
                one.call.is_none() && log.lines().any(|line| line == BEGINS)
            };
            if !participants.iter().any(begins) {
                continue;
            }
            // All who are there belong to it: for most clients a call begins when the others have come.
            for one in participants.iter_mut().filter(|one| one.call.is_none()) {
                one.call = Some(calls);
            }
            drop(participants);
            if calls == self.call {
                return self.strike(Instant::now());
            }
            calls += 1;
        }
    }

    fn strike(&self, began: Instant) {
        let mut chance = Chance::new(self.seed, self.test);
        let mut targets: Vec<usize> = (0..self.participants().len()).collect();
        targets.retain(|at| self.participants()[*at].call == Some(self.call));
        let place = chance.below(targets.len());
        targets.rotate_left(place);
        let seconds = chance.share() * self.participants()[targets[0]].seconds;
        let due = began + Duration::from_secs_f64(seconds);
        while Instant::now() < due {
            if self.stopped() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let participants = self.participants();
        let alive = targets.iter().map(|at| &participants[*at]);
        let Some(victim) = alive.into_iter().find(|one| one.runs()) else {
            return;
        };
        let ports = ICE_TCP
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let output = Command::new(setting("AURALINK_PYTHON"))
            .arg(root().join("tests/tools/no_media.py"))
            .arg(&victim.cgroup)
            .arg("--tcp")
            .args(ports.iter().map(u16::to_string))
            .output()
            .expect("tests/tools/no_media.py");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let text = format!(
            "the media of {} was killed {:.1} s into the call",
            victim.name,
            began.elapsed().as_secs_f64()
        );
        eprintln!("{}: {text}", self.test);
        fs::write(self.dir.join(STRUCK), text).unwrap();
    }
}

/// Where cgroups of version 2 are.
fn cgroups() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").unwrap_or_default();
    let fields = mounts.lines().map(|line| line.split(' ').collect());
    let found = fields
        .filter(|fields: &Vec<&str>| fields.get(2) == Some(&"cgroup2"))
        .find_map(|fields| fields.get(1).map(PathBuf::from));
    found.expect("a mounted cgroup v2 (mount -t cgroup2 none /sys/fs/cgroup/unified), for AURALINK_TEST_FAULT")
}

/// Numbers that a seed and a test's name decide (SplitMix64).
struct Chance(u64);

impl Chance {
    fn new(seed: u64, test: &str) -> Self {
        // FNV-1a.
        let name = test.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self(name ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below `count`.
    fn below(&mut self, count: usize) -> usize {
        usize::try_from(self.next() % (count as u64)).unwrap()
    }

    /// From 0 to below 1.
    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}
