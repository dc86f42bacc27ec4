//! What signalling tells media: the wanted state of one peer connection, both of its legs and the
//! rules for its tracks. Signalling writes it, [`crate::relay`] obeys it; it is declarative, so
//! that a repeated or re-ordered SDP can be applied any number of times.

use crate::ladder::{Rung, Rungs};
use std::net::SocketAddr;

/// ICE credentials of one side of one leg (RFC 8839 section 5.4).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Creds {
    /// `a=ice-ufrag`, 4 to 256 ice-chars.
    pub ufrag: String,
    /// `a=ice-pwd`, 22 to 256 ice-chars.
    pub pwd: String,
}

/// Which of a participant's peer connections, as LiveKit's `SignalTarget` names them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Target {
    /// Offered by the client: what it publishes, and in single-peer-connection sessions everything.
    Publisher,
    /// Offered by the server in dual-peer-connection sessions: what the client receives.
    Subscriber,
}

/// Our role in the DTLS handshake of a leg (RFC 5763 section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DtlsRole {
    /// We send the ClientHello.
    Client,
    /// We wait for it.
    Server,
}

/// A certificate fingerprint out of SDP (RFC 8122): hash name in lower case and digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fingerprint {
    /// `sha-256` and its kin, lower case.
    pub algorithm: String,
    /// The digest.
    pub digest: Vec<u8>,
}

/// What is known of one leg: our side of it and the peer's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LegDescription {
    /// What we told the peer.
    pub local: Creds,
    /// What the peer told us; absent until its SDP has come.
    pub remote: Option<Creds>,
    /// The peer's certificate must match one of them (RFC 8122 section 5); none until its SDP has come.
    pub fingerprints: Vec<Fingerprint>,
    /// Known once the answer has passed.
    pub dtls: Option<DtlsRole>,
    /// The peer's candidates (`candidate:…`, no `a=`), from SDP and trickle. Only the server leg
    /// uses them: the client leg is ICE-lite and learns addresses from checks.
    pub remote_candidates: Vec<String>,
    /// The peer said `a=ice-lite`.
    pub remote_lite: bool,
    /// Only the SRTP profile with the 10-byte tag (AES_CM_128_HMAC_SHA1_80), not the one with 16
    /// bytes (AEAD_AES_128_GCM): 6 bytes a packet are 5 % of lean audio.
    pub short_tags: bool,
    /// Payload types of framed packets that come and that go (docs/protocol.md): their SRTP tag is
    /// cut to 4 bytes.
    pub aic_pts: (Option<u8>, Option<u8>),
    /// We are the controlling agent (RFC 8445 section 6.1.1). Never on the client leg.
    pub controlling: bool,
}

/// The rule for one RTP stream in one direction, found by its SSRC, or by MID where the SDP names
/// no SSRC.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TrackRule {
    /// SSRCs of the stream (`a=ssrc`), primary first.
    pub ssrcs: Vec<u32>,
    /// `a=mid` of its m-section.
    pub mid: String,
    /// What the m-section carries.
    pub kind: MediaKind,
    /// Up: the client sends plain Opus (first) and the server expects RED (second): wrap each
    /// packet as primary-only RED (RFC 2198).
    pub wrap_red: Option<(u8, u8)>,
    /// Down: payload type of RED whose redundancy may be shed while the receiver loses nothing.
    pub shed_red: Option<u8>,
    /// Down: shed whatever the receiver reports.
    pub shed_always: bool,
    /// The uplink was steered below the default: bytes a second of speech that the default
    /// publisher would have sent instead, headers included; 0 when not steered.
    pub default_bytes_per_second: u32,
    /// Payload types of Opus and of the RED that carries it.
    pub opus_pts: (Option<u8>, Option<u8>),
    /// Speech is packed for the receiving peer, which takes framed packets.
    pub pack: Option<PackRule>,
    /// Framed packets of the sending peer are restored.
    pub restore: Option<RestoreRule>,
    /// Each packet is coded anew by itself; only where it is neither packed nor restored.
    pub recode: Option<RecodeRule>,
}

/// How packets are coded anew without a hop ([`crate::hop::recode`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecodeRule {
    /// The rung; none: enhanced (LACE) and coded at the engine's local rate.
    pub rung: Option<Rung>,
    /// Names the source of the speech, so that all its receivers share the work; none: it has no other.
    pub key: Option<u128>,
    /// Only while the receiver reports loss.
    pub lossy_only: bool,
}

/// How a stream is packed (docs/protocol.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackRule {
    /// Payload type of framed packets towards the receiver.
    pub pt: u8,
    /// Rungs that the receiver decodes.
    pub rungs: Rungs,
    /// The receiver reads short headers.
    pub short_headers: bool,
    /// It restores originals of 10 and 120 ms.
    pub more_units: bool,
    /// The models that it decodes the neural ones with; no others may be used to code them.
    pub models: Option<u32>,
    /// The rung that policy wants.
    pub rung: Rung,
    /// Header extension id of the hint at the receiver.
    pub hint_id: u8,
    /// Header extension id of the audio level (RFC 6464) at the sender.
    pub level_id: Option<u8>,
}

/// How framed packets become what they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestoreRule {
    /// Payload type of framed packets of the sender.
    pub pt: u8,
    /// The models that the sender was told of: it codes the neural rungs with these.
    pub models: Option<u32>,
    /// Header extension id of the hint at the sender.
    pub hint_id: u8,
    /// Header extension id of the audio level (RFC 6464) at the receiver.
    pub level_id: Option<u8>,
}

/// The media type of an m-section.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MediaKind {
    /// `m=audio`
    Audio,
    /// `m=video`
    Video,
    /// `m=application` or anything else.
    #[default]
    Other,
}

/// The wanted state of one peer connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PcDescription {
    /// Which of the participant's.
    pub target: Target,
    /// Towards the participant; ICE-lite.
    pub client: LegDescription,
    /// Towards LiveKit; full ICE.
    pub server: LegDescription,
    /// Streams from the client to the server.
    pub up: Vec<TrackRule>,
    /// Streams from the server to the client.
    pub down: Vec<TrackRule>,
    /// Header extension id of `urn:ietf:params:rtp-hdrext:sdes:mid` in what the client sends.
    pub mid_ext_id: Option<u8>,
}

/// A host candidate of ours that a peer may dial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostCandidate {
    /// Where.
    pub addr: SocketAddr,
    /// Passive ICE-TCP (RFC 6544) instead of UDP.
    pub tcp: bool,
}
