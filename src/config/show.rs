//! What a room gets, written as the file would have it: `auralink --check --room NAME`.

use super::Settings;
use super::values::show_bitrate;
use auralink_proto::ladder::Rung;
use auralink_proto::policy::{AudioPolicy, Policy, Rule};
use std::fmt::Write;

/// The effective settings of a room, as YAML with comments. Without an identity and an API key
/// every rule is shown that may be for someone in the room, up to the first for everyone.
#[must_use]
pub fn show_room(
    settings: &Settings,
    room: &str,
    identity: Option<&str>,
    api_key: Option<&str>,
) -> String {
    let rules = &settings.rules;
    let mut out = String::new();
    for (n, rule) in rules.rules().iter().enumerate() {
        if !rule.covers_room(room) || !may_match(rule, identity, api_key) {
            continue;
        }
        let who = conditions(rule, identity, api_key);
        let _ = writeln!(out, "# room {room:?}{who}: rooms[{n}]");
        show_policy(&mut out, &rule.policy);
        if who.is_empty() {
            return out;
        }
    }
    let who = if out.is_empty() {
        ""
    } else {
        ", everyone else"
    };
    let _ = writeln!(out, "# room {room:?}{who}: defaults, no rule is for it");
    show_policy(&mut out, rules.defaults());
    out
}

fn may_match(rule: &Rule, identity: Option<&str>, api_key: Option<&str>) -> bool {
    let fits = |globs: &[auralink_proto::policy::Glob], name: Option<&str>| {
        globs.is_empty() || name.is_none_or(|name| globs.iter().any(|g| g.matches(name)))
    };
    fits(&rule.identities, identity) && fits(&rule.api_keys, api_key)
}

/// What is still open: whom the rule is for among those asked about; empty: all of them.
fn conditions(rule: &Rule, identity: Option<&str>, api_key: Option<&str>) -> String {
    let mut who = String::new();
    for (name, globs, given) in [
        ("identities", &rule.identities, identity),
        ("api_keys", &rule.api_keys, api_key),
    ] {
        if given.is_none() && !globs.is_empty() && !globs.iter().any(|g| g.is_any()) {
            let list: Vec<_> = globs.iter().map(ToString::to_string).collect();
            let _ = write!(who, ", {name} {}", list.join(" or "));
        }
    }
    who
}

/// What it says beyond the defaults of coding anew.
fn recoding(audio: &AudioPolicy) -> String {
    let mut out = String::new();
    if audio.enhance {
        out.push_str(", enhance: true");
    }
    if audio.recode != Rung::NATIVE {
        let _ = write!(
            out,
            ", recode: {}, recode_for: {}",
            audio.recode,
            audio.recode_for.name()
        );
    }
    out
}

fn show_policy(out: &mut String, policy: &Policy) {
    let Policy {
        mode,
        audio,
        rung: _,
        disclose,
        video,
        generation: _,
    } = policy;
    let _ = writeln!(out, "mode: {mode}");
    let _ = writeln!(
        out,
        "audio: {{ max_bitrate: {}, packet: {}ms, red: {}{} }}",
        show_bitrate(audio.max_bitrate),
        audio.packet_ms,
        audio.red.name(),
        recoding(audio),
    );
    // What the file would take: off has no rung.
    if policy.rung() != Rung::NATIVE {
        let _ = writeln!(out, "rung: {}", policy.rung());
    }
    let _ = writeln!(out, "disclose: {disclose}");
    let Some(video) = video else {
        let _ = writeln!(out, "# no video: left alone");
        return;
    };
    let mut parts = vec![format!("codec: {}", video.codec.name())];
    parts.extend(
        video
            .max_bitrate
            .map(|n| format!("max_bitrate: {}", show_bitrate(n))),
    );
    let screen = if video.screen_share { "same" } else { "keep" };
    parts.push(format!("screen_share: {screen}"));
    let _ = writeln!(out, "video: {{ {} }}", parts.join(", "));
}
