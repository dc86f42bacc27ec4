//! The `auralink` command.
fn main() {
    tracing_subscriber::fmt().with_env_filter("debug").init();
    let path = std::env::args().nth(2).unwrap_or_default();
    let loaded = auralink::config::load(std::path::Path::new(&path)).unwrap();
    let rt = tokio::runtime::Runtime::new().unwrap();
    rt.block_on(auralink::run(loaded.settings, std::path::Path::new(&path))).unwrap();
}
