//! What the tests of the registry share.
#![allow(clippy::unwrap_used)]

use super::App;
use crate::config::{Live, Settings};
use crate::media::{Media, MediaConfig};
use auralink_engine::{Engine, EngineConfig};
use auralink_proto::dtls::Identity;
use std::sync::Arc;
use std::time::Duration;

/// A registry over media on loopback, where sessions end as soon as their signalling does.
pub(super) fn app() -> Arc<App> {
    let identity = Identity::generate().unwrap();
    let engine = Arc::new(Engine::start(EngineConfig::default()).unwrap());
    let (events, from_media) = tokio::sync::mpsc::unbounded_channel();
    let config = MediaConfig {
        ips: vec!["127.0.0.1".parse().unwrap()],
        external: Vec::new(),
        udp_port: 0,
        tcp_port: None,
        workers: 1,
        realtime: false,
        consent_timeout: Duration::from_secs(30),
    };
    let media = Arc::new(Media::start(config, &identity, engine, events).unwrap());
    let text =
        "upstream: http://127.0.0.1:9\nmedia: { ip: 127.0.0.1 }\nsession: { resume_grace: 0s }\n";
    let live = Live::new(Settings::parse(text).unwrap(), "no.yaml");
    let runtime = tokio::runtime::Handle::current();
    let app = App::new(media, live, identity.fingerprint().to_owned(), runtime).unwrap();
    tokio::spawn(app.clone().follow(from_media));
    app
}
