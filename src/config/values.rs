//! What may stand behind a key: each function takes a node and gives the value, or says what stands
//! there and what is allowed.

use super::Upstream;
use super::yaml::{Kind, Node};
use auralink_proto::ladder::Rung;
use auralink_proto::policy::Glob;
use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

type Parsed<T> = Result<T, String>;

fn text<'n>(node: &'n Node, what: &str) -> Parsed<&'n str> {
    match &node.kind {
        Kind::Text(text) => Ok(text),
        Kind::Bool(_) | Kind::Int(_) | Kind::Float(_) => Err(format!(
            "{} is not {what} as it stands; put it in quotes",
            node.shown()
        )),
        _ => Err(format!("{} stands where {what} belongs", node.shown())),
    }
}

/// A whole number.
pub(super) fn number<T>(range: RangeInclusive<T>) -> impl Fn(&Node) -> Parsed<T>
where
    T: Copy + PartialOrd + Display + TryFrom<i128>,
{
    move |node| {
        let (low, high) = (*range.start(), *range.end());
        let allowed = format!("a whole number from {low} to {high} is allowed");
        let Kind::Int(n) = node.kind else {
            return Err(format!("{}: {allowed}", node.shown()));
        };
        T::try_from(n)
            .ok()
            .filter(|n| range.contains(n))
            .ok_or_else(|| format!("{n} is out of range; {allowed}"))
    }
}

/// One of a few words; those in `later` are known, but not yet there.
pub(super) fn choice<T: Copy>(
    words: &'static [(&'static str, T)],
    later: &'static [&'static str],
) -> impl Fn(&Node) -> Parsed<T> {
    move |node| {
        let allowed = words.iter().map(|(w, _)| *w).collect::<Vec<_>>().join(", ");
        // YAML 1.1 habits: `off` unquoted is a word here, but `false` is not.
        let Kind::Text(word) = &node.kind else {
            return Err(format!("{} is none of: {allowed}", node.shown()));
        };
        if later.contains(&word.as_str()) {
            return Err(format!(
                "`{word}` comes with a later version; allowed now: {allowed}"
            ));
        }
        words
            .iter()
            .find(|(w, _)| w == word)
            .map(|(_, value)| *value)
            .ok_or_else(|| format!("{} is none of: {allowed}", node.shown()))
    }
}

/// Digits, perhaps with a fraction, and a unit: `1.5M` is 1.5 × 10⁶. Exact: no floating point.
fn with_unit(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let unit = unit.trim_start();
    let scale = units.iter().find(|(name, _)| *name == unit)?.1;
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, "0"));
    if whole.is_empty() || fraction.is_empty() || fraction.len() > 6 || whole.len() > 15 {
        return None;
    }
    let part = fraction.parse::<u64>().ok()?.checked_mul(scale)?;
    let of = 10_u64.pow(u32::try_from(fraction.len()).ok()?);
    if !part.is_multiple_of(of) {
        return None;
    }
    whole
        .parse::<u64>()
        .ok()?
        .checked_mul(scale)?
        .checked_add(part / of)
}

/// A number with a unit, in a range; `show` writes the bounds as one would write them in the file.
fn measured(
    node: &Node,
    units: &[(&str, u64)],
    range: &RangeInclusive<u64>,
    like: &str,
    show: fn(u64) -> String,
) -> Parsed<u64> {
    let (low, high) = (show(*range.start()), show(*range.end()));
    let allowed = format!("{like} from {low} to {high} is allowed");
    let value = match &node.kind {
        Kind::Text(text) => with_unit(text, units),
        // Without a unit only where the units hold an empty one.
        Kind::Int(n) => with_unit(&n.to_string(), units),
        Kind::Float(n) => with_unit(&n.to_string(), units),
        _ => None,
    };
    let value = value.ok_or_else(|| format!("{}: {allowed}", node.shown()))?;
    if range.contains(&value) {
        Ok(value)
    } else {
        Err(format!("{} is out of range; {allowed}", node.shown()))
    }
}

/// Bits a second: `12k`, `2M`, `12000`.
pub(super) fn bitrate(range: RangeInclusive<u32>) -> impl Fn(&Node) -> Parsed<u32> {
    move |node| {
        let units = [("", 1), ("k", 1_000), ("M", 1_000_000)];
        let range = u64::from(*range.start())..=u64::from(*range.end());
        let like = "bits a second like 12k or 2M";
        let value = measured(node, &units, &range, like, show_bitrate)?;
        u32::try_from(value).map_err(|e| e.to_string())
    }
}

/// As [`bitrate`] reads it.
pub(super) fn show_bitrate(n: impl Into<u64>) -> String {
    show_in(n.into(), &[("M", 1_000_000), ("k", 1_000), ("", 1)])
}

/// A time span: `40ms`, `30s`, `2m`, `1h`.
pub(super) fn duration(range: RangeInclusive<Duration>) -> impl Fn(&Node) -> Parsed<Duration> {
    move |node| {
        let units = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000)];
        let ms = |d: &Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let range = ms(range.start())..=ms(range.end());
        let like = "a time like 40ms, 30s or 2m";
        let value = measured(node, &units, &range, like, |n| {
            show_duration(Duration::from_millis(n))
        })?;
        Ok(Duration::from_millis(value))
    }
}

/// As [`duration`] reads it.
pub(super) fn show_duration(d: Duration) -> String {
    let ms = u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    show_in(
        ms,
        &[("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)],
    )
}

/// Bytes: `64KiB`, `1MiB`, `65536`.
pub(super) fn bytes(range: RangeInclusive<usize>) -> impl Fn(&Node) -> Parsed<usize> {
    move |node| {
        let units = [("", 1), ("KiB", 1 << 10), ("MiB", 1 << 20)];
        let range = *range.start() as u64..=*range.end() as u64;
        let value = measured(node, &units, &range, "bytes like 64KiB or 1MiB", show_bytes)?;
        usize::try_from(value).map_err(|e| e.to_string())
    }
}

/// As [`bytes`] reads it.
pub(super) fn show_bytes(n: u64) -> String {
    show_in(n, &[("MiB", 1 << 20), ("KiB", 1 << 10), ("", 1)])
}

/// In the largest unit that leaves no fraction.
fn show_in(n: u64, units: &[(&str, u64)]) -> String {
    let whole = units
        .iter()
        .find(|(_, scale)| n != 0 && n.is_multiple_of(*scale));
    let (unit, scale) = whole.or(units.last()).copied().unwrap_or(("", 1));
    format!("{}{unit}", n / scale)
}

/// Speech a packet carries.
pub(super) fn packet(node: &Node) -> Parsed<u16> {
    choice(&[("20ms", 20), ("40ms", 40), ("60ms", 60)], &[])(node)
}

/// `true` or `false`.
pub(super) fn flag(node: &Node) -> Parsed<bool> {
    match node.kind {
        Kind::Bool(value) => Ok(value),
        _ => Err(format!("{} is neither true nor false", node.shown())),
    }
}

/// A rung of the ladder.
pub(super) fn rung(node: &Node) -> Parsed<Rung> {
    let what = "a rung from L1 to L6";
    text(node, what)?
        .parse()
        .map_err(|_| format!("{} is not {what}", node.shown()))
}

/// An address to listen on.
pub(super) fn address(node: &Node) -> Parsed<SocketAddr> {
    let what = "an address like 127.0.0.1:7980 or [::1]:7980";
    text(node, what)?.parse().map_err(|_| {
        format!(
            "{} is not {what} (an IP address and a port; host names are not looked up)",
            node.shown()
        )
    })
}

/// An address that peers may send to.
pub(super) fn ip(node: &Node) -> Parsed<IpAddr> {
    let what = "an IP address like 203.0.113.7 or 2001:db8::7";
    let ip: IpAddr = text(node, what)?
        .parse()
        .map_err(|_| format!("{} is not {what}", node.shown()))?;
    let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
    if ip.is_unspecified() || ip.is_multicast() || broadcast {
        return Err(format!(
            "{ip} cannot be advertised: peers send to it, so it must be one host's own address"
        ));
    }
    Ok(ip)
}

/// A STUN server, with its port: 3478 where none is given (RFC 8489 section 7).
pub(super) fn stun_server(node: &Node) -> Parsed<String> {
    let what = "a STUN server like stun.example.com:3478 or 203.0.113.7";
    let given = text(node, what)?;
    let wrong = |why: &str| format!("{} is not {what}: {why}", node.shown());
    let server = given.strip_prefix("stun:").unwrap_or(given);
    if given.starts_with("stuns:") || given.starts_with("turn") {
        return Err(wrong("only STUN over UDP is spoken"));
    }
    let (host, port) = server.split_once(':').unwrap_or((server, "3478"));
    let sane = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if host.is_empty() || host.len() > 253 || !host.chars().all(sane) {
        return Err(wrong("the host is neither a name nor an IPv4 address"));
    }
    match port.parse::<u16>() {
        Ok(1..) => Ok(format!("{host}:{port}")),
        _ => Err(wrong("the port must be from 1 to 65535")),
    }
}

/// A file's name.
pub(super) fn path(node: &Node) -> Parsed<PathBuf> {
    let path = text(node, "a file's name")?;
    if path.is_empty() || path.contains('\0') {
        return Err(format!("{} is not a file's name", node.shown()));
    }
    Ok(path.into())
}

/// A folder's name in another folder.
pub(super) fn folder(node: &Node) -> Parsed<String> {
    let name = text(node, "the name of a folder in engine.models")?;
    if name.is_empty() || name.starts_with('.') || name.contains(['/', '\0']) {
        let shown = node.shown();
        return Err(format!(
            "{shown} is not the name of a folder in engine.models"
        ));
    }
    Ok(name.to_owned())
}

/// A glob over names.
pub(super) fn glob(node: &Node) -> Parsed<Glob> {
    text(node, "a pattern")?
        .parse()
        .map_err(|e| format!("{}: {e}", node.shown()))
}

/// A log level, or tracing's `target=level,…` directives.
pub(super) fn level(node: &Node) -> Parsed<String> {
    let what =
        "off, error, warn, info, debug, trace, or directives like \"info,auralink::media=debug\"";
    let level = text(node, what)?;
    // A word that is no level would be taken as the name of a target and turn everything else off.
    let levels = ["off", "error", "warn", "info", "debug", "trace"];
    let sane = |part: &str| match part.trim().split_once('=') {
        None => levels.contains(&part.trim()),
        Some((target, level)) => !target.trim().is_empty() && levels.contains(&level.trim()),
    };
    if level.split(',').all(sane) && tracing_subscriber::EnvFilter::try_new(level).is_ok() {
        Ok(level.to_owned())
    } else {
        Err(format!("{} is none of: {what}", node.shown()))
    }
}

/// LiveKit's address as its clients write it.
pub(super) fn upstream(node: &Node) -> Parsed<Upstream> {
    let what = "a URL like http://127.0.0.1:7880 or https://livekit.example.com";
    let url = text(node, what)?;
    let wrong = |why: &str| format!("{} is not {what}: {why}", node.shown());
    let (scheme, rest) = url
        .split_once("://")
        .ok_or_else(|| wrong("it has no scheme"))?;
    let https = match scheme.to_ascii_lowercase().as_str() {
        "http" | "ws" => false,
        "https" | "wss" => true,
        _ => return Err(wrong("the scheme must be http, https, ws or wss")),
    };
    if rest.contains(['?', '#']) {
        return Err(wrong("no query or fragment is allowed"));
    }
    let (authority, base) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    if authority.contains('@') {
        return Err(wrong("no user name or password is allowed"));
    }
    let bracketed = authority.strip_prefix('[').and_then(|a| a.split_once(']'));
    let (host, port) = match bracketed {
        Some((host, port)) => {
            let _: std::net::Ipv6Addr = host
                .parse()
                .map_err(|_| wrong("no IPv6 address in the brackets"))?;
            (host, port)
        }
        None => authority.split_at(authority.find(':').unwrap_or(authority.len())),
    };
    let sane = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if host.is_empty() || host.len() > 253 || (bracketed.is_none() && !host.chars().all(sane)) {
        return Err(wrong("the host name is missing or malformed"));
    }
    let port = match port.strip_prefix(':') {
        None if port.is_empty() => {
            if https {
                443
            } else {
                80
            }
        }
        Some(digits) if digits.chars().all(|c| c.is_ascii_digit()) => digits
            .parse::<u16>()
            .ok()
            .filter(|p| *p != 0)
            .ok_or_else(|| wrong("a port is 1 to 65535"))?,
        _ => return Err(wrong("a port is 1 to 65535")),
    };
    let fits = |c: char| {
        c.is_ascii_graphic() && !matches!(c, '"' | '<' | '>' | '\\' | '^' | '`' | '{' | '|' | '}')
    };
    if !base.chars().all(fits) {
        return Err(wrong("the path holds characters that a URL does not allow"));
    }
    let base_path = base.trim_end_matches('/').to_owned();
    Ok(Upstream {
        https,
        host: host.to_owned(),
        port,
        base_path,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn units_are_exact() {
        let units = [("", 1), ("k", 1_000), ("M", 1_000_000)];
        for (text, value) in [
            ("12k", Some(12_000)),
            ("1.5M", Some(1_500_000)),
            ("0.0005k", None),
            ("0.5k", Some(500)),
            ("12 k", Some(12_000)),
            ("12000", Some(12_000)),
            ("-1", None),
            ("", None),
            ("k", None),
            (".5k", None),
            ("1.k", None),
            ("1.2.3k", None),
            ("1e3", None),
            ("999999999999999M", None),
            ("9999999999999999", None),
            ("１２k", None),
        ] {
            assert_eq!(with_unit(text, &units), value, "{text}");
        }
        assert_eq!(show_bitrate(12_500_u32), "12500");
        assert_eq!(show_duration(Duration::from_secs(90)), "90s");
        assert_eq!(show_duration(Duration::ZERO), "0ms");
        assert_eq!(show_bytes(256 << 10), "256KiB");
    }
}
