//! A codec thread that stops dead in a real call: speech crosses natively within a moment, and coded again once the engine is mended.

use crate::chain::{Chain, hop, speech, undisturbed};
use crate::client::{Client, Kind};
use crate::harness::{Load, Trial, wait_for};
use crate::wire::{capture, now};
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// So much longer than before may be the longest time without a packet while the engine stops. That the restoring end hangs shows after 50 ms;
/// the other end sends again what wasn't restored.
const LONGER: Duration = Duration::from_millis(100);

/// Stops one thread of another process, as a codec does that never comes back.
struct Frozen(Pid);

impl Frozen {
    fn thread(pid: u32, name: &str) -> Self {
        let tid = fs::read_dir(format!("/proc/{pid}/task"))
            .unwrap()
            .filter_map(|task| task.ok()?.file_name().into_string().ok())
            .find(|tid| {
                fs::read_to_string(format!("/proc/{pid}/task/{tid}/comm"))
                    .is_ok_and(|comm| comm.trim() == name)
            })
            .unwrap_or_else(|| panic!("no thread {name} in process {pid}"));
        let tid = Pid::from_raw(tid.parse().unwrap());
        ptrace::seize(tid, ptrace::Options::empty())
            .expect("ptrace of a child of ours (kernel.yama.ptrace_scope up to 1 allows it)");
        ptrace::interrupt(tid).unwrap();
        waitpid(tid, Some(WaitPidFlag::__WALL)).unwrap();
        Self(tid)
    }

    fn let_go(self) {
        ptrace::detach(self.0, None).unwrap();
    }
}

/// What was heard of the streams to or from some ports, in a span of time.
#[derive(Debug, PartialEq, Eq)]
struct Heard {
    streams: usize,
    /// Longest time without a packet.
    gap: Duration,
    /// Sequence numbers between a stream's first and its last that never came.
    missing: usize,
}

/// Of the streams that go to one of these ports (`to`) or come from one, in these nanoseconds.
fn heard(packets: &Path, ports: &[u16], to: bool, span: (u128, u128)) -> Heard {
    let mut streams = std::collections::BTreeMap::<String, Vec<(u128, u16)>>::new();
    for line in fs::read_to_string(packets).unwrap().lines() {
        let field: Vec<&str> = line.split(' ').collect();
        let [time, source, destination, ssrc, sequence, ..] = field[..] else {
            panic!("rtp.py: {line}");
        };
        let end = if to { destination } else { source };
        let port: u16 = end.rsplit(':').next().unwrap().parse().unwrap();
        let time: u128 = time.parse().unwrap();
        if ports.contains(&port) && (span.0..span.1).contains(&time) {
            let packet = (time, sequence.parse().unwrap());
            streams.entry(ssrc.to_owned()).or_default().push(packet);
        }
    }
    // The server's first packets are silence of its own, on the same numbers; whole streams only.
    streams.retain(|_, packets| packets.len() > 50);
    // To the end of the span: a stream that ends in it has a gap as any other.
    let gaps = |packets: &Vec<(u128, u16)>| {
        let times = packets.iter().map(|packet| packet.0).chain([span.1]);
        let times: Vec<u128> = times.collect();
        times.windows(2).map(|pair| pair[1] - pair[0]).max()
    };
    let gap = streams.values().filter_map(gaps).max();
    let gap = gap.unwrap_or(u128::MAX);
    let missing = streams.values().map(|packets| {
        let first = packets[0].1;
        // From the first on; what came before it and was sent again is around 65,535.
        let places = packets.iter().map(|packet| packet.1.wrapping_sub(first));
        let places: std::collections::BTreeSet<u16> =
            places.filter(|place| *place < 1 << 15).collect();
        usize::from(*places.last().unwrap()) + 1 - places.len()
    });
    Heard {
        streams: streams.len(),
        gap: Duration::from_nanos(u64::try_from(gap).unwrap_or(u64::MAX)),
        missing: missing.sum(),
    }
}

/// Both talk without a pause while the edge's codec thread, which codes what goes up and restores what comes down, stops for four seconds.
#[test]
fn an_engine_that_stops_is_not_heard_of() {
    let trial = Trial::new("an_engine_that_stops_is_not_heard_of", Load::Alone);
    let room = trial.room("neural");
    let (chain, gaps) = undisturbed(&trial, || {
        let chain = Chain::neural(&trial);
        let make = |identity: &str, name: &str| {
            Client::new(Kind::Go, &chain.edge.url(), &room, identity)
                .wav(&speech(name))
                .flag("--no-dtx")
                .seconds(26.0)
                .spawn(&trial)
        };
        let (anna, ben) = (make("anna", "talker-a"), make("ben", "talker-b"));
        chain.wait_talking(&room, 2);

        let packets = trial.dir.join("packets.txt");
        let ports = [vec![chain.livekit.udp_port], chain.edge.udp_ports()].concat();
        let mut capture = capture(&trial, &ports, &packets, 60);
        let captured = now();
        std::thread::sleep(Duration::from_secs(2));
        let count = |what: &str| hop(&chain.edge.status(), what);
        let soon = Duration::from_secs(12);
        let grows = |what: &'static str| {
            let before = count(what);
            wait_for(what, soon, || (count(what) > before + 25.0).then_some(()));
        };
        grows("/originals/coded");
        grows("/originals/restored");

        let began = now();
        let frozen = Frozen::thread(chain.edge.process.pid(), "codec-0");
        std::thread::sleep(Duration::from_secs(4));
        frozen.let_go();
        let ended = now();
        let while_frozen = [chain.edge.status(), chain.origin.status()];
        // By itself: another thread took the place of the one that hung, trials succeeded, breakers closed.
        grows("/originals/coded");
        grows("/originals/restored");

        let (anna, ben) = (anna.finish(), ben.finish());
        capture.signal("TERM");
        capture.wait(Duration::from_secs(20));
        // With the last packets before, and beside it the same call while nothing was stopped.
        let last = Duration::from_millis(200).as_nanos();
        let gaps = [(captured, began), (began - last, ended)].map(|span| {
            [
                heard(&packets, &[chain.livekit.udp_port], true, span),
                heard(&packets, &chain.edge.udp_ports(), false, span),
            ]
        });
        println!("towards LiveKit and towards the clients, before and while it stops: {gaps:?}");
        anna.lasted(&ben);
        ben.lasted(&anna);
        // How busy the machine was is seen at the end that was left alone.
        let [_, origin] = while_frozen;
        ((chain, gaps), [origin.clone(), origin])
    });
    let [before, stopped] = gaps;
    let ways = ["towards LiveKit", "towards the clients"];
    for ((what, before), heard) in ways.into_iter().zip(before).zip(stopped) {
        let streams = (before.streams, heard.streams);
        assert_eq!(streams, (2, 2), "{what}: streams of the two talkers");
        assert!(
            heard.gap <= before.gap + LONGER,
            "{what}: nothing for {:?}, and for {:?} before",
            heard.gap,
            before.gap
        );
        assert_eq!(heard.missing, 0, "{what}: packets that never came");
    }
    chain.wait_over(&room);
}
