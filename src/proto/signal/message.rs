//! What the proxy wants to know of LiveKit's messages, read out of either encoding with one reader
//! a message. Numbers and names are those of livekit_rtc.proto and livekit_models.proto as
//! livekit-server 1.13.5 uses them (protocol 1.50.5).

use serde_json::{Map, Value as Json};

use super::json::snake;
use super::wire::{Fields, Value};
use crate::description::{MediaKind, Target};

/// `TrackSource.CAMERA`.
pub const SOURCE_CAMERA: i32 = 1;
/// `TrackSource.MICROPHONE`.
pub const SOURCE_MICROPHONE: i32 = 2;
/// `TrackSource.SCREEN_SHARE`.
pub const SOURCE_SCREEN_SHARE: i32 = 3;
/// `TrackSource.SCREEN_SHARE_AUDIO`.
pub const SOURCE_SCREEN_SHARE_AUDIO: i32 = 4;

const TARGETS: &[&str] = &["PUBLISHER", "SUBSCRIBER"];
const TRACK_TYPES: &[&str] = &["AUDIO", "VIDEO", "DATA"];
const SOURCES: &[&str] = &[
    "UNKNOWN",
    "CAMERA",
    "MICROPHONE",
    "SCREEN_SHARE",
    "SCREEN_SHARE_AUDIO",
];
const ENCRYPTIONS: &[&str] = &["NONE", "GCM", "CUSTOM"];
const STATES: &[&str] = &["JOINING", "JOINED", "ACTIVE", "DISCONNECTED"];
const KINDS: &[&str] = &[
    "STANDARD",
    "INGRESS",
    "EGRESS",
    "SIP",
    "AGENT",
    "",
    "",
    "CONNECTOR",
    "BRIDGE",
];
const AUDIO_FEATURES: &[&str] = &["TF_STEREO", "TF_NO_DTX"];
const TF_STEREO: i32 = 0;
const TF_NO_DTX: i32 = 1;
pub(super) const ACTIONS: &[&str] = &["DISCONNECT", "RESUME", "RECONNECT"];
pub(super) const REASONS: &[&str] = &[
    "UNKNOWN_REASON",
    "CLIENT_INITIATED",
    "DUPLICATE_IDENTITY",
    "SERVER_SHUTDOWN",
    "PARTICIPANT_REMOVED",
    "ROOM_DELETED",
    "STATE_MISMATCH",
    "JOIN_FAILURE",
    "MIGRATION",
    "SIGNAL_CLOSE",
    "ROOM_CLOSED",
    "USER_UNAVAILABLE",
    "USER_REJECTED",
    "SIP_TRUNK_FAILURE",
    "CONNECTION_TIMEOUT",
    "MEDIA_FAILURE",
    "AGENT_ERROR",
];

/// A track that a client asks to publish (`AddTrackRequest`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AddTrack {
    /// The client's id, which is also the track id in `a=msid`, if nothing else in the SDP says so.
    pub cid: String,
    /// As the client shows it.
    pub name: String,
    /// Set when a further codec is added to a track that is published already.
    pub sid: String,
    /// Audio or video.
    pub kind: MediaKind,
    /// `TrackSource`, see [`SOURCE_MICROPHONE`] and its kin.
    pub source: i32,
    /// By the old flag or by `TF_STEREO`.
    pub stereo: bool,
    /// End-to-end encrypted.
    pub encrypted: bool,
    /// The client asks for no RED.
    pub disable_red: bool,
    /// By the old flag or by `TF_NO_DTX`.
    pub disable_dtx: bool,
    /// Added muted.
    pub muted: bool,
    /// Pixels; 0 for audio.
    pub width: u32,
    /// Pixels; 0 for audio.
    pub height: u32,
    /// Number of `layers`.
    pub layers: usize,
    /// Codec names (`vp8`, `av1`), the first preferred, further ones as backup; often empty.
    pub simulcast_codecs: Vec<String>,
    /// The cids that belong to `simulcast_codecs`.
    pub simulcast_cids: Vec<String>,
}

/// A published track (`TrackInfo`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Track {
    /// `TR_…`
    pub sid: String,
    /// As its publisher named it.
    pub name: String,
    /// Audio or video.
    pub kind: MediaKind,
    /// `TrackSource`.
    pub source: i32,
    /// By the old flag or by `TF_STEREO`.
    pub stereo: bool,
    /// End-to-end encrypted.
    pub encrypted: bool,
    /// RED is off.
    pub disable_red: bool,
    /// By the old flag or by `TF_NO_DTX`.
    pub disable_dtx: bool,
    /// Muted by its publisher.
    pub muted: bool,
    /// Pixels; 0 for audio.
    pub width: u32,
    /// Pixels; 0 for audio.
    pub height: u32,
    /// Of the first codec: `audio/red`, `video/VP8`; may be empty until media flows.
    pub mime_type: String,
    /// The m-section of the publisher's own peer connection; may be empty.
    pub mid: String,
    /// MIME types of all codecs that are published.
    pub codecs: Vec<String>,
}

/// A participant of the room (`ParticipantInfo`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Participant {
    /// `PA_…`
    pub sid: String,
    /// Unique in the room.
    pub identity: String,
    /// `ParticipantInfo.Kind`: 0 standard, 1 ingress, 2 egress, 3 SIP, 4 agent.
    pub kind: i32,
    /// `ParticipantInfo.State`; 3 is disconnected.
    pub state: i32,
    /// What it publishes.
    pub tracks: Vec<Track>,
}

impl Participant {
    /// Whether the server says that it has left the room.
    #[must_use]
    pub fn has_gone(&self) -> bool {
        STATES.get(usize::try_from(self.state).unwrap_or(usize::MAX)) == Some(&"DISCONNECTED")
    }
}

/// The server's first answer (`JoinResponse`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Join {
    /// Name of the room.
    pub room_name: String,
    /// `RM_…`; LiveKit may tell it later.
    pub room_sid: String,
    /// Of the participant that joined.
    pub participant_sid: String,
    /// Of the participant that joined.
    pub identity: String,
    /// `ParticipantInfo.Kind` of the participant that joined.
    pub kind: i32,
    /// LiveKit's version.
    pub server_version: String,
    /// The session has two peer connections and the one which receives comes first.
    pub subscriber_primary: bool,
    /// The client is to connect its publisher at once.
    pub fast_publish: bool,
    /// Who was there, with what they publish.
    pub other_participants: Vec<Participant>,
    /// MIME types, in order; a type occurs once for each set of parameters.
    pub enabled_publish_codecs: Vec<String>,
    /// Another server that the client is told to dial instead; empty from a server that accepted.
    pub alternative_url: String,
}

/// A message in one of its encodings. Getters give the default where a field is absent or of
/// another type: what is read here only informs, it never decides whether a message passes.
#[derive(Debug, Clone, Copy)]
pub(super) enum Message<'a> {
    Wire(&'a [u8]),
    Json(&'a Map<String, Json>),
}

impl<'a> Message<'a> {
    /// Values of the fields numbered `number`.
    fn wire(self, number: u32) -> impl Iterator<Item = Value<'a>> {
        let bytes = match self {
            Self::Wire(bytes) => bytes,
            Self::Json(_) => &[],
        };
        Fields::new(bytes)
            .map_while(Result::ok)
            .filter(move |field| field.number == number)
            .map(|field| field.value)
    }

    fn member(self, name: &str) -> Option<&'a Json> {
        match self {
            Self::Wire(_) => None,
            Self::Json(map) => map
                .get(name)
                .or_else(|| map.get(&snake(name)))
                .filter(|value| !value.is_null()),
        }
    }

    pub(super) fn text(self, number: u32, name: &str) -> String {
        match self {
            Self::Wire(_) => self
                .wire(number)
                .filter_map(|value| match value {
                    Value::Bytes(bytes) => std::str::from_utf8(bytes).ok(),
                    _ => None,
                })
                .last()
                .unwrap_or("")
                .to_owned(),
            Self::Json(_) => self
                .member(name)
                .and_then(Json::as_str)
                .unwrap_or("")
                .to_owned(),
        }
    }

    pub(super) fn uint(self, number: u32, name: &str) -> u64 {
        match self {
            Self::Wire(_) => self.wire(number).filter_map(varint).last().unwrap_or(0),
            Self::Json(_) => match self.member(name) {
                // 64-bit numbers travel as strings.
                Some(Json::String(text)) => text.parse().unwrap_or(0),
                Some(value) => value.as_u64().unwrap_or(0),
                None => 0,
            },
        }
    }

    fn small(self, number: u32, name: &str) -> u32 {
        u32::try_from(self.uint(number, name)).unwrap_or(0)
    }

    pub(super) fn flag(self, number: u32, name: &str) -> bool {
        match self {
            Self::Wire(_) => self.uint(number, name) != 0,
            Self::Json(_) => self.member(name).and_then(Json::as_bool).unwrap_or(false),
        }
    }

    /// An enum; `names` are indexed by value.
    pub(super) fn choice(self, number: u32, name: &str, names: &[&str]) -> i32 {
        match self {
            Self::Wire(_) => i32::try_from(self.uint(number, name)).unwrap_or(0),
            Self::Json(_) => self.member(name).map_or(0, |value| named(value, names)),
        }
    }

    /// A repeated enum, packed or not.
    fn choices(self, number: u32, name: &str, names: &[&str]) -> Vec<i32> {
        match self {
            Self::Wire(_) => self
                .wire(number)
                .flat_map(|value| match value {
                    Value::Varint(value) => vec![value],
                    Value::Bytes(packed) => super::wire::packed_varints(packed),
                    _ => Vec::new(),
                })
                .filter_map(|value| i32::try_from(value).ok())
                .collect(),
            Self::Json(_) => self
                .array(name)
                .iter()
                .map(|value| named(value, names))
                .collect(),
        }
    }

    fn array(self, name: &str) -> &'a [Json] {
        self.member(name)
            .and_then(Json::as_array)
            .map_or(&[], Vec::as_slice)
    }

    /// A sub-message; the last one where it is repeated against the schema.
    pub(super) fn one(self, number: u32, name: &str) -> Option<Self> {
        match self {
            Self::Wire(_) => self.wire(number).filter_map(message).last(),
            Self::Json(_) => self.member(name)?.as_object().map(Self::Json),
        }
    }

    pub(super) fn many(self, number: u32, name: &str) -> Vec<Self> {
        match self {
            Self::Wire(_) => self.wire(number).filter_map(message).collect(),
            Self::Json(_) => self
                .array(name)
                .iter()
                .filter_map(|value| value.as_object().map(Self::Json))
                .collect(),
        }
    }

    /// A map of strings.
    pub(super) fn pairs(self, number: u32, name: &str) -> Vec<(String, String)> {
        match self {
            Self::Wire(_) => self
                .many(number, name)
                .into_iter()
                .map(|entry| (entry.text(1, "key"), entry.text(2, "value")))
                .collect(),
            Self::Json(_) => self
                .member(name)
                .and_then(Json::as_object)
                .into_iter()
                .flatten()
                .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
                .collect(),
        }
    }
}

fn varint(value: Value<'_>) -> Option<u64> {
    match value {
        Value::Varint(value) => Some(value),
        _ => None,
    }
}

fn message(value: Value<'_>) -> Option<Message<'_>> {
    match value {
        Value::Bytes(bytes) => Some(Message::Wire(bytes)),
        _ => None,
    }
}

fn named(value: &Json, names: &[&str]) -> i32 {
    let number = match value {
        Json::String(text) => names
            .iter()
            .position(|name| name == text)
            .and_then(|index| i64::try_from(index).ok())
            // A name from a newer protocol is none of those we know.
            .or(Some(-1)),
        value => value.as_i64(),
    };
    number.and_then(|n| i32::try_from(n).ok()).unwrap_or(0)
}

fn kind(track_type: i32) -> MediaKind {
    match track_type {
        0 => MediaKind::Audio,
        1 => MediaKind::Video,
        _ => MediaKind::Other,
    }
}

pub(super) fn target(trickle: Message<'_>) -> Target {
    match trickle.choice(2, "target", TARGETS) {
        1 => Target::Subscriber,
        _ => Target::Publisher,
    }
}

pub(super) fn add_track(m: Message<'_>) -> AddTrack {
    let features = m.choices(17, "audioFeatures", AUDIO_FEATURES);
    let codecs = m.many(10, "simulcastCodecs");
    AddTrack {
        cid: m.text(1, "cid"),
        name: m.text(2, "name"),
        sid: m.text(11, "sid"),
        kind: kind(m.choice(3, "type", TRACK_TYPES)),
        source: m.choice(8, "source", SOURCES),
        stereo: m.flag(12, "stereo") || features.contains(&TF_STEREO),
        encrypted: m.choice(14, "encryption", ENCRYPTIONS) != 0,
        disable_red: m.flag(13, "disableRed"),
        disable_dtx: m.flag(7, "disableDtx") || features.contains(&TF_NO_DTX),
        muted: m.flag(6, "muted"),
        width: m.small(4, "width"),
        height: m.small(5, "height"),
        layers: m.many(9, "layers").len(),
        simulcast_codecs: codecs.iter().map(|c| c.text(1, "codec")).collect(),
        simulcast_cids: codecs.iter().map(|c| c.text(2, "cid")).collect(),
    }
}

pub(super) fn track(m: Message<'_>) -> Track {
    let features = m.choices(19, "audioFeatures", AUDIO_FEATURES);
    Track {
        sid: m.text(1, "sid"),
        name: m.text(3, "name"),
        kind: kind(m.choice(2, "type", TRACK_TYPES)),
        source: m.choice(9, "source", SOURCES),
        stereo: m.flag(14, "stereo") || features.contains(&TF_STEREO),
        encrypted: m.choice(16, "encryption", ENCRYPTIONS) != 0,
        disable_red: m.flag(15, "disableRed"),
        disable_dtx: m.flag(8, "disableDtx") || features.contains(&TF_NO_DTX),
        muted: m.flag(4, "muted"),
        width: m.small(5, "width"),
        height: m.small(6, "height"),
        mime_type: m.text(11, "mimeType"),
        mid: m.text(12, "mid"),
        codecs: m
            .many(13, "codecs")
            .iter()
            .map(|codec| codec.text(1, "mimeType"))
            .collect(),
    }
}

pub(super) fn participant(m: Message<'_>) -> Participant {
    Participant {
        sid: m.text(1, "sid"),
        identity: m.text(2, "identity"),
        kind: m.choice(14, "kind", KINDS),
        state: m.choice(3, "state", STATES),
        tracks: m.many(4, "tracks").into_iter().map(track).collect(),
    }
}

pub(super) fn join(m: Message<'_>) -> Join {
    let room = m.one(1, "room");
    let own = m.one(2, "participant").map(participant).unwrap_or_default();
    let info = m.one(12, "serverInfo").map(|i| i.text(2, "version"));
    Join {
        room_name: room.map(|r| r.text(2, "name")).unwrap_or_default(),
        room_sid: room.map(|r| r.text(1, "sid")).unwrap_or_default(),
        participant_sid: own.sid,
        identity: own.identity,
        kind: own.kind,
        server_version: info
            .filter(|version| !version.is_empty())
            .unwrap_or_else(|| m.text(4, "serverVersion")),
        subscriber_primary: m.flag(6, "subscriberPrimary"),
        fast_publish: m.flag(15, "fastPublish"),
        other_participants: m
            .many(3, "otherParticipants")
            .into_iter()
            .map(participant)
            .collect(),
        enabled_publish_codecs: m
            .many(14, "enabledPublishCodecs")
            .iter()
            .map(|codec| codec.text(1, "mime"))
            .collect(),
        alternative_url: m.text(7, "alternativeUrl"),
    }
}
