//! Line edits on a parsed SDP.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use super::aic::{self, AicLine};
use super::steer::{red_payload_types, steer_line};
use super::{Line, Media, Sdp, Setup, attribute, parse_extmap};
use crate::description::{Creds, HostCandidate};

/// ICE options that promise something of an agent which is no longer the peer: `goog-sped-v1` puts
/// DTLS into STUN, `renomination` needs an agent that takes a nomination back. `trickle` and `ice2`
/// are true of our own agents.
const STRIPPED_ICE_OPTIONS: [&str; 2] = ["goog-sped-v1", "renomination"];

/// Attributes that cannot outlive the end of ICE, DTLS and SRTP at the proxy: `sctp-init` (the SCTP
/// handshake inside SDP) goes with `goog-sped-v1`; `identity` (RFC 8827) signs the fingerprint that
/// is replaced; `cryptex` (RFC 9335) encrypts header extensions, which our SRTP does not do.
const STRIPPED_ATTRIBUTES: [&str; 3] = ["sctp-init", "identity", "cryptex"];

/// Highest id of a one-byte header extension (RFC 8285 section 4.2); 15 is reserved.
const LAST_ONE_BYTE_ID: u16 = 14;
/// Highest id of a two-byte header extension (RFC 8285 section 4.3).
const LAST_TWO_BYTE_ID: u16 = 255;

/// What [`rewrite`] puts in place of what the writer of the SDP said.
///
/// All strings go into lines as they are: they must hold no line break.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Edit {
    /// Replace `a=ice-ufrag` and `a=ice-pwd` wherever they stand.
    pub creds: Creds,
    /// Replaces the value of `a=fingerprint` wherever it stands: `sha-256 AB:CD…`.
    pub fingerprint: String,
    /// Ours, best first; the writer's own are always removed.
    ///
    /// They go into the first m-section of each BUNDLE group and into each unbundled one that is
    /// not rejected: Pion reads only the first of the group, libwebrtc and Firefox map every
    /// bundled m-section to the transport of the first. `a=end-of-candidates` follows them.
    ///
    /// `m=` and `c=` of those sections name the first UDP one, as RFC 8829 section 5.2.2 wants and
    /// libwebrtc writes; everywhere else they say port 9 and an unspecified address. Port 0 stays.
    pub candidates: Vec<HostCandidate>,
    /// Whether `a=ice-lite` stands at session level in the end.
    pub ice_lite: bool,
    /// Replaces the value of every `a=setup`.
    pub setup: Option<Setup>,
    /// Header extensions to add: mid, id, URI; an id that is in use there is left as it is. One above 14 brings `a=extmap-allow-mixed` along.
    pub extmaps: Vec<(String, u16, String)>,
    /// Remove every `a=extmap` with this URI; done before `extmaps` are added.
    pub strip_extmap_uri: Option<&'static str>,
    /// Remove every `a=extmap` with this id, whatever its URI; done before `extmaps` are added.
    pub strip_extmap_id: Option<u16>,
    /// `a=aic` to add, by mid; the writer's own lines always go, because they are for one hop.
    pub aic: Vec<(String, AicLine)>,
    /// What is to change in single m-sections.
    pub media: Vec<MediaSteer>,
}

/// What is to change in the m-section of one mid.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MediaSteer {
    /// `a=mid` of the m-section; rejected ones are left alone.
    pub mid: String,
    /// Take RED (RFC 2198) and the retransmission of it out: the `m=` line, `a=rtpmap`, `a=fmtp`,
    /// `a=rtcp-fb`. Not done where nothing else would be left.
    pub remove_red: bool,
    /// Per payload type, keys of `a=fmtp` to set; a missing line is added after the `a=rtpmap`.
    pub fmtp: Vec<(u8, Vec<(String, String)>)>,
    /// `a=ptime`, milliseconds.
    pub ptime: Option<u16>,
    /// `a=maxptime`, milliseconds.
    pub maxptime: Option<u16>,
    /// `b=TIAS` in bit/s without headers (RFC 3890); replaces `b=TIAS` and `b=AS`.
    pub tias: Option<u32>,
}

/// Ids for header extensions to add, see [`free_extmap_ids`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FreeExtmapIds {
    /// At most as many as were asked for; fewer when all 254 are taken.
    pub ids: Vec<u16>,
    /// One of them needs two-byte headers.
    pub two_byte: bool,
    /// The SDP has `a=extmap-allow-mixed`. An answer may have it only where its offer had it.
    pub allow_mixed: bool,
}

/// Finds `count` ids that no m-section uses: from 1 to 14 where one is free, else from 16 on.
///
/// Ids must be free over the whole BUNDLE group, because there an id may mean one thing only (RFC
/// 9143 section 9.2). A later offer may take a one-byte id that was free here, so choose anew then.
pub fn free_extmap_ids(sdp: &Sdp<'_>, count: usize) -> FreeExtmapIds {
    let taken: HashSet<u16> = sdp
        .values("extmap")
        .filter_map(parse_extmap)
        .map(|(id, _)| id)
        .collect();
    let ids: Vec<u16> = (1..=LAST_ONE_BYTE_ID)
        .chain(LAST_ONE_BYTE_ID + 2..=LAST_TWO_BYTE_ID)
        .filter(|id| !taken.contains(id))
        .take(count)
        .collect();
    FreeExtmapIds {
        two_byte: ids.iter().any(|id| *id > LAST_ONE_BYTE_ID),
        ids,
        allow_mixed: sdp.values("extmap-allow-mixed").next().is_some(),
    }
}

/// A host candidate as it stands in SDP and in `candidateInit`, without `a=` (RFC 8839 section 5.1,
/// RFC 6544 for TCP). `index` is its place among ours; earlier ones get a higher priority.
pub fn candidate_attribute(candidate: &HostCandidate, index: usize) -> String {
    let (addr, port) = (candidate.addr.ip(), candidate.addr.port());
    let order = u32::try_from(index).unwrap_or(u32::MAX).min(1000);
    // Type preference 126 for UDP; TCP comes 27 lower, as libice, Pion and LiveKit have it. Local
    // preference of passive TCP: direction preference 4 (RFC 6544 section 4.2).
    let (transport, type_preference, local, suffix) = if candidate.tcp {
        ("tcp", 99, (4 << 13) + 8191 - order, " tcptype passive")
    } else {
        ("udp", 126, 65535 - order, "")
    };
    let priority: u32 = (type_preference << 24) + (local << 8) + 255;
    let foundation = index.saturating_add(1);
    format!("candidate:{foundation} 1 {transport} {priority} {addr} {port} typ host{suffix}")
}

/// Applies an edit; what it does not name comes out byte for byte as it went in.
///
/// Always done, whatever the edit says: candidates of the writer go (`a=candidate`,
/// `a=end-of-candidates`, `a=remote-candidates`), addresses in `c=` and `a=rtcp` with them; ICE
/// options and attributes that a proxy which ends ICE, DTLS and SRTP cannot keep (`goog-sped-v1`,
/// `renomination`, `sctp-init`, `identity`, `cryptex`) go too, and `a=aic`. `o=` stays.
pub fn rewrite(sdp: &Sdp<'_>, edit: &Edit) -> String {
    let default = edit.candidates.iter().find(|c| !c.tcp).map(|c| c.addr);
    let carriers = carriers(sdp);
    let mixed = sdp.allows_mixed_extmaps();

    let mut out = Text::new(&sdp.lines);
    out.session(sdp, edit, default, mixed);
    for (index, media) in sdp.media().iter().enumerate() {
        out.media(sdp, edit, index, media, default, carriers.contains(&index));
    }
    out.finish()
}

/// Indices of the m-sections whose transport has to be told our candidates.
fn carriers(sdp: &Sdp<'_>) -> HashSet<usize> {
    let media = sdp.media();
    let groups = sdp.bundles();
    let mut places: HashMap<&str, usize> = HashMap::new();
    for (index, media) in media.iter().enumerate().filter(|(_, m)| !m.rejected) {
        places.entry(&media.mid).or_insert(index);
    }
    let usable = |mid: &str| places.get(mid).copied();
    let mut carriers: HashSet<usize> = groups
        .iter()
        .filter_map(|mids| mids.iter().find_map(|mid| usable(mid)))
        .collect();
    let bundled: HashSet<&str> = groups.iter().flatten().copied().collect();
    carriers.extend(
        media
            .iter()
            .enumerate()
            .filter(|(_, m)| !m.rejected && !bundled.contains(m.mid.as_str()))
            .map(|(index, _)| index),
    );
    carriers
}

fn is_candidate(name: &str) -> bool {
    matches!(
        name,
        "candidate" | "end-of-candidates" | "remote-candidates"
    )
}

/// The text under construction.
pub(super) struct Text<'a> {
    pub(super) lines: Vec<(Cow<'a, str>, &'a str)>,
    /// For lines that are added.
    eol: &'a str,
    /// Whether the last line of the input had a terminator.
    open_end: bool,
}

impl<'a> Text<'a> {
    /// Empty; lines to be added end as the first of `lines` does.
    fn new(lines: &[Line<'a>]) -> Self {
        let eol = lines.first().map_or("", |line| line.eol);
        let eol = if eol.is_empty() { "\r\n" } else { eol };
        Self {
            lines: Vec::new(),
            eol,
            open_end: false,
        }
    }

    fn push(&mut self, text: impl Into<Cow<'a, str>>, eol: &'a str) {
        self.lines.push((text.into(), eol));
        self.open_end = eol.is_empty();
    }

    /// Adds a line at the end of the section, before blank lines that may end the text.
    fn add(&mut self, text: impl Into<Cow<'a, str>>) {
        let text = text.into();
        self.lines.insert(self.end(), (text, self.eol));
    }

    /// Where a section ends that is still open: behind the last line which is not blank.
    pub(super) fn end(&self) -> usize {
        let last = self.lines.iter().rposition(|(text, _)| !text.is_empty());
        last.map_or(0, |last| last + 1)
    }

    pub(super) fn insert(&mut self, at: usize, text: String) {
        let at = at.min(self.lines.len());
        self.lines.insert(at, (text.into(), self.eol));
    }

    fn candidates(&mut self, candidates: &[HostCandidate]) {
        for (index, candidate) in candidates.iter().enumerate() {
            self.add(format!("a={}", candidate_attribute(candidate, index)));
        }
        if !candidates.is_empty() {
            self.add("a=end-of-candidates");
        }
    }

    fn finish(self) -> String {
        let length = self.lines.iter().map(|(t, eol)| t.len() + eol.len() + 2);
        let mut out = String::with_capacity(length.sum());
        let count = self.lines.len();
        for (index, (text, eol)) in self.lines.iter().enumerate() {
            out.push_str(text);
            // Only the last line may lack a terminator, and only where the input's last one did.
            if index + 1 == count && self.open_end && !text.is_empty() {
                break;
            }
            out.push_str(if eol.is_empty() { self.eol } else { eol });
        }
        out
    }

    fn session(&mut self, sdp: &Sdp<'a>, edit: &Edit, default: Option<SocketAddr>, mixed: bool) {
        let mut state = Section::default();
        let mut lite = false;
        for line in sdp.session() {
            if let Some((name, _)) = attribute(line.text)
                && name.eq_ignore_ascii_case("ice-lite")
            {
                if edit.ice_lite && !lite {
                    self.push(line.text, line.eol);
                }
                self.open_end = line.eol.is_empty();
                lite = true;
                continue;
            }
            if let Some(text) = state.transport_line(line.text, edit, default) {
                self.push(text, line.eol);
            } else {
                self.open_end = line.eol.is_empty();
            }
        }
        if edit.ice_lite && !lite {
            self.add("a=ice-lite");
        }
        let two_byte = edit.extmaps.iter().any(|(mid, id, _)| {
            *id > LAST_ONE_BYTE_ID && sdp.media_by_mid(mid).is_some_and(|m| !m.rejected)
        });
        if two_byte && !mixed {
            self.add("a=extmap-allow-mixed");
        }
    }

    fn media(
        &mut self,
        sdp: &Sdp<'a>,
        edit: &Edit,
        index: usize,
        media: &Media,
        default: Option<SocketAddr>,
        carrier: bool,
    ) {
        let default = default.filter(|_| carrier);
        let nothing = MediaSteer::default();
        let steer = edit
            .media
            .iter()
            .find(|steer| steer.mid == media.mid && !media.rejected)
            .unwrap_or(&nothing);
        let mut adding: Vec<(u16, &str)> = edit
            .extmaps
            .iter()
            .filter(|(mid, ..)| *mid == media.mid && !media.rejected)
            .map(|(_, id, uri)| (*id, uri.as_str()))
            .collect();
        // Sections without a mid all have those of the others.
        adding.dedup();
        let removed = if steer.remove_red {
            red_payload_types(media)
        } else {
            Vec::new()
        };
        let mut state = Section::default();
        let start = self.lines.len();
        for line in sdp.section(index) {
            let text = if line.text.starts_with("m=") {
                Some(media_line(line.text, default, &removed))
            } else {
                state
                    .transport_line(line.text, edit, default)
                    .and_then(|text| steer_line(text, steer, &removed, &adding))
            };
            match text {
                Some(text) => self.push(text, line.eol),
                None => self.open_end = line.eol.is_empty(),
            }
        }
        self.add_extmaps(start, &adding);
        if let Some((_, line)) = edit.aic.iter().find(|(mid, _)| *mid == media.mid)
            && !media.rejected
        {
            self.add(line.to_string());
        }
        self.add_steering(start, steer);
        if carrier {
            self.candidates(&edit.candidates);
        }
    }

    /// After the last line from `start` on for which `wanted` holds.
    pub(super) fn after(&self, start: usize, wanted: impl Fn(&str) -> bool) -> Option<usize> {
        let lines = self.lines.get(start..)?;
        let place = lines.iter().rposition(|(text, _)| wanted(text))?;
        Some(start + place + 1)
    }

    fn add_extmaps(&mut self, start: usize, adding: &[(u16, &str)]) {
        for (id, uri) in adding {
            let known = self.lines.iter().skip(start).any(|(text, _)| {
                attribute(text)
                    .filter(|(name, _)| *name == "extmap")
                    .and_then(|(_, value)| parse_extmap(value))
                    .is_some_and(|(known, _)| known == *id)
            });
            if known {
                continue;
            }
            let place = self
                .after(start, |line| line.starts_with("a=extmap:"))
                .or_else(|| self.after(start, |line| line.starts_with("a=mid:")))
                .unwrap_or_else(|| self.end());
            self.insert(place, format!("a=extmap:{id} {uri}"));
        }
    }
}

/// What has been seen of the session part or of an m-section.
#[derive(Default)]
struct Section {
    fingerprint: bool,
}

impl Section {
    /// The line as it has to be once ICE and DTLS end at the proxy; `None` when it has to go.
    fn transport_line<'a>(
        &mut self,
        line: &'a str,
        edit: &Edit,
        default: Option<SocketAddr>,
    ) -> Option<Cow<'a, str>> {
        if let Some(value) = line.strip_prefix("c=") {
            return Some(connection(line, value, default));
        }
        let Some((name, value)) = attribute(line) else {
            return Some(line.into());
        };
        let name = name.to_ascii_lowercase();
        if is_candidate(&name)
            || name == aic::ATTRIBUTE
            || STRIPPED_ATTRIBUTES.contains(&name.as_str())
        {
            return None;
        }
        match name.as_str() {
            "ice-ufrag" => Some(format!("a=ice-ufrag:{}", edit.creds.ufrag).into()),
            "ice-pwd" => Some(format!("a=ice-pwd:{}", edit.creds.pwd).into()),
            // Of several (one a hash function) the first stands for all.
            "fingerprint" if self.fingerprint => None,
            "fingerprint" => {
                self.fingerprint = true;
                Some(format!("a=fingerprint:{}", edit.fingerprint).into())
            }
            "ice-lite" => None,
            "ice-options" => ice_options(line, value),
            "setup" => Some(match edit.setup {
                Some(setup) => format!("a=setup:{}", setup.as_str()).into(),
                None => line.into(),
            }),
            "rtcp" => Some(rtcp(line, value)),
            "extmap" => {
                let stripped = parse_extmap(value).is_some_and(|(id, uri)| {
                    edit.strip_extmap_uri.is_some_and(|strip| strip == uri)
                        || edit.strip_extmap_id == Some(id)
                });
                (!stripped).then(|| line.into())
            }
            _ => Some(line.into()),
        }
    }
}

fn ice_options<'a>(line: &'a str, value: &str) -> Option<Cow<'a, str>> {
    let stripped = |word: &&str| STRIPPED_ICE_OPTIONS.contains(word);
    if !value.split_ascii_whitespace().any(|word| stripped(&word)) {
        return Some(line.into());
    }
    let kept: Vec<&str> = value
        .split_ascii_whitespace()
        .filter(|word| !stripped(word))
        .collect();
    (!kept.is_empty()).then(|| format!("a=ice-options:{}", kept.join(" ")).into())
}

/// `c=`: ours, or an unspecified address (RFC 8840 section 4.1.1).
fn connection<'a>(line: &'a str, value: &str, default: Option<SocketAddr>) -> Cow<'a, str> {
    let family = |ip: IpAddr| if ip.is_ipv4() { "IP4" } else { "IP6" };
    if let Some(addr) = default {
        return format!("c=IN {} {}", family(addr.ip()), addr.ip()).into();
    }
    let known = value
        .split_ascii_whitespace()
        .nth(2)
        .and_then(|address| address.parse::<IpAddr>().ok());
    match known {
        Some(ip) if ip.is_unspecified() => line.into(),
        _ => "c=IN IP4 0.0.0.0".into(),
    }
}

/// `a=rtcp` (RFC 3605): RTCP is muxed, so it names nothing that anyone dials.
fn rtcp<'a>(line: &'a str, value: &str) -> Cow<'a, str> {
    let mut words = value.split_ascii_whitespace();
    let port = words.next();
    match (port, words.nth(2).map(str::parse::<IpAddr>)) {
        (Some("9"), Some(Ok(ip))) if ip.is_unspecified() => line.into(),
        (_, Some(_)) => "a=rtcp:9 IN IP4 0.0.0.0".into(),
        (_, None) => "a=rtcp:9".into(),
    }
}

/// The `m=` line with our port and without the payload types that go.
fn media_line<'a>(line: &'a str, default: Option<SocketAddr>, removed: &[u8]) -> Cow<'a, str> {
    let port = default.map_or(9, |addr| addr.port()).to_string();
    let words: Vec<&str> = line
        .split_ascii_whitespace()
        .enumerate()
        .map(|(place, word)| {
            // `0`, `00` or `0/2`: not used.
            let number = word.split_once('/').map_or(word, |(number, _)| number);
            if place == 1 && number.parse::<u16>() != Ok(0) {
                port.as_str()
            } else {
                word
            }
        })
        .enumerate()
        .filter(|(place, word)| {
            *place < 3 || word.parse().map_or(true, |pt| !removed.contains(&pt))
        })
        .map(|(_, word)| word)
        .collect();
    if words.iter().copied().eq(line.split_ascii_whitespace()) {
        return line.into();
    }
    words.join(" ").into()
}
