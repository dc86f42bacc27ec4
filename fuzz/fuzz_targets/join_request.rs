//! The query of a signalling request: base64, gzip and protobuf from strangers.
#![cfg_attr(fuzzing, no_main)]

use auralink_fuzz::fuzz_target;
use auralink_proto::asked::{Asked, Request};
use auralink_proto::description::Target;
use auralink_proto::signal::{RequestVisitor, SdpSlot, edit_join_request};

struct Visitor(Option<&'static str>);

impl RequestVisitor for Visitor {
    fn sdp(&mut self, _: SdpSlot, _: &str) -> Result<Option<String>, String> {
        Ok(self.0.map(str::to_owned))
    }
    fn trickle(&mut self, _: Target, _: &str) -> bool {
        true
    }
}

fuzz_target!(|query: &str| {
    let _ = Asked::read(&Request::of(query));
    let _ = Asked::read(&Request::of(&format!("join_request={query}")));
    if let Ok((new, _)) = edit_join_request(query, &mut Visitor(None)) {
        assert_eq!(new, None, "nothing was to change");
    }
    let edited = edit_join_request(query, &mut Visitor(Some("v=0 new")));
    if let Ok((Some(new), info)) = edited {
        let again = edit_join_request(&new, &mut Visitor(Some("v=0 new")));
        let (_, info_again) = again.expect("what was written can be read");
        assert_eq!(info, info_again);
    }
});
