//! Addresses and limits that contradict each other: each is allowed for itself, and no call would come about.

use super::Settings;
use super::yaml::Findings;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Says what can't be right about the addresses.
pub(super) fn contradictions(settings: &Settings, found: &Findings) {
    let media = &settings.media;
    let warn = |key: &str, other: &str, message: String| {
        found.warning(found.id_of_either(key, other), key, message);
    };
    for ip in &media.ips {
        if let Some(why) = not_to_be_advertised(*ip) {
            warn("media.ip", "media.ip", format!("{ip} {why}"));
        }
    }
    let shown: Vec<String> = media.ips.iter().map(ToString::to_string).collect();
    let shown = shown.join(", ");
    let listen = settings.listen;
    if media.ips.iter().all(IpAddr::is_loopback) {
        if !listen.ip().is_loopback() {
            let message = format!(
                "clients that dial listen ({listen}) from elsewhere are told to send media to {shown}, which is their own host; name an address at which they reach this one"
            );
            warn("media.ip", "listen", message);
        } else if let Some(upstream) = elsewhere(&settings.upstream.host) {
            let message = format!(
                "LiveKit at {upstream} is on another host, and media can't go there from {shown}; name an address of this host that it reaches"
            );
            warn("media.ip", "upstream", message);
        }
    } else if is_public(listen) && media.ips.iter().all(|ip| is_private(*ip)) {
        let message = format!(
            "listen ({listen}) is a public address, and those in media.ip ({shown}) are private: clients outside find no path for media; name the public one too"
        );
        warn("media.ip", "listen", message);
    }
    if settings
        .upstream
        .host
        .parse::<IpAddr>()
        .is_ok_and(|ip| ip.is_unspecified())
    {
        let message = format!(
            "{} is no host's address: write 127.0.0.1 where LiveKit is on this host",
            settings.upstream.host
        );
        warn("upstream", "upstream", message);
    }
    limits(settings, found);
}

/// Limits that others make useless.
fn limits(settings: &Settings, found: &Findings) {
    let limits = &settings.limits;
    for (name, key, value) in [
        ("handshakes", "limits.handshakes", limits.handshakes),
        (
            "connections of one address",
            "limits.connections_per_address",
            limits.connections_per_address,
        ),
    ] {
        if value > limits.connections {
            let message = format!(
                "{value} {name} can't be reached over {} connections: lower it, or raise limits.connections",
                limits.connections
            );
            found.warning(found.id_of_either(key, "limits.connections"), key, message);
        }
    }
}

/// Why nobody reaches it, if so.
fn not_to_be_advertised(ip: IpAddr) -> Option<&'static str> {
    match ip.to_canonical() {
        IpAddr::V4(v4) if v4.is_documentation() => {
            Some("is an address for examples (RFC 5737), which nobody has; name this host's own")
        }
        IpAddr::V6(v6) if v6.segments()[..2] == [0x2001, 0xdb8] => {
            Some("is an address for examples (RFC 3849), which nobody has; name this host's own")
        }
        IpAddr::V4(v4) if v4.is_link_local() => Some(
            "is link-local (RFC 3927): only hosts on the same wire reach it; name one that was assigned",
        ),
        IpAddr::V6(v6) if v6.is_unicast_link_local() => Some(
            "is link-local (RFC 4291), which means nothing without an interface; name one that was assigned",
        ),
        _ => None,
    }
}

/// The upstream, where it surely is on another host.
fn elsewhere(host: &str) -> Option<IpAddr> {
    let ip: IpAddr = host.parse().ok()?;
    (!ip.is_loopback() && !ip.is_unspecified()).then_some(ip)
}

/// Of one host, and of the whole net.
fn is_public(listen: SocketAddr) -> bool {
    let ip = listen.ip();
    !(ip.is_unspecified()
        || ip.is_loopback()
        || is_private(ip)
        || not_to_be_advertised(ip).is_some())
}

/// RFC 1918, RFC 6598, RFC 4193.
fn is_private(ip: IpAddr) -> bool {
    let shared = |v4: Ipv4Addr| v4.octets()[0] == 100 && v4.octets()[1] & 0xc0 == 64;
    let unique = |v6: Ipv6Addr| v6.segments()[0] & 0xfe00 == 0xfc00;
    match ip.to_canonical() {
        IpAddr::V4(v4) => v4.is_private() || shared(v4) || v4.is_loopback(),
        IpAddr::V6(v6) => unique(v6) || v6.is_loopback(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn contradictions_are_warned_of_with_their_place() {
        for (text, expected) in [
            (
                "listen: 0.0.0.0:7980",
                "1:9: warning: media.ip: clients that dial listen (0.0.0.0:7980) from elsewhere are told to send media to 127.0.0.1",
            ),
            (
                "listen: '[::]:7980'\nmedia: { ip: [127.0.0.1, '::1'] }",
                "2:14: warning: media.ip: clients that dial listen ([::]:7980) from elsewhere are told to send media to 127.0.0.1, ::1",
            ),
            (
                "listen: 10.0.0.1:7980",
                "1:9: warning: media.ip: clients that dial listen (10.0.0.1:7980)",
            ),
            (
                "upstream: http://10.0.0.2:7880",
                "1:11: warning: media.ip: LiveKit at 10.0.0.2 is on another host",
            ),
            (
                "upstream: http://0.0.0.0:7880",
                "1:11: warning: upstream: 0.0.0.0 is no host's address",
            ),
            (
                "listen: 8.8.8.8:7980\nmedia: { ip: [10.0.0.1, 'fd00::1', 100.64.0.1] }",
                "2:14: warning: media.ip: listen (8.8.8.8:7980) is a public address, and those in media.ip (10.0.0.1, fd00::1, 100.64.0.1) are private",
            ),
            (
                "media: { ip: 203.0.113.7 }",
                "1:14: warning: media.ip: 203.0.113.7 is an address for examples",
            ),
            (
                "media: { ip: '2001:db8::7' }",
                "1:14: warning: media.ip: 2001:db8::7 is an address for examples",
            ),
            (
                "media: { ip: 169.254.0.1 }",
                "1:14: warning: media.ip: 169.254.0.1 is link-local",
            ),
            (
                "media: { ip: 'fe80::1' }",
                "1:14: warning: media.ip: fe80::1 is link-local",
            ),
            (
                "limits: { connections: 200, sessions: 100, handshakes: 300, connections_per_address: 0 }",
                "1:56: warning: limits.handshakes: 300 handshakes can't be reached over 200 connections",
            ),
        ] {
            let warnings = Settings::parse(text).unwrap().warnings;
            let lines: Vec<String> = warnings.iter().map(|w| w.line("f", "warning")).collect();
            let starts = format!("f:{expected}");
            assert!(
                lines.len() == 1 && lines[0].starts_with(&starts),
                "{text}\n{lines:#?}\n{starts}"
            );
        }
    }

    #[test]
    fn what_is_usual_is_no_contradiction() {
        for text in [
            "",
            // Behind a proxy on the same host.
            "media: { ip: 8.8.8.8 }",
            "listen: 0.0.0.0:7980\nmedia: { ip: 192.168.0.2 }",
            "listen: 0.0.0.0:7980\nmedia: { ip: [127.0.0.1, 192.168.0.2] }",
            "listen: 8.8.8.8:7980\nmedia: { ip: [10.0.0.1, 8.8.8.8] }",
            "listen: 10.0.0.1:7980\nmedia: { ip: 10.0.0.1 }\nupstream: https://livekit.example.com",
            "upstream: https://livekit.example.com",
        ] {
            let warnings = Settings::parse(text).unwrap().warnings;
            assert!(warnings.is_empty(), "{text}: {warnings:?}");
        }
    }
}
