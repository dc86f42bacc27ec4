//! What somebody without a token can hold of the sidecar's memory and descriptors. Allocations are counted for the whole process,
//! so the tests of this file run one at a time.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods
)]
// A global allocator that counts can't be had without.
#![allow(unsafe_code)]

use auralink::fault::Fault;
use auralink::signal::{
    Drain, Limits, Opened, Opening, Sessions, SignalConfig, Whip, WhipMessage, bind, serve,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);

unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HELD.fetch_add(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(at, layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        HELD.fetch_add(size, Ordering::Relaxed);
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Nobody gets in.
struct Nobody;

impl Sessions for Nobody {
    fn open(&self, _: &Opening<'_>) -> Result<Opened, Fault> {
        Err(Fault::client(auralink::fault::What::Undecodable, "no"))
    }
    fn whip(&self, _: &Opening<'_>, _: WhipMessage<'_>) -> Result<Whip, Fault> {
        Err(Fault::client(auralink::fault::What::Undecodable, "no"))
    }
}

/// A listener in this process. Its upstream is nowhere.
fn listener() -> (SocketAddr, tokio::runtime::Runtime) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let limits = Limits {
        // All strangers of this test have one address.
        connections_per_address: 0,
        header_timeout: Duration::from_secs(600),
        keep_alive_timeout: Duration::from_secs(600),
        ..Limits::default()
    };
    let config = SignalConfig {
        listen: "127.0.0.1:0".parse().unwrap(),
        upstream: "http://127.0.0.1:9".parse().unwrap(),
        tls: None,
        compress: false,
        limits,
    };
    let bound = runtime.block_on(bind(config)).unwrap();
    let at = bound.local_addr();
    let (sender, drain) = tokio::sync::watch::channel(Drain::Running);
    runtime.spawn(async move {
        serve(bound, Arc::new(Nobody), drain).await;
        drop(sender);
    });
    (at, runtime)
}

/// Bytes in use, once they stay the same.
fn settled() -> usize {
    let end = Instant::now() + Duration::from_secs(60);
    let mut same = 0;
    let mut last = HELD.load(Ordering::Relaxed);
    while same < 5 && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(50));
        let now = HELD.load(Ordering::Relaxed);
        same = if now.abs_diff(last) < 4096 {
            same + 1
        } else {
            0
        };
        last = now;
    }
    last
}

/// Bytes that the process holds for so many connections on which this was sent.
fn cost(connections: usize, said: &[&[u8]]) -> usize {
    let (at, runtime) = listener();
    // What the first connection of all makes once.
    let mut first = TcpStream::connect(at).unwrap();
    first.write_all(said[0]).unwrap();
    let before = settled();
    let mut open = Vec::with_capacity(connections);
    for _ in 0..connections {
        let mut tcp = TcpStream::connect(at).unwrap();
        for part in said {
            // One that had to go for others says so.
            if tcp.write_all(part).is_err() {
                break;
            }
            if said.len() > 2 {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
        open.push(tcp);
    }
    let held = settled().saturating_sub(before);
    drop((open, runtime));
    held
}

#[test]
fn an_unfinished_request_holds_little() {
    let _alone = alone();
    let head = b"GET /rtc?access_token=x HTTP/1.1\r\nHost: s\r\n".as_slice();
    let long = [head, b"X-Long: ", &[b'x'; 120_000]].concat();
    let whole = [head, b"\r\n"].concat();
    let long_whole = [&long[..60_000], b"\r\n\r\n"].concat();
    let post = b"POST /x HTTP/1.1\r\nHost: s\r\nContent-Length: 500000\r\n\r\n".as_slice();
    let body_whole = [post, &[b'x'; 500_000]].concat();
    let whip =
        b"POST /whip/v1 HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n".as_slice();
    let body = [whip, b"30000\r\n", &[b'x'; 190_000]].concat();
    let patch =
        b"PATCH /whip/v1/PA_1 HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\n\r\n".as_slice();
    let mut single: Vec<&[u8]> = vec![patch];
    single.extend([b"1\r\nx\r\n".as_slice(); 50]);
    for (what, said, connections, a_connection, together) in [
        // Nothing but the task.
        ("silence", vec![b"".as_slice()], 1000, 3 << 10, 0),
        ("a head that doesn't end", vec![head], 1000, 4 << 10, 0),
        // hyper's state and first buffer, which it doubles, and what is left of the answer.
        ("a request and silence", vec![&whole], 1000, 32 << 10, 0),
        (
            "a long request and silence",
            vec![&long_whole],
            200,
            32 << 10,
            0,
        ),
        (
            "a long body and silence",
            vec![&body_whole],
            200,
            32 << 10,
            0,
        ),
        // Beyond 8 KiB each there are 16 MiB for all, in buffers that double.
        ("a long head", vec![&long], 1000, 24 << 10, 32 << 20),
        ("a long body", vec![&body], 500, 48 << 10, 32 << 20),
        ("a body in single bytes", single, 50, 48 << 10, 0),
    ] {
        let held = cost(connections, &said);
        println!(
            "{what}: {} bytes a connection, {held} in all",
            held / connections
        );
        let budget = a_connection * connections + together;
        assert!(held <= budget, "{what}: {held} bytes, {budget} are allowed");
    }
}

/// An upstream that answers everything with 200.
fn upstream() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for tcp in listener.incoming() {
            let mut tcp = tcp.unwrap();
            std::thread::spawn(move || {
                let mut asked = [0; 4096];
                while let Ok(1..) = tcp.read(&mut asked) {
                    let _ = tcp.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok");
                }
            });
        }
    });
    at
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

struct Process {
    child: std::process::Child,
    port: u16,
    log: std::path::PathBuf,
    _folder: tempfile::TempDir,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    /// The binary with at most so many descriptors.
    fn start(descriptors: u32) -> Process {
        let folder = tempfile::tempdir().unwrap();
        let (port, log) = (free_port(), folder.path().join("log"));
        let file = folder.path().join("auralink.yaml");
        let text = format!(
            "listen: 127.0.0.1:{port}\nupstream: http://{}\nmedia: {{ workers: 1, udp_port: {} }}\nadmin: {{ listen: 127.0.0.1:{} }}\nengine: {{ threads: 1 }}\n",
            upstream(),
            free_port(),
            free_port()
        );
        std::fs::write(&file, text).unwrap();
        let child = Command::new("sh")
            .arg("-c")
            .arg(format!(
                "ulimit -n {descriptors}; exec \"$0\" --config \"$1\""
            ))
            .arg(env!("CARGO_BIN_EXE_auralink"))
            .arg(&file)
            .stderr(Stdio::from(std::fs::File::create(&log).unwrap()))
            .spawn()
            .unwrap();
        let process = Process {
            child,
            port,
            log,
            _folder: folder,
        };
        process.until("to serve", |answer| answer.starts_with("HTTP/1.1 200"));
        process
    }

    fn get(&self) -> Option<String> {
        let mut tcp = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        tcp.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        tcp.write_all(b"GET /x HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n")
            .ok()?;
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).ok()?;
        Some(answer)
    }

    fn until(&self, what: &str, good: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let answer = self.get().unwrap_or_default();
            if good(&answer) {
                return answer;
            }
            assert!(
                Instant::now() < end,
                "waited in vain for it {what}: {answer}\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
}

/// Silent connections of a stranger leave descriptors for what others ask.
#[test]
fn few_descriptors_are_few_connections() {
    let _alone = alone();
    let process = Process::start(160);
    assert!(
        process
            .log()
            .contains("limits.connections can't be reached"),
        "{}",
        process.log()
    );
    let silent: Vec<_> = (0..400)
        .map(|_| TcpStream::connect(("127.0.0.1", process.port)))
        .collect();
    for _ in 0..5 {
        process.until("to answer", |answer| answer.starts_with("HTTP/1.1 200"));
    }
    drop(silent);
    let log = process.log();
    assert!(
        !log.contains("descriptors left") && !log.contains("side=\"upstream\""),
        "{log}"
    );
}

/// A sidecar without a descriptor for LiveKit says that it is itself, not LiveKit.
#[test]
fn no_descriptor_is_the_sidecar_s_fault() {
    let _alone = alone();
    let process = Process::start(1024);
    let pid = process.child.id();
    let used = || -> Vec<u64> {
        std::fs::read_dir(format!("/proc/{pid}/fd"))
            .unwrap()
            .map(|fd| fd.unwrap().file_name().to_str().unwrap().parse().unwrap())
            .collect()
    };
    // What health knocks at LiveKit's door with comes and goes: so several times.
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let used = used();
        // One is free below it, for the client.
        let free = |limit: u64| (0..limit).filter(|fd| !used.contains(fd)).count();
        let limit = (0..).find(|limit| free(*limit) == 1).unwrap();
        let set = Command::new("prlimit")
            .args([format!("--pid={pid}"), format!("--nofile={limit}:1024")])
            .status()
            .unwrap();
        assert!(set.success());
        let answer = process.get().unwrap_or_default();
        if answer.starts_with("HTTP/1.1 503") {
            assert!(
                answer.contains(r#""side":"internal""#)
                    && answer.contains(r#""what":"descriptors""#),
                "{answer}"
            );
            assert!(answer.to_lowercase().contains("retry-after: 1"), "{answer}");
            break;
        }
        assert!(
            !answer.starts_with("HTTP/1.1 502"),
            "LiveKit is blamed: {answer}"
        );
        assert!(Instant::now() < end, "{answer}\n{}", process.log());
        std::thread::sleep(Duration::from_millis(100));
    }
    // It recovers by itself.
    Command::new("prlimit")
        .args([format!("--pid={pid}"), "--nofile=1024:1024".to_owned()])
        .status()
        .unwrap();
    process.until("to recover", |answer| answer.starts_with("HTTP/1.1 200"));
}
