#![allow(clippy::unwrap_used)]

use super::*;
use rcgen::{CertificateParams, Issuer, KeyPair, date_time_ymd};

/// A certificate of 2020 to 2030 for these names, and its key, both PEM.
fn issued(names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> (String, String) {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.not_before = date_time_ymd(2020, 1, 1);
    params.not_after = date_time_ymd(2030, 1, 1);
    change(&mut params);
    let key = KeyPair::generate().unwrap();
    (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
}

fn at(year: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs((year - 1970) * 31_556_952)
}

fn read(cert: &str, key: &str) -> Result<Certificate, Unusable> {
    Certificate::read(cert.as_bytes(), key.as_bytes())
}

#[test]
fn what_can_not_be_used_is_named_with_its_file() {
    let (cert, key) = issued(&["a.example"], |_| {});
    let (other, other_key) = issued(&["a.example"], |_| {});
    let (cert, key, other, other_key) = (&*cert, &*key, &*other, &*other_key);
    assert!(read(cert, key).is_ok());
    let cut = &cert[..cert.len() / 2];
    let der = "-----BEGIN CERTIFICATE-----\nMAMCAQE=\n-----END CERTIFICATE-----\n";
    for (cert, key, file, why) in [
        ("", key, "tls.cert", "holds no certificate"),
        ("garbage", key, "tls.cert", "holds no certificate"),
        (cut, key, "tls.cert", "wanted is the certificate"),
        (der, key, "tls.cert", "no X.509 certificate"),
        (key, key, "tls.cert", "holds no certificate"),
        (cert, "", "tls.key", "holds no private key"),
        (cert, other, "tls.key", "holds no private key"),
        (cert, other_key, "tls.key", "does not fit the certificate"),
        (other, key, "tls.key", "does not fit the certificate"),
        (
            cert,
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAMCAQE=\n-----END ENCRYPTED PRIVATE KEY-----\n",
            "tls.key",
            "is encrypted",
        ),
    ] {
        let error = read(cert, key).unwrap_err();
        assert_eq!(error.key(), file, "{error}");
        assert!(error.to_string().contains(why), "{error}");
        assert!(!error.to_string().contains("BEGIN"), "{error}");
    }
}

#[test]
fn time_runs_out() {
    let (cert, key) = issued(&["a.example"], |_| {});
    let certificate = read(&cert, &key).unwrap();
    assert!(certificate.doubts(at(2025), false).is_empty());
    let day = Duration::from_secs(86_400);
    let ends = certificate.ends();
    assert!(certificate.doubts(ends - 15 * day, false).is_empty());
    assert!(
        certificate.doubts(ends - 13 * day, false)[0].contains("expires at Jan  1 00:00:00 2030")
    );
    assert!(certificate.out_of_time(ends - day).is_none());
    assert!(certificate.doubts(ends + day, false)[0].contains("expired at Jan  1"));
    assert!(
        certificate.doubts(at(2019), false)[0].contains("not valid before Jan  1 00:00:00 2020")
    );
    // One that lives six days is no news to anybody on its first.
    let (cert, key) = issued(&["a.example"], |params| {
        params.not_after = params.not_before + day * 6;
    });
    let certificate = read(&cert, &key).unwrap();
    let ends = certificate.ends();
    assert!(certificate.doubts(ends - 5 * day, false).is_empty());
    assert_eq!(certificate.doubts(ends - day, false).len(), 1);
}

#[test]
fn names_that_nobody_dials_are_a_doubt() {
    let doubts = |names: &[&str], local| {
        let (cert, key) = issued(names, |_| {});
        read(&cert, &key)
            .unwrap()
            .doubts(at(2025), local)
            .join("; ")
    };
    assert!(doubts(&[], true).contains("names no host"));
    assert!(
        doubts(&["localhost", "127.0.0.1", "::1"], false)
            .contains("is for localhost, 127.0.0.1, ::1 alone")
    );
    for (names, local) in [
        (&["localhost"][..], true),
        (&["localhost", "a.example"], false),
        (&["localhost", "192.0.2.1"], false),
    ] {
        assert_eq!(doubts(names, local), "", "{names:?}");
    }
}

#[test]
fn a_chain_has_an_order() {
    let (ca_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut ca = CertificateParams::new(vec![]).unwrap();
    ca.distinguished_name
        .push(rcgen::DnType::CommonName, "the authority");
    let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
    let leaf = CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
    let issuer = Issuer::from_params(&ca, &ca_key);
    let leaf_pem = leaf.signed_by(&key, &issuer).unwrap().pem();
    let good = read(&format!("{leaf_pem}{ca_pem}"), &key.serialize_pem()).unwrap();
    assert!(good.doubts(at(2025), false).is_empty());
    let twice = read(&format!("{leaf_pem}{leaf_pem}"), &key.serialize_pem()).unwrap();
    let doubts = twice.doubts(at(2025), false);
    assert!(
        doubts[0].contains("certificate 2 of the file did not sign certificate 1"),
        "{doubts:?}"
    );
    assert!(!good.is(&twice) && good.is(&good));
}
