#![allow(clippy::unwrap_used, clippy::panic)]
use super::*;
use base64::Engine;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};

fn token(identity: &str) -> String {
    let claims = format!(r#"{{"iss":"key","sub":"{identity}","video":{{"room":"r"}}}}"#);
    format!("e30.{}.x", URL_SAFE_NO_PAD.encode(claims))
}

fn identity(asked: &Result<Asked<'_>, SignalError>) -> String {
    let asked = asked.as_ref().unwrap();
    asked
        .claims()
        .map(|claims| claims.identity.clone())
        .unwrap_or_default()
}

fn unclear<T: std::fmt::Debug>(result: Result<T, SignalError>) -> Unclear {
    match result {
        Err(SignalError::Unclear(unclear)) => unclear,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_token_is_the_one_that_livekit_checks() {
    let (anna, eve) = (token("anna"), token("eve"));
    let bearer = |token: &str| format!("Bearer {token}").into_bytes();
    let of = |query: &str, headers: &[&[u8]]| {
        let request = Request {
            query,
            authorization: headers,
            content_type: &[],
        };
        identity(&Asked::read(&request))
    };
    let query = format!("access%5Ftoken={anna}");
    assert_eq!(of(&query, &[]), "anna");
    assert_eq!(of(&query, &[b""]), "anna", "an empty header says nothing");
    assert_eq!(of(&query, &[&bearer(&eve)]), "eve");
    // LiveKit refuses these, whatever the query says.
    for header in [
        &b"Bearer"[..],
        b"Basic x",
        b"bearer x",
        b"Bearer \xff",
        b"Bearer ",
    ] {
        assert_eq!(of(&query, &[header]), "", "{header:?}");
    }
    let twice = format!("access%5Ftoken={anna}&access_token={eve}");
    assert_eq!(
        unclear(Asked::read(&Request::of(&twice))),
        Unclear::Repeated("access_token")
    );
    let headers: [&[u8]; 2] = [&bearer(&anna), &bearer(&eve)];
    let request = Request {
        query: "",
        authorization: &headers,
        content_type: &[],
    };
    assert_eq!(unclear(Asked::read(&request)), Unclear::Authorization);
    assert_eq!(whip_claims(&request), Err(Unclear::Authorization));
}

#[test]
fn a_form_for_a_body_is_refused() {
    for (value, refused) in [
        ("application/x-www-form-urlencoded", true),
        (" Multipart/Form-Data ; boundary=x", true),
        ("application/sdp", false),
        ("text/plain; multipart/form-data", false),
    ] {
        let types = [value.as_bytes()];
        let request = Request {
            query: "",
            authorization: &[],
            content_type: &types,
        };
        let result = whip_claims(&request);
        assert_eq!(result == Err(Unclear::Form), refused, "{value}");
    }
}

#[test]
fn a_participant_that_only_publishes_has_an_identity_of_its_own() {
    let query = format!("access_token={}&publish=%63am", token("anna"));
    assert_eq!(identity(&Asked::read(&Request::of(&query))), "anna#cam");
    // With a join_request LiveKit reads none of the others.
    let wrapped = URL_SAFE.encode([8, 0]).replace('=', "%3D");
    let query = format!("{query}&reconnect=1&sid=PA_1&join_request={wrapped}");
    let asked = Asked::read(&Request::of(&query));
    assert_eq!(identity(&asked), "anna");
    assert_eq!(asked.unwrap().resumes(), None);
    let claims = whip_claims(&Request::of(&query)).unwrap().unwrap();
    assert_eq!(claims.identity, "anna");
}

#[test]
fn who_resumes_what_is_said_once() {
    for (query, resumes) in [
        ("", None),
        ("sid=PA_1", None),
        ("reconnect=0&sid=PA_1", None),
        ("reconnect=True&sid=PA_1", None),
        ("reconnect=1&sid=PA_1", Some("PA_1")),
        ("reconnect=true&s%69d=PA%5f1", Some("PA_1")),
        ("reconnect=1", Some("")),
        ("join_request=&reconnect=1&sid=PA_1", Some("PA_1")),
    ] {
        assert_eq!(
            Asked::read(&Request::of(query)).unwrap().resumes(),
            resumes,
            "{query}"
        );
    }
    for (query, name) in [
        ("reconnect=0&reconnect=1&sid=PA_1", "reconnect"),
        ("reconnect=1&sid=PA_1&s%69d=PA_2", "sid"),
        ("join_request=CAA%3D&join%5frequest=CAA%3D", "join_request"),
        ("publish=a&publish=b", "publish"),
        // Those that don't count as well: others may count them.
        ("join_request=CAA%3D&sid=a&sid=b", "sid"),
    ] {
        assert_eq!(
            unclear(Asked::read(&Request::of(query))),
            Unclear::Repeated(name),
            "{query}"
        );
    }
    for (query, why) in [
        ("reconnect=1;sid=PA_1", Unclear::Semicolon),
        ("reconnect=%zz&sid=PA_1", Unclear::Escape),
        ("reconnect=1&sid=%ff", Unclear::NotUtf8("sid")),
    ] {
        assert_eq!(unclear(Asked::read(&Request::of(query))), why, "{query}");
    }
}
