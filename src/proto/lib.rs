//! The sans-IO core of AuraLink: every protocol and decision as pure state machines. Time and
//! randomness are passed in; nothing here opens a socket, reads a clock or spawns a task.

pub mod aic;
pub mod asked;
pub mod binding;
pub mod coding;
pub mod description;
pub mod dtls;
pub mod flow;
pub mod framing;
pub mod hop;
pub mod ice;
pub mod ladder;
pub mod leg;
pub mod packet;
mod past;
pub mod policy;
pub mod query;
pub mod red;
pub mod relay;
mod rules;
pub mod sdp;
pub mod session;
pub mod signal;
pub mod srtp;
mod steering;
pub mod stun;
pub mod token;
mod tracks;
