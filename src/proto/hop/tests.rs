#![allow(clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)]
