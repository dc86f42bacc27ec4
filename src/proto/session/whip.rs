//! WHIP (RFC 9725): a session without signalling. One offer and one answer make it, SDP fragments restart its ICE.
//!
//! There is no AddTrack, so nothing is known of the tracks but their SDP, and what isn't known isn't steered.

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
