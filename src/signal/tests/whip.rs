//! WHIP requests: their bodies are rewritten both ways, all else passes.

use super::*;

fn post(target: &str, body: &str) -> String {
    format!(
        "POST {target} HTTP/1.1\r\nHost: s\r\nAuthorization: Bearer t\r\nContent-Type: application/sdp\r\n\
         Accept-Encoding: gzip\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}

#[tokio::test]
async fn offer_and_answer_are_rewritten() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let answer = sidecar.raw(&post("/whip/v1", "offer")).await;
    assert!(answer.starts_with("HTTP/1.1 201 Created\r\n"), "{answer}");
    for line in [
        "location: /whip/v1/PA_1\r\n",
        "etag: abcd\r\n",
        "content-length: 16\r\n",
    ] {
        assert!(
            answer.to_lowercase().contains(&line.to_lowercase()),
            "{line} is missing in {answer}"
        );
    }
    assert!(answer.ends_with("\r\n\r\nrewritten answer"), "{answer}");
    let asked = origin.told.all();
    for line in [
        "POST /whip/v1",
        "content-type: application/sdp",
        "content-length: 14",
        "sdp offer and more",
    ] {
        assert!(
            asked.iter().any(|l| l == line),
            "{line} is missing in {asked:#?}"
        );
    }
    // A compressed answer could not be read.
    assert_eq!(origin.told.count("accept-encoding"), 0);
    assert_eq!(
        sidecar.told.all(),
        [
            r#"whip Some("Bearer t") Offer("offer")"#,
            r#"answered Some("PA_1") "answer" with a place"#
        ]
    );
}

#[tokio::test]
async fn another_spelling_of_the_path_is_no_way_around() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    for target in [
        "/%77hip/v1",
        "/whip//v1/",
        "/livekit/sfu/whip/v1",
        "/whip%2Fv1?bad",
    ] {
        sidecar.raw(&post(target, "offer")).await;
    }
    assert_eq!(sidecar.told.count("whip"), 4, "{:?}", sidecar.told.all());
    // What only looks like it passes.
    sidecar.get("/whip/v1/PA_1").await;
    sidecar.raw(&post("/whip/v2", "offer")).await;
    assert_eq!(sidecar.told.count("whip"), 4);
}

#[tokio::test]
async fn fragments_and_the_end_find_their_session() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    for (if_match, restart) in [("abcd", false), ("*", true)] {
        let answer = sidecar
            .raw(&format!(
                "PATCH /whip/v1/PA_1 HTTP/1.1\r\nHost: s\r\nIf-Match: {if_match}\r\nContent-Length: 6\r\n\
                 Connection: close\r\n\r\ntheirs"
            ))
            .await;
        // 204 has no Content-Length (RFC 9110 section 8.6).
        assert!(
            answer.starts_with("HTTP/1.1 204") && !answer.contains("ontent-"),
            "{answer}"
        );
        let told = format!(r#"whip None Fragment {{ resource: "PA_1", restart: {restart}"#);
        sidecar.told.wait(&told).await;
    }
    assert_eq!(origin.told.count("sdp ours"), 2);
    let answer = sidecar
        .raw("DELETE /whip/v1/PA_1 HTTP/1.1\r\nHost: s\r\nConnection: close\r\n\r\n")
        .await;
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    sidecar
        .told
        .wait(r#"whip None Delete { resource: "PA_1" }"#)
        .await;
    assert_eq!(sidecar.told.count(r#"answered None "" without a place"#), 3);
}

#[tokio::test]
async fn refusals_make_no_session() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::before(&origin).await;
    let answer = sidecar.raw(&post("/whip/v1?bad", "offer")).await;
    assert!(
        answer.starts_with("HTTP/1.1 401") && answer.ends_with("invalid token\n"),
        "{answer}"
    );
    let answer = sidecar.raw(&post("/whip/v1", "undecodable")).await;
    assert!(
        answer.starts_with("HTTP/1.1 400") && answer.contains(r#""what":"undecodable""#),
        "{answer}"
    );
    let long = "o".repeat((256 << 10) + 1);
    let answer = sidecar.raw(&post("/whip/v1", &long)).await;
    assert!(
        answer.starts_with("HTTP/1.1 413") && answer.contains(r#""what":"too_large""#),
        "{answer}"
    );
    sidecar.drain.send_replace(Drain::Draining);
    let answer = sidecar.raw(&post("/whip/v1", "offer")).await;
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.contains(r#""what":"draining""#),
        "{answer}"
    );
    assert_eq!(sidecar.told.count("answered"), 0);
    assert_eq!(origin.told.count("sdp"), 0);
}

#[tokio::test]
async fn sessions_are_bounded() {
    let origin = Origin::start().await;
    let sidecar = Sidecar::start(&origin.url(), |config| config.limits.sessions = 0).await;
    let answer = sidecar.raw(&post("/whip/v1", "offer")).await;
    assert!(
        answer.starts_with("HTTP/1.1 503") && answer.contains(r#""what":"busy""#),
        "{answer}"
    );
    assert_eq!(origin.told.count("POST"), 0);
}
