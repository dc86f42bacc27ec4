//! Texts that are no configuration, and what is said about them.

use crate::config::Settings;

/// Every mistake as `line:column key: message`.
pub(super) fn mistakes(text: &str) -> Vec<String> {
    let problems = Settings::parse(text).err().map(|p| p.0).unwrap_or_default();
    problems
        .iter()
        .map(|p| match p.place {
            Some(place) => format!("{place} {p}"),
            None => format!("- {p}"),
        })
        .collect()
}

#[test]
fn every_mistake_is_named_with_its_place_and_what_is_allowed() {
    let mut wrong = Vec::new();
    for (text, expected) in [
        (
            "lissten: 127.0.0.1:1",
            "1:1 lissten: unknown key (did you mean `listen`?); allowed here: listen, tls, upstream, media, admin, limits, session, log, metrics, engine, audit, defaults, rooms",
        ),
        (
            "media: { ip: 127.0.0.1, port: 5 }",
            "1:25 media.port: unknown key; allowed here: ip, use_external_ip, stun_servers, udp_port, tcp_port, workers, scheduling",
        ),
        (
            "log: { level: info }\nlog: { level: warn }",
            "2:1 log: the key stands here for the second time; keep one of them",
        ),
        (
            "media:\n  udp_port: 1\n  udp_port: 2",
            "3:3 media.udp_port: the key stands here for the second time; keep one of them",
        ),
        (
            "rooms:\n  - mode: lean",
            "2:5 rooms[0].match: is missing here; it has no default",
        ),
        (
            "rooms:\n  - match: a\n  - match: 'b-[0-9]'",
            "3:12 rooms[1].match: \"b-[0-9]\": '[' is not allowed in a pattern (`*` matches any run of characters and `?` any one; there are no classes, alternatives or escapes)",
        ),
        (
            "rooms: [{match: [a, '']}]",
            "1:21 rooms[0].match[1]: \"\": an empty pattern matches nothing (write \"*\" for everything)",
        ),
        (
            "rooms: [{match: 7}]",
            "1:17 rooms[0].match: 7 is not a pattern as it stands; put it in quotes",
        ),
        (
            "rooms: [{match: []}]",
            "1:17 rooms[0].match: the list is empty; leave the key out instead",
        ),
        (
            "rooms: { match: a }",
            "1:8 rooms: a mapping stands where a list (`- …`) belongs",
        ),
        (
            "rooms: [a]",
            "1:9 rooms[0]: \"a\" stands where a mapping (`key: value`) belongs",
        ),
        (
            "defaults: { mode: auto }",
            "1:19 defaults.mode: `auto` comes with a later version; allowed now: off, lean, neural",
        ),
        (
            "defaults: { mode: auto }",
            "1:19 defaults.mode: `auto` comes with a later version; allowed now: off, lean, neural",
        ),
        (
            "defaults: { mode: Lean }",
            "1:19 defaults.mode: \"Lean\" is none of: off, lean, neural",
        ),
        (
            "defaults: { mode: false }",
            "1:19 defaults.mode: false is none of: off, lean, neural",
        ),
        (
            "defaults: { audio: { max_bitrate: 5k } }",
            "1:35 defaults.audio.max_bitrate: \"5k\" is out of range; bits a second like 12k or 2M from 6k to 510k is allowed",
        ),
        (
            "defaults: { audio: { recode: L2 } }",
            "1:30 defaults.audio.recode: \"L2\" is none of: off, L3, L4, L5, L6",
        ),
        (
            "defaults: { audio: { max_bitrate: fast } }",
            "1:35 defaults.audio.max_bitrate: \"fast\": bits a second like 12k or 2M from 6k to 510k is allowed",
        ),
        (
            "defaults: { audio: { max_bitrate: -12000 } }",
            "1:35 defaults.audio.max_bitrate: -12000: bits a second like 12k or 2M from 6k to 510k is allowed",
        ),
        (
            "defaults: { audio: { packet: 30ms } }",
            "1:30 defaults.audio.packet: \"30ms\" is none of: 20ms, 40ms, 60ms",
        ),
        (
            "defaults: { audio: { packet: 40 } }",
            "1:30 defaults.audio.packet: 40 is none of: 20ms, 40ms, 60ms",
        ),
        (
            "defaults: { audio: { red: maybe } }",
            "1:27 defaults.audio.red: \"maybe\" is none of: auto, keep, off",
        ),
        (
            "defaults: { video: { codec: h264 } }",
            "1:29 defaults.video.codec: \"h264\" is none of: keep, vp9, av1",
        ),
        (
            "defaults: { video: { max_layers: 2 } }",
            "1:22 defaults.video.max_layers: unknown key; allowed here: codec, max_bitrate, screen_share",
        ),
        (
            "limits: { max_query_bytes: 256KiB }",
            "1:28 limits.max_query_bytes: \"256KiB\" is out of range; bytes like 64KiB or 1MiB from 8KiB to 65000 is allowed",
        ),
        (
            "limits: { sessions: 200000 }",
            "1:21 limits.sessions: 200000 sessions can't be reached over 20000 connections: each takes one; raise limits.connections or lower limits.sessions",
        ),
        (
            "limits: { connections: 100 }",
            "1:24 limits.connections: 10000 sessions can't be reached over 100 connections: each takes one; raise limits.connections or lower limits.sessions",
        ),
        (
            "media: { workers: 0 }",
            "1:19 media.workers: 0 is out of range; a whole number from 1 to 64 is allowed",
        ),
        (
            "media: { scheduling: fifo }",
            "1:22 media.scheduling: \"fifo\" is none of: normal, realtime",
        ),
        (
            "media: { workers: 2.5 }",
            "1:19 media.workers: 2.5: a whole number from 1 to 64 is allowed",
        ),
        (
            "media: { udp_port: 70000 }",
            "1:20 media.udp_port: 70000 is out of range; a whole number from 1 to 65535 is allowed",
        ),
        (
            "media: { udp_port: 340282366920938463463374607431768211455 }",
            "1:20 media.udp_port: 170141183460469231731687303715884105727 is out of range; a whole number from 1 to 65535 is allowed",
        ),
        (
            "media: { workers: 64, udp_port: 65500 }",
            "1:33 media.udp_port: 65500 and one more for each of the 64 media workers go beyond 65535; at most 65472 is allowed",
        ),
        (
            "media: { ip: localhost }",
            "1:14 media.ip: \"localhost\" is not an IP address like 203.0.113.7 or 2001:db8::7",
        ),
        (
            "media: { ip: 0.0.0.0 }",
            "1:14 media.ip: 0.0.0.0 cannot be advertised: peers send to it, so it must be one host's own address",
        ),
        (
            "media: { ip: [127.0.0.1, 127.0.0.1] }",
            "1:14 media.ip: 127.0.0.1 stands there twice",
        ),
        (
            "media: { ip: }",
            "1:14 media.ip: has no value; give it one, or leave the key out for its default",
        ),
        (
            "listen: localhost:80",
            "1:9 listen: \"localhost:80\" is not an address like 127.0.0.1:7980 or [::1]:7980 (an IP address and a port; host names are not looked up)",
        ),
        (
            "listen: 7980",
            "1:9 listen: 7980 is not an address like 127.0.0.1:7980 or [::1]:7980 as it stands; put it in quotes",
        ),
        (
            "listen: 127.0.0.1:7990",
            "1:9 admin.listen: TCP 127.0.0.1:7990 overlaps listen (127.0.0.1:7990); give it another port",
        ),
        (
            "listen: 0.0.0.0:7980\nadmin:\n  listen: 127.0.0.1:7980",
            "3:11 admin.listen: TCP 127.0.0.1:7980 overlaps listen (0.0.0.0:7980); give it another port",
        ),
        (
            "listen: '[::]:7980'\nmedia: { tcp_port: 7980 }",
            "2:20 media.tcp_port: TCP 127.0.0.1:7980 overlaps listen ([::]:7980); give it another port",
        ),
        (
            "listen: 127.0.0.1:80\nupstream: ws://localhost",
            "2:11 upstream: http://localhost:80 is this sidecar's own listen (127.0.0.1:80), not LiveKit",
        ),
        (
            "upstream: 127.0.0.1:7880",
            "1:11 upstream: \"127.0.0.1:7880\" is not a URL like http://127.0.0.1:7880 or https://livekit.example.com: it has no scheme",
        ),
        (
            "upstream: ftp://a",
            "1:11 upstream: \"ftp://a\" is not a URL like http://127.0.0.1:7880 or https://livekit.example.com: the scheme must be http, https, ws or wss",
        ),
        (
            "upstream: http://u:p@h",
            "1:11 upstream: \"http://u:p@h\" is not a URL like http://127.0.0.1:7880 or https://livekit.example.com: no user name or password is allowed",
        ),
        (
            "upstream: http://h:0",
            "1:11 upstream: \"http://h:0\" is not a URL like http://127.0.0.1:7880 or https://livekit.example.com: a port is 1 to 65535",
        ),
        (
            "upstream: http://h/?a=b",
            "1:11 upstream: \"http://h/?a=b\" is not a URL like http://127.0.0.1:7880 or https://livekit.example.com: no query or fragment is allowed",
        ),
        (
            "tls: { cert: a.pem }",
            "1:6 tls.key: is missing here; it has no default",
        ),
        (
            "limits: { idle_timeout: 30 }",
            "1:25 limits.idle_timeout: 30: a time like 40ms, 30s or 2m from 1s to 24h is allowed",
        ),
        (
            "media: { use_external_ip: true }",
            "1:27 media.use_external_ip: needs media.stun_servers: who is to be asked for the external address",
        ),
        (
            "media: { use_external_ip: true, stun_servers: [a, \"b:0\"] }",
            "1:51 media.stun_servers[1]: \"b:0\" is not a STUN server like stun.example.com:3478 or 203.0.113.7: the port must be from 1 to 65535",
        ),
        (
            "media: { use_external_ip: true, stun_servers: \"turns:a\" }",
            "1:47 media.stun_servers: \"turns:a\" is not a STUN server like stun.example.com:3478 or 203.0.113.7: only STUN over UDP is spoken",
        ),
        (
            "limits: { max_upstream_frame_bytes: 65MiB }",
            "1:37 limits.max_upstream_frame_bytes: \"65MiB\" is out of range; bytes like 64KiB or 1MiB from 1MiB to 64MiB is allowed",
        ),
        (
            "limits: { max_frame_bytes: 1KiB }",
            "1:28 limits.max_frame_bytes: \"1KiB\" is out of range; bytes like 64KiB or 1MiB from 64KiB to 16MiB is allowed",
        ),
        (
            "limits: { handshakes: many }",
            "1:23 limits.handshakes: \"many\": a whole number from 1 to 100000 is allowed",
        ),
        (
            "session: { consent_timeout: 1s }",
            "1:29 session.consent_timeout: \"1s\" is out of range; a time like 40ms, 30s or 2m from 5s to 1h is allowed",
        ),
        (
            "log: { level: loud }",
            "1:15 log.level: \"loud\" is none of: off, error, warn, info, debug, trace, or directives like \"info,auralink::media=debug\"",
        ),
        (
            "log: { format: xml }",
            "1:16 log.format: \"xml\" is none of: text, json",
        ),
        (
            "metrics: { rooms: -1 }",
            "1:19 metrics.rooms: -1 is out of range; a whole number from 0 to 10000 is allowed",
        ),
        (
            "[a]",
            "1:1 the file: a list stands where a mapping (`key: value`) belongs",
        ),
        ("1: 2", "1:1 the file: 1 is no key: a key is a word"),
        (
            "media: { ip: [1, 2",
            "not valid YAML: did not find expected ',' or ']'",
        ),
        (
            "a:\n\t- b",
            "2:1 not valid YAML: found character that cannot start any token",
        ),
        ("a: !tag b", "not valid YAML: "),
        ("a: 1\n---\nb: 2", "not valid YAML: "),
        ("? [a]\n: b", "not valid YAML: a key must be a word"),
    ] {
        let all = mistakes(text);
        // libyaml's own words may hold more.
        let yaml = |m: &str| expected.contains("not valid YAML") && m.contains(expected);
        if all.len() != 1 || !(all[0] == expected || yaml(&all[0])) {
            let got = all.join("\n         ");
            wrong.push(format!("{text}\nexpected {expected}\ngot      {got}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn all_mistakes_are_reported_in_the_file_s_order() {
    let text = "listen: here
nonsense: 1
media:
  ip: [127.0.0.1, nowhere, 0.0.0.0]
  workers: 65
rooms:
  - match: '['
    mode: auto
    audio: { packet: 41ms, red: x, colour: blue }
  - mode: lean
";
    let keys: Vec<_> = mistakes(text)
        .iter()
        .map(|m| m.split(": ").next().unwrap().to_owned())
        .collect();
    assert_eq!(
        keys,
        [
            "1:9 listen",
            "2:1 nonsense",
            "4:19 media.ip[1]",
            "4:28 media.ip[2]",
            "5:12 media.workers",
            "7:12 rooms[0].match",
            "8:11 rooms[0].mode",
            "9:22 rooms[0].audio.packet",
            "9:33 rooms[0].audio.red",
            "9:36 rooms[0].audio.colour",
            "10:5 rooms[1].match",
        ]
    );
    let many = (0..80).map(|n| format!("k{n}: 1\n")).collect::<String>();
    let all = mistakes(&many);
    assert_eq!(
        (all.len(), all[50].as_str()),
        (51, "- 30 more mistakes are not listed")
    );
}
