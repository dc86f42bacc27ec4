//! Steering of single m-sections: codecs, format parameters, packet time and bandwidth.

use std::borrow::Cow;

use super::rewrite::{MediaSteer, Text};
use super::{Media, attribute, parse_extmap, payload_value};

impl Text<'_> {
    /// Adds the lines of `steer` that are not there yet to the m-section that begins at `start`.
    pub(super) fn add_steering(&mut self, start: usize, steer: &MediaSteer) {
        if let Some(tias) = steer.tias {
            // RFC 8866 section 9: m=, i=, c=, b=, k=, a=.
            let place = self.after(start, |line| {
                line.starts_with("m=") || line.starts_with("i=") || line.starts_with("c=")
            });
            self.insert(place.unwrap_or(start + 1), format!("b=TIAS:{tias}"));
        }
        for (pt, pairs) in steer.fmtp.iter().filter(|(_, pairs)| !pairs.is_empty()) {
            let of_pt = |line: &str, wanted: &str| {
                attribute(line).is_some_and(|(name, value)| {
                    name == wanted && payload_value(value).is_some_and(|(known, _)| known == *pt)
                })
            };
            let values = |missing: &dyn Fn(&str) -> bool| {
                pairs
                    .iter()
                    .filter(|(key, _)| missing(key))
                    .map(|(key, value)| format!("{key}={value}"))
                    .collect::<Vec<_>>()
                    .join(";")
            };
            if let Some(after) = self.after(start, |line| of_pt(line, "fmtp")) {
                // `steer_line` has replaced the keys that were there; the rest is appended.
                let has = |key: &str| {
                    self.lines.iter().skip(start).any(|(line, _)| {
                        of_pt(line, "fmtp") && fmtp_keys(line).any(|k| k.eq_ignore_ascii_case(key))
                    })
                };
                let more = values(&|key| !has(key));
                if let Some((text, _)) = self.lines.get_mut(after - 1)
                    && !more.is_empty()
                {
                    let glue = if text.trim_end().ends_with(';') {
                        ""
                    } else if text.trim_end().ends_with(&format!(":{pt}")) {
                        // Payload type and nothing else.
                        " "
                    } else {
                        ";"
                    };
                    *text = format!("{}{glue}{more}", text.trim_end()).into();
                }
            } else if let Some(place) = self.after(start, |line| of_pt(line, "rtpmap")) {
                self.insert(place, format!("a=fmtp:{pt} {}", values(&|_| true)));
            }
        }
        for (name, value) in [("ptime", steer.ptime), ("maxptime", steer.maxptime)] {
            let Some(value) = value else { continue };
            let place = self
                .after(start, |line| {
                    ["a=rtpmap:", "a=fmtp:", "a=rtcp-fb:", "a=ptime:"]
                        .iter()
                        .any(|prefix| line.starts_with(prefix))
                })
                .unwrap_or_else(|| self.end());
            self.insert(place, format!("a={name}:{value}"));
        }
    }
}

/// Payload types of RED and of RTX (RFC 4588) for it; none where nothing else would be left.
pub(super) fn red_payload_types(media: &Media) -> Vec<u8> {
    let red: Vec<u8> = media
        .codecs
        .iter()
        .filter(|codec| codec.is("red"))
        .map(|codec| codec.pt)
        .collect();
    let mut removed = red.clone();
    removed.extend(media.codecs.iter().filter_map(|codec| {
        let apt = codec.fmtp_value("apt")?.parse().ok()?;
        (codec.is("rtx") && red.contains(&apt)).then_some(codec.pt)
    }));
    let left = media.codecs.iter().any(|c| !removed.contains(&c.pt));
    if left { removed } else { Vec::new() }
}

/// A line of an m-section under its steering; what is to be added comes later.
pub(super) fn steer_line<'a>(
    line: Cow<'a, str>,
    steer: &MediaSteer,
    removed: &[u8],
    adding: &[(u16, &str)],
) -> Option<Cow<'a, str>> {
    if steer.tias.is_some() && (line.starts_with("b=TIAS:") || line.starts_with("b=AS:")) {
        return None;
    }
    let Some((name, value)) = attribute(&line) else {
        return Some(line);
    };
    match name {
        "ptime" if steer.ptime.is_some() => None,
        "maxptime" if steer.maxptime.is_some() => None,
        "extmap" => {
            // A URI that is about to be added under another id stands once.
            let moved = parse_extmap(value)
                .is_some_and(|(id, uri)| adding.iter().any(|(new, u)| *new != id && *u == uri));
            (!moved).then_some(line)
        }
        "rtpmap" | "fmtp" | "rtcp-fb" => {
            let Some((pt, parameters)) = payload_value(value) else {
                return Some(line);
            };
            if removed.contains(&pt) {
                return None;
            }
            let pairs = steer.fmtp.iter().find(|(known, _)| *known == pt);
            match pairs {
                Some((_, pairs)) if name == "fmtp" && !pairs.is_empty() => {
                    let set = set_fmtp(parameters, pairs);
                    Some(format!("a=fmtp:{pt} {set}").into())
                }
                _ => Some(line),
            }
        }
        _ => Some(line),
    }
}

/// Replaces the values of known keys, keeping order and spacing.
fn set_fmtp(parameters: &str, pairs: &[(String, String)]) -> String {
    let parts: Vec<Cow<'_, str>> = parameters
        .split(';')
        .map(|part| {
            let key = part.split_once('=').map_or(part, |(key, _)| key);
            let new = pairs
                .iter()
                .find(|(known, _)| known.eq_ignore_ascii_case(key.trim()));
            match new {
                Some((_, value)) => format!("{}={value}", key.trim_end()).into(),
                None => part.into(),
            }
        })
        .collect();
    parts.join(";")
}

fn fmtp_keys(line: &str) -> impl Iterator<Item = &str> {
    let parameters = attribute(line)
        .and_then(|(_, value)| payload_value(value))
        .map_or("", |(_, parameters)| parameters);
    parameters
        .split(';')
        .map(|part| part.split_once('=').map_or(part, |(key, _)| key).trim())
}
