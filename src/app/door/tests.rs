#![allow(clippy::unwrap_used, clippy::panic)]
use super::super::tests::app;
use super::*;
use auralink_proto::signal::wire::{write_bytes, write_uint};
use base64::Engine;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use hyper::HeaderMap;
use std::time::Duration;

fn bytes(number: u32, value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    write_bytes(&mut out, number, value);
    out
}

/// The participant `sid`, who is `identity`, in `room`.
fn joined(room: &str, identity: &str, sid: &str) -> Vec<u8> {
    let room = bytes(1, &bytes(2, room.as_bytes()));
    let own = [bytes(1, sid.as_bytes()), bytes(2, identity.as_bytes())].concat();
    bytes(1, &[room, bytes(2, &own)].concat())
}

fn resumed() -> Vec<u8> {
    bytes(19, &[])
}

/// What LiveKit tells after it of who is there.
fn update(identity: &str, sid: &str) -> Vec<u8> {
    let own = [bytes(1, sid.as_bytes()), bytes(2, identity.as_bytes())].concat();
    bytes(5, &bytes(1, &own))
}

fn access(key: &str, identity: &str, room: &str, more: &str) -> String {
    let claims =
        format!(r#"{{"iss":"{key}","sub":"{identity}","video":{{"room":"{room}"{more}}}}}"#);
    format!("access_token=e30.{}.x", URL_SAFE_NO_PAD.encode(claims))
}

fn open(app: &Arc<App>, query: &str) -> Result<Opened, Fault> {
    let opening = Opening {
        path: "/rtc",
        query,
        headers: &HeaderMap::new(),
        peer: "127.0.0.1:9".parse().unwrap(),
    };
    Door(app.clone()).open(&opening)
}

/// A connection that the server has accepted and answered so.
fn answered(app: &Arc<App>, query: &str, frame: &[u8]) -> (Box<dyn SignalSession>, Verdict) {
    let mut session = open(app, query)
        .unwrap_or_else(|fault| panic!("{fault}"))
        .session;
    session.accepted(None);
    let verdict = session.server_frame(Frame::Binary(frame));
    (session, verdict.unwrap_or_else(|fault| panic!("{fault}")))
}

fn must_join_anew() -> Verdict {
    Verdict::Binary(proto::leave_response(
        proto::ACTION_RECONNECT,
        proto::REASON_SERVER_SHUTDOWN,
    ))
}

/// Everything that a stranger's request could change of a running session.
fn state(app: &Arc<App>, sid: &str) -> String {
    let cell = app.registry().by_sid.get(sid).cloned().unwrap();
    let inner = cell.lock();
    format!(
        "{} {} {} {} {:?}",
        cell.id, inner.incarnation, inner.signalling_open, inner.gone, inner.session
    )
}

const CLOSED: Closed = Closed {
    by: By::Client,
    code: None,
};

#[tokio::test]
async fn a_sid_alone_touches_nobodys_session() {
    let app = app();
    let victim = access("key", "anna", "r", "");
    let (_anna, _) = answered(&app, &victim, &joined("r", "anna", "PA_1"));
    let before = state(&app, "PA_1");
    // Eve's own token is good, and the server resumes her own participant: its answer is the same for any sid.
    let eve = access("key", "eve", "r", "");
    let other_room = access("key", "anna", "other", "");
    for token in [&eve, &other_room, "", "access_token=x"] {
        for spelt in [
            "reconnect=1&sid=PA_1",
            "reconnect=true&s%69d=PA%5F1",
            "sid=PA_1&reconnect=%31",
        ] {
            for accepted in [false, true] {
                let query = format!("{spelt}&{token}");
                let mut session = open(&app, &query).unwrap_or_else(|f| panic!("{f}")).session;
                if accepted {
                    session.accepted(None);
                    let answer = session.server_frame(Frame::Binary(&resumed()));
                    assert!(answer.is_err() || answer == Ok(must_join_anew()), "{query}");
                    assert!(session.server_frame(Frame::Binary(&resumed())).is_err());
                    assert!(session.client_frame(Frame::Binary(&bytes(8, &[]))).is_err());
                    assert_eq!(session.extra_frame(), None);
                } else {
                    session.refused(401);
                }
                session.closed(CLOSED);
                drop(session);
                assert_eq!(state(&app, "PA_1"), before, "{query}");
            }
        }
    }
    // Two tokens, of which another reader would take the other, don't even get that far.
    for query in [
        format!("{eve}&reconnect=1&sid=PA_1&{victim}"),
        format!("reconnect=1&sid=PA_1&{eve}&{}", victim.replace('_', "%5F")),
        format!("reconnect=1&sid=PA_1;{victim}&{eve}"),
        format!("reconnect=1&sid=PA_1&x=%zz&{eve}"),
        format!("reconnect=0&reconnect=1&sid=PA_1&{victim}"),
    ] {
        assert_eq!(open(&app, &query).err().unwrap().status(), 400, "{query}");
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(state(&app, "PA_1"), before);
    assert_eq!(app.cells().len(), 1);
}

#[tokio::test]
async fn nothing_changes_until_the_server_says_that_the_session_goes_on() {
    let app = app();
    let token = access("key", "anna", "r", "");
    let (mut first, _) = answered(&app, &token, &joined("r", "anna", "PA_1"));
    let before = state(&app, "PA_1");
    let resume = format!("reconnect=1&sid=PA_1&{token}");
    // Forged, or expired: LiveKit refuses it.
    let mut refused = open(&app, &resume)
        .unwrap_or_else(|f| panic!("{f}"))
        .session;
    refused.refused(401);
    refused.closed(CLOSED);
    // The server knows no such participant any more, and says so itself.
    let leave = proto::leave_response(proto::ACTION_RECONNECT, 6);
    let (mut gone, verdict) = answered(&app, &resume, &leave);
    assert_eq!(verdict, Verdict::Keep, "in LiveKit's own words");
    gone.closed(CLOSED);
    // Accepted, but not answered yet.
    let mut waiting = open(&app, &resume)
        .unwrap_or_else(|f| panic!("{f}"))
        .session;
    waiting.accepted(None);
    assert_eq!(state(&app, "PA_1"), before);
    first.closed(Closed {
        by: By::Client,
        code: None,
    });
    let verdict = waiting.server_frame(Frame::Binary(&resumed()));
    assert_eq!(verdict, Ok(Verdict::Keep));
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(app.cells().len(), 1, "it goes on");
    assert_eq!(waiting.id(), app.cells()[0].name);
    assert_eq!(app.cells()[0].lock().incarnation, 2);
}

#[tokio::test]
async fn another_key_and_other_grants_resume_the_same_session() {
    let app = app();
    let (_first, _) = answered(
        &app,
        &access("key", "anna", "r", r#","canUpdateOwnMetadata":true"#),
        &joined("r", "anna", "PA_1"),
    );
    // LiveKit signs the tokens that it refreshes with any of its keys.
    for (key, more, can) in [
        ("other", r#","canUpdateOwnMetadata":true"#, true),
        ("key", "", false),
        (
            "third",
            r#","canPublish":false,"canUpdateOwnMetadata":true"#,
            true,
        ),
    ] {
        let query = format!("reconnect=1&sid=PA_1&{}", access(key, "anna", "r", more));
        let (mut session, verdict) = answered(&app, &query, &resumed());
        assert_eq!(verdict, Verdict::Keep, "{key}");
        let verdict = session.server_frame(Frame::Binary(&update("anna", "PA_1")));
        assert_eq!(verdict, Ok(Verdict::Keep));
        let cells = app.cells();
        assert_eq!(cells.len(), 1);
        assert_eq!(cells[0].lock().can_update_own_metadata, can, "as it is now");
    }
}

#[tokio::test]
async fn a_server_that_begins_anew_gets_a_new_session() {
    let app = app();
    let token = access("key", "anna", "r", "");
    let (mut first, _) = answered(&app, &token, &joined("r", "anna", "PA_1"));
    let (second, _) = answered(
        &app,
        &format!("reconnect=1&sid=PA_1&{token}"),
        &joined("r", "anna", "PA_2"),
    );
    let known = app.registry().by_sid.get("PA_2").cloned().unwrap();
    assert_eq!(second.id(), known.name);
    assert_eq!(app.cells().len(), 2);
    first.closed(CLOSED);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(app.cells().len(), 1);
}

#[tokio::test]
async fn whoever_took_the_identity_over_is_not_resumed_by_the_one_before() {
    let app = app();
    let token = access("key", "anna", "r", "");
    let (_first, _) = answered(&app, &token, &joined("r", "anna", "PA_1"));
    let (_second, _) = answered(&app, &token, &joined("r", "anna", "PA_2"));
    let second = state(&app, "PA_2");
    // LiveKit resumes by identity, so it grants the first one the second one's participant; what it tells next is of that one.
    let query = format!("reconnect=1&sid=PA_1&{token}");
    let (mut session, verdict) = answered(&app, &query, &resumed());
    assert_eq!(verdict, Verdict::Keep);
    let verdict = session.server_frame(Frame::Binary(&update("anna", "PA_2")));
    assert_eq!(verdict, Ok(must_join_anew()));
    assert_eq!(state(&app, "PA_2"), second);
    assert!(!app.registry().by_sid.contains_key("PA_1"));
}

#[tokio::test]
async fn a_server_that_takes_the_client_for_another_ends_it() {
    let app = app();
    let token = access("key", "anna", "r", "");
    for (room, identity) in [("r", "eve"), ("other", "anna"), ("", "")] {
        let mut session = open(&app, &token).unwrap_or_else(|f| panic!("{f}")).session;
        session.accepted(None);
        let answer = session.server_frame(Frame::Binary(&joined(room, identity, "PA_1")));
        assert_eq!(answer.unwrap_err().what, What::BadAnswer);
        session.closed(CLOSED);
        assert!(app.cells().is_empty() && app.registry().by_sid.is_empty());
    }
    // Nor does a token that can't be read make a session.
    let mut session = open(&app, "access_token=x")
        .unwrap_or_else(|f| panic!("{f}"))
        .session;
    session.accepted(None);
    assert!(
        session
            .server_frame(Frame::Binary(&joined("", "", "PA_1")))
            .is_err()
    );
    session.closed(CLOSED);
    assert!(app.cells().is_empty());
}

#[tokio::test]
async fn a_resume_by_join_request_is_one_too() {
    let app = app();
    let token = access("key", "anna", "r", "");
    let (_first, _) = answered(&app, &token, &joined("r", "anna", "PA_1"));
    let mut request = bytes(9, b"PA_1");
    write_uint(&mut request, 7, 1);
    let wrapped = URL_SAFE.encode(bytes(2, &request)).replace('=', "%3D");
    let (session, _) = answered(&app, &format!("join_request={wrapped}&{token}"), &resumed());
    assert_eq!(app.cells().len(), 1);
    assert_eq!(session.id(), app.cells()[0].name);
    // Said twice, it could be read in two ways.
    let twice = [bytes(9, b"PA_2"), request].concat();
    let wrapped = URL_SAFE.encode(bytes(2, &twice)).replace('=', "%3D");
    let fault = open(&app, &format!("join_request={wrapped}&{token}")).err();
    assert_eq!(fault.unwrap().status(), 400);
}

/// A resume in the very moment in which the grace is over finds the session, or is told that it is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_resume_as_the_grace_ends_is_taken_or_refused() {
    let app = app();
    let token = access("key", "anna", "r", "");
    let mut resumes = Vec::new();
    for n in 0..2_000 {
        let sid = format!("PA_{n}");
        let (mut first, _) = answered(&app, &token, &joined("r", "anna", &sid));
        let query = format!("reconnect=1&sid={sid}&{token}");
        let mut second = open(&app, &query).unwrap_or_else(|f| panic!("{f}")).session;
        second.accepted(None);
        first.closed(CLOSED);
        // The end is on its way on another thread; that some come too late must not depend on how fast that is.
        if n % 100 == 99 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for _ in 0..n % 997 {
            std::hint::spin_loop();
        }
        let taken = second.server_frame(Frame::Binary(&resumed())).unwrap() == Verdict::Keep;
        resumes.push((second, taken));
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let live: Vec<String> = app.cells().iter().map(|cell| cell.name.clone()).collect();
    let taken: Vec<_> = resumes.iter().filter(|(_, taken)| *taken).collect();
    for (resume, _) in &taken {
        assert!(
            live.iter().any(|name| name == resume.id()),
            "it was taken and is ended"
        );
    }
    assert_eq!(live.len(), taken.len(), "who lives is in the registry");
    assert!(
        !taken.is_empty() && taken.len() < resumes.len(),
        "{} were in time",
        taken.len()
    );
}

/// That the grace is over and that the session ends is one thing: nobody can take it in between.
#[tokio::test]
async fn nobody_resumes_what_is_being_ended() {
    let app = app();
    let token = access("key", "anna", "r", "");
    let (_first, _) = answered(&app, &token, &joined("r", "anna", "PA_1"));
    let cell = app.cells()[0].clone();
    let query = format!("reconnect=1&sid=PA_1&{token}");
    let mut resume = open(&app, &query).unwrap_or_else(|f| panic!("{f}")).session;
    resume.accepted(None);
    let mut resuming = None;
    app.end_if(&cell, |_| {
        resuming = Some(std::thread::spawn(move || {
            resume.server_frame(Frame::Binary(&resumed()))
        }));
        std::thread::sleep(Duration::from_millis(100));
        true
    });
    assert_eq!(resuming.unwrap().join().unwrap(), Ok(must_join_anew()));
    assert!(cell.lock().gone && app.cells().is_empty());
}

/// LiveKit has a participant once: nobody comes back to what she left behind, and it takes no place from others.
#[tokio::test]
async fn what_a_participant_left_behind_ends_when_she_joins_anew() {
    let app = app();
    let places = crate::signal::Quota::new(8);
    let join = |identity: &str, sid: &str| {
        let query = access("key", identity, "r", "");
        let mut session = open(&app, &query).unwrap_or_else(|f| panic!("{f}")).session;
        session.accepted(Some(places.take().unwrap()));
        let frame = joined("r", identity, sid);
        session.server_frame(Frame::Binary(&frame)).unwrap();
        session
    };
    let known = |sid: &str| app.registry().by_sid.contains_key(sid);
    let mut ben = join("ben", "PA_9");
    ben.closed(CLOSED);
    let mut first = join("anna", "PA_1");
    first.closed(CLOSED);
    drop(first);
    // She may come back, and so her session keeps its place.
    assert_eq!((known("PA_1"), places.free()), (true, 6));
    let mut second = join("anna", "PA_2");
    assert_eq!(
        (known("PA_1"), known("PA_2"), known("PA_9")),
        (false, true, true)
    );
    assert_eq!(places.free(), 6);
    // One that is connected still is LiveKit's to end.
    let _third = join("anna", "PA_3");
    assert_eq!((known("PA_2"), places.free()), (true, 5));
    second.closed(CLOSED);
    assert!(known("PA_3"));
}

/// Whoever leaves before she is told her sid can't come back by it.
#[tokio::test]
async fn a_session_whose_sid_nobody_knows_has_no_grace() {
    let app = app();
    let query = access("key", "anna", "r", "");
    let mut session = open(&app, &query).unwrap_or_else(|f| panic!("{f}")).session;
    session.accepted(None);
    session.closed(CLOSED);
    assert_eq!(app.cells().len(), 1);
    tokio::time::sleep(LEFT_GRACE + Duration::from_millis(500)).await;
    assert_eq!(app.cells().len(), 0);
}

/// LiveKit ends whomever the path names, at the wish of any WHIP participant.
#[tokio::test]
async fn a_whip_participant_ends_nobody_else() {
    let app = app();
    let (_anna, _) = answered(
        &app,
        &access("key", "anna", "r", ""),
        &joined("r", "anna", "PA_1"),
    );
    let delete = |identity: &str, resource: &str| {
        let query = access("key", identity, "r", "");
        let opening = Opening {
            path: "/whip/v1",
            query: &query,
            headers: &HeaderMap::new(),
            peer: "127.0.0.1:9".parse().unwrap(),
        };
        let message = WhipMessage::Delete { resource };
        Door(app.clone()).whip(&opening, message).map(drop)
    };
    assert_eq!(delete("eve", "PA_1").unwrap_err().status(), 404);
    // Her own, and one that isn't here, are the server's to judge.
    delete("anna", "PA_1").unwrap_or_else(|f| panic!("{f}"));
    delete("eve", "PA_2").unwrap_or_else(|f| panic!("{f}"));
}
