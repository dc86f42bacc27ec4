#![allow(clippy::unwrap_used, clippy::panic)]

mod mistakes;

use super::parse::{given_keys, known_keys};
use super::*;
use auralink_proto::policy::{Mode, Policy, RedPolicy, VideoCodec, VideoPolicy};
use mistakes::mistakes;
use proptest::prelude::*;
use std::collections::BTreeSet;

const REFERENCE: &str = include_str!("../../config/auralink.yaml");

fn parse(text: &str) -> Settings {
    Settings::parse(text)
        .unwrap_or_else(|e| panic!("{e}\n{text}"))
        .settings
}

/// The reference with its absent keys present: `#key` loses its `#`, and `rooms: []` goes.
fn reference_in_full() -> String {
    let mut out = String::new();
    for line in REFERENCE.lines().filter(|l| *l != "rooms: []") {
        let (indent, rest) = line.split_at(line.len() - line.trim_start().len());
        let own = rest.strip_prefix('#').filter(|r| {
            let r = r.trim_start_matches(' ');
            let near = rest.len() - r.len() <= 5;
            // `#tls:`, `#rooms:`, `#  - match:`, `#    mode:`, but no prose and no table of values.
            (near && indent.is_empty() && (rest.starts_with("#  - ") || rest.starts_with("#    ")))
                || !rest.starts_with("# ")
                    && !r.is_empty()
                    && rest.len() > 1
                    && !rest.starts_with("#  ")
        });
        out.push_str(indent);
        out.push_str(own.unwrap_or(rest));
        out.push('\n');
    }
    out
}

#[test]
fn the_reference_equals_the_defaults() {
    assert_eq!(parse(REFERENCE), Settings::default());
    assert_eq!(parse(""), Settings::default());
    assert_eq!(parse("# nothing\n\n  # at all"), Settings::default());
    assert_eq!(parse("{}"), Settings::default());
}

#[test]
fn the_reference_holds_every_key_and_its_examples_work() {
    let full = reference_in_full();
    let loaded = Settings::parse(&full).unwrap_or_else(|e| panic!("{e}\n{full}"));
    let known = known_keys();
    assert!(
        known.len() > 45 && known.contains("rooms[].video.screen_share"),
        "{known:?}"
    );
    let given: BTreeSet<_> = given_keys(&full);
    assert_eq!(
        given, known,
        "left: keys in config/auralink.yaml, right: keys in the code"
    );
    let s = loaded.settings;
    assert_eq!(s.media.tcp_port, Some(7981));
    assert_eq!(
        s.rules.resolve("support-1", "agent-1", "API9").mode,
        Mode::Lean
    );
}

#[test]
fn the_issue_s_example() {
    let s = parse(
        "listen: 127.0.0.1:7980
upstream: http://127.0.0.1:7880
media:
  ip: 127.0.0.1
  udp_port: 7982
  tcp_port: 7981
admin: { listen: 127.0.0.1:7990 }
defaults: { mode: off }
rooms:
  - match: \"support-*\"
    mode: lean
    audio: { max_bitrate: 12k, packet: 40ms, red: auto }
",
    );
    assert_eq!(s.rules.resolve("support-7", "x", "y").mode, Mode::Lean);
    assert_eq!(s.rules.resolve("lobby", "x", "y").mode, Mode::Off);
}

#[test]
fn a_rule_builds_on_the_defaults() {
    let s = parse(
        "defaults:
  audio: { max_bitrate: 20k, red: keep }
  video: { codec: vp9, screen_share: same }
rooms:
  - { match: a, mode: lean, audio: { packet: 60ms } }
  - { match: [b, 'c*'], mode: lean, video: { max_bitrate: 1.5M } }
",
    );
    let a = s.rules.resolve("a", "", "");
    assert_eq!(
        (a.audio.max_bitrate, a.audio.packet_ms, a.audio.red),
        (20_000, 60, RedPolicy::Keep)
    );
    let mut video = VideoPolicy {
        codec: VideoCodec::Vp9,
        screen_share: true,
        ..VideoPolicy::default()
    };
    assert_eq!(a.video, Some(video));
    video.max_bitrate = Some(1_500_000);
    assert_eq!(s.rules.resolve("c1", "", "").video, Some(video));
    assert_eq!(parse("").rules.resolve("a", "", "").video, None);
}

#[test]
fn unknown_keys_are_refused_in_every_section() {
    let sections: BTreeSet<String> = known_keys()
        .iter()
        .filter_map(|k| k.rsplit_once('.').map(|(section, _)| section.to_owned()))
        .collect();
    assert!(sections.len() >= 11, "{sections:?}");
    for section in sections {
        // `rooms[].audio` → `rooms: [{match: a, audio: {zzz: 1}}]`
        let mut text = "zzz: 1".to_owned();
        for part in section.rsplit('.') {
            text = match part.strip_suffix("[]") {
                Some(list) => format!("{list}: [{{match: a, {text}}}]"),
                None => format!("{part}: {{{text}}}"),
            };
        }
        let all = mistakes(&text);
        assert!(
            all.iter().any(|m| m.contains("zzz: unknown key")),
            "{text}: {all:?}"
        );
    }
}

#[test]
fn udp_and_tcp_ports_may_have_the_same_number() {
    // 443 for everything is what networks that block the rest call for.
    let s = parse("listen: 127.0.0.1:443\nmedia: { ip: 127.0.0.2, tcp_port: 443, udp_port: 443 }");
    assert_eq!((s.media.udp_port, s.media.tcp_port), (443, Some(443)));
    // The system chooses different ones.
    parse("listen: 127.0.0.1:0\nadmin: { listen: 127.0.0.1:0 }");
}

#[test]
fn upstreams() {
    for (url, shown) in [
        ("http://livekit", "http://livekit:80"),
        (
            "wss://livekit.example.com/",
            "https://livekit.example.com:443",
        ),
        ("ws://[::1]:7880", "http://[::1]:7880"),
        ("HTTPS://h:8443/base/", "https://h:8443/base"),
    ] {
        assert_eq!(
            parse(&format!("upstream: '{url}'")).upstream.to_string(),
            shown
        );
    }
}

#[test]
fn what_has_no_effect_is_a_warning() {
    let text = "rooms:
  - { match: a, audio: { packet: 20ms } }
  - { match: '*', mode: lean }
  - { match: b }
";
    let loaded = Settings::parse(text).unwrap();
    let warnings: Vec<_> = loaded
        .warnings
        .iter()
        .map(|w| w.line("f", "warning"))
        .collect();
    assert_eq!(
        warnings,
        [
            "f:2:24: warning: rooms[0].audio: has no effect: the mode is off",
            "f:4:5: warning: rooms[2]: is never reached: rooms[1] is for everyone in every room",
        ]
    );
}

#[test]
fn a_room_s_effective_settings() {
    let s = parse(
        "rooms:
  - { match: 'x*', identities: 'bot-*', mode: lean, audio: { max_bitrate: 16k } }
  - { match: xy, mode: lean, video: { codec: av1, max_bitrate: 400k } }
  - { match: z, mode: lean, audio: { enhance: true, recode: L5, recode_for: all } }
",
    );
    let anew = "mode: lean\naudio: { max_bitrate: 12k, packet: 40ms, red: auto, enhance: true, recode: L5, recode_for: all }\nrung: L4\ndisclose: false\n# no video: left alone\n";
    assert_eq!(
        show_room(&s, "z", None, None),
        format!("# room \"z\": rooms[2]\n{anew}")
    );
    let bots = "mode: lean\naudio: { max_bitrate: 16k, packet: 40ms, red: auto }\nrung: L4\ndisclose: false\n# no video: left alone\n";
    let all = "mode: lean\naudio: { max_bitrate: 12k, packet: 40ms, red: auto }\nrung: L4\ndisclose: false\nvideo: { codec: av1, max_bitrate: 400k, screen_share: keep }\n";
    let off = "mode: off\naudio: { max_bitrate: 12k, packet: 40ms, red: auto }\ndisclose: false\n# no video: left alone\n";
    assert_eq!(
        show_room(&s, "xy", None, None),
        format!("# room \"xy\", identities bot-*: rooms[0]\n{bots}# room \"xy\": rooms[1]\n{all}")
    );
    assert_eq!(
        show_room(&s, "xy", Some("bot-1"), None),
        format!("# room \"xy\": rooms[0]\n{bots}")
    );
    assert_eq!(
        show_room(&s, "xy", Some("ann"), None),
        format!("# room \"xy\": rooms[1]\n{all}")
    );
    assert_eq!(
        show_room(&s, "xz", None, None),
        format!(
            "# room \"xz\", identities bot-*: rooms[0]\n{bots}# room \"xz\", everyone else: defaults, no rule is for it\n{off}"
        )
    );
    // What is shown is what the file takes.
    let pasted = format!(
        "rooms:\n - match: xy\n   {}",
        all.trim_end().replace('\n', "\n   ")
    );
    let resolved = s.rules.resolve("xy", "", "");
    let explicit = Policy {
        rung: Some(resolved.rung()),
        ..resolved
    };
    assert_eq!(parse(&pasted).rules.resolve("xy", "", ""), explicit);
}

#[test]
fn the_longest_query_is_what_http_can_hold() {
    let most = crate::signal::Limits::QUERY_CEILING;
    assert_eq!(MAX_QUERY, most);
    assert_eq!(Settings::default().limits.max_query_bytes, most);
    let text = format!("limits: {{ max_query_bytes: {} }}", most + 1);
    assert!(Settings::parse(&text).is_err());
}

#[test]
fn what_only_a_restart_changes() {
    let base = Settings::default();
    let restart: BTreeSet<&str> = [
        "listen: 127.0.0.1:1",
        "tls: {cert: a, key: b}",
        "upstream: http://h",
        "media: {ip: 127.0.0.2}",
        "media: {udp_port: 1}",
        "media: {tcp_port: 1}",
        "media: {stun_servers: a}",
        "admin: {listen: 127.0.0.1:2}",
        "media: {scheduling: realtime}",
        "log: {format: json}",
        "engine: {threads: 63}",
        "engine: {models: /m}",
        "engine: {codec: other}",
        "engine: {runtime: /r}",
        "engine: {local_bitrate: 32k}",
        "audit: {log: /a}",
    ]
    .into_iter()
    .map(|text| {
        let new = parse(text);
        let keys = base.restart_only(&new);
        assert_eq!(keys.len(), 1, "{text}: {keys:?}");
        assert!(base.reloadable(&new).is_empty(), "{text}");
        keys[0]
    })
    .collect();
    let workers = if base.media.workers == 3 { 4 } else { 3 };
    assert_eq!(
        base.restart_only(&parse(&format!("media: {{workers: {workers}}}"))),
        ["media.workers"]
    );
    let external = "media: {use_external_ip: true, stun_servers: [a, 'stun:192.0.2.1:5000']}";
    let external = parse(external);
    assert_eq!(
        base.restart_only(&external),
        ["media.ip", "media.use_external_ip", "media.stun_servers"]
    );
    assert_eq!(external.media.ips, [] as [IpAddr; 0]);
    assert_eq!(external.media.stun_servers, ["a:3478", "192.0.2.1:5000"]);
    for (text, part) in [
        ("defaults: {mode: lean}", "defaults"),
        ("rooms: [{match: a}]", "rooms"),
        ("log: {level: warn}", "log.level"),
        ("metrics: {rooms: 1}", "metrics.rooms"),
        ("limits: {max_header_bytes: 8KiB}", "limits"),
        ("limits: {max_query_bytes: 8KiB}", "limits"),
        ("limits: {max_frame_bytes: 64KiB}", "limits"),
        ("limits: {header_timeout: 1s}", "limits"),
        ("limits: {dial_timeout: 1s}", "limits"),
        ("limits: {idle_timeout: 1s}", "limits"),
        ("limits: {handshakes: 1}", "limits"),
        ("limits: {sessions: 1}", "limits"),
        ("limits: {keep_alive_timeout: 60s}", "limits"),
        ("limits: {connections: 30000}", "limits"),
        ("limits: {connections_per_address: 0}", "limits"),
        ("session: {resume_grace: 1s}", "session"),
        ("session: {consent_timeout: 5s}", "session"),
        ("session: {drain_grace: 1s}", "session"),
    ] {
        let new = parse(text);
        assert_eq!(
            (base.restart_only(&new), base.reloadable(&new)),
            (vec![], vec![part]),
            "{text}"
        );
    }
    // Whether there is TLS is for a restart, and other files aren't.
    let [a, b] = ["a", "b"].map(|cert| parse(&format!("tls: {{cert: {cert}, key: k}}")));
    assert_eq!(
        (a.restart_only(&b), a.reloadable(&b)),
        (vec![], vec!["tls"])
    );
    // Every leaf key is one or the other.
    let known = known_keys();
    let leaf = |k: &&String| {
        !known
            .iter()
            .any(|o| o.starts_with(&format!("{k}.")) || o.starts_with(&format!("{k}[")))
    };
    for key in known.iter().filter(leaf) {
        let reloadable = [
            "defaults.",
            "rooms",
            "log.level",
            "metrics.rooms",
            "limits.",
            "session.",
            "tls.",
        ];
        let live = reloadable.iter().any(|r| key.starts_with(r));
        let others = ["media.workers", "media.use_external_ip"];
        let fixed = restart.contains(key.as_str()) || others.contains(&key.as_str());
        assert!(live != fixed, "{key}");
    }
}

/// A container may get fewer cores while it runs; the file that starts a process must stay one that it can reload.
#[test]
fn another_number_of_cores_is_no_other_configuration() {
    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;
    let (before, all) = (
        Settings::default(),
        sched_getaffinity(Pid::from_raw(0)).unwrap(),
    );
    let first = (0..CpuSet::count())
        .find(|cpu| all.is_set(*cpu).unwrap())
        .unwrap();
    let mut one = CpuSet::new();
    one.set(first).unwrap();
    // Of this thread only.
    sched_setaffinity(Pid::from_raw(0), &one).unwrap();
    assert_eq!(std::thread::available_parallelism().unwrap().get(), 1);
    assert_eq!(before.restart_only(&parse("")), [""; 0]);
}

#[test]
fn files_that_are_no_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.yaml");
    let error = |bytes: &[u8]| {
        std::fs::write(&file, bytes).unwrap();
        load(&file).unwrap_err().to_string()
    };
    assert!(
        load(&file)
            .unwrap_err()
            .to_string()
            .starts_with("cannot be read: No such file")
    );
    assert_eq!(
        error(b"# \xc3\xbc\n ab\xff: 1"),
        "2:4: is not UTF-8 text here"
    );
    assert_eq!(
        error(&vec![b'#'; MAX_FILE + 1]),
        "is larger than 1048576 bytes, the most allowed"
    );
    assert!(
        error(&[b"a: ".as_slice(), "[".repeat(10_000).as_bytes()].concat())
            .contains("not valid YAML")
    );
    assert_eq!(
        error(b"tls:\n  cert: /nowhere/a.pem\n  key: /dev/null"),
        "2:9: tls.cert: /nowhere/a.pem cannot be read: No such file or directory (os error 2)"
    );
    // Aliases that multiply are refused, not expanded.
    let bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n".to_owned()
        + &(b'b'..b'k')
            .map(|c| {
                let (c, p) = (char::from(c), char::from(c - 1));
                format!("{c}: &{c} [*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p},*{p}]\n")
            })
            .collect::<String>();
    assert!(
        error(bomb.as_bytes()).contains("repetition limit"),
        "{}",
        error(bomb.as_bytes())
    );
}

/// Texts near enough to a configuration to reach the depths of the reader.
fn nearly_config() -> impl Strategy<Value = String> {
    let full = reference_in_full();
    let edits = prop::collection::vec((any::<prop::sample::Index>(), ".{0,6}", 0_usize..8), 0..6);
    edits.prop_map(move |edits| {
        let mut chars: Vec<char> = full.chars().filter(|c| c.is_ascii()).collect();
        for (at, insert, remove) in edits {
            let at = at.index(chars.len());
            let end = (at + remove).min(chars.len());
            chars.splice(at..end, insert.chars());
        }
        chars.into_iter().collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn no_text_panics(text in any::<String>()) {
        let _ = Settings::parse(&text);
    }

    #[test]
    fn no_edit_of_the_reference_panics_and_places_lie_in_the_text(text in nearly_config()) {
        if let Err(problems) = Settings::parse(&text) {
            prop_assert!(!problems.0.is_empty());
            let lines = text.split(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']).count();
            for p in problems.0 {
                prop_assert!(!p.message.is_empty());
                if let Some(place) = p.place {
                    prop_assert!(place.line >= 1 && place.line <= lines + 1, "{}", p);
                }
            }
        }
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = load_bytes(&bytes);
    }
}
