//! The configuration file: any text is taken or refused in words.
#![cfg_attr(fuzzing, no_main)]

use auralink::config::Settings;
use auralink_fuzz::fuzz_target;

fuzz_target!(|text: &str| {
    match Settings::parse(text) {
        Ok(loaded) => drop(loaded),
        Err(problems) => assert!(!problems.to_string().is_empty()),
    }
});
