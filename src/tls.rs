//! TLS: certificates and trusted roots, as the start, a reload and `--check` read them.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio_rustls::rustls;
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

/// A certificate that lives as long as most do (90 days) should have been renewed by now.
const SOON: Duration = Duration::from_secs(14 * 86_400);

/// The same of one that lives shorter: a fifth of its life is left.
const SOON_PART: u32 = 5;

/// The crypto that every TLS of the process uses; no process-wide default is assumed.
pub(crate) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Which of the two files is to blame, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unusable {
    /// The certificate's.
    Certificate(String),
    /// The key's.
    Key(String),
}

impl Unusable {
    /// The configuration's key for that file.
    #[must_use]
    pub fn key(&self) -> &'static str {
        match self {
            Self::Certificate(_) => "tls.cert",
            Self::Key(_) => "tls.key",
        }
    }
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Certificate(why) | Self::Key(why) => f.write_str(why),
        }
    }
}

/// The listener's certificate with its chain and key: what can be said about it, and what rustls needs.
pub struct Certificate {
    server: Arc<rustls::ServerConfig>,
    chain: Vec<CertificateDer<'static>>,
    valid: [SystemTime; 2],
    /// The same for people.
    shown: [String; 2],
    hosts: Vec<String>,
    addresses: Vec<IpAddr>,
    /// The first one of the file (from 2) that did not sign the one before it.
    stray: Option<usize>,
}

impl fmt::Debug for Certificate {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificate")
            .field("hosts", &self.hosts)
            .field("valid", &self.shown)
            .finish_non_exhaustive()
    }
}

impl Certificate {
    /// Reads PEM files: the chain, leaf first, and the leaf's key (PKCS #8, PKCS #1 or SEC1).
    ///
    /// # Errors
    /// What is wrong, with the file and with what is wanted: no PEM, no certificate, a key that doesn't fit or is encrypted.
    pub fn read(cert: &[u8], key: &[u8]) -> Result<Self, Unusable> {
        const WANTED: &str = "wanted is the certificate with its chain in PEM, leaf first";
        let bad = |why: String| Unusable::Certificate(format!("{why}; {WANTED}"));
        let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_slice_iter(cert)
            .collect::<Result<_, _>>()
            .map_err(|e| bad(format!("is no PEM: {e}")))?;
        if chain.is_empty() {
            return Err(bad("holds no certificate".into()));
        }
        let key = private_key(key)?;
        let read = |der: &[u8]| -> Result<Parsed, String> {
            let (_, certificate) = X509Certificate::from_der(der).map_err(|e| e.to_string())?;
            Parsed::of(&certificate)
        };
        let parsed: Vec<Parsed> = chain
            .iter()
            .map(|der| read(der))
            .collect::<Result<_, _>>()
            .map_err(|e| bad(format!("holds what is no X.509 certificate: {e}")))?;
        let certified =
            CertifiedKey::from_der(chain.clone(), key, &provider()).map_err(|e| match e {
                rustls::Error::InconsistentKeys(_) => Unusable::Key(
                    "does not fit the certificate of tls.cert; wanted is that certificate's private key"
                        .into(),
                ),
                rustls::Error::General(why) => {
                    Unusable::Key(format!("can't be used: {why}; wanted is RSA, ECDSA or Ed25519"))
                }
                e => bad(format!("can't be used: {e}")),
            })?;
        let mut server = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(|e| bad(e.to_string()))?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
        server.alpn_protocols = vec![b"http/1.1".to_vec()];
        let stray = parsed
            .windows(2)
            .position(|pair| matches!(pair, [one, next] if one.issuer != next.subject))
            .map(|at| at + 2);
        let [first, ..] = parsed.as_slice() else {
            return Err(bad("holds no certificate".into()));
        };
        Ok(Self {
            server: Arc::new(server),
            valid: first.valid,
            shown: first.shown.clone(),
            hosts: first.hosts.clone(),
            addresses: first.addresses.clone(),
            chain,
            stray,
        })
    }

    /// What a listener is to serve with.
    pub(crate) fn server(&self) -> Arc<rustls::ServerConfig> {
        self.server.clone()
    }

    /// The end of its validity.
    #[must_use]
    pub fn ends(&self) -> SystemTime {
        self.valid[1]
    }

    /// The same for people.
    #[must_use]
    pub fn ends_shown(&self) -> &str {
        &self.shown[1]
    }

    /// Both are the same chain. The key is then, too: it fits both.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        self.chain == other.chain
    }

    /// Why no client takes it now: it is over, or hasn't begun.
    #[must_use]
    pub fn out_of_time(&self, now: SystemTime) -> Option<String> {
        let [from, to] = &self.shown;
        if now > self.valid[1] {
            return Some(format!(
                "the certificate expired at {to}: clients refuse it; renew it"
            ));
        }
        (now < self.valid[0]).then(|| {
            format!(
                "the certificate is not valid before {from}: clients refuse it; is the clock right?"
            )
        })
    }

    /// What is wrong with it that keeps nobody from starting: time and names. `local`: clients dial a loopback address.
    #[must_use]
    pub fn doubts(&self, now: SystemTime, local: bool) -> Vec<String> {
        let mut doubts: Vec<String> = self.out_of_time(now).into_iter().collect();
        let life = self.valid[1].duration_since(self.valid[0]);
        let left = self.valid[1].duration_since(now).unwrap_or_default();
        if doubts.is_empty() && left < SOON.min(life.unwrap_or_default() / SOON_PART) {
            let to = &self.shown[1];
            doubts.push(format!("the certificate expires at {to}: renew it; files that are replaced are taken without a restart"));
        }
        if let Some(stray) = self.stray {
            let before = stray - 1;
            doubts.push(format!(
                "certificate {stray} of the file did not sign certificate {before}: clients that lack an intermediate refuse the chain; wanted is the leaf, then each one's issuer"
            ));
        }
        if self.hosts.is_empty() && self.addresses.is_empty() {
            doubts.push("the certificate names no host (subjectAltName), and browsers look nowhere else: have one issued for the name that clients dial".into());
        } else if !local && self.names_this_machine_only() {
            doubts.push(format!(
                "the certificate is for {} alone, while listen takes clients from elsewhere: have one issued for the name that they dial",
                self.names().join(", ")
            ));
        }
        doubts
    }

    fn names(&self) -> Vec<String> {
        let addresses = self.addresses.iter().map(ToString::to_string);
        self.hosts.iter().cloned().chain(addresses).collect()
    }

    fn names_this_machine_only(&self) -> bool {
        let local = |host: &String| host == "localhost" || host.ends_with(".localhost");
        self.hosts.iter().all(local) && self.addresses.iter().all(IpAddr::is_loopback)
    }
}

/// What is read of one certificate.
struct Parsed {
    valid: [SystemTime; 2],
    shown: [String; 2],
    hosts: Vec<String>,
    addresses: Vec<IpAddr>,
    subject: Vec<u8>,
    issuer: Vec<u8>,
}

impl Parsed {
    fn of(certificate: &X509Certificate<'_>) -> Result<Self, String> {
        let validity = certificate.validity();
        // Before 1970 is as far away as 1970.
        let at = |seconds: i64| UNIX_EPOCH + Duration::from_secs(seconds.try_into().unwrap_or(0));
        let names = certificate
            .subject_alternative_name()
            .map_err(|e| format!("subjectAltName: {e}"))?;
        let names = names.iter().flat_map(|names| &names.value.general_names);
        let (mut hosts, mut addresses) = (Vec::new(), Vec::new());
        for name in names {
            match name {
                GeneralName::DNSName(host) => hosts.push((*host).to_ascii_lowercase()),
                GeneralName::IPAddress(bytes) => {
                    let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
                    addresses
                        .extend(v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from)));
                }
                _ => {}
            }
        }
        Ok(Self {
            valid: [
                at(validity.not_before.timestamp()),
                at(validity.not_after.timestamp()),
            ],
            shown: [
                validity.not_before.to_string(),
                validity.not_after.to_string(),
            ],
            hosts,
            addresses,
            subject: certificate.subject().as_raw().to_vec(),
            issuer: certificate.issuer().as_raw().to_vec(),
        })
    }
}

fn private_key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, Unusable> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|e| {
        let encrypted = String::from_utf8_lossy(pem).contains("ENCRYPTED");
        Unusable::Key(if encrypted {
            "is encrypted: wanted is the key without a passphrase (openssl pkey -in FILE -out FILE)"
                .into()
        } else {
            format!("holds no private key ({e}); wanted is the certificate's private key in PEM")
        })
    })
}

/// The system's trusted roots; SSL_CERT_FILE and SSL_CERT_DIR name others.
///
/// # Errors
/// There are none: why, and what to do.
pub(crate) fn roots() -> Result<rustls::RootCertStore, String> {
    let mut roots = rustls::RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    let (taken, _) = roots.add_parsable_certificates(found.certs);
    if taken == 0 {
        let why: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
        return Err(format!(
            "no trusted root certificates were found: install ca-certificates or set SSL_CERT_FILE ({})",
            why.join("; ")
        ));
    }
    Ok(roots)
}

#[cfg(test)]
#[path = "tls/tests.rs"]
mod tests;
