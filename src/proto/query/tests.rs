#![allow(clippy::unwrap_used, clippy::panic)]
use super::*;

/// What Go makes of queries: `(cd tests/clients/go && go run ./query > ../../golden/query.jsonl)`, Go 1.26.
const GO: &str = include_str!("../../../tests/golden/query.jsonl");

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn what_is_read_is_what_go_reads() {
    let (mut read, mut refused) = (0, 0);
    for line in GO.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        let text = line["query"].as_str().unwrap();
        let query = match Query::parse(text) {
            Ok(query) => query,
            Err(why) => {
                // What Go leaves out is the only thing that is refused.
                assert_eq!(line["error"], true, "{text}: {why}");
                refused += 1;
                continue;
            }
        };
        assert_eq!(line["error"], false, "{text}");
        for name in ["sid", "access_token"] {
            let theirs = line[name].as_array().unwrap();
            match query.find(name) {
                Ok(ours) => {
                    let ours: Vec<String> = ours.iter().map(|pair| hex(&pair.value)).collect();
                    assert_eq!(serde_json::json!(ours), line[name], "{text}");
                    read += ours.len();
                }
                Err(why) => {
                    assert_eq!(why, Unclear::Repeated(name), "{text}");
                    assert!(theirs.len() > 1, "{text}");
                    refused += 1;
                }
            }
        }
    }
    assert!(read > 30 && refused > 100, "{read} {refused}");
}

#[test]
fn a_value_is_exchanged_where_it_stands() {
    let query = Query::parse("a=%3D&join%5Frequest=x%3D%3D&&b").unwrap();
    assert_eq!(query.get("join_request"), Ok(Some("x==")));
    let new = query.with("join_request", "y%3D").unwrap();
    assert_eq!(new, "a=%3D&join%5Frequest=y%3D&&b");
    assert_eq!(
        query.with("c", "z").unwrap(),
        "a=%3D&join%5Frequest=x%3D%3D&&b"
    );
    assert_eq!(query.get("b"), Ok(None), "empty is as good as absent");
    let bytes = Query::parse("sid=%ff").unwrap();
    assert_eq!(bytes.get("sid"), Err(Unclear::NotUtf8("sid")));
    // A name by itself, which the fuzzer found.
    let query = Query::parse("a=1&join%5Frequest&b").unwrap();
    let new = query.with("join_request", "y%3D").unwrap();
    assert_eq!(new, "a=1&join%5Frequest=y%3D&b");
    assert_eq!(query.with("b", "z").unwrap(), "a=1&join%5Frequest&b=z");
}

#[test]
fn a_query_of_many_parameters_is_refused_at_once() {
    assert!(Query::parse(&"a&".repeat(MAX_PAIRS)).is_ok());
    assert!(Query::parse(&"&".repeat(65_000)).is_ok());
    let many = Query::parse(&"a&".repeat(32_000)).map(|query| query.pairs.len());
    assert_eq!(many, Err(Unclear::Pairs));
}
