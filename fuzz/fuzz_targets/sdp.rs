//! SDP and its fragments: reading never fails badly, rewriting gives SDP again, and rewriting that changes nothing.
#![cfg_attr(fuzzing, no_main)]

use auralink_fuzz::fuzz_target;
use auralink_proto::description::{Creds, HostCandidate};
use auralink_proto::ladder::Rungs;
use auralink_proto::sdp::{
    AicLine, Edit, FragmentEdit, MediaSteer, Sdp, fragment_creds, free_extmap_ids,
    free_payload_type, rewrite, rewrite_fragment,
};

fuzz_target!(|text: &str| {
    let candidates = vec![
        HostCandidate {
            addr: ([203, 0, 113, 7], 7982).into(),
            tcp: false,
        },
        HostCandidate {
            addr: ([203, 0, 113, 7], 7981).into(),
            tcp: true,
        },
    ];
    let creds = Creds {
        ufrag: "00ours".to_owned(),
        pwd: "ourpasswordourpasswordour".to_owned(),
    };
    let fragment = FragmentEdit {
        creds: Some(creds.clone()),
        candidates: candidates.clone(),
        ice_lite: true,
    };
    if let Ok(once) = rewrite_fragment(text, &fragment) {
        let named = fragment_creds(&once);
        assert!(
            named.is_none() || named.as_ref() == Some(&creds),
            "{once:?}"
        );
        if let Ok(twice) = rewrite_fragment(&once, &fragment) {
            assert_eq!(twice, once);
        }
    }
    let Ok(sdp) = Sdp::parse(text) else {
        return;
    };
    let free = free_extmap_ids(&sdp, 2);
    let mids: Vec<String> = sdp.media().iter().map(|media| media.mid.clone()).collect();
    let edit = Edit {
        creds,
        fingerprint: "sha-256 AB:CD".to_owned(),
        candidates,
        ice_lite: true,
        setup: None,
        extmaps: free
            .ids
            .first()
            .into_iter()
            .flat_map(|id| {
                mids.iter()
                    .map(|mid| (mid.clone(), *id, "urn:auralink:x".to_owned()))
            })
            .collect(),
        aic: free_payload_type(&sdp, None)
            .into_iter()
            .flat_map(|pt| {
                let rungs = Rungs::default();
                mids.iter().map(move |mid| {
                    (
                        mid.clone(),
                        AicLine {
                            pt,
                            rungs,
                            models: None,
                            short_headers: true,
                            more_units: true,
                        },
                    )
                })
            })
            .collect(),
        strip_extmap_uri: Some("urn:auralink:x"),
        strip_extmap_id: None,
        media: mids
            .iter()
            .map(|mid| MediaSteer {
                mid: mid.clone(),
                remove_red: true,
                fmtp: vec![(
                    111,
                    vec![("maxaveragebitrate".to_owned(), "12000".to_owned())],
                )],
                ptime: Some(40),
                maxptime: Some(40),
                tias: Some(12_000),
            })
            .collect(),
    };
    let once = rewrite(&sdp, &edit);
    // An input at the limit may pass it by what is added.
    let Ok(read) = Sdp::parse(&once) else {
        assert!(once.len() > auralink_proto::sdp::MAX_SDP, "{once:?}");
        return;
    };
    assert_eq!(read.media().len(), sdp.media().len());
    // A lone CR is part of a line's text, or, at the end, a line that new ones are put before.
    let lone_cr = text.replace("\r\n", "").contains('\r');
    assert!(lone_cr || rewrite(&read, &edit) == once, "{once:?}");
});
