//! Networks of a client's own (`ip netns`, needs root): UDP blocked, an address that goes away, IPv6 only. And proof from
//! LiveKit's side that nobody but the sidecar sends it media.

use crate::client::{Client, Kind, Running};
use crate::harness::{Load, Trial, array, number, string, wait_for};
use crate::servers::{Options, Sidecar, Stack};
use crate::wire::Wire;
use std::collections::HashSet;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A network namespace with one or two links to this one; it goes away with this value.
pub(crate) struct Namespace {
    name: String,
    links: usize,
    subnet: u32,
}

impl Namespace {
    /// Link `n` has 10.213.(subnet + n).1 and fd13:(subnet + n)::1 here, and .2 and ::2 there.
    pub(crate) fn new(links: usize) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let subnet = (std::process::id() * 7 + count * 2) % 240 + 1;
        let namespace = Self {
            name: format!("al{}-{count}", std::process::id()),
            links,
            subnet,
        };
        ip(&format!("netns add {}", namespace.name));
        namespace.inside("link set lo up");
        for link in 0..links {
            let (here, there) = (namespace.here(link), format!("c{link}"));
            ip(&format!(
                "link add {here} type veth peer name {there} netns {}",
                namespace.name
            ));
            let net = subnet + u32::try_from(link).unwrap();
            ip(&format!("addr add 10.213.{net}.1/24 dev {here}"));
            ip(&format!("addr add fd13:{net}::1/64 dev {here} nodad"));
            ip(&format!("link set {here} up"));
            namespace.inside(&format!("addr add 10.213.{net}.2/24 dev {there}"));
            namespace.inside(&format!("addr add fd13:{net}::2/64 dev {there} nodad"));
            namespace.inside(&format!("link set {there} up"));
        }
        namespace
    }

    /// This host's device of a link.
    fn here(&self, link: usize) -> String {
        format!("al{}x{link}", self.subnet)
    }

    pub(crate) fn inside(&self, arguments: &str) {
        ip(&format!("-n {} {arguments}", self.name));
    }

    pub(crate) fn v4(&self, link: u32) -> String {
        format!("10.213.{}.1", self.subnet + link)
    }

    fn v6(&self, link: u32) -> String {
        format!("fd13:{}::1", self.subnet + link)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        for link in 0..self.links {
            let _ = Command::new("ip")
                .args(["link", "del", &self.here(link)])
                .status();
        }
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("ip of Debian's iproute2: run scripts/setup.sh all");
    assert!(
        output.status.success(),
        "ip {arguments}: {} (network namespaces need root)",
        String::from_utf8_lossy(&output.stderr).trim()
    );
}

/// A call between one client in a namespace and one beside the server, who has to be reached over `ips`.
fn pair(
    trial: &Trial,
    namespace: &Namespace,
    ips: Vec<String>,
    kind: Kind,
    seconds: f64,
) -> (Stack, String, Running, Running) {
    let stack = Stack::own(
        trial,
        Options {
            ips,
            ..Options::default()
        },
    );
    let room = trial.room("off");
    let make = |kind, identity: &str, hz| {
        Client::new(kind, &stack.sidecar.url(), &room, identity)
            .tone(hz)
            .data(10, 60_000)
            .seconds(seconds)
    };
    let anna = make(kind, "anna", 440.0)
        .inside(&namespace.name)
        .spawn(trial);
    let ben = make(Kind::Go, "ben", 620.0).spawn(trial);
    (stack, room, anna, ben)
}

/// Ends a [`pair`]'s call: everything arrived, over the sidecar alone.
fn both_received(sidecar: &Sidecar, anna: Running, ben: Running) -> serde_json::Value {
    let (anna, ben) = (anna.finish(), ben.finish());
    anna.received(&ben);
    ben.received(&anna);
    anna.met_only(sidecar);
    ben.met_only(sidecar);
    anna.json
}

fn udp_blocked(name: &'static str, load: Load, kind: Kind) {
    let trial = Trial::new(name, load);
    let namespace = Namespace::new(1);
    namespace.inside("rule add ipproto udp prohibit");
    namespace.inside("-6 rule add ipproto udp prohibit");
    let (stack, room, anna, ben) = pair(&trial, &namespace, vec![namespace.v4(0)], kind, 7.0);
    let report = both_received(&stack.sidecar, anna, ben);
    for pair in array(&report, "/ice") {
        let remote = string(pair, "/remote");
        assert!(
            remote.ends_with(&format!(":{}", stack.sidecar.tcp_port)),
            "the client in a network without UDP has the pair {pair}"
        );
    }
    stack.sidecar.wait_empty(&room, Duration::from_secs(20));
}

#[test]
fn udp_blocked_python_uses_ice_tcp() {
    udp_blocked("udp_blocked_python_uses_ice_tcp", Load::Light, Kind::Python);
}

#[test]
fn udp_blocked_chromium_uses_ice_tcp() {
    udp_blocked(
        "udp_blocked_chromium_uses_ice_tcp",
        Load::Browser,
        Kind::Chromium,
    );
}

#[test]
fn ipv6_only_client() {
    let trial = Trial::new("ipv6_only_client", Load::Light);
    let namespace = Namespace::new(1);
    namespace.inside("addr flush dev c0 scope global");
    namespace.inside(&format!(
        "addr add fd13:{}::2/64 dev c0 nodad",
        namespace.subnet
    ));
    let ips = vec![namespace.v6(0), namespace.v4(0)];
    let (stack, _, anna, ben) = pair(&trial, &namespace, ips, Kind::Python, 7.0);
    let report = both_received(&stack.sidecar, anna, ben);
    for pair in array(&report, "/ice") {
        assert!(
            string(pair, "/remote").contains("fd13:"),
            "not over IPv6: {pair}"
        );
    }
}

/// The client's first network goes away in the middle of the call; it goes on over the second.
fn network_change(name: &'static str, load: Load, kind: Kind) {
    let trial = Trial::new(name, load);
    let namespace = Namespace::new(2);
    // The sidecar's one address is reached over either link.
    let sidecar_ip = namespace.v4(0);
    namespace.inside(&format!(
        "route add {sidecar_ip}/32 via {} metric 50",
        namespace.v4(1)
    ));
    let (stack, room, anna, ben) = pair(&trial, &namespace, vec![sidecar_ip], kind, 22.0);
    wait_for("both to join", Duration::from_secs(60), || {
        (stack.sidecar.sessions_in(&room) == 2).then_some(())
    });
    std::thread::sleep(Duration::from_secs(6));
    let links = [
        format!("10.213.{}.2", namespace.subnet),
        format!("10.213.{}.2", namespace.subnet + 1),
    ];
    // Cut the link that its media goes over: that of the more specific route.
    namespace.inside("link set c1 down");
    let (anna, ben) = (anna.finish(), ben.finish());
    let used = array(&anna.json, "/ice");
    assert!(!used.is_empty(), "no selected pair: {}", anna.json);
    for pair in used {
        assert!(
            string(pair, "/local").starts_with(&format!("{}:", links[0])),
            "the pair is still over the network that is gone: {pair}"
        );
    }
    // A gap of some seconds is what a client needs to notice; then the tone has to be back.
    for (ear, hz) in [(&anna, 620.0), (&ben, 440.0)] {
        let peer = if hz > 500.0 { "ben" } else { "anna" };
        ear.lasted(if hz > 500.0 { &ben } else { &anna });
        let audio = ear.audio_from(peer);
        let sounding = number(audio, "/heard_ms") / 1000.0;
        assert!(
            (number(audio, "/tone_hz") / hz - 1.0).abs() < 0.02 && sounding > 10.0,
            "{}: {sounding:.1} s of {peer}'s tone in 22 s: {audio}",
            ear.client.identity
        );
    }
    anna.met_only(&stack.sidecar);
    stack.sidecar.wait_empty(&room, Duration::from_secs(30));
}

#[test]
fn network_change_python() {
    network_change("network_change_python", Load::Light, Kind::Python);
}

/// Local UDP ports of a process.
pub(crate) fn udp_ports_of(pid: u32) -> HashSet<u16> {
    let mut inodes = HashSet::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
    {
        if let Ok(target) = std::fs::read_link(entry.path()) {
            let target = target.display().to_string();
            if let Some(inode) = target
                .strip_prefix("socket:[")
                .and_then(|t| t.strip_suffix(']'))
            {
                inodes.insert(inode.to_owned());
            }
        }
    }
    let mut ports = HashSet::new();
    for table in ["/proc/net/udp", "/proc/net/udp6"] {
        for line in std::fs::read_to_string(table)
            .unwrap_or_default()
            .lines()
            .skip(1)
        {
            let fields: Vec<_> = line.split_whitespace().collect();
            if fields.get(9).is_some_and(|inode| inodes.contains(*inode)) {
                let port = fields[1].rsplit(':').next().unwrap();
                ports.insert(u16::from_str_radix(port, 16).unwrap());
            }
        }
    }
    ports
}

/// The clients know the server's address from nowhere, and the server never hears from them.
#[test]
fn the_server_meets_only_the_sidecar() {
    let trial = Trial::new("the_server_meets_only_the_sidecar", Load::Browser);
    let stack = Stack::own(&trial, Options::default());
    let room = trial.room("off");
    let make = |kind, identity: &str, hz| {
        Client::new(kind, &stack.sidecar.url(), &room, identity)
            .tone(hz)
            .data(5, 1000)
            .seconds(8.0)
    };
    let media = [stack.livekit.udp_port, stack.livekit.tcp_port];
    let wire = Wire::count(&trial, "wire", 14.0, &media);
    let clients = [
        make(Kind::Chromium, "anna", 440.0).spawn(&trial),
        make(Kind::Python, "ben", 620.0).dual().spawn(&trial),
    ];
    wait_for("both to join", Duration::from_secs(30), || {
        (stack.sidecar.sessions_in(&room) == 2).then_some(())
    });
    std::thread::sleep(Duration::from_secs(2));
    let own = udp_ports_of(stack.sidecar.process.pid());
    let reports = clients.map(Running::finish);
    let flows = wire.flows();
    let peers: HashSet<u16> = flows
        .iter()
        .flat_map(|flow| [flow.src, flow.dst])
        .filter(|port| !media.contains(port))
        .collect();
    assert!(!peers.is_empty(), "no packet went to or from the server");
    assert!(
        peers.iter().all(|port| own.contains(port)),
        "the server's peers {peers:?} are not all of the sidecar's ports {own:?}"
    );
    assert!(
        flows.iter().all(|flow| flow.udp),
        "the server was reached over ICE-TCP: {flows:?}"
    );
    // Three peer connections, one port each (LiveKit tells peers apart by it), both ways.
    assert_eq!(
        peers.len(),
        3,
        "one port for each peer connection: {peers:?}"
    );
    assert!(
        flows.iter().map(|flow| flow.packets).sum::<f64>() > 1000.0,
        "hardly anything went to the server: {flows:?}"
    );
    reports[0].received(&reports[1]);
    reports[1].received(&reports[0]);
    for report in &reports {
        report.met_only(&stack.sidecar);
    }
}
