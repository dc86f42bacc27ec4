//! SDP fragments (`application/trickle-ice-sdpfrag`, RFC 8840 section 9): what a WHIP client and its server tell each other
//! once offer and answer have passed.

use super::{SdpError, attribute, candidate_attribute};
use crate::description::{Creds, HostCandidate};

/// Longest fragment that is read, in bytes: some hundred candidates.
pub const MAX_FRAGMENT: usize = 64 * 1024;

fn is_candidate(name: &str) -> bool {
    matches!(
        name,
        "candidate" | "end-of-candidates" | "remote-candidates"
    )
}

/// What a fragment is to say instead of what it says.
#[derive(Debug, Clone, Default)]
pub struct FragmentEdit {
    /// In place of the ICE credentials; none: they stay.
    pub creds: Option<Creds>,
    /// In place of the candidates, in the first m-section, which carries the bundle; the writer's own always go.
    pub candidates: Vec<HostCandidate>,
    /// The writer is an ICE-lite agent now.
    pub ice_lite: bool,
}

/// Lines with their terminators, and without them.
fn lines(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split_inclusive('\n')
        .map(|whole| (whole, whole.trim_end_matches(['\n', '\r'])))
}

/// First value of an attribute, without the white space around it.
fn value<'a>(text: &'a str, wanted: &str) -> Option<&'a str> {
    lines(text).find_map(|(_, line)| {
        let (name, value) = attribute(line)?;
        (name == wanted).then(|| value.trim())
    })
}

/// The ICE credentials that a fragment names, if it names both parts.
#[must_use]
pub fn fragment_creds(text: &str) -> Option<Creds> {
    Some(Creds {
        ufrag: value(text, "ice-ufrag")?.to_owned(),
        pwd: value(text, "ice-pwd")?.to_owned(),
    })
}

/// The candidates of a fragment (`candidate:…`, without `a=`).
#[must_use]
pub fn fragment_candidates(text: &str) -> Vec<String> {
    lines(text)
        .filter_map(|(_, line)| line.strip_prefix("a="))
        .filter(|line| line.starts_with("candidate:"))
        .map(str::to_owned)
        .collect()
}

/// Applies an edit; what it does not name comes out byte for byte as it went in, but for the writer's candidates.
///
/// # Errors
/// [`SdpError::TooLong`] for more than [`MAX_FRAGMENT`] bytes.
pub fn rewrite_fragment(text: &str, edit: &FragmentEdit) -> Result<String, SdpError> {
    if text.len() > MAX_FRAGMENT {
        return Err(SdpError::TooLong(text.len()));
    }
    // Lines are added with the end that the first one has which stays.
    let stays = |line: &str| attribute(line).is_none_or(|(name, _)| !is_candidate(name));
    let eol = match lines(text).find(|(_, line)| stays(line)) {
        Some((whole, _)) if whole.ends_with('\n') && !whole.ends_with("\r\n") => "\n",
        _ => "\r\n",
    };
    let mut out = String::with_capacity(text.len() + 256);
    let mut sections = 0;
    if edit.ice_lite && value(text, "ice-lite").is_none() {
        out.push_str("a=ice-lite");
        out.push_str(eol);
    }
    for (whole, line) in lines(text) {
        if line.starts_with("m=") {
            if sections == 1 {
                add_candidates(&mut out, &edit.candidates, eol);
            }
            sections += 1;
        }
        let creds = edit.creds.as_ref();
        let replaced = match (attribute(line).map(|(name, _)| name), creds) {
            // Ours bring their own end.
            (Some(name), _) if is_candidate(name) => continue,
            (Some("ice-ufrag"), Some(creds)) => format!("a=ice-ufrag:{}", creds.ufrag),
            (Some("ice-pwd"), Some(creds)) => format!("a=ice-pwd:{}", creds.pwd),
            _ => {
                out.push_str(whole);
                continue;
            }
        };
        out.push_str(&replaced);
        out.push_str(whole.get(line.len()..).unwrap_or(eol));
    }
    if sections == 1 {
        add_candidates(&mut out, &edit.candidates, eol);
    }
    Ok(out)
}

fn add_candidates(out: &mut String, candidates: &[HostCandidate], eol: &str) {
    if candidates.is_empty() {
        return;
    }
    if !out.ends_with('\n') {
        out.push_str(eol);
    }
    for (index, candidate) in candidates.iter().enumerate() {
        out.push_str("a=");
        out.push_str(&candidate_attribute(candidate, index));
        out.push_str(eol);
    }
    out.push_str("a=end-of-candidates");
    out.push_str(eol);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 9725, figure of an ICE restart, with two sections.
    const RESTART: &str = "a=ice-options:trickle ice2\r\na=group:BUNDLE 0 1\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\n\
        a=ice-ufrag:ysXw\r\na=ice-pwd:vw5LmwG4y/e6dPP/zAP9Gp5k\r\n\
        a=candidate:1387637174 1 udp 2122260223 192.0.2.1 61764 typ host generation 0 ufrag ysXw network-id 1\r\n\
        a=end-of-candidates\r\nm=video 9 UDP/TLS/RTP/SAVPF 96\r\na=mid:1\r\n";

    fn ours() -> FragmentEdit {
        FragmentEdit {
            creds: Some(Creds {
                ufrag: "ours".into(),
                pwd: "p".repeat(24),
            }),
            candidates: vec![HostCandidate {
                addr: "198.51.100.7:7982".parse().unwrap(),
                tcp: false,
            }],
            ice_lite: true,
        }
    }

    #[test]
    fn a_restart_is_read() {
        let creds = fragment_creds(RESTART).unwrap();
        assert_eq!(
            (creds.ufrag.as_str(), creds.pwd.as_str()),
            ("ysXw", "vw5LmwG4y/e6dPP/zAP9Gp5k")
        );
        let candidates = fragment_candidates(RESTART);
        assert_eq!(candidates.len(), 1);
        assert!(candidates[0].starts_with("candidate:1387637174 1 udp"));
        assert_eq!(fragment_creds("a=ice-ufrag:alone\r\n"), None);
    }

    #[test]
    fn our_credentials_and_candidates_take_the_place_of_the_writers() {
        let out = rewrite_fragment(RESTART, &ours()).unwrap();
        assert_eq!(
            out,
            "a=ice-lite\r\na=ice-options:trickle ice2\r\na=group:BUNDLE 0 1\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\n\
             a=ice-ufrag:ours\r\na=ice-pwd:pppppppppppppppppppppppp\r\n\
             a=candidate:1 1 udp 2130706431 198.51.100.7 7982 typ host\r\na=end-of-candidates\r\n\
             m=video 9 UDP/TLS/RTP/SAVPF 96\r\na=mid:1\r\n"
        );
        // Once is enough.
        assert_eq!(rewrite_fragment(&out, &ours()).unwrap(), out);
    }

    #[test]
    fn trickled_candidates_go_and_nothing_else() {
        let kept: String = RESTART
            .split_inclusive('\n')
            .filter(|line| !line.contains("candidate"))
            .collect();
        assert_eq!(
            rewrite_fragment(RESTART, &FragmentEdit::default()).unwrap(),
            kept
        );
    }

    #[test]
    fn odd_ends_are_kept_or_mended() {
        // Bare line feeds, and a last line without any.
        let text = "m=audio 9 UDP/TLS/RTP/SAVPF 0\na=mid:0\na=ice-ufrag:x";
        let out = rewrite_fragment(text, &ours()).unwrap();
        assert_eq!(
            out,
            "a=ice-lite\nm=audio 9 UDP/TLS/RTP/SAVPF 0\na=mid:0\na=ice-ufrag:ours\n\
             a=candidate:1 1 udp 2130706431 198.51.100.7 7982 typ host\na=end-of-candidates\n"
        );
        assert_eq!(rewrite_fragment("", &FragmentEdit::default()).unwrap(), "");
        let long = "a".repeat(MAX_FRAGMENT + 1);
        assert!(rewrite_fragment(&long, &FragmentEdit::default()).is_err());
    }
}
