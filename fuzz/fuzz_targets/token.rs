//! Tokens of strangers: where they stand in a request, and what they claim.
#![cfg_attr(fuzzing, no_main)]

use auralink_fuzz::fuzz_target;
use auralink_proto::asked::{Request, whip_claims};
use auralink_proto::query::Unclear;
use auralink_proto::token::claims;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

fn token(payload: &str) -> String {
    format!("x.{}.y", URL_SAFE_NO_PAD.encode(payload))
}

fuzz_target!(|text: &str| {
    let _ = claims(text);
    let read = claims(&token(text));
    // One that is a little longer is read too.
    let json = serde_json::from_str::<serde_json::Value>(text).ok();
    let json = json.filter(|_| text.len() < 40_000);
    if let (Ok(Some(claims)), Some(json)) = (&read, json) {
        // Never more than is claimed, by a reader that knows nothing of ours: of the names in their one spelling.
        let said = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
        let subject = Some(said(&json["sub"])).filter(|subject| !subject.is_empty());
        assert_eq!(claims.identity, subject.unwrap_or(said(&json["jti"])));
        assert_eq!(claims.api_key, said(&json["iss"]));
        assert_eq!(claims.room, said(&json["video"]["room"]));
        assert_eq!(
            claims.can_update_own_metadata,
            json["video"]["canUpdateOwnMetadata"] == true
        );
        // Another spelling of one that matters makes it unclear, wherever it stands.
        if let Some(rest) = text.trim_start().strip_prefix('{')
            && json.get("sub").is_some()
        {
            for second in [r#""Sub":"eve","#, "\"\u{17f}ub\":null,", r#""sub":"eve","#] {
                let twice = claims_of(&format!("{{{second}{rest}"));
                assert_eq!(twice, Err(Unclear::Claim("sub")));
            }
        }
    }
    // The same token says the same wherever it stands.
    let (token, bearer) = (token(text), format!("Bearer {}", token(text)));
    let query = format!("access%5Ftoken={token}");
    assert_eq!(whip_claims(&Request::of(&query)), read);
    let request = Request {
        query: "",
        authorization: &[bearer.as_bytes()],
        content_type: &[],
    };
    assert_eq!(whip_claims(&request), read);
    let _ = whip_claims(&Request::of(text));
});

fn claims_of(payload: &str) -> Result<Option<auralink_proto::token::Claims>, Unclear> {
    claims(&token(payload))
}
