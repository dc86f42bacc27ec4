//! Processes, ports, folders, and the slots that keep measurements from disturbing each other.

use serde_json::Value;
use std::collections::HashMap;
use std::fs::{self, File};
use std::net::{TcpListener, UdpSocket};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

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
    /// One call of cheap clients.
    Light,
    /// A browser is in it: one such call at a time.
    Browser,
    /// It measures, or it is many clients: nothing else runs.
    Alone,
}

static GATE: RwLock<()> = RwLock::new(());
static BROWSERS: Mutex<()> = Mutex::new(());

/// One test: its folder, its share of the machine, and the logs to print if it fails.
pub(crate) struct Trial {
    pub(crate) name: &'static str,
    pub(crate) dir: PathBuf,
    logs: Mutex<Vec<PathBuf>>,
    _browsers: Option<MutexGuard<'static, ()>>,
    _shared: Option<RwLockReadGuard<'static, ()>>,
    _alone: Option<RwLockWriteGuard<'static, ()>>,
}

impl Trial {
    /// Waits for the share of the machine and makes an empty folder.
    pub(crate) fn new(name: &'static str, load: Load) -> Self {
        let browsers = (load == Load::Browser)
            .then(|| BROWSERS.lock().unwrap_or_else(PoisonError::into_inner));
        let alone =
            (load == Load::Alone).then(|| GATE.write().unwrap_or_else(PoisonError::into_inner));
        let shared =
            (load != Load::Alone).then(|| GATE.read().unwrap_or_else(PoisonError::into_inner));
        let dir = logs_dir().join(name);
        let _ = fs::remove_dir_all(&dir);
        fs::create_dir_all(&dir).expect("a folder for logs under target/");
        Self {
            name,
            dir,
            logs: Mutex::default(),
            _browsers: browsers,
            _shared: shared,
            _alone: alone,
        }
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
