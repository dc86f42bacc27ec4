//! What a configuration asks of the machine that it is on: certificates, models, descriptors, ports, memory. The text alone doesn't
//! tell; `--check` and the start do.

use crate::config::{Loaded, Problem, Settings};
use crate::signal;
use auralink_engine::bundle::Bundle;
use auralink_proto::ladder::Rung;
use auralink_proto::policy::{Mode, Policy};
use std::fs;
use std::ops::RangeInclusive;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::SystemTime;

/// What a session takes where calls run (docs/benchmarks.md, "Memory").
const SESSION: u64 = 106 << 10;

/// Sockets of a session's server legs on each address: two peer connections.
const PORTS_A_SESSION: usize = 2;

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// The sidecar would not start.
    pub errors: Vec<Problem>,
    /// It would, and something can't be right.
    pub warnings: Vec<Problem>,
}

/// Who looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// `--check`: everything.
    Checked,
    /// The start, where descriptors, models and the audit log speak for themselves a moment later.
    Started,
}

/// Looks at the files that the configuration names, and at the machine.
#[must_use]
pub fn look(loaded: &Loaded, when: When) -> Found {
    let mut found = Found::default();
    certificate(loaded, SystemTime::now(), &mut found);
    machine(loaded, &Machine::here(), when, &mut found);
    rungs(loaded, &mut found);
    if when == When::Checked {
        models(loaded, &mut found);
        audit(loaded, &mut found);
    }
    found
}

fn problem(loaded: &Loaded, keys: &[&str], message: String) -> Problem {
    Problem {
        place: keys.iter().find_map(|key| loaded.place(key)),
        key: keys.first().copied().unwrap_or_default().to_owned(),
        message,
    }
}

fn certificate(loaded: &Loaded, now: SystemTime, found: &mut Found) {
    let local = loaded.settings.listen.ip().is_loopback();
    if let Some(certificate) = &loaded.material.certificate {
        let doubts = certificate.doubts(now, local).into_iter();
        found
            .warnings
            .extend(doubts.map(|doubt| problem(loaded, &["tls.cert"], doubt)));
    }
}

/// What there is of things that limits are made of; none: it can't be told.
struct Machine {
    descriptors: Option<u64>,
    local_ports: Option<RangeInclusive<u16>>,
    memory: Option<u64>,
}

impl Machine {
    fn here() -> Self {
        use nix::sys::resource::{Resource, getrlimit};
        let hard = getrlimit(Resource::RLIMIT_NOFILE).ok();
        Self {
            descriptors: hard.map(|(_, hard)| hard),
            local_ports: local_ports(),
            memory: memory(),
        }
    }
}

/// The ports that the system gives to sockets which ask for none: ip(7).
fn local_ports() -> Option<RangeInclusive<u16>> {
    let text = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let mut ends = text.split_whitespace().map(|word| word.parse::<u16>().ok());
    Some(ends.next()??..=ends.next()??)
}

/// Bytes that the process may have: the machine's, or what a control group (version 2) leaves of them.
fn memory() -> Option<u64> {
    let info = fs::read_to_string("/proc/meminfo").ok()?;
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let total: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    let mut least = total << 10;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    for group in Path::new("/sys/fs/cgroup")
        .join(own.unwrap_or_default())
        .ancestors()
    {
        let most = fs::read_to_string(group.join("memory.max")).unwrap_or_default();
        least = least.min(most.trim().parse().unwrap_or(u64::MAX));
        if group.ends_with("cgroup") {
            break;
        }
    }
    Some(least)
}

fn machine(loaded: &Loaded, machine: &Machine, when: When, found: &mut Found) {
    let Settings { limits, media, .. } = &loaded.settings;
    let (sessions, connections) = (limits.sessions, limits.connections);
    let mut warn = |keys: &[&str], message: String| {
        found.warnings.push(problem(loaded, keys, message));
    };
    let wanted = signal::descriptors(sessions, connections);
    if let Some(there) = machine.descriptors.filter(|there| *there < wanted)
        && when == When::Checked
    {
        let keys = ["limits.connections", "limits.sessions"];
        warn(
            &keys,
            format!(
                "{connections} connections can't be reached: with {sessions} sessions they take up to {wanted} file descriptors, and {there} are allowed here; raise the hard limit (LimitNOFILE=, ulimit -Hn) or lower limits.sessions and limits.connections"
            ),
        );
    }
    if let Some(range) = &machine.local_ports {
        let last = usize::from(media.udp_port) + media.workers.saturating_sub(1);
        let there = usize::from(range.end() - range.start()) + 1;
        if usize::from(media.udp_port) <= usize::from(*range.end())
            && last >= usize::from(*range.start())
        {
            warn(
                &["media.udp_port"],
                format!(
                    "{} to {last} are among the ports that the system gives to any socket ({} to {}, net.ipv4.ip_local_port_range): another program may have one when the sidecar starts; choose lower ones, or reserve them (net.ipv4.ip_local_reserved_ports)",
                    media.udp_port,
                    range.start(),
                    range.end()
                ),
            );
        }
        let wanted = sessions.saturating_mul(PORTS_A_SESSION);
        if wanted > there {
            warn(
                &["limits.sessions"],
                format!(
                    "{sessions} sessions can't be reached: they take up to {wanted} local UDP ports on each address of media.ip, and the system has {there} (net.ipv4.ip_local_port_range); widen the range, lower the limit, or spread sessions over sidecars of their own hosts"
                ),
            );
        }
    }
    // Nobody has asked for as many as the default allows.
    let asked = loaded.place("limits.sessions").is_some();
    let wanted = (sessions as u64).saturating_mul(SESSION);
    if let Some(there) = machine.memory.filter(|there| *there < wanted)
        && asked
    {
        warn(
            &["limits.sessions"],
            format!(
                "{sessions} sessions can't be reached: they take some {} MiB, and there are {} MiB; lower the limit",
                wanted >> 20,
                there >> 20
            ),
        );
    }
}

/// What a policy needs that isn't there without models: a rung, and whether the codec's bundle or the voice detector alone is missing.
fn needs(policy: &Policy) -> Option<Rung> {
    let on = policy.mode != Mode::Off;
    let rung = policy.rung();
    let neural = (on && rung.is_neural()).then_some(rung);
    let detected = on && (rung == Rung::L3 || policy.audio.recode == Rung::L3);
    neural.or(detected.then_some(Rung::L3))
}

/// Rules whose rung there are no models for.
fn rungs(loaded: &Loaded, found: &mut Found) {
    let engine = &loaded.settings.engine;
    if engine.models.is_some() && engine.runtime.is_some() {
        return;
    }
    let rules = loaded.settings.rules.rules();
    let named = rules
        .iter()
        .enumerate()
        .map(|(n, rule)| (format!("rooms[{n}]"), &rule.policy));
    let defaults = ("defaults".to_owned(), loaded.settings.rules.defaults());
    let first = std::iter::once(defaults)
        .chain(named)
        .find_map(|(key, policy)| Some((key, needs(policy)?)));
    if let Some((key, rung)) = first {
        let at = |name: &str| format!("{key}.{name}");
        // The place of what asks for it, and the name of the rule.
        let places = [at("rung"), at("audio.recode"), at("mode"), key.clone()];
        let mut warning = problem(
            loaded,
            &places.each_ref().map(String::as_str),
            format!(
                "asks for rung {rung}, which needs models: set engine.models and engine.runtime (`make models` makes both, docs/models.md), or name a rung from L4 on, which is what speech takes until then"
            ),
        );
        warning.key = key;
        found.warnings.push(warning);
    }
}

/// Models and runtime, without running them.
fn models(loaded: &Loaded, found: &mut Found) {
    let engine = &loaded.settings.engine;
    let mut warn = |keys: &[&str], message: String| {
        found.warnings.push(problem(loaded, keys, message));
    };
    if let Some(runtime) = &engine.runtime {
        let is = fs::metadata(runtime);
        let why = match &is {
            Ok(is) if is.is_file() => None,
            Ok(_) => Some("is no file".to_owned()),
            Err(error) => Some(format!("cannot be read: {error}")),
        };
        if let Some(why) = why {
            warn(
                &["engine.runtime"],
                format!(
                    "{} {why}: no model runs without it; wanted is libonnxruntime.so, 1.22 or later (`make models`)",
                    runtime.display()
                ),
            );
        }
    }
    if let Some(folder) = &engine.models {
        let without = [
            (&*engine.codec, "without it there are only the Opus rungs"),
            ("silero-vad", "without it nothing is coded below L4"),
        ];
        for (name, what) in without {
            if let Err(error) = Bundle::read(&folder.join(name)) {
                warn(
                    &["engine.models", "engine.codec"],
                    format!("{error}; {what}"),
                );
            }
        }
    }
}

/// The audit log keeps the sidecar from starting where it can't be opened, which isn't tried here: it would make one.
fn audit(loaded: &Loaded, found: &mut Found) {
    let Some(path) = &loaded.settings.audit else {
        return;
    };
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    let why = match fs::symlink_metadata(path) {
        Ok(is) if is.is_symlink() => Some("it is a symbolic link; name the file itself"),
        Ok(is) if is.is_dir() || is.file_type().is_fifo() || !is.is_file() => {
            Some("it is no ordinary file")
        }
        Ok(_) => None,
        Err(_) if folder.is_dir() => None,
        Err(_) => Some("its folder does not exist; make it, for the sidecar's user to write"),
    };
    if let Some(why) = why {
        let message = format!("cannot be opened: {}: {why}", path.display());
        found.errors.push(problem(loaded, &["audit.log"], message));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const PLENTY: Machine = Machine {
        descriptors: Some(1 << 20),
        local_ports: Some(32_768..=60_999),
        memory: Some(64 << 30),
    };

    fn said(text: &str, machine_is: &Machine) -> String {
        let loaded = Settings::parse(text).unwrap();
        let mut found = Found::default();
        machine(&loaded, machine_is, When::Checked, &mut found);
        rungs(&loaded, &mut found);
        let lines = found.warnings.iter().map(|w| w.line("f", "warning"));
        lines.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn limits_that_the_machine_can_not_hold() {
        assert_eq!(said("", &PLENTY), "");
        let few = Machine {
            descriptors: Some(4096),
            ..PLENTY
        };
        let all = said("", &few);
        assert!(
            all.starts_with("f: warning: limits.connections: 20000 connections can't be reached: with 10000 sessions they take up to 60128 file descriptors, and 4096"),
            "{all}"
        );
        let many = "limits:\n  sessions: 200000\n  connections: 300000\n";
        let all = said(many, &PLENTY);
        assert!(
            all.starts_with("f:2:13: warning: limits.sessions: 200000 sessions can't be reached: they take up to 400000 local UDP ports")
                && all.lines().count() == 1,
            "{all}"
        );
        let small = Machine {
            memory: Some(512 << 20),
            ..PLENTY
        };
        assert_eq!(said("", &small), "", "nobody has asked for it");
        let all = said("limits: { sessions: 9000 }", &small);
        assert!(
            all.contains("take some 931 MiB, and there are 512 MiB"),
            "{all}"
        );
        let all = said("media: { udp_port: 32767, workers: 2 }", &PLENTY);
        assert!(
            all.starts_with("f:1:20: warning: media.udp_port: 32767 to 32768 are among"),
            "{all}"
        );
        assert_eq!(said("media: { udp_port: 32767, workers: 1 }", &PLENTY), "");
    }

    #[test]
    fn what_this_machine_has_can_be_read() {
        let here = Machine::here();
        assert!(here.descriptors.unwrap() >= 256);
        assert!(here.local_ports.unwrap().count() > 1000);
        assert!(here.memory.unwrap() > 64 << 20);
    }

    #[test]
    fn rules_without_models() {
        for (text, place) in [
            (
                "rooms:\n  - { match: a, mode: neural }",
                "f:2:23: warning: rooms[0]: asks for rung L2",
            ),
            (
                "defaults: { mode: neural }",
                "f:1:19: warning: defaults: asks for rung L2",
            ),
            (
                "rooms: [{ match: a, mode: lean, rung: L3 }]",
                "f:1:39: warning: rooms[0]: asks for rung L3",
            ),
            (
                "rooms: [{ match: a, mode: lean, audio: { recode: L3 } }]",
                "f:1:50: warning: rooms[0]: asks for rung L3",
            ),
        ] {
            let all = said(text, &PLENTY);
            assert!(all.starts_with(place), "{all}");
            let with = format!("{text}\nengine: {{ models: /m, runtime: /r }}");
            assert_eq!(said(&with, &PLENTY), "");
        }
        for text in [
            "rooms: [{ match: a, mode: lean }]",
            "rooms: [{ match: a, mode: neural, rung: L4 }]",
            "rooms: [{ match: a, rung: L2 }]",
        ] {
            assert_eq!(said(text, &PLENTY), "", "{text}");
        }
    }
}
