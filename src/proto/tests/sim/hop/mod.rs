//! A stream over an AIC hop: packer, a network that loses, doubles and reorders, restorer, and toy
//! engines on both sides that carry which original it was instead of speech.

mod engine;
mod link;
mod scenarios;
mod source;
mod streams;
