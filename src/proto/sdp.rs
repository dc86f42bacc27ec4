//! Reads SDP (RFC 8866) and edits the few lines that a proxy in the media path must change; every
//! other byte stays, line endings included, so that what this code does not know still works.
//!
//! [`Sdp::parse`] gives a view, [`rewrite`] applies an [`Edit`] to it.

mod aic;
mod fragment;
mod rewrite;
mod steer;
#[cfg(test)]
mod tests;

use std::collections::HashSet;

use crate::description::{Creds, Fingerprint, MediaKind};

pub use aic::{AicLine, free_payload_type};
pub use fragment::{
    FragmentEdit, MAX_FRAGMENT, fragment_candidates, fragment_creds, rewrite_fragment,
};
pub use rewrite::{Edit, FreeExtmapIds, MediaSteer, candidate_attribute, free_extmap_ids, rewrite};

/// Longest SDP that is read, in bytes. LiveKit's largest seen are about 30 kB; a room with 500
/// subscribed tracks comes to some 200 kB.
pub const MAX_SDP: usize = 256 * 1024;

/// Most m-sections that are read.
pub const MAX_MEDIA: usize = 512;

/// Each m-section inherits those of the session, so their number is bounded. Browsers write some 15, and those in m-sections.
const MAX_SESSION_EXTMAPS: usize = 32;

/// Fingerprints that are read: certificates of two kinds (ECDSA and RSA) by three hashes, and a few more.
const MAX_FINGERPRINTS: usize = 8;

/// Why a text was not taken as SDP.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SdpError {
    /// Longer than [`MAX_SDP`].
    #[error("SDP of {0} bytes is longer than the {MAX_SDP} allowed")]
    TooLong(usize),
    /// More m-sections than [`MAX_MEDIA`].
    #[error("SDP has more than {MAX_MEDIA} m-sections")]
    TooManyMedia,
    /// The first line is not `v=0`.
    #[error("SDP does not start with v=0")]
    NotSdp,
    /// An `m=` line without media, port and protocol.
    #[error("SDP line {line}: m= needs a media type, a port from 0 to 65535 and a protocol")]
    BadMedia {
        /// 1-based.
        line: usize,
    },
}

/// `a=setup` (RFC 4145): who opens the DTLS handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setup {
    /// Sends the ClientHello.
    Active,
    /// Waits for it.
    Passive,
    /// Either; only in offers.
    Actpass,
    /// Not now.
    Holdconn,
}

impl Setup {
    /// As SDP spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Passive => "passive",
            Self::Actpass => "actpass",
            Self::Holdconn => "holdconn",
        }
    }

    fn parse(value: &str) -> Option<Self> {
        match value.trim() {
            "active" => Some(Self::Active),
            "passive" => Some(Self::Passive),
            "actpass" => Some(Self::Actpass),
            "holdconn" => Some(Self::Holdconn),
            _ => None,
        }
    }
}

/// The direction attribute of an m-section, seen from the side which wrote the SDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Direction {
    /// Also where SDP says nothing (RFC 8866 section 6.7).
    #[default]
    SendRecv,
    /// `a=sendonly`
    SendOnly,
    /// `a=recvonly`
    RecvOnly,
    /// `a=inactive`
    Inactive,
}

impl Direction {
    /// The writer of the SDP may send.
    pub fn sends(self) -> bool {
        matches!(self, Self::SendRecv | Self::SendOnly)
    }

    /// The writer of the SDP may receive.
    pub fn receives(self) -> bool {
        matches!(self, Self::SendRecv | Self::RecvOnly)
    }

    fn parse(attribute: &str) -> Option<Self> {
        match attribute {
            "sendrecv" => Some(Self::SendRecv),
            "sendonly" => Some(Self::SendOnly),
            "recvonly" => Some(Self::RecvOnly),
            "inactive" => Some(Self::Inactive),
            _ => None,
        }
    }
}

/// A payload type of an m-section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Codec {
    /// Payload type.
    pub pt: u8,
    /// Encoding name as written (`opus`, `red`, `VP8`); compare without regard to case.
    pub name: String,
    /// Clock rate in Hz.
    pub clock: u32,
    /// 1 where SDP says nothing.
    pub channels: u8,
    /// What follows the payload type in `a=fmtp`; several lines are joined with `;`.
    pub fmtp: Option<String>,
}

impl Codec {
    /// A parameter of `a=fmtp`, by name without regard to case.
    pub fn fmtp_value(&self, key: &str) -> Option<&str> {
        self.fmtp.as_deref()?.split(';').find_map(|pair| {
            let (name, value) = pair.split_once('=')?;
            name.trim()
                .eq_ignore_ascii_case(key)
                .then_some(value.trim())
        })
    }

    /// Whether this is the codec of that name.
    pub fn is(&self, name: &str) -> bool {
        self.name.eq_ignore_ascii_case(name)
    }
}

/// An m-section.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Media {
    /// The media type.
    pub kind: MediaKind,
    /// `a=mid`; empty where there is none.
    pub mid: String,
    /// The port of the `m=` line.
    pub port: u16,
    /// Port 0 without `a=bundle-only`: the m-section is not used (RFC 8829 section 5.1.2).
    pub rejected: bool,
    /// Own direction, else that of the session.
    pub direction: Direction,
    /// In the order of the `m=` line, hence of preference. Payload types without `a=rtpmap` are
    /// left out.
    pub codecs: Vec<Codec>,
    /// Of `a=ssrc`, in order of appearance, each once.
    pub ssrcs: Vec<u32>,
    /// `a=ssrc-group`: semantics (`FID`, `SIM`, `FEC-FR`) and SSRCs.
    pub ssrc_groups: Vec<(String, Vec<u32>)>,
    /// `a=rid` names which the writer of the SDP sends.
    pub send_rids: Vec<String>,
    /// Stream and track of `a=msid`, else of `a=ssrc:… msid:`.
    pub msid: Option<(String, String)>,
    /// Header extensions: id and URI, the session's own included.
    pub extmaps: Vec<(u16, String)>,
    /// `a=aic`: which framed packets the writer of the SDP takes.
    pub aic: Option<AicLine>,
}

impl Media {
    /// The id under which a header extension is known in this m-section.
    pub fn extmap_id(&self, uri: &str) -> Option<u16> {
        self.extmaps
            .iter()
            .find(|(_, known)| known == uri)
            .map(|(id, _)| *id)
    }

    /// The first codec of that name, without regard to case.
    pub fn codec(&self, name: &str) -> Option<&Codec> {
        self.codecs.iter().find(|codec| codec.is(name))
    }
}

/// One line: text and the terminator that followed it (CRLF, LF, or nothing at the end).
#[derive(Debug, Clone, Copy)]
struct Line<'a> {
    text: &'a str,
    eol: &'a str,
}

/// A session description, borrowed from its text.
#[derive(Debug, Clone)]
pub struct Sdp<'a> {
    lines: Vec<Line<'a>>,
    /// Index of each `m=` line in `lines`.
    starts: Vec<usize>,
    media: Vec<Media>,
}

impl<'a> Sdp<'a> {
    /// Reads a session description. Lenient: what it does not understand it leaves alone.
    ///
    /// # Errors
    /// When it is too large, does not start with `v=0`, or has an `m=` line that no peer could take.
    pub fn parse(text: &'a str) -> Result<Self, SdpError> {
        if text.len() > MAX_SDP {
            return Err(SdpError::TooLong(text.len()));
        }
        let lines = split_lines(text);
        if lines
            .first()
            .is_none_or(|line| line.text.trim_end() != "v=0")
        {
            return Err(SdpError::NotSdp);
        }
        let starts: Vec<usize> = (0..lines.len())
            .filter(|&i| lines.get(i).is_some_and(|l| l.text.starts_with("m=")))
            .collect();
        if starts.len() > MAX_MEDIA {
            return Err(SdpError::TooManyMedia);
        }
        let mut sdp = Self {
            lines,
            starts,
            media: Vec::new(),
        };
        let mut defaults = Media::default();
        for (name, value) in sdp.session_lines().filter_map(|l| attribute(l.text)) {
            if let Some(direction) = Direction::parse(name) {
                defaults.direction = direction;
            } else if name == "extmap" && defaults.extmaps.len() < MAX_SESSION_EXTMAPS {
                defaults.extmaps.extend(parse_extmap(value));
            }
        }
        let mut media = Vec::with_capacity(sdp.starts.len());
        for (index, &start) in sdp.starts.iter().enumerate() {
            let section = read_media(sdp.section(index), &defaults)
                .ok_or(SdpError::BadMedia { line: start + 1 })?;
            media.push(section);
        }
        sdp.media = media;
        Ok(sdp)
    }

    /// The first complete ICE credentials, of the session or of an m-section.
    pub fn creds(&self) -> Option<Creds> {
        let find = |mut lines: std::slice::Iter<'_, Line<'_>>| {
            let (mut ufrag, mut pwd) = (None, None);
            for (name, value) in lines.by_ref().filter_map(|l| attribute(l.text)) {
                if name.eq_ignore_ascii_case("ice-ufrag") {
                    ufrag = ufrag.or(Some(value.trim()));
                } else if name.eq_ignore_ascii_case("ice-pwd") {
                    pwd = pwd.or(Some(value.trim()));
                }
            }
            Some(Creds {
                ufrag: ufrag?.to_owned(),
                pwd: pwd?.to_owned(),
            })
        };
        find(self.session().iter())
            .or_else(|| (0..self.media.len()).find_map(|i| find(self.section(i).iter())))
    }

    /// The certificate fingerprints of the session and of m-sections, each once: who has several certificates, or names one by
    /// several hashes, writes several (RFC 8122 section 5).
    pub fn fingerprints(&self) -> Vec<Fingerprint> {
        let mut all = Vec::new();
        for one in self.values("fingerprint").filter_map(parse_fingerprint) {
            if all.len() < MAX_FINGERPRINTS && !all.contains(&one) {
                all.push(one);
            }
        }
        all
    }

    /// The first DTLS role that is stated.
    pub fn setup(&self) -> Option<Setup> {
        self.values("setup").find_map(Setup::parse)
    }

    /// The writer is an ICE-lite agent (RFC 8839 section 5.3).
    pub fn ice_lite(&self) -> bool {
        self.session_lines()
            .filter_map(|l| attribute(l.text))
            .any(|(name, _)| name.eq_ignore_ascii_case("ice-lite"))
    }

    /// All candidates as `candidate:…` without `a=`, each once.
    pub fn candidates(&self) -> Vec<String> {
        let mut seen = HashSet::new();
        self.values("candidate")
            .map(str::trim_end)
            .filter(|value| seen.insert(*value))
            .map(|value| format!("candidate:{value}"))
            .collect()
    }

    /// The m-sections in order.
    pub fn media(&self) -> &[Media] {
        &self.media
    }

    /// The m-section with that `a=mid`.
    pub fn media_by_mid(&self, mid: &str) -> Option<&Media> {
        self.media.iter().find(|media| media.mid == mid)
    }

    /// Whether `a=extmap-allow-mixed` (RFC 8285 section 6) stands at session level.
    pub fn allows_mixed_extmaps(&self) -> bool {
        self.session_lines()
            .filter_map(|l| attribute(l.text))
            .any(|(name, _)| name.eq_ignore_ascii_case("extmap-allow-mixed"))
    }

    /// The mids of every `a=group:BUNDLE` (RFC 9143), one list a group.
    pub fn bundles(&self) -> Vec<Vec<&'a str>> {
        self.session()
            .iter()
            .filter_map(|line| attribute(line.text))
            .filter(|(name, _)| *name == "group")
            .filter_map(|(_, value)| {
                let mut words = value.split_ascii_whitespace();
                (words.next()? == "BUNDLE").then(|| words.collect::<Vec<_>>())
            })
            .filter(|mids| !mids.is_empty())
            .collect()
    }

    /// Values of an attribute, in order, of the whole text.
    fn values<'s>(&'s self, wanted: &'s str) -> impl Iterator<Item = &'a str> + 's {
        self.lines
            .iter()
            .filter_map(|line| attribute(line.text))
            .filter(move |(name, _)| name.eq_ignore_ascii_case(wanted))
            .map(|(_, value)| value)
    }

    fn session(&self) -> &[Line<'a>] {
        let end = self.starts.first().copied().unwrap_or(self.lines.len());
        self.lines.get(..end).unwrap_or(&[])
    }

    fn session_lines(&self) -> impl Iterator<Item = &Line<'a>> {
        self.session().iter()
    }

    /// The lines of one m-section, its `m=` line first.
    fn section(&self, index: usize) -> &[Line<'a>] {
        let Some(&start) = self.starts.get(index) else {
            return &[];
        };
        let end = self.starts.get(index + 1).copied();
        self.lines
            .get(start..end.unwrap_or(self.lines.len()))
            .unwrap_or(&[])
    }
}

fn split_lines(text: &str) -> Vec<Line<'_>> {
    text.split_inclusive('\n')
        .map(|whole| {
            let text = whole
                .strip_suffix("\r\n")
                .or_else(|| whole.strip_suffix('\n'))
                .unwrap_or(whole);
            Line {
                text,
                eol: whole.get(text.len()..).unwrap_or(""),
            }
        })
        .collect()
}

/// Name and value of an `a=` line; the value of a flag is empty.
fn attribute(line: &str) -> Option<(&str, &str)> {
    let rest = line.strip_prefix("a=")?;
    Some(match rest.split_once(':') {
        Some((name, value)) => (name.trim(), value),
        None => (rest.trim(), ""),
    })
}

/// `<id>[/<direction>] <URI> [<attributes>]`, RFC 8285 section 5.
fn parse_extmap(value: &str) -> Option<(u16, String)> {
    let mut words = value.split_ascii_whitespace();
    let id = words.next()?;
    let id = id.split_once('/').map_or(id, |(id, _)| id);
    Some((id.parse().ok()?, words.next()?.to_owned()))
}

/// `<hash> <hex>:<hex>…`, RFC 8122 section 5.
fn parse_fingerprint(value: &str) -> Option<Fingerprint> {
    let (algorithm, hex) = value.trim().split_once(' ')?;
    let digest = hex
        .trim()
        .split(':')
        .map(|byte| (byte.len() == 2).then(|| u8::from_str_radix(byte, 16).ok())?)
        .collect::<Option<Vec<u8>>>()?;
    Some(Fingerprint {
        algorithm: algorithm.to_ascii_lowercase(),
        digest,
    })
}

/// The payload types of an `m=` line.
fn formats(m_line: &str) -> impl Iterator<Item = &str> {
    m_line.split_ascii_whitespace().skip(3)
}

/// Payload type and the rest of `a=rtpmap`, `a=fmtp` and `a=rtcp-fb`.
fn payload_value(value: &str) -> Option<(u8, &str)> {
    let (pt, rest) = value.trim_start().split_once(' ')?;
    let pt = pt.parse().ok().filter(|pt| *pt < 128)?;
    Some((pt, rest.trim()))
}

fn read_media(lines: &[Line<'_>], defaults: &Media) -> Option<Media> {
    let first = lines.first()?.text;
    let mut words = first.strip_prefix("m=")?.split_ascii_whitespace();
    let kind = match words.next()? {
        "audio" => MediaKind::Audio,
        "video" => MediaKind::Video,
        _ => MediaKind::Other,
    };
    let port = words.next()?;
    let port = port.split_once('/').map_or(port, |(port, _)| port);
    let port: u16 = port.parse().ok()?;
    words.next()?;

    let mut media = Media {
        kind,
        port,
        ..defaults.clone()
    };
    let mut bundle_only = false;
    let mut maps: Vec<Option<&str>> = vec![None; 128];
    let mut fmtps: Vec<Option<String>> = vec![None; 128];
    let mut seen = HashSet::new();
    for (name, value) in lines.iter().skip(1).filter_map(|l| attribute(l.text)) {
        match name {
            "mid" => value.trim().clone_into(&mut media.mid),
            "bundle-only" => bundle_only = true,
            "rtpmap" => {
                if let Some((pt, map)) = payload_value(value)
                    && let Some(slot) = maps.get_mut(usize::from(pt))
                {
                    *slot = slot.or(Some(map));
                }
            }
            "fmtp" => {
                if let Some((pt, parameters)) = payload_value(value)
                    && let Some(slot) = fmtps.get_mut(usize::from(pt))
                {
                    match slot {
                        Some(known) => {
                            known.push(';');
                            known.push_str(parameters);
                        }
                        None => *slot = Some(parameters.to_owned()),
                    }
                }
            }
            "ssrc" => {
                let (ssrc, rest) = value.split_once(' ').unwrap_or((value, ""));
                if let Ok(ssrc) = ssrc.trim().parse()
                    && seen.insert(ssrc)
                {
                    media.ssrcs.push(ssrc);
                }
                if media.msid.is_none() {
                    media.msid = rest.trim().strip_prefix("msid:").and_then(parse_msid);
                }
            }
            "ssrc-group" => {
                let mut words = value.split_ascii_whitespace();
                if let Some(semantics) = words.next() {
                    let ssrcs = words.filter_map(|word| word.parse().ok()).collect();
                    media.ssrc_groups.push((semantics.to_owned(), ssrcs));
                }
            }
            "msid" => media.msid = parse_msid(value).or(media.msid),
            "rid" => {
                let mut words = value.split_ascii_whitespace();
                if let (Some(rid), Some("send")) = (words.next(), words.next()) {
                    media.send_rids.push(rid.to_owned());
                }
            }
            "extmap" => media.extmaps.extend(parse_extmap(value)),
            aic::ATTRIBUTE => media.aic = media.aic.or_else(|| AicLine::parse(value)),
            _ => {
                if let Some(direction) = Direction::parse(name) {
                    media.direction = direction;
                }
            }
        }
    }
    media.rejected = port == 0 && !bundle_only;
    let mut listed = [false; 128];
    for pt in formats(first).filter_map(|word| word.parse::<u8>().ok()) {
        let slot = usize::from(pt);
        // A payload type that is repeated in the m= line is one codec.
        if listed.get(slot).copied().unwrap_or(true) {
            continue;
        }
        if let Some(flag) = listed.get_mut(slot) {
            *flag = true;
        }
        let Some(Some(map)) = maps.get(slot) else {
            continue;
        };
        let mut parts = map.split('/');
        media.codecs.push(Codec {
            pt,
            name: parts.next().unwrap_or("").trim().to_owned(),
            clock: parts
                .next()
                .and_then(|v| v.trim().parse().ok())
                .unwrap_or(0),
            channels: parts
                .next()
                .and_then(|v| v.trim().parse().ok())
                .unwrap_or(1),
            fmtp: fmtps.get_mut(slot).and_then(Option::take),
        });
    }
    Some(media)
}

fn parse_msid(value: &str) -> Option<(String, String)> {
    let mut words = value.split_ascii_whitespace();
    let stream = words.next()?.to_owned();
    Some((stream, words.next().unwrap_or("").to_owned()))
}
