#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod golden;
mod join_request;
mod json;
mod messages;

use super::*;
use wire::{write_bytes, write_uint};

/// Notes what it is told; SDP becomes `answer`.
#[derive(Default)]
struct Recorder {
    sdp: Vec<(SdpSlot, String)>,
    mids: Vec<(String, String)>,
    trickles: Vec<(Target, String)>,
    added: Vec<AddTrack>,
    left: Vec<(i32, i32)>,
    joins: Vec<Join>,
    reconnects: usize,
    participants: Vec<Participant>,
    published: Vec<(String, Track)>,
    rooms: Vec<String>,
    /// What replaces every SDP.
    new: Option<String>,
    drop_trickle: bool,
    keep_codecs: Option<Vec<String>>,
    refuse: bool,
}

impl Recorder {
    fn replacing(new: &str) -> Self {
        Self {
            new: Some(new.to_owned()),
            ..Self::default()
        }
    }

    fn take(&mut self, slot: SdpSlot, sdp: &str) -> Result<Option<String>, String> {
        self.sdp.push((slot, sdp.to_owned()));
        if self.refuse {
            return Err("no".to_owned());
        }
        Ok(self.new.clone())
    }
}

impl RequestVisitor for Recorder {
    fn sdp(&mut self, slot: SdpSlot, sdp: &str) -> Result<Option<String>, String> {
        self.take(slot, sdp)
    }
    fn trickle(&mut self, target: Target, candidate_init: &str) -> bool {
        self.trickles.push((target, candidate_init.to_owned()));
        !self.drop_trickle
    }
    fn add_track(&mut self, track: AddTrack) {
        self.added.push(track);
    }
    fn leave(&mut self) {
        self.left.push((0, 0));
    }
}

impl ResponseVisitor for Recorder {
    fn sdp(
        &mut self,
        slot: SdpSlot,
        sdp: &str,
        mid_to_track_id: &[(String, String)],
    ) -> Result<Option<String>, String> {
        self.mids = mid_to_track_id.to_vec();
        self.take(slot, sdp)
    }
    fn trickle(&mut self, target: Target, candidate_init: &str) -> bool {
        self.trickles.push((target, candidate_init.to_owned()));
        !self.drop_trickle
    }
    fn join(&mut self, join: Join) -> JoinEdit {
        self.joins.push(join);
        JoinEdit {
            keep_publish_codecs: self.keep_codecs.clone(),
        }
    }
    fn reconnect(&mut self) {
        self.reconnects += 1;
    }
    fn participants(&mut self, participants: Vec<Participant>) {
        self.participants.extend(participants);
    }
    fn track_published(&mut self, cid: &str, track: Track) {
        self.published.push((cid.to_owned(), track));
    }
    fn leave(&mut self, action: i32, reason: i32) {
        self.left.push((action, reason));
    }
    fn room_moved(&mut self, room_name: &str) {
        self.rooms.push(room_name.to_owned());
    }
}

/// A message of one length-delimited field.
fn field(number: u32, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    write_bytes(&mut out, number, value);
    out
}

/// A message of one varint field.
fn number(number: u32, value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    write_uint(&mut out, number, value);
    out
}

/// `SessionDescription` with an id and an unknown field around the SDP.
fn description(kind: &str, sdp: &str) -> Vec<u8> {
    [
        field(1, kind.as_bytes()),
        field(2, sdp.as_bytes()),
        number(3, 7),
        field(99, b"\x00unknown\xff"),
    ]
    .concat()
}

fn binary(verdict: Verdict) -> Vec<u8> {
    match verdict {
        Verdict::Binary(bytes) => bytes,
        other => panic!("not replaced: {other:?}"),
    }
}
