//! The keys: which there are, what each may hold, and what they must not hold together.

use super::addresses::contradictions;
use super::reach::Reach;
use super::values::{
    address, bitrate, bytes, choice, duration, flag, folder, glob, ip, level, number, packet, path,
    rung, stun_server, upstream,
};
use super::yaml::{self, Findings, Section};
use super::{
    Admin, Engine, Limits, Loaded, Log, LogFormat, MAX_QUERY, MAX_WORKERS, Media, Metrics,
    Scheduling,
};
use super::{Material, Places, Problem, Problems, Session, Settings, TlsFiles};
use auralink_proto::ladder::Rung;
use auralink_proto::policy::{
    AudioPolicy, Mode, Policy, RecodeFor, RedPolicy, Rule, Rules, VideoCodec, VideoPolicy,
};
use auralink_proto::signal::MAX_FRAME;
#[cfg(test)]
use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// More addresses than a host has that is worth advertising.
const MAX_IPS: usize = 8;

pub(super) fn parse(text: &str) -> Result<Loaded, Problems> {
    let (settings, found) = read(text).map_err(|p| Problems(vec![p]))?;
    let given = found.given();
    let (problems, warnings) = found.into_problems(text);
    if !problems.is_empty() {
        return Err(Problems(problems));
    }
    Ok(Loaded {
        settings,
        warnings,
        material: Material::default(),
        places: Places {
            text: text.to_owned(),
            given,
        },
    })
}

/// Every key that a file may hold, `rooms[].audio.packet`; asked of the reader itself.
#[cfg(test)]
pub(super) fn known_keys() -> BTreeSet<String> {
    read("rooms: [{match: a}]")
        .map(|(_, found)| found.known())
        .unwrap_or_default()
}

/// Every key that stands in the text.
#[cfg(test)]
pub(super) fn given_keys(text: &str) -> BTreeSet<String> {
    let keys = read(text)
        .map(|(_, found)| found.given())
        .unwrap_or_default();
    keys.into_keys()
        .map(|k| k.replace(|c: char| c.is_ascii_digit(), ""))
        .collect()
}

fn read(text: &str) -> Result<(Settings, Findings), Problem> {
    let tree = yaml::parse(text)?;
    let found = Findings::default();
    let top = Section::new(String::new(), Some(&tree), &found);
    let base = Settings::default();
    let settings = Settings {
        listen: top.or("listen", address, base.listen),
        tls: tls(&top),
        upstream: top.or("upstream", upstream, base.upstream),
        media: media(top.section("media"), base.media),
        admin: admin(top.section("admin"), base.admin),
        limits: limits(top.section("limits"), &base.limits),
        session: session(top.section("session"), &base.session),
        log: log(top.section("log"), base.log),
        metrics: metrics(top.section("metrics"), &base.metrics),
        engine: engine(top.section("engine"), base.engine),
        audit: audit(top.section("audit")),
        rules: rules(&top),
    };
    top.done();
    ports(&settings, &found);
    contradictions(&settings, &found);
    Ok((settings, found))
}

fn tls(top: &Section<'_>) -> Option<TlsFiles> {
    let (there, section) = top.optional_section("tls");
    let (cert, key) = (
        section.optional("cert", path),
        section.optional("key", path),
    );
    if there {
        section.require(&["cert", "key"]);
    }
    section.done();
    Some(TlsFiles {
        cert: cert?,
        key: key?,
    })
}

fn media(section: Section<'_>, base: Media) -> Media {
    let schedulings = &[
        ("normal", Scheduling::Normal),
        ("realtime", Scheduling::Realtime),
    ];
    let given_ips = section.one_or_more("ip", ip);
    let use_external_ip = section.or("use_external_ip", flag, base.use_external_ip);
    let stun_servers = section
        .one_or_more("stun_servers", stun_server)
        .unwrap_or(base.stun_servers);
    let there = |key| section.found.given().contains_key(key);
    match (use_external_ip, there("media.stun_servers")) {
        (true, false) => {
            let key = "media.use_external_ip";
            let message = "needs media.stun_servers: who is to be asked for the external address";
            section.found.problem(section.found.id(key), key, message);
        }
        (false, true) => {
            let key = "media.stun_servers";
            let message = "has no effect without media.use_external_ip";
            section.found.warning(section.found.id(key), key, message);
        }
        _ => {}
    }
    // Left out, it is the address that leads to the STUN servers.
    let fallback = if use_external_ip {
        Vec::new()
    } else {
        base.ips
    };
    let ips = given_ips.unwrap_or(fallback);
    let twice = ips
        .iter()
        .enumerate()
        .find(|(i, ip)| ips[..*i].contains(ip));
    let (id, key) = (section.found.id("media.ip"), "media.ip");
    if let Some((_, ip)) = twice {
        section
            .found
            .problem(id, key, format!("{ip} stands there twice"));
    }
    if ips.len() > MAX_IPS {
        let message = format!("{} addresses; at most {MAX_IPS} are allowed", ips.len());
        section.found.problem(id, key, message);
    }
    let media = Media {
        ips,
        use_external_ip,
        stun_servers,
        udp_port: section.or("udp_port", number(1..=u16::MAX), base.udp_port),
        tcp_port: section.optional("tcp_port", number(1..=u16::MAX)),
        workers: section.or("workers", number(1..=MAX_WORKERS), base.workers),
        scheduling: section.or("scheduling", choice(schedulings, &[]), base.scheduling),
    };
    section.done();
    media
}

fn admin(section: Section<'_>, base: Admin) -> Admin {
    let admin = Admin {
        listen: section.or("listen", address, base.listen),
    };
    section.done();
    admin
}

fn limits(section: Section<'_>, base: &Limits) -> Limits {
    let (kib, mib) = (1 << 10, 1 << 20);
    let time = |low_ms, high_s| Duration::from_millis(low_ms)..=Duration::from_secs(high_s);
    let limits = Limits {
        // hyper itself takes no less than 8 KiB.
        max_header_bytes: section.or(
            "max_header_bytes",
            bytes(8 * kib..=mib),
            base.max_header_bytes,
        ),
        max_query_bytes: section.or(
            "max_query_bytes",
            bytes(8 * kib..=MAX_QUERY),
            base.max_query_bytes,
        ),
        max_frame_bytes: section.or(
            "max_frame_bytes",
            bytes(64 * kib..=16 * mib),
            base.max_frame_bytes,
        ),
        max_upstream_frame_bytes: section.or(
            "max_upstream_frame_bytes",
            bytes(mib..=MAX_FRAME),
            base.max_upstream_frame_bytes,
        ),
        header_timeout: section.or(
            "header_timeout",
            duration(time(100, 600)),
            base.header_timeout,
        ),
        keep_alive_timeout: section.or(
            "keep_alive_timeout",
            duration(time(1_000, 3_600)),
            base.keep_alive_timeout,
        ),
        dial_timeout: section.or("dial_timeout", duration(time(100, 600)), base.dial_timeout),
        // LiveKit's clients ping every few seconds.
        idle_timeout: section.or(
            "idle_timeout",
            duration(time(1_000, 86_400)),
            base.idle_timeout,
        ),
        handshakes: section.or("handshakes", number(1..=100_000), base.handshakes),
        sessions: section.or("sessions", number(1..=1_000_000), base.sessions),
        connections: section.or("connections", number(16..=2_000_000), base.connections),
        connections_per_address: section.or(
            "connections_per_address",
            number(0..=2_000_000),
            base.connections_per_address,
        ),
    };
    if limits.sessions > limits.connections {
        let given = |key| section.found.given().contains_key(key);
        let key = ["limits.sessions", "limits.connections"]
            .into_iter()
            .find(|key| given(*key))
            .unwrap_or("limits.sessions");
        let message = format!(
            "{} sessions can't be reached over {} connections: each takes one; raise limits.connections or lower limits.sessions",
            limits.sessions, limits.connections
        );
        section.found.problem(section.found.id(key), key, message);
    }
    section.done();
    limits
}

fn session(section: Section<'_>, base: &Session) -> Session {
    let time = |low_ms, high_s| Duration::from_millis(low_ms)..=Duration::from_secs(high_s);
    let session = Session {
        resume_grace: section.or("resume_grace", duration(time(0, 3_600)), base.resume_grace),
        // RFC 7675 has consent expire after 30 s; under 5 s a short radio gap would end calls.
        consent_timeout: section.or(
            "consent_timeout",
            duration(time(5_000, 3_600)),
            base.consent_timeout,
        ),
        drain_grace: section.or("drain_grace", duration(time(0, 86_400)), base.drain_grace),
    };
    section.done();
    session
}

fn log(section: Section<'_>, base: Log) -> Log {
    let formats = &[("text", LogFormat::Text), ("json", LogFormat::Json)];
    let log = Log {
        level: section.or("level", level, base.level),
        format: section.or("format", choice(formats, &[]), base.format),
    };
    section.done();
    log
}

fn metrics(section: Section<'_>, base: &Metrics) -> Metrics {
    let metrics = Metrics {
        rooms: section.or("rooms", number(0..=10_000), base.rooms),
    };
    section.done();
    metrics
}

fn engine(section: Section<'_>, base: Engine) -> Engine {
    let engine = Engine {
        threads: section.or("threads", number(1..=MAX_WORKERS), base.threads),
        models: section.optional("models", path),
        codec: section.or("codec", folder, base.codec),
        runtime: section.optional("runtime", path),
        local_bitrate: section.or(
            "local_bitrate",
            bitrate(16_000..=128_000),
            base.local_bitrate,
        ),
    };
    if let (None, Some(_)) = (&engine.runtime, &engine.models) {
        let (id, key) = (section.found.id("engine.models"), "engine.models");
        let message = "has no effect without engine.runtime (libonnxruntime.so)";
        section.found.warning(id, key, message);
    }
    section.done();
    engine
}

fn audit(section: Section<'_>) -> Option<PathBuf> {
    let log = section.optional("log", path);
    section.done();
    log
}

fn rules(top: &Section<'_>) -> Rules {
    let section = top.section("defaults");
    let defaults = policy(&section, Policy::default());
    section.done();

    let mut rules: Vec<Rule> = Vec::new();
    let mut last: Option<String> = None;
    let mut reach = Reach::new();
    for section in top.sections("rooms") {
        let rooms = section.one_or_more("match", glob);
        section.require(&["match"]);
        let identities = section.one_or_more("identities", glob).unwrap_or_default();
        let api_keys = section.one_or_more("api_keys", glob).unwrap_or_default();
        let policy = policy(&section, defaults);
        let here = section.path("match").trim_end_matches(".match").to_owned();
        let rule = Rule {
            rooms: rooms.unwrap_or_default(),
            identities,
            api_keys,
            policy,
        };
        reach.next(&rule, &section, last.as_deref());
        section.done();
        if last.is_none() && rule.takes_everything() {
            last = Some(here);
        }
        rules.push(rule);
    }
    Rules::new(defaults, rules, 1)
}

/// `mode`, `audio` and `video` laid over `base`.
fn policy(section: &Section<'_>, base: Policy) -> Policy {
    let modes = &[
        ("off", Mode::Off),
        ("lean", Mode::Lean),
        ("neural", Mode::Neural),
    ];
    let mode = section.or("mode", choice(modes, &["auto"]), base.mode);
    let rung = section.optional("rung", rung).or(base.rung);
    let disclose = section.or("disclose", flag, base.disclose);

    let (audio_there, audio) = section.optional_section("audio");
    let reds = &[
        ("auto", RedPolicy::Auto),
        ("keep", RedPolicy::Keep),
        ("off", RedPolicy::Off),
    ];
    // What a stock subscriber decodes.
    let recodes = &[
        ("off", Rung::NATIVE),
        ("L3", Rung::L3),
        ("L4", Rung::L4),
        ("L5", Rung::L5),
        ("L6", Rung::L6),
    ];
    let constrained = &[("all", RecodeFor::All), ("lossy", RecodeFor::Lossy)];
    let audio_policy = AudioPolicy {
        max_bitrate: audio.or(
            "max_bitrate",
            bitrate(6_000..=510_000),
            base.audio.max_bitrate,
        ),
        packet_ms: audio.or("packet", packet, base.audio.packet_ms),
        red: audio.or("red", choice(reds, &[]), base.audio.red),
        enhance: audio.or("enhance", flag, base.audio.enhance),
        recode: audio.or("recode", choice(recodes, &[]), base.audio.recode),
        recode_for: audio.or(
            "recode_for",
            choice(constrained, &[]),
            base.audio.recode_for,
        ),
    };
    audio.done();

    let (video_there, video) = section.optional_section("video");
    let old = base.video.unwrap_or_default();
    let codecs = &[
        ("keep", VideoCodec::Keep),
        ("vp9", VideoCodec::Vp9),
        ("av1", VideoCodec::Av1),
    ];
    let screens = &[("keep", false), ("same", true)];
    let video_policy = VideoPolicy {
        codec: video.or("codec", choice(codecs, &[]), old.codec),
        max_bitrate: video
            .optional("max_bitrate", bitrate(30_000..=100_000_000))
            .or(old.max_bitrate),
        screen_share: video.or("screen_share", choice(screens, &[]), old.screen_share),
    };
    video.done();

    // In `defaults` they are there for the rules to build on.
    let in_rule = section.path("mode") != "defaults.mode";
    for (there, key) in [(audio_there, "audio"), (video_there, "video")] {
        if in_rule && there && mode == Mode::Off {
            let path = section.path(key);
            section.found.warning(
                section.found.id(&path),
                path,
                "has no effect: the mode is off",
            );
        }
    }
    let video = if video_there {
        Some(video_policy)
    } else {
        base.video
    };
    Policy {
        mode,
        audio: audio_policy,
        rung,
        disclose,
        video,
        generation: base.generation,
    }
}

/// What would fail when it is bound, or would dial itself. UDP and TCP ports are different things
/// even where their numbers are the same.
fn ports(settings: &Settings, found: &Findings) {
    let media = &settings.media;
    let extra = u16::try_from(media.workers.saturating_sub(1)).unwrap_or(u16::MAX);
    if media.udp_port.checked_add(extra).is_none() {
        let key = "media.udp_port";
        let message = format!(
            "{} and one more for each of the {} media workers go beyond 65535; at most {} is allowed",
            media.udp_port,
            media.workers,
            u16::MAX - extra,
        );
        found.problem(found.id(key), key, message);
    }

    let mut tcp = vec![
        ("listen", settings.listen),
        ("admin.listen", settings.admin.listen),
    ];
    if let Some(port) = media.tcp_port {
        tcp.extend(
            media
                .ips
                .iter()
                .map(|ip| ("media.tcp_port", SocketAddr::new(*ip, port))),
        );
    }
    for (i, (key, address)) in tcp.iter().enumerate() {
        let clash = tcp[..i]
            .iter()
            .find(|(other, taken)| other != key && overlap(*taken, *address));
        if let Some((other, taken)) = clash {
            let message = format!("TCP {address} overlaps {other} ({taken}); give it another port");
            found.problem(found.id_of_either(key, other), *key, message);
            // One report for each key, not for each of its addresses.
            if *key == "media.tcp_port" {
                break;
            }
        }
    }

    let upstream = &settings.upstream;
    let host = match upstream.host.as_str() {
        "localhost" => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        host => host.parse().ok(),
    };
    if let Some(ip) = host {
        let dialled = SocketAddr::new(ip, upstream.port);
        let own = |taken: SocketAddr| {
            let wildcard = taken.ip().is_unspecified() && !ip.is_loopback();
            // What is bound to every address may still be another host's.
            !wildcard && overlap(taken, dialled)
        };
        for (key, taken) in &tcp {
            if own(*taken) {
                let message =
                    format!("{upstream} is this sidecar's own {key} ({taken}), not LiveKit");
                found.problem(found.id_of_either("upstream", key), "upstream", message);
                break;
            }
        }
    }
}

/// Both cannot be bound.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    if a.port() == 0 || a.port() != b.port() {
        return false;
    }
    let (a, b) = (a.ip().to_canonical(), b.ip().to_canonical());
    let covers = |x: IpAddr, y: IpAddr| match x {
        IpAddr::V4(v4) => v4.is_unspecified() && y.is_ipv4(),
        // Dual-stack, as Linux has it by default.
        IpAddr::V6(v6) => v6 == Ipv6Addr::UNSPECIFIED,
    };
    a == b || covers(a, b) || covers(b, a)
}
