//! WHIP (RFC 9725): a session without signalling. One offer and one answer make it, SDP fragments restart its ICE.
//!
//! There is no AddTrack, so nothing is known of the tracks but their SDP, and what isn't known isn't steered.

use super::visit::check_first;
use super::{Env, Session, index};
use crate::description::{Creds, Target};
use crate::sdp::{
    FragmentEdit, MAX_FRAGMENT, fragment_candidates, fragment_creds, rewrite_fragment,
};
use crate::signal::SignalError;

impl Session {
    /// The offer of a WHIP client as the server is to see it.
    ///
    /// # Errors
    /// When it is no SDP.
    pub fn whip_offer(&mut self, env: &mut dyn Env, offer: &str) -> Result<String, SignalError> {
        check_first(offer).map_err(SignalError::Refused)?;
        // LiveKit 1.13.5 ends with a panic when ICE restarts and an m-section of the offer ended with candidates
        // (PatchICECredentialAndCandidatesIntoSDP). It needs none: our checks tell it where we are.
        self.pc(env, Target::Publisher)
            .map_err(SignalError::Refused)?
            .server_candidates
            .clear();
        self.client_sdp(env, Target::Publisher, offer, true)
            .map_err(SignalError::Refused)
    }

    /// The server's answer as the client is to see it; `sid` is the participant's, the last part of the answer's Location.
    ///
    /// # Errors
    /// When it is no SDP.
    pub fn whip_answer(
        &mut self,
        env: &mut dyn Env,
        answer: &str,
        sid: &str,
    ) -> Result<String, SignalError> {
        sid.clone_into(&mut self.facts.participant_sid);
        self.server_sdp(env, Target::Publisher, answer, false, &[])
            .map_err(SignalError::Refused)
    }

    /// A fragment from the client as the server is to see it. With `restart` it begins a new generation of ICE; without,
    /// it trickles candidates, which stay here: the server's peer is the sidecar.
    ///
    /// # Errors
    /// When it is too long, restarts without credentials, or the session has no media.
    pub fn whip_fragment(
        &mut self,
        env: &mut dyn Env,
        fragment: &str,
        restart: bool,
    ) -> Result<String, SignalError> {
        let fresh = self.creds(env, "");
        let theirs = fragment_creds(fragment);
        let pc = self.whip_pc()?;
        let edit = if restart {
            let theirs = theirs.ok_or_else(|| {
                SignalError::Refused("a restart needs a=ice-ufrag and a=ice-pwd".to_owned())
            })?;
            if pc.client.remote.as_ref() != Some(&theirs) {
                pc.server.local = fresh;
                pc.client.remote = Some(theirs);
                pc.changed = true;
            }
            FragmentEdit {
                creds: Some(pc.server.local.clone()),
                // As in the offer.
                ..FragmentEdit::default()
            }
        } else {
            // Credentials of another generation stay as they are, for the server to refuse.
            let current = theirs.is_some() && theirs == pc.client.remote;
            FragmentEdit {
                creds: current.then(|| pc.server.local.clone()),
                ..FragmentEdit::default()
            }
        };
        rewritten(fragment, &edit)
    }

    /// The server's answer to a restart as the client is to see it. `before` is the session as it was before the restart.
    ///
    /// # Errors
    /// When it is too long or lacks credentials.
    pub fn whip_fragment_answer(
        &mut self,
        env: &mut dyn Env,
        before: &Self,
        fragment: &str,
    ) -> Result<String, SignalError> {
        let prefix = self.config.ufrag_prefix.clone();
        let fresh = self.creds(env, &prefix);
        let theirs: Creds = fragment_creds(fragment).ok_or_else(|| {
            SignalError::Refused(
                "the answer to a restart has no a=ice-ufrag and a=ice-pwd".to_owned(),
            )
        })?;
        self.begin_generation(Target::Publisher, &theirs);
        for candidate in fragment_candidates(fragment) {
            self.add_candidate(Target::Publisher, &candidate);
        }
        let candidates = self.config.client_candidates.clone();
        let pc = self.whip_pc()?;
        if pc.server.remote.as_ref() == Some(&theirs) {
            // LiveKit replaces credentials only on the level (session or media) where its offer had them, and otherwise goes
            // on with the old ones, without a word. Then only the client's leg restarts.
            if let Some(old) = &before.pcs[index(Target::Publisher)] {
                pc.server.local.clone_from(&old.server.local);
            }
        }
        pc.client.local = fresh;
        pc.server.remote = Some(theirs);
        pc.changed = true;
        let edit = FragmentEdit {
            creds: Some(pc.client.local.clone()),
            candidates,
            ice_lite: true,
        };
        rewritten(fragment, &edit)
    }

    fn whip_pc(&mut self) -> Result<&mut super::Pc, SignalError> {
        self.pcs[index(Target::Publisher)]
            .as_mut()
            .ok_or_else(|| SignalError::Refused("the session's media is over".to_owned()))
    }
}

fn rewritten(fragment: &str, edit: &FragmentEdit) -> Result<String, SignalError> {
    rewrite_fragment(fragment, edit).map_err(|_| SignalError::TooLong {
        what: "SDP fragment",
        limit: MAX_FRAGMENT,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::description::HostCandidate;
    use crate::ladder::Rungs;
    use crate::policy::Policy;
    use crate::sdp::Sdp;
    use crate::session::SessionConfig;
    use std::net::SocketAddr;

    /// Counts, so that no two credentials are the same.
    struct Env(u8);

    impl crate::session::Env for Env {
        fn random(&mut self, bytes: &mut [u8]) {
            self.0 += 1;
            bytes.fill(self.0);
        }
        fn bind_server_leg(&mut self, _: Target) -> Result<Vec<SocketAddr>, String> {
            Ok(vec!["127.0.0.1:5000".parse().unwrap()])
        }
    }

    fn sdp(ufrag: &str, setup: &str, candidate: &str) -> String {
        format!(
            "v=0\r\no=- 1 1 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\na=group:BUNDLE 0\r\n\
             m=audio 9 UDP/TLS/RTP/SAVPF 111\r\nc=IN IP4 0.0.0.0\r\na=mid:0\r\na=ice-ufrag:{ufrag}\r\na=ice-pwd:{ufrag}{ufrag}{ufrag}{ufrag}\r\n\
             a=fingerprint:sha-256 00:01\r\na=setup:{setup}\r\na=rtpmap:111 opus/48000/2\r\n\
             a={candidate}\r\na=end-of-candidates\r\n"
        )
    }

    fn fragment(ufrag: &str, candidate: &str) -> String {
        format!(
            "a=group:BUNDLE 0\r\nm=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\na=ice-ufrag:{ufrag}\r\n\
             a=ice-pwd:{ufrag}{ufrag}{ufrag}{ufrag}\r\na={candidate}\r\na=end-of-candidates\r\n"
        )
    }

    const CLIENT: &str = "candidate:1 1 udp 1 192.0.2.1 1000 typ host";
    const SERVER: &str = "candidate:1 1 udp 1 203.0.113.9 7882 typ host";
    const OURS: &str = "198.51.100.7 7982";

    fn begun() -> (Session, Env, Creds) {
        let mut env = Env(0);
        let mut session = Session::new(SessionConfig {
            policy: Policy::default(),
            fingerprint: "sha-256 AA:BB".into(),
            client_candidates: vec![HostCandidate {
                addr: "198.51.100.7:7982".parse().unwrap(),
                tcp: false,
            }],
            ufrag_prefix: "0".into(),
            rungs: Rungs::default(),
            models: None,
        });
        let offer = session
            .whip_offer(&mut env, &sdp("client", "actpass", CLIENT))
            .unwrap();
        // Not even ours: the server would die of them at a restart.
        assert!(!offer.contains("candidate"), "{offer}");
        assert!(offer.contains("AA:BB") && !offer.contains("ice-ufrag:client"));
        let told = Sdp::parse(&offer).unwrap().creds().unwrap();
        let answer = session
            .whip_answer(&mut env, &sdp("server", "active", SERVER), "PA_1")
            .unwrap();
        assert!(
            answer.contains(OURS) && answer.contains("a=ice-lite"),
            "{answer}"
        );
        assert!(
            !answer.contains("203.0.113.9") && !answer.contains("ice-ufrag:server"),
            "{answer}"
        );
        assert_eq!(session.facts().participant_sid, "PA_1");
        let media = session.poll_update().unwrap();
        assert_eq!(media.server.local, told);
        assert_eq!(media.server.remote_candidates, [SERVER]);
        (session, env, told)
    }

    #[test]
    fn trickled_candidates_stay_here() {
        let (mut session, mut env, told) = begun();
        let out = session
            .whip_fragment(&mut env, &fragment("client", CLIENT), false)
            .unwrap();
        assert_eq!(fragment_creds(&out), Some(told));
        assert!(!out.contains("candidate"), "{out}");
        assert_eq!(session.poll_update(), None, "nothing changed");
        // Those of another generation are the server's to refuse.
        let other = session
            .whip_fragment(&mut env, &fragment("other", CLIENT), false)
            .unwrap();
        assert_eq!(fragment_creds(&other).unwrap().ufrag, "other");
    }

    #[test]
    fn a_restart_is_one_of_both_legs() {
        let (before, mut env, told) = begun();
        let mut session = before.clone();
        let out = session
            .whip_fragment(&mut env, &fragment("again", CLIENT), true)
            .unwrap();
        let fresh = fragment_creds(&out).unwrap();
        assert!(fresh != told && fresh.ufrag != "again" && !out.contains("candidate"));
        let back = session
            .whip_fragment_answer(&mut env, &before, &fragment("server2", SERVER))
            .unwrap();
        assert!(
            back.contains(OURS) && !back.contains("203.0.113.9"),
            "{back}"
        );
        let media = session.poll_update().unwrap();
        assert_eq!(media.server.local, fresh);
        assert_eq!(media.client.remote.unwrap().ufrag, "again");
        assert_eq!(media.server.remote.unwrap().ufrag, "server2");
        assert_eq!(fragment_creds(&back), Some(media.client.local));
    }

    #[test]
    fn a_restart_that_the_server_ignores_is_one_of_the_clients_leg() {
        let (before, mut env, told) = begun();
        let mut session = before.clone();
        session
            .whip_fragment(&mut env, &fragment("again", CLIENT), true)
            .unwrap();
        let back = session
            .whip_fragment_answer(&mut env, &before, &fragment("server", SERVER))
            .unwrap();
        let media = session.poll_update().unwrap();
        assert_eq!(media.server.local, told, "the server still checks these");
        assert_eq!(fragment_creds(&back), Some(media.client.local));
        assert_eq!(media.client.remote.unwrap().ufrag, "again");
    }

    #[test]
    fn what_cannot_be_a_restart_is_refused() {
        let (mut session, mut env, _) = begun();
        let nameless = "m=audio 9 UDP/TLS/RTP/SAVPF 111\r\na=mid:0\r\n";
        assert!(session.whip_fragment(&mut env, nameless, true).is_err());
        let long = "a".repeat(MAX_FRAGMENT + 1);
        assert!(session.whip_fragment(&mut env, &long, false).is_err());
        session.pc_closed(Target::Publisher);
        let late = fragment("again", CLIENT);
        assert!(session.whip_fragment(&mut env, &late, true).is_err());
    }
}
