//! Signalling frames of either direction and encoding, through the patcher and through a session.
#![cfg_attr(fuzzing, no_main)]

use auralink_fuzz::fuzz_target;
use auralink_proto::description::Target;
use auralink_proto::policy::{Mode, Policy};
use auralink_proto::session::{Env, Session, SessionConfig};
use auralink_proto::signal::{
    Frame, RequestVisitor, ResponseVisitor, SdpSlot, Verdict, edit_request, edit_response,
};
use std::net::SocketAddr;

/// Changes nothing, or every SDP.
struct Visitor(Option<&'static str>);

impl RequestVisitor for Visitor {
    fn sdp(&mut self, _: SdpSlot, _: &str) -> Result<Option<String>, String> {
        Ok(self.0.map(str::to_owned))
    }
    fn trickle(&mut self, _: Target, _: &str) -> bool {
        true
    }
}

impl ResponseVisitor for Visitor {
    fn sdp(
        &mut self,
        _: SdpSlot,
        _: &str,
        _: &[(String, String)],
    ) -> Result<Option<String>, String> {
        Ok(self.0.map(str::to_owned))
    }
    fn trickle(&mut self, _: Target, _: &str) -> bool {
        true
    }
}

struct Fixed;

impl Env for Fixed {
    fn random(&mut self, bytes: &mut [u8]) {
        bytes.fill(7);
    }
    fn bind_server_leg(&mut self, _: Target) -> Result<Vec<SocketAddr>, String> {
        Ok(vec![([10, 0, 0, 1], 40000).into()])
    }
}

/// What is patched can be patched again, to the same end.
fn check(edit: impl Fn(Frame<'_>, &mut Visitor) -> Option<Verdict>, frame: Frame<'_>) {
    if let Some(verdict) = edit(frame, &mut Visitor(None)) {
        assert_eq!(verdict, Verdict::Keep, "nothing was to change");
    }
    let again = |frame: Frame<'_>| edit(frame, &mut Visitor(Some("v=0 new")));
    match again(frame) {
        Some(Verdict::Binary(new)) => {
            assert_eq!(
                again(Frame::Binary(&new)),
                Some(Verdict::Binary(new.clone()))
            );
        }
        Some(Verdict::Text(new)) => {
            assert_eq!(again(Frame::Text(&new)), Some(Verdict::Text(new.clone())));
        }
        _ => {}
    }
}

fuzz_target!(|data: &[u8]| {
    let mut session = Session::new(SessionConfig {
        policy: Policy {
            mode: Mode::Lean,
            ..Policy::default()
        },
        fingerprint: "sha-256 AB:CD".to_owned(),
        client_candidates: Vec::new(),
        ufrag_prefix: "00".to_owned(),
        rungs: auralink_proto::ladder::Rungs::ALL,
        models: Some(1),
    });
    let mut frames = vec![Frame::Binary(data)];
    frames.extend(std::str::from_utf8(data).ok().map(Frame::Text));
    for frame in frames {
        check(|frame, visitor| edit_request(frame, visitor).ok(), frame);
        check(|frame, visitor| edit_response(frame, visitor).ok(), frame);
        let _ = session.client_frame(&mut Fixed, frame);
        let _ = session.server_frame(&mut Fixed, frame);
        while session.poll_update().is_some() {}
    }
});
