//! The test vectors of RFC 3711 appendix B and of RFC 7714 sections 16 and 17.

#![allow(clippy::unwrap_used)]

use super::cipher::{Cipher, Cm, Derivation, Gcm};

fn hex<const N: usize>(text: &str) -> [u8; N] {
    bytes(text).try_into().unwrap()
}

fn bytes(text: &str) -> Vec<u8> {
    let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
    digits
        .chunks(2)
        .map(|pair| u8::try_from(pair[0] << 4 | pair[1]).unwrap())
        .collect()
}

/// RFC 3711 appendix B.2.
#[test]
fn the_keystream_of_aes_cm() {
    let cm = Cm::new(
        &hex("2B7E151628AED2A6ABF7158809CF4F3C"),
        &[0; 20],
        &hex("F0F1F2F3F4F5F6F7F8F9FAFBFCFD"),
    )
    .unwrap();
    let mut stream = vec![0; 0xff02 * 16];
    cm.apply(0, 0, &mut stream);
    for (block, wanted) in [
        (0, "E03EAD0935C95E80E166B16DD92B4EB4"),
        (1, "D23513162B02D0F72A43A2FE4A5F97AB"),
        (2, "41E95B3BB0A2E8DD477901E4FCA894C0"),
        (0xfeff, "EC8CDF7398607CB0F2D21675EA9EA1E4"),
        (0xff00, "362B7C3C6773516318A077D7FC5073AE"),
        (0xff01, "6A2CC3787889374FBEB4C81B17BA6C44"),
    ] {
        assert_eq!(stream[block * 16..][..16], hex::<16>(wanted), "{block:#x}");
    }
}

/// RFC 3711 appendix B.3.
#[test]
fn the_key_derivation() {
    let keys = Derivation::new(
        &hex::<16>("E1F97A0D3E018BE0D64FA32C06DE4139"),
        &hex::<14>("0EC675AD498AFEEBB6960B3AABE6"),
    )
    .unwrap();
    assert_eq!(
        keys.derive(0),
        hex::<16>("C61E7A93744F39EE10734AFE3FF7A087")
    );
    assert_eq!(keys.derive(2), hex::<14>("30CBBC08863D8C85D49DB34A9AE1"));
    assert_eq!(
        keys.derive(1),
        hex::<94>(
            "CEBE321F6FF7716B6FD4AB49AF256A156D38BAA48F0A0ACF3C34E2359E6CDBCEE049646C43D9327AD175578EF72270986371C10C9A369AC2\
             F94A8C5FBCDDDC256D6E919A48B610EF17C2041E474035766B68642C59BBFC2F34DB60DBDFB2"
        )
    );
}

fn gcm() -> Cipher {
    // The vectors are of session keys.
    let key = || Gcm::new(&hex("000102030405060708090a0b0c0d0e0f"), *b"Quid pro quo").unwrap();
    Cipher::Gcm(Box::new([key(), key()]))
}

/// RFC 7714 section 16.1.
#[test]
fn srtp_of_aes_gcm() {
    let plain = bytes(
        "8040f17b 8041f8d3 5501a0b2 47616c6c 69612065 7374206f 6d6e6973 20646976 69736120 696e2070 61727465 73207472 6573",
    );
    let wanted = bytes(
        "8040f17b 8041f8d3 5501a0b2 f24de3a3 fb34de6c acba861c 9d7e4bca be633bd5 0d294e6f 42a5f47a 51c7d19b 36de3adf 8833
         899d7f27 beb16a91 52cf765e e4390cce",
    );
    let mut packet = plain.clone();
    assert!(gcm().seal_rtp(&mut packet, 12, 0x5501_a0b2, 0xf17b, false));
    assert_eq!(packet, wanted);
    let mut opened = Vec::new();
    assert!(gcm().open_rtp(&wanted, &mut opened, 12, 0x5501_a0b2, 0xf17b, false));
    assert_eq!(opened, plain);
}

/// RFC 7714 section 17.1.
#[test]
fn srtcp_of_aes_gcm() {
    let plain = bytes(
        "81c8000d 4d617273 4e545031 4e545032 52545020 0000042a 0000e930 4c756e61 deadbeef deadbeef deadbeef deadbeef deadbeef",
    );
    let wanted = bytes(
        "81c8000d 4d617273 63e94885 dcdab67c a727d766 2f6b7e99 7ff5c0f7 6c06f32d c676a5f1 730d6fda 4ce09b46 86303ded 0bb9275b
         c84aa458 96cf4d2f c5abf872 45d9eade 800005d4",
    );
    let mut packet = plain.clone();
    assert!(gcm().seal_rtcp(&mut packet, 0x4d61_7273, 0x5d4));
    assert_eq!(packet, wanted);
    let mut opened = Vec::new();
    assert!(gcm().open_rtcp(&wanted, &mut opened, 0x4d61_7273, 0x5d4));
    assert_eq!(opened, plain);
}
