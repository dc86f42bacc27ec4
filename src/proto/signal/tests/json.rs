//! Text frames (protojson).

use proptest::prelude::*;

use super::*;

fn request(text: &str, visitor: &mut Recorder) -> Result<Verdict, SignalError> {
    edit_request(Frame::Text(text), visitor)
}

fn text(verdict: Verdict) -> String {
    match verdict {
        Verdict::Text(text) => text,
        other => panic!("not replaced: {other:?}"),
    }
}

#[test]
fn only_the_sdp_is_written_anew() {
    let odd = |sdp: &str| {
        format!(
            " {{ \"x\" : [1.0e3, -0, {{\"sdp\":\"decoy\"}}, \"\\\"}}\"] ,\n\"offer\":{{\"id\":7 , \"type\":\"offer\",\
             \"sdp\" :{sdp} , \"n\":18446744073709551616, \"midToTrackId\":{{}} }} }}\t"
        )
    };
    let mut visitor = Recorder::replacing("v=0\r\nnew \"é\"\u{1}");
    let old = odd(r#""v=0\r\nold \u00e9\/""#);
    assert_eq!(
        text(request(&old, &mut visitor).unwrap()),
        odd(r#""v=0\r\nnew \"é\"\u0001""#)
    );
    assert_eq!(visitor.sdp, [(SdpSlot::Offer, "v=0\r\nold é/".to_owned())]);
    assert_eq!(
        request(&old, &mut Recorder::default()).unwrap(),
        Verdict::Keep
    );
}

#[test]
fn both_spellings_are_known() {
    for sync in ["syncState", "sync_state"] {
        let build = |a: &str, b: &str| {
            format!(r#"{{"{sync}":{{"answer":{{"sdp":"{a}"}},"offer":{{"sdp":"{b}"}}}}}}"#)
        };
        let mut visitor = Recorder::replacing("n");
        assert_eq!(
            text(request(&build("a", "b"), &mut visitor).unwrap()),
            build("n", "n")
        );
        assert_eq!(
            visitor.sdp,
            [
                (SdpSlot::SyncOffer, "b".to_owned()),
                (SdpSlot::SyncAnswer, "a".to_owned())
            ]
        );
    }
    let mut visitor = Recorder::default();
    for (name, kind, source) in [
        ("addTrack", "\"VIDEO\"", "\"SCREEN_SHARE\""),
        ("add_track", "1", "3"),
    ] {
        let frame = format!(
            r#"{{"{name}":{{"cid":"c","type":{kind},"source":{source},"audioFeatures":["TF_STEREO",6,"TF_NEW"],"encryption":"GCM",
            "disable_red":true,"simulcastCodecs":[{{"codec":"vp9","cid":"d"}}],"width":640,"sid":null}}}}"#
        );
        assert_eq!(request(&frame, &mut visitor), Ok(Verdict::Keep));
    }
    assert_eq!(visitor.added[0], visitor.added[1]);
    let track = &visitor.added[0];
    assert_eq!(track.source, SOURCE_SCREEN_SHARE);
    assert!(track.stereo && track.encrypted && track.disable_red && !track.disable_dtx);
    assert_eq!(track.width, 640);
    assert_eq!(track.simulcast_codecs, ["vp9"]);
}

#[test]
fn candidates_are_dropped() {
    let mut visitor = Recorder {
        drop_trickle: true,
        ..Recorder::default()
    };
    for (frame, target) in [
        (r#"{"trickle":{"candidateInit":"{}"}}"#, Target::Publisher),
        (
            r#"{"trickle":{"target":"SUBSCRIBER","candidateInit":"{}"}}"#,
            Target::Subscriber,
        ),
        (
            r#"{"trickle":{"target":1,"candidateInit":"{}"}}"#,
            Target::Subscriber,
        ),
    ] {
        assert_eq!(request(frame, &mut visitor), Ok(Verdict::Drop));
        assert_eq!(visitor.trickles.pop(), Some((target, "{}".to_owned())));
    }
}

#[test]
fn a_join_is_read_and_its_codecs_are_filtered() {
    let build = |codecs: &str| {
        format!(
            r#"{{"join":{{"room":{{"sid":"RM_1","name":"room","creationTimeMs":"1"}}, "participant":{{"sid":"PA_1","identity":"me","kind":"SIP"}},
            "otherParticipants":[{{"identity":"o","state":"ACTIVE","tracks":[{{"sid":"TR_1","type":"VIDEO","mimeType":"video/VP8"}}]}}],
            "serverInfo":{{"version":"1.13.5"}}, "enabledPublishCodecs":{codecs}, "fastPublish":true}}}}"#
        )
    };
    let all = build(
        r#"[ {"mime":"video/VP8"}, {"mime":"video/AV1", "fmtpLine":"a,]"} , {"mime":"audio/opus"}]"#,
    );
    let mut visitor = Recorder {
        keep_codecs: Some(vec!["video/av1".to_owned(), "audio/opus".to_owned()]),
        ..Recorder::default()
    };
    let new = edit_response(Frame::Text(&all), &mut visitor).unwrap();
    assert_eq!(
        text(new),
        build(r#"[{"mime":"video/AV1", "fmtpLine":"a,]"},{"mime":"audio/opus"}]"#)
    );
    let join = &visitor.joins[0];
    assert_eq!(join.kind, 3);
    assert_eq!(join.room_sid, "RM_1");
    assert_eq!(join.server_version, "1.13.5");
    assert!(join.fast_publish && !join.subscriber_primary);
    assert_eq!(join.enabled_publish_codecs.len(), 3);
    assert_eq!(join.other_participants[0].state, 2);
    assert_eq!(join.other_participants[0].tracks[0].mime_type, "video/VP8");
}

#[test]
fn what_protojson_refuses_is_refused() {
    let refused = |frame: &str| {
        let verdict = request(frame, &mut Recorder::replacing("x"));
        assert!(
            matches!(verdict, Err(SignalError::Json(_))),
            "{frame}: {verdict:?}"
        );
    };
    refused("");
    refused("[]");
    refused("{\"offer\":{\"sdp\":\"v=0\"}");
    refused(r#"{"offer":{"sdp":"a","sdp":"b"}}"#);
    refused(r#"{"sync_state":{},"syncState":{}}"#);
    refused(r#"{"offer":{"sdp":5}}"#);
    refused(r#"{"offer":{"sdp":"\ud800"}}"#);
    refused(&format!("{}{}", "{\"a\":".repeat(500), "}".repeat(500)));
    // Absent by another name.
    for frame in [
        r#"{"offer":null}"#,
        r#"{"offer":{"sdp":null}}"#,
        r#"{"offer":{}}"#,
        "{}",
    ] {
        assert_eq!(
            request(frame, &mut Recorder::replacing("x")),
            Ok(Verdict::Keep)
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn any_text_is_kept_or_refused(frame in "[\\[\\]{}\",:\\\\a-f0-9 ]{0,60}", member in "[\"{}\\[\\],: a-z]{0,20}") {
        let wrapped = format!("{{\"offer\":{{\"sdp\":{member}}}, \"x\":{frame}}}");
        for frame in [&frame, &wrapped] {
            let _ = request(frame, &mut Recorder::replacing("x"));
            let _ = edit_response(Frame::Text(frame), &mut Recorder::replacing("x"));
        }
    }

    #[test]
    fn sdp_survives_escaping(old in any::<String>().prop_filter("empty is none", |old| !old.is_empty()), new in any::<String>(), name in "[a-z]{1,9}", other in any::<String>()) {
        prop_assume!(name != "offer" && name != "leave" && name != "trickle");
        let build = |sdp: &str| format!(
            "{{{}:{}, \"offer\":{{\"sdp\": {} , \"type\":\"offer\"}}}}",
            serde_json::to_string(&name).unwrap(),
            serde_json::to_string(&other).unwrap(),
            serde_json::to_string(sdp).unwrap(),
        );
        let mut visitor = Recorder::replacing(&new);
        prop_assert_eq!(text(request(&build(&old), &mut visitor).unwrap()), build(&new));
        prop_assert_eq!(&visitor.sdp[0].1, &old);
    }
}
