//! What the ends say to each other through the sidecar's session.

use super::network::{Event, Out};
use super::{IDENTITY, World, back, description, others, sdp_of};
use crate::sdp::{
    self, CLIENT_AUDIO_SSRC, CLIENT_CID, CLIENT_VIDEO_SSRC, Content, Described, OTHER_SID,
    SERVER_AUDIO_SSRC, SERVER_VIDEO_SSRC,
};
use auralink_proto::coding::{EngineRungs, Job, Outcome};
use auralink_proto::description::{PcDescription, Target};
use auralink_proto::relay::{Relay, Side};
use auralink_proto::signal::wire::{Fields, Value, write_bytes, write_uint};
use auralink_proto::signal::{Frame, Verdict};

impl World {
    fn content(&self, side: Side, offered: Option<&str>) -> Content {
        let client = side == Side::Client;
        let aic = offered
            .filter(|_| !client && self.options.server_takes_aic)
            .and_then(|sdp| sdp.lines().find(|line| line.contains("aic-hint")));
        Content {
            audio_ssrc: if client {
                CLIENT_AUDIO_SSRC
            } else {
                SERVER_AUDIO_SSRC
            },
            video_ssrc: if client {
                CLIENT_VIDEO_SSRC
            } else {
                SERVER_VIDEO_SSRC
            },
            audio_track: if client { CLIENT_CID } else { OTHER_SID },
            fmtp: self.options.fmtp[usize::from(!client)],
            media_lines: aic.map(str::to_owned).into_iter().collect(),
        }
    }

    fn written(&self, side: Side, setup: &str, offered: Option<&str>) -> String {
        let peer = match side {
            Side::Client => &self.client,
            Side::Server => &self.server,
        };
        let sdp = sdp::write(peer, setup, &self.content(side, offered));
        if self.options.false_fingerprint == Some(side) {
            let lie = format!("sha-256 {}00", "00:".repeat(31));
            return sdp.replace(&peer.fingerprint, &lie);
        }
        sdp
    }

    /// The client announces its track, the server who else is there; then the offerer offers.
    pub(crate) fn join(&mut self) {
        let mut track = Vec::new();
        write_bytes(&mut track, 1, CLIENT_CID.as_bytes());
        write_uint(&mut track, 8, 2);
        if self.options.client_encrypts {
            write_uint(&mut track, 14, 1);
        }
        self.client_says(4, &track);
        self.server_says(5, &others(OTHER_SID, 2, false));
        self.offer();
    }

    pub(crate) fn offer(&mut self) {
        match self.options.target {
            Target::Publisher => {
                let sdp = self.written(Side::Client, "actpass", None);
                self.client_says(1, &description("offer", &sdp, &[]));
            }
            Target::Subscriber => {
                let sdp = self.written(Side::Server, "actpass", None);
                self.server_says(3, &description("offer", &sdp, &[]));
            }
        }
    }

    pub(crate) fn client_says(&mut self, field: u32, message: &[u8]) {
        let mut frame = Vec::new();
        write_bytes(&mut frame, field, message);
        self.schedule(self.options.client_signal[0], Event::ProxyFromClient(frame));
    }

    pub(crate) fn server_says(&mut self, field: u32, message: &[u8]) {
        let mut frame = Vec::new();
        write_bytes(&mut frame, field, message);
        self.schedule(self.options.server_signal[1], Event::ProxyFromServer(frame));
    }

    pub(super) fn at_proxy(&mut self, from: Side, frame: Vec<u8>) {
        let verdict = match from {
            Side::Client => self
                .session
                .client_frame(&mut self.env, Frame::Binary(&frame)),
            Side::Server => self
                .session
                .server_frame(&mut self.env, Frame::Binary(&frame)),
        };
        let frame = match verdict.expect("a good frame") {
            Verdict::Keep => Some(frame),
            Verdict::Binary(new) => Some(new),
            Verdict::Drop => None,
            Verdict::Text(_) => panic!("text for binary"),
        };
        while let Some(description) = self.session.poll_update() {
            self.describe(&description);
        }
        let Some(frame) = frame else {
            return;
        };
        match from {
            Side::Client => self.schedule(self.options.server_signal[0], Event::Server(frame)),
            Side::Server => self.schedule(self.options.client_signal[1], Event::Client(frame)),
        }
    }

    pub(crate) fn describe(&mut self, description: &PcDescription) {
        let now = self.clock();
        self.description = Some(description.clone());
        let consent = self.options.consent_timeout;
        let relay = self.relay.get_or_insert_with(|| {
            Relay::new(
                1,
                EngineRungs::NONE,
                now.instant,
                &IDENTITY,
                consent,
                vec![back()],
                description,
            )
        });
        let mut out = Out::default();
        relay.describe(now, description, &mut self.scratch, &mut out);
        self.after_relay(out);
    }

    /// Lets the codecs be able to do this, and answers each job that waits.
    pub(crate) fn codecs(
        &mut self,
        able: EngineRungs,
        mut answer: impl FnMut(Job) -> Option<Outcome>,
    ) {
        let now = self.clock();
        let mut out = Out::default();
        let relay = self.relay.as_mut().expect("a relay");
        relay.set_engine(now.instant, able);
        while let Some(job) = relay.poll_job() {
            if let Some(outcome) = answer(job) {
                relay.outcome(now, outcome, &mut self.scratch, &mut out);
            }
        }
        self.after_relay(out);
    }

    pub(super) fn at_end(&mut self, end: Side, frame: Vec<u8>) {
        // Requests: 1 offer, 2 answer. Responses: 3 offer, 2 answer.
        let offer_field = if end == Side::Server { 1 } else { 3 };
        for field in Fields::new(&frame).map_while(Result::ok) {
            let Value::Bytes(message) = field.value else {
                continue;
            };
            if field.number == offer_field || field.number == 2 {
                let sdp = sdp_of(message);
                self.take_sdp(end, &sdp, field.number == offer_field);
            }
        }
        match end {
            Side::Client => self.frames_at_client.push(frame),
            Side::Server => self.frames_at_server.push(frame),
        }
    }

    fn take_sdp(&mut self, end: Side, sdp: &str, is_offer: bool) {
        let described = Described::read(sdp);
        let (peer, log) = match end {
            Side::Client => (&mut self.client, &mut self.at_client),
            Side::Server => (&mut self.server, &mut self.at_server),
        };
        log.push(sdp.to_owned());
        let known = peer.remote.as_ref().map(|remote| remote.ufrag.clone());
        if is_offer && known.is_some_and(|known| known != described.ufrag) {
            peer.restart();
        }
        if is_offer {
            peer.active = Some(self.options.answer_active);
        } else {
            peer.active = Some(described.setup != "active");
        }
        peer.learn(self.now, described);
        if is_offer {
            let setup = if self.options.answer_active {
                "active"
            } else {
                "passive"
            };
            let answer = self.written(end, setup, Some(sdp));
            let mids = [("0", OTHER_SID)];
            match end {
                Side::Server => self.server_says(2, &super::description("answer", &answer, &mids)),
                Side::Client => self.client_says(2, &super::description("answer", &answer, &[])),
            }
        }
        self.flush_peers();
    }
}
