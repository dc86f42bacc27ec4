//! Whom the stock server takes a client for, and whom the sidecar does: in any spelling the same, or nobody gets in.

use crate::client::{Client, Kind};
use crate::harness::{Load, Trial, array, string, wait_for};
use crate::http::{WebSocket, grant, token};
use crate::servers::{Options, Stack};
use auralink_proto::description::Target;
use auralink_proto::signal::{Frame, Join, JoinEdit, ResponseVisitor, SdpSlot, edit_response};
use serde_json::json;
use std::collections::HashMap;
use std::time::Duration;

/// Keeps a JoinResponse.
#[derive(Default)]
struct Joined(Option<Join>);

impl ResponseVisitor for Joined {
    fn sdp(
        &mut self,
        _: SdpSlot,
        _: &str,
        _: &[(String, String)],
    ) -> Result<Option<String>, String> {
        Ok(None)
    }
    fn trickle(&mut self, _: Target, _: &str) -> bool {
        true
    }
    fn join(&mut self, join: Join) -> JoinEdit {
        self.0 = Some(join);
        JoinEdit::default()
    }
}

/// The status, and where it is 101 what LiveKit's first message says of a join.
fn ask(
    port: u16,
    target: &str,
    headers: &[(&str, &str)],
) -> (u16, Option<Join>, Option<WebSocket>) {
    match WebSocket::open_with(port, target, headers) {
        Err(answer) => (answer.status, None, None),
        Ok(mut socket) => {
            let mut joined = Joined::default();
            if let Some((2, bytes)) = socket.next() {
                edit_response(Frame::Binary(&bytes), &mut joined).unwrap();
            }
            (101, joined.0, Some(socket))
        }
    }
}

#[test]
fn livekit_and_the_sidecar_read_the_same_request() {
    let trial = Trial::new("livekit_and_the_sidecar_read_the_same_request", Load::Light);
    let stack = Stack::own(
        &trial,
        Options {
            resume_grace: "0s",
            ..Options::default()
        },
    );
    let (port, direct) = (stack.sidecar.port, stack.livekit.port);
    let (room, other) = (trial.room("lean"), trial.room("off"));
    let anna = token(&room, "anna");
    let eve = token(&other, "eve");
    let forged = grant(
        json!({"room": other, "roomJoin": true}),
        "eve",
        &"x".repeat(40),
    );
    let escaped: String = anna.bytes().map(|byte| format!("%{byte:02x}")).collect();
    let (bearer, bearer_eve, bearer_forged) = (
        format!("Bearer {anna}"),
        format!("Bearer {eve}"),
        format!("Bearer {forged}"),
    );
    let form = "application/x-www-form-urlencoded";
    // Query, header fields, whether it is refused because it could be read in two ways.
    type Case<'a> = (String, Vec<(&'a str, &'a str)>, bool);
    let plain = |query: String| -> Case<'_> { (query, vec![], false) };
    let unclear = |query: String| -> Case<'_> { (query, vec![], true) };
    let cases: Vec<Case<'_>> = vec![
        plain(format!("access_token={anna}")),
        plain(format!("access_token={eve}")),
        plain(format!("access_token={forged}")),
        plain(String::new()),
        plain("access_token=".into()),
        plain("access_token=x.y.z".into()),
        plain(format!("access%5Ftoken={anna}")),
        plain(format!("%61ccess_token={anna}")),
        plain(format!("access_token={escaped}")),
        plain(format!("ACCESS_TOKEN={anna}")),
        plain(format!("access+token={anna}")),
        plain(format!("access_token={anna}+")),
        plain(format!("access_token={anna}%0A")),
        plain(format!("access_token={anna}%20")),
        plain(format!("access_token={anna}=")),
        plain(format!("access_token={anna}.x")),
        plain(format!("&&access_token={anna}&&x&=y")),
        plain(format!("x=1&access_token={anna}&x=2")),
        plain(format!("access_token%3D{forged}&access_token={anna}")),
        plain(format!("access_token={anna}&publish=cam")),
        plain(format!("access_token={anna}&p%75blish=c%23m+1")),
        plain(format!("access_token={anna}&publish=")),
        plain(format!("access_token={anna}&sid=PA_1&reconnect=0")),
        plain(format!("access_token={anna}&sid=PA_1&reconnect=True")),
        plain(format!("access_token={anna}&join_request=")),
        (String::new(), vec![("Authorization", &bearer)], false),
        (String::new(), vec![("authorization", &bearer)], false),
        (
            format!("access_token={eve}"),
            vec![("Authorization", &bearer)],
            false,
        ),
        (
            format!("access_token={anna}"),
            vec![("Authorization", &bearer_eve)],
            false,
        ),
        (
            format!("access_token={anna}"),
            vec![("Authorization", &bearer_forged)],
            false,
        ),
        (
            format!("access_token={anna}"),
            vec![("Authorization", "")],
            false,
        ),
        (
            format!("access_token={anna}"),
            vec![("Authorization", "Basic x")],
            false,
        ),
        (
            format!("access_token={anna}"),
            vec![("Authorization", "bearer x")],
            false,
        ),
        (
            format!("access_token={anna}"),
            vec![("Authorization", "Bearer")],
            false,
        ),
        (
            format!("access_token={anna}"),
            vec![("Cookie", "access_token=x")],
            false,
        ),
        unclear(format!("access_token={anna}&access_token={forged}")),
        unclear(format!("access%5Ftoken={anna}&access_token={forged}")),
        unclear(format!("access_token={forged}&access_token={anna}")),
        unclear(format!("access_token={anna};access_token={forged}")),
        unclear(format!("access_token={forged};&access_token={anna}")),
        unclear(format!("access_token={forged}%zz&access_token={anna}")),
        unclear(format!("access_token={anna}&x=%")),
        unclear(format!("access_token={anna}&publish=a&publish=b")),
        unclear(format!(
            "access_token={anna}&reconnect=0&reconnect=1&sid=PA_1"
        )),
        (
            String::new(),
            vec![("Authorization", &bearer), ("Authorization", &bearer_eve)],
            true,
        ),
        (
            format!("access_token={anna}"),
            vec![("Content-Type", form)],
            true,
        ),
        (
            format!("access_token={anna}"),
            vec![("Content-Type", "Multipart/Form-Data; boundary=x")],
            true,
        ),
    ];
    let mut hashes: HashMap<String, String> = HashMap::new();
    let mut joins = 0;
    for (query, headers, unclear) in &cases {
        let target = format!("/rtc?protocol=15&{query}");
        let (theirs, their_join, socket) = ask(direct, &target, headers);
        drop(socket);
        let (status, join, socket) = ask(port, &target, headers);
        if *unclear {
            assert_eq!(status, 400, "{target} {headers:?}");
            continue;
        }
        assert_eq!(status, theirs, "{target} {headers:?}");
        let who = |join: &Option<Join>| {
            let join = join.as_ref()?;
            Some((join.room_name.clone(), join.identity.clone()))
        };
        assert_eq!(who(&join), who(&their_join), "{target} {headers:?}");
        let Some(join) = join else {
            assert!(stack.sidecar.open_sessions().is_empty(), "{target}");
            continue;
        };
        joins += 1;
        // What it chose its policy by, and what it shows of it.
        let status = stack.sidecar.status();
        let session = array(&status, "/sessions")
            .last()
            .expect("a session")
            .clone();
        assert_eq!(string(&session, "/room"), join.room_name, "{target}");
        let mode = if join.room_name == room {
            "lean"
        } else {
            "off"
        };
        assert_eq!(string(&session, "/mode"), mode, "{target}");
        let sid = string(&session, "/participant_sid");
        assert!(
            sid.starts_with("PA_") && sid == join.participant_sid,
            "{target}: {sid}"
        );
        let hash = string(&session, "/identity_hash").to_owned();
        let known = hashes
            .entry(join.identity.clone())
            .or_insert_with(|| hash.clone());
        assert_eq!(
            *known, hash,
            "{target}: believed to be another than {}",
            join.identity
        );
        drop(socket);
        wait_for("the session to end", Duration::from_secs(15), || {
            stack.sidecar.open_sessions().is_empty().then_some(())
        });
    }
    assert!(joins > 15 && hashes.len() == 4, "{joins} {hashes:?}");
}

/// Every participant of a room knows the others' sids. One with a good token of her own tries them, while the others talk.
#[test]
fn a_sid_of_anothers_ends_and_resumes_nothing() {
    let trial = Trial::new("a_sid_of_anothers_ends_and_resumes_nothing", Load::Light);
    let stack = Stack::own(
        &trial,
        Options {
            resume_grace: "1s",
            ..Options::default()
        },
    );
    let port = stack.sidecar.port;
    let room = trial.room("lean");
    let talk = |identity: &str, hz| {
        let client = Client::new(Kind::Go, &stack.sidecar.url(), &room, identity);
        client.tone(hz).seconds(9.0).spawn(&trial)
    };
    let (anna, ben) = (talk("anna", 440.0), talk("ben", 620.0));
    wait_for("anna and ben", Duration::from_secs(20), || {
        (stack.sidecar.sessions_in(&room) == 2).then_some(())
    });
    std::thread::sleep(Duration::from_secs(2));
    let mallory = token(&room, "mallory");
    let (_, join, own) = ask(
        port,
        &format!("/rtc?protocol=15&access_token={mallory}"),
        &[],
    );
    let others = join.unwrap().other_participants;
    let victim = others
        .iter()
        .find(|other| other.identity == "anna")
        .unwrap();
    let forged = grant(
        json!({"room": room, "roomJoin": true}),
        "anna",
        &"x".repeat(40),
    );
    let sid = &victim.sid;
    for attack in [
        format!("access_token={mallory}&reconnect=1&sid={sid}"),
        format!("access_token={forged}&reconnect=1&sid={sid}"),
        format!("access%5Ftoken={mallory}&access_token={forged}&reconnect=1&sid={sid}"),
        format!("access_token={forged};&access_token={mallory}&reconnect=1&sid={sid}"),
        format!("access_token={mallory}&reconnect=1&s%69d={sid}"),
    ] {
        let (_, _, socket) = ask(port, &format!("/rtc?protocol=15&{attack}"), &[]);
        drop(socket);
        std::thread::sleep(Duration::from_millis(300));
    }
    drop(own);
    let (anna, ben) = (anna.finish(), ben.finish());
    anna.received(&ben);
    ben.received(&anna);
    // Anna and Ben joined once, and nobody was taken for a resume of theirs.
    let joins = stack.sidecar.joins(&room);
    assert!(
        joins.iter().all(|join| join["resumed"] == false),
        "{joins:?}"
    );
    assert_eq!(joins.len(), 3, "{joins:?}");
    stack.sidecar.wait_empty(&room, Duration::from_secs(25));
    assert_eq!(stack.sidecar.complaints(), Vec::<String>::new());
}
