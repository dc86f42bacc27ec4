//! Processes, ports, folders, and the slots that keep measurements from disturbing each other.

use crate::sabotage::Sabotage;
use serde_json::Value;
use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::io::Write;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A path that `scripts/setup.sh` wrote, or the environment variable of that name.
pub(crate) fn setting(name: &str) -> String {
    if let Ok(value) = std::env::var(name) {
        return value;
    }
    let cache = std::env::var("XDG_CACHE_HOME").unwrap_or_else(|_| {
        let home = std::env::var("HOME").expect("HOME or XDG_CACHE_HOME has to be set");
        format!("{home}/.cache")
    });
    let file = format!("{cache}/auralink/env");
    let text = fs::read_to_string(&file)
        .unwrap_or_else(|error| panic!("{file}: {error}: run scripts/setup.sh all"));
    let settings: HashMap<_, _> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .collect();
    let value = settings
        .get(name)
        .unwrap_or_else(|| panic!("{file} has no {name}: run scripts/setup.sh all"));
    assert!(
        Path::new(value).exists(),
        "{name}={value} in {file} is not there any more: run scripts/setup.sh all"
    );
    (*value).to_owned()
}

/// How much of the machine a test needs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Load {
    /// One call of cheap clients, without pictures: a core.
    Light,
    /// A browser is in it, or clients that code pictures: two cores.
    Browser,
    /// It measures, or it is many clients: nothing else runs.
    Alone,
}

/// Cores that running tests have taken, and who waits for some. Where more ran than there are, the start of one call took from
/// another's middle what it needed to be heard.
struct Cores {
    taken: usize,
    queue: VecDeque<u64>,
    next: u64,
}

static CORES: Mutex<Cores> = Mutex::new(Cores {
    taken: 0,
    queue: VecDeque::new(),
    next: 0,
});
static FREED: Condvar = Condvar::new();

/// Some of the machine's cores, until it is dropped.
struct Share(usize);

impl Share {
    /// Waits for its turn: whoever came first is first.
    fn take(load: Load) -> Self {
        let all = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        let wanted = match load {
            Load::Light => 1,
            Load::Browser => 2,
            Load::Alone => all,
        };
        let wanted = wanted.min(all);
        let lock = || -> MutexGuard<'static, Cores> {
            CORES.lock().unwrap_or_else(PoisonError::into_inner)
        };
        let mut cores = lock();
        let own = cores.next;
        cores.next += 1;
        cores.queue.push_back(own);
        while cores.queue.front() != Some(&own) || cores.taken + wanted > all {
            cores = FREED.wait(cores).unwrap_or_else(PoisonError::into_inner);
        }
        cores.queue.pop_front();
        cores.taken += wanted;
        FREED.notify_all();
        Self(wanted)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut cores = CORES.lock().unwrap_or_else(PoisonError::into_inner);
        cores.taken -= self.0;
        FREED.notify_all();
    }
}

/// One test: its folder, its share of the machine, and the logs to print if it fails.
pub(crate) struct Trial {
    pub(crate) name: &'static str,
    pub(crate) dir: PathBuf,
    logs: Mutex<Vec<PathBuf>>,
    sabotage: Option<Sabotage>,
    _share: Share,
}

impl Trial {
    /// Waits for the share of the machine and makes an empty folder.
    pub(crate) fn new(name: &'static str, load: Load) -> Self {
        let share = Share::take(load);
        let dir = logs_dir().join(name);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).expect("a folder for logs under target/");
        Self {
            name,
            sabotage: Sabotage::asked(name, &dir),
            dir,
            logs: Mutex::default(),
            _share: share,
        }
    }

    /// Starts somebody who takes part in a call that goes on for so many seconds once all are there.
    pub(crate) fn participant(&self, name: &str, mut command: Command, seconds: f64) -> Process {
        let process = match &self.sabotage {
            None => Process::spawn(&self.dir, name, &mut command, true),
            Some(sabotage) => {
                let (mut exposed, cgroup) = sabotage.exposed(&command);
                let process = Process::spawn(&self.dir, name, &mut exposed, true);
                sabotage.enlist(name, &process, cgroup, seconds);
                process
            }
        };
        self.watch(&process.log);
        self.watch(&process.out);
        process
    }

    /// Whether a call may be made once more, because of what the machine did to it. It is told of: scripts/test.sh counts it.
    pub(crate) fn again(&self, why: &str) -> bool {
        let again = std::env::var_os("AURALINK_TEST_ONCE").is_none() && self.sabotage.is_none();
        if again {
            // Past the test harness, which keeps to itself what a test that passes prints.
            let _ = writeln!(std::io::stderr(), "\nagain: {}: {why}", self.name);
        } else {
            println!("{why}; the call isn't made again");
        }
        again
    }

    /// Prints the end of this file if the test fails.
    pub(crate) fn watch(&self, log: &Path) {
        let mut logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        if !logs.iter().any(|known| known == log) {
            logs.push(log.to_owned());
        }
    }

    /// A room of this test: `mode-NAME`, as the sidecar's rules tell modes apart.
    pub(crate) fn room(&self, mode: &str) -> String {
        format!("{mode}-{}", self.name)
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for log in self
            .logs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .iter()
        {
            eprintln!("--- the end of {}\n{}", log.display(), tail(log, 4000));
        }
    }
}

/// Where all tests put their folders.
pub(crate) fn logs_dir() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("livekit")
}

/// The last `bytes` of a file, from the start of a line.
pub(crate) fn tail(path: &Path, bytes: usize) -> String {
    let text = fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text[text.len().saturating_sub(bytes)..]).into_owned();
    match text.split_once('\n') {
        Some((_, whole_lines)) if text.len() >= bytes => whole_lines.to_owned(),
        _ => text,
    }
}

/// First of `count` ports in a row that are free for UDP and TCP on every address. They lie below the system's ephemeral
/// ports, so that no client's own socket can take one in between.
pub(crate) fn free_ports(count: u16) -> u16 {
    const FIRST: u16 = 12_000;
    const LAST: u16 = 31_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Processes of other test runs start elsewhere.
    let offset = u16::try_from(std::process::id() % 1_000).unwrap() * 16;
    for _ in 0..2_000 {
        let step = NEXT.fetch_add(count, Ordering::Relaxed);
        let base = FIRST + (offset.wrapping_add(step)) % (LAST - FIRST - count);
        let free = (base..base + count).all(|port| {
            TcpListener::bind(("0.0.0.0", port)).is_ok()
                && UdpSocket::bind(("0.0.0.0", port)).is_ok()
        });
        if free {
            return base;
        }
    }
    panic!("no {count} free ports in a row between {FIRST} and {LAST}");
}

/// Calls `probe` until it gives something; fails after `limit`, saying what was waited for.
pub(crate) fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = probe() {
            return found;
        }
        assert!(Instant::now() < end, "waited {limit:?} for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A child process with its own process group; it ends with this value.
pub(crate) struct Process {
    name: String,
    child: Child,
    /// Its standard error.
    pub(crate) log: PathBuf,
    /// Its standard output.
    pub(crate) out: PathBuf,
    /// Asked to end before it is killed: it has children of its own to take along.
    gentle: bool,
}

impl Process {
    /// Starts a command with its output in files of `dir`.
    pub(crate) fn spawn(dir: &Path, name: &str, command: &mut Command, gentle: bool) -> Self {
        fs::create_dir_all(dir).expect("a folder for logs under target/");
        let log = dir.join(format!("{name}.log"));
        let out = dir.join(format!("{name}.out"));
        let file = |path: &Path| File::create(path).expect("a log file under target/");
        let child = command
            .stdin(Stdio::null())
            .stdout(file(&out))
            .stderr(file(&log))
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| {
                panic!(
                    "{}: {error}: run scripts/setup.sh all",
                    command.get_program().display()
                )
            });
        Self {
            name: name.to_owned(),
            child,
            log,
            out,
            gentle,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal to this process alone.
    pub(crate) fn signal(&self, signal: &str) {
        let sent = kill(signal, &self.pid().to_string());
        assert!(sent, "kill -{signal} {} ({})", self.pid(), self.name);
    }

    /// SIGKILL to the process and whatever it started.
    pub(crate) fn crash(&mut self) {
        kill("KILL", &format!("-{}", self.pid()));
        let _ = self.child.wait();
    }

    /// Exit code once it has ended, `128 + n` where signal `n` ended it; fails after `limit`.
    pub(crate) fn wait(&mut self, limit: Duration) -> i32 {
        let name = self.name.clone();
        let child = &mut self.child;
        let status = wait_for(&format!("the end of {name}"), limit, || {
            child.try_wait().expect("a child can be waited for")
        });
        status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.running() {
            return;
        }
        if self.gentle {
            kill("TERM", &self.pid().to_string());
            let end = Instant::now() + Duration::from_secs(8);
            while self.running() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        self.crash();
    }
}

fn kill(signal: &str, target: &str) -> bool {
    Command::new("kill")
        .args([&format!("-{signal}"), "--", target])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Seconds since 1970, as clients tell of moments.
pub(crate) fn unix_now() -> f64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.expect("a clock after 1970").as_secs_f64()
}

/// A number at a JSON pointer; absent and null are 0.
pub(crate) fn number(value: &Value, pointer: &str) -> f64 {
    value
        .pointer(pointer)
        .and_then(Value::as_f64)
        .unwrap_or(0.0)
}

/// A string at a JSON pointer; anything else is empty.
pub(crate) fn string<'a>(value: &'a Value, pointer: &str) -> &'a str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or("")
}

/// An array at a JSON pointer; anything else is empty.
pub(crate) fn array<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}
