//! Reads and patches LiveKit's signalling (protobuf or protojson over WebSocket, and the
//! `join_request` of the query): SDP is replaced, candidates are dropped, codecs are filtered, and
//! everything else passes byte for byte, unknown fields and their order included.
//!
//! [`edit_request`] and [`edit_response`] take one WebSocket frame, [`edit_join_request`] takes the
//! query parameter. What they find they tell to a visitor, which decides.
//!
//! A frame that does not parse gives an error. LiveKit and its clients refuse such frames too, so
//! nothing is lost when the proxy ends the session there; it must not pass them on unseen.

mod editor;
mod join_request;
mod json;
mod message;
#[cfg(test)]
mod tests;
pub mod wire;

use crate::description::Target;

pub use join_request::{
    JoinRequest, JoinRequestInfo, MAX_JOIN_REQUEST, MAX_JOIN_TRACKS, edit_join_request,
};
pub use message::{
    AddTrack, Join, Participant, SOURCE_CAMERA, SOURCE_MICROPHONE, SOURCE_SCREEN_SHARE,
    SOURCE_SCREEN_SHARE_AUDIO, Track,
};

use editor::Editor;
use message::{ACTIONS, Message, REASONS};

/// Longest frame that is read, in bytes. LiveKit sets no limit. Its longest, a JoinResponse, lists everybody in the room: in one of
/// 3,000 participants some 3 MB, and where each has all the metadata (512 KiB) and attributes (64 KiB) that LiveKit's configuration
/// allows by default, 57.6 MiB with 100 of them. LiveKit's SDKs in Rust, Python and Node.js take no more than this either
/// (tungstenite's `max_message_size`). The listener sets a lower one for clients.
pub const MAX_FRAME: usize = 64 * 1024 * 1024;

/// `LeaveRequest.Action`: the client ends the session.
pub const ACTION_DISCONNECT: i32 = 0;
/// `LeaveRequest.Action`: the client resumes on a new connection.
pub const ACTION_RESUME: i32 = 1;
/// `LeaveRequest.Action`: the client joins anew.
pub const ACTION_RECONNECT: i32 = 2;
/// `DisconnectReason.SERVER_SHUTDOWN`.
pub const REASON_SERVER_SHUTDOWN: i32 = 3;

/// Why a frame or a query was not edited.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SignalError {
    /// A field is longer than what is left of its message.
    #[error("protobuf: message is truncated")]
    Truncated,
    /// Not the wire format.
    #[error("protobuf: {0}")]
    Wire(&'static str),
    /// A string field is not UTF-8.
    #[error("protobuf: string is not UTF-8")]
    Utf8,
    /// The sidecar lacks what the message needs: nobody's fault who sent it.
    #[error("{0}")]
    Unavailable(String),
    /// A field that may be there once, by its number, and that is there more often.
    #[error("protobuf: field {0} is there more than once")]
    Repeated(u32),
    /// It could be read in two ways.
    #[error(transparent)]
    Unclear(#[from] crate::query::Unclear),
    /// Not JSON, or not such as protojson takes.
    #[error("JSON: {0}")]
    Json(String),
    /// Longer than allowed; for a query after decompression too.
    #[error("{what} is longer than {limit} bytes")]
    TooLong {
        /// What is too long.
        what: &'static str,
        /// The limit in bytes.
        limit: usize,
    },
    /// `join_request` is not base64.
    #[error("join_request is not base64")]
    Base64,
    /// `join_request` cannot be decompressed.
    #[error("join_request cannot be decompressed: {0}")]
    Gzip(String),
    /// `WrappedJoinRequest.compression` of a newer protocol.
    #[error("join_request has compression {0}, known are 0 (none) and 1 (gzip)")]
    Compression(u64),
    /// The visitor refused the SDP.
    #[error("SDP refused: {0}")]
    Refused(String),
}

/// A WebSocket message.
#[derive(Debug, Clone, Copy)]
pub enum Frame<'a> {
    /// Protobuf.
    Binary(&'a [u8]),
    /// protojson; LiveKit answers a client in the encoding which that used last.
    Text(&'a str),
}

/// What becomes of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Passes as it is.
    Keep,
    /// Is not passed on.
    Drop,
    /// Replaces a [`Frame::Binary`].
    Binary(Vec<u8>),
    /// Replaces a [`Frame::Text`].
    Text(String),
}

/// Which SDP of a session a field holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SdpSlot {
    /// In a request (or `join_request`): the client's offer for its publisher connection, which in
    /// single-peer-connection sessions is the only one. In a response: the server's offer for the
    /// subscriber connection.
    Offer,
    /// In a request: the client's answer for the subscriber connection. In a response: the server's
    /// answer for the publisher connection.
    Answer,
    /// `SyncState.offer`, sent by a client that resumes. Two peer connections: the server's last
    /// subscriber offer as the client got it, that is as the proxy wrote it. One peer connection:
    /// the client's own last offer, its candidates included.
    ///
    /// livekit-server 1.13.5 reads neither of the two (`Room.onSyncState`); servers that migrate
    /// sessions seed their peer connection with them (`TransportManager.SetMigrateInfo`).
    SyncOffer,
    /// `SyncState.answer`. Two peer connections: the client's own last subscriber answer. One: the
    /// server's last answer as the proxy wrote it.
    SyncAnswer,
}

/// Is told what a client's message says. Only SDP and candidates need a decision.
pub trait RequestVisitor {
    /// New text for an SDP, or `None` to leave it.
    ///
    /// # Errors
    /// When the frame cannot pass; the text becomes [`SignalError::Refused`].
    fn sdp(&mut self, slot: SdpSlot, sdp: &str) -> Result<Option<String>, String>;
    /// A trickled candidate: `candidate_init` is the JSON of an `RTCIceCandidateInit`, empty in a
    /// message that only ends the candidates. False drops the message.
    fn trickle(&mut self, target: Target, candidate_init: &str) -> bool;
    /// A track is about to be published.
    fn add_track(&mut self, _track: AddTrack) {}
    /// The client leaves for good.
    fn leave(&mut self) {}
}

/// Is told what a server's message says. Only SDP and candidates need a decision.
pub trait ResponseVisitor {
    /// New text for an SDP, or `None` to leave it. `mid_to_track_id` are pairs of `a=mid` and track
    /// sid of what the client receives.
    ///
    /// # Errors
    /// When the frame cannot pass; the text becomes [`SignalError::Refused`].
    fn sdp(
        &mut self,
        slot: SdpSlot,
        sdp: &str,
        mid_to_track_id: &[(String, String)],
    ) -> Result<Option<String>, String>;
    /// As [`RequestVisitor::trickle`].
    fn trickle(&mut self, target: Target, candidate_init: &str) -> bool;
    /// The session exists.
    fn join(&mut self, _join: Join) -> JoinEdit {
        JoinEdit::default()
    }
    /// The session was resumed.
    fn reconnect(&mut self) {}
    /// Participants came, changed or left (those with state 3).
    fn participants(&mut self, _participants: Vec<Participant>) {}
    /// A track of the client's own got its sid.
    fn track_published(&mut self, _cid: &str, _track: Track) {}
    /// The server let a track of the client's own go.
    fn track_unpublished(&mut self, _sid: &str) {}
    /// The server ends the session: `LeaveRequest.Action` and `DisconnectReason`. Older clients are
    /// told `can_reconnect` instead of an action; it is reported as [`ACTION_RECONNECT`].
    fn leave(&mut self, _action: i32, _reason: i32) {}
    /// The participant was moved to another room.
    fn room_moved(&mut self, _room_name: &str) {}
}

/// What is to change in a JoinResponse.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JoinEdit {
    /// MIME types that stay in `enabled_publish_codecs`, without regard to case; all others go,
    /// audio too, so name those that are to stay out of [`Join::enabled_publish_codecs`]. `None`
    /// changes nothing.
    pub keep_publish_codecs: Option<Vec<String>>,
}

/// Edits a message from a client (`SignalRequest`).
///
/// # Errors
/// When it is not a well-formed message or the visitor refuses its SDP.
pub fn edit_request(
    frame: Frame<'_>,
    visitor: &mut dyn RequestVisitor,
) -> Result<Verdict, SignalError> {
    let mut editor = Editor::new(frame)?;
    if let Some(track) = editor.message().one(4, "addTrack") {
        visitor.add_track(message::add_track(track));
    }
    for (slot, path) in REQUEST_SDP {
        editor.replace(path, &mut |sdp| refusable(visitor.sdp(*slot, sdp)))?;
    }
    if let Some(trickle) = editor.message().one(3, "trickle")
        && !visitor.trickle(message::target(trickle), &trickle.text(1, "candidateInit"))
    {
        return Ok(Verdict::Drop);
    }
    if editor.message().one(8, "leave").is_some() {
        visitor.leave();
    }
    Ok(editor.verdict())
}

/// Edits a message from LiveKit (`SignalResponse`).
///
/// # Errors
/// When it is not a well-formed message or the visitor refuses its SDP.
pub fn edit_response(
    frame: Frame<'_>,
    visitor: &mut dyn ResponseVisitor,
) -> Result<Verdict, SignalError> {
    let mut editor = Editor::new(frame)?;
    if let Some(join) = editor.message().one(1, "join") {
        let edit = visitor.join(message::join(join));
        if let Some(keep) = edit.keep_publish_codecs {
            editor.keep_publish_codecs(&keep)?;
        }
    }
    if editor.message().one(19, "reconnect").is_some() {
        visitor.reconnect();
    }
    if let Some(moved) = editor.message().one(24, "roomMoved") {
        let room = moved.one(1, "room");
        visitor.room_moved(&room.map(|r| r.text(2, "name")).unwrap_or_default());
        visitor.participants(participants(moved, 4, "otherParticipants"));
    }
    if let Some(update) = editor.message().one(5, "update") {
        visitor.participants(participants(update, 1, "participants"));
    }
    if let Some(published) = editor.message().one(6, "trackPublished") {
        let track = published.one(2, "track").map(message::track);
        visitor.track_published(&published.text(1, "cid"), track.unwrap_or_default());
    }
    if let Some(unpublished) = editor.message().one(17, "trackUnpublished") {
        visitor.track_unpublished(&unpublished.text(1, "trackSid"));
    }
    for (slot, path) in RESPONSE_SDP {
        let (number, name) = path[0];
        let mids = editor
            .message()
            .one(number, name)
            .map(|description| description.pairs(4, "midToTrackId"))
            .unwrap_or_default();
        editor.replace(path, &mut |sdp| refusable(visitor.sdp(*slot, sdp, &mids)))?;
    }
    if let Some(trickle) = editor.message().one(4, "trickle")
        && !visitor.trickle(message::target(trickle), &trickle.text(1, "candidateInit"))
    {
        return Ok(Verdict::Drop);
    }
    if let Some(leave) = editor.message().one(8, "leave") {
        let action = match leave.choice(3, "action", ACTIONS) {
            ACTION_DISCONNECT if leave.flag(1, "canReconnect") => ACTION_RECONNECT,
            action => action,
        };
        visitor.leave(action, leave.choice(2, "reason", REASONS));
    }
    Ok(editor.verdict())
}

/// How LiveKit answers the wish for a signalling connection: its first message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// `JoinResponse`: there is a new participant.
    Joined,
    /// `LeaveRequest`: there is none.
    Left,
    /// `ReconnectResponse`: the participant who is there goes on. So does one who is told anything else, because what the room
    /// has to say may overtake it (`Room.ResumeParticipant` links the connection before it answers); clients take it so too.
    Resumed,
}

/// Reads a server's first message.
///
/// # Errors
/// When it is not a well-formed message.
pub fn answer(frame: Frame<'_>) -> Result<Answer, SignalError> {
    let editor = Editor::new(frame)?;
    let message = editor.message();
    Ok(if message.one(1, "join").is_some() {
        Answer::Joined
    } else if message.one(8, "leave").is_some() {
        Answer::Left
    } else {
        Answer::Resumed
    })
}

/// A `SignalResponse` that makes the client leave, as the server sends it: field numbers as in
/// `LeaveRequest`, `action` and `reason` as in its enums.
pub fn leave_response(action: i32, reason: i32) -> Vec<u8> {
    let number = |value: i32| u64::try_from(value).unwrap_or(0);
    let mut leave = Vec::new();
    wire::write_uint(&mut leave, 1, u64::from(action == ACTION_RECONNECT));
    wire::write_uint(&mut leave, 2, number(reason));
    wire::write_uint(&mut leave, 3, number(action));
    let mut response = Vec::new();
    wire::write_bytes(&mut response, 8, &leave);
    response
}

/// [`leave_response`] for a client that speaks protojson.
pub fn leave_response_json(action: i32, reason: i32) -> String {
    let named = |value: i32, names: &[&str]| {
        usize::try_from(value)
            .ok()
            .and_then(|index| names.get(index).copied())
            .map_or_else(|| value.into(), serde_json::Value::from)
    };
    serde_json::json!({
        "leave": {
            "canReconnect": action == ACTION_RECONNECT,
            "reason": named(reason, REASONS),
            "action": named(action, ACTIONS),
        }
    })
    .to_string()
}

/// A `SignalRequest` by which a participant sets attributes of its own, as a client sends it
/// (`UpdateParticipantMetadata`).
pub fn update_attributes(attributes: &[(&str, &str)]) -> Vec<u8> {
    let mut update = Vec::new();
    for (key, value) in attributes {
        let mut entry = Vec::new();
        wire::write_bytes(&mut entry, 1, key.as_bytes());
        wire::write_bytes(&mut entry, 2, value.as_bytes());
        wire::write_bytes(&mut update, 3, &entry);
    }
    let mut request = Vec::new();
    wire::write_bytes(&mut request, 15, &update);
    request
}

/// [`update_attributes`] of a client that speaks protojson.
pub fn update_attributes_json(attributes: &[(&str, &str)]) -> String {
    let attributes: serde_json::Map<String, serde_json::Value> = attributes
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).into()))
        .collect();
    serde_json::json!({ "updateMetadata": { "attributes": attributes } }).to_string()
}

/// One step of a path to a field: its number, and its name in protojson.
type Step = (u32, &'static str);

const REQUEST_SDP: &[(SdpSlot, &[Step])] = &[
    (SdpSlot::Offer, &[(1, "offer"), (2, "sdp")]),
    (SdpSlot::Answer, &[(2, "answer"), (2, "sdp")]),
    (
        SdpSlot::SyncOffer,
        &[(12, "syncState"), (5, "offer"), (2, "sdp")],
    ),
    (
        SdpSlot::SyncAnswer,
        &[(12, "syncState"), (1, "answer"), (2, "sdp")],
    ),
];

const RESPONSE_SDP: &[(SdpSlot, [Step; 2])] = &[
    (SdpSlot::Answer, [(2, "answer"), (2, "sdp")]),
    (SdpSlot::Offer, [(3, "offer"), (2, "sdp")]),
];

/// SDP in a `JoinRequest`.
const JOIN_SDP: &[(SdpSlot, &[Step])] = &[
    (SdpSlot::Offer, &[(6, "publisherOffer"), (2, "sdp")]),
    (
        SdpSlot::SyncOffer,
        &[(10, "syncState"), (5, "offer"), (2, "sdp")],
    ),
    (
        SdpSlot::SyncAnswer,
        &[(10, "syncState"), (1, "answer"), (2, "sdp")],
    ),
];

fn participants(m: Message<'_>, number: u32, name: &str) -> Vec<Participant> {
    m.many(number, name)
        .into_iter()
        .map(message::participant)
        .collect()
}

fn refusable(result: Result<Option<String>, String>) -> Result<Option<String>, SignalError> {
    result.map_err(SignalError::Refused)
}
