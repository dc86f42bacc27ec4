//! The engine as a media worker sees it: real speech, real models, and models that misbehave.

mod bundles;
mod call;
mod codecs;
pub(crate) use call::group;
mod faults;
mod recode;
mod steps;
