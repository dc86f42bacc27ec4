//! The configuration file: any text is taken or refused in words.
#![no_main]

use auralink::config::Settings;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    match Settings::parse(text) {
        Ok(loaded) => drop(loaded),
        Err(problems) => assert!(!problems.to_string().is_empty()),
    }
});
