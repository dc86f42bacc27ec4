//! The files that a configuration names: the listener's certificate and key, and the roots that an https upstream is checked by.

use super::{Settings, TlsFiles};
use crate::tls::{self, Certificate, Unusable};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tokio_rustls::rustls::RootCertStore;

/// A certificate with its chain has a few kB, all roots of a system have some 250.
const MAX: u64 = 4 << 20;

type Content = Result<Vec<u8>, String>;

/// What stands in them at one look. Not to be shown: a private key is in it.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Files {
    tls: Option<(TlsFiles, [Content; 2])>,
    /// Where SSL_CERT_FILE names one. A system's own store has hundreds of files: it is read again when a reload is asked for.
    roots: Option<(PathBuf, Content)>,
}

/// What is made of them.
#[derive(Debug, Clone, Default)]
pub struct Material {
    /// The listener's; none: plain HTTP.
    pub certificate: Option<Arc<Certificate>>,
    /// What an https upstream's certificate has to be signed by; none: plain HTTP.
    pub roots: Option<Arc<RootCertStore>>,
}

impl Files {
    /// One look at the files of these settings.
    pub(super) fn read(settings: &Settings) -> Self {
        let tls = settings.tls.as_ref().map(|files| {
            let content = [&files.cert, &files.key].map(|path| read(path));
            (files.clone(), content)
        });
        let roots = std::env::var_os("SSL_CERT_FILE").filter(|_| settings.upstream.https);
        let roots = roots.map(PathBuf::from).map(|path| {
            let content = read(&path);
            (path, content)
        });
        Self { tls, roots }
    }

    /// What can be made of them.
    ///
    /// # Errors
    /// What is wrong, by the key that it belongs to.
    pub(super) fn material(&self, https: bool) -> Result<Material, Vec<(&'static str, String)>> {
        let mut wrong = Vec::new();
        let certificate = self
            .certificate()
            .map_err(|e| wrong.extend(e))
            .ok()
            .flatten();
        let roots = https.then(tls::roots).transpose();
        let roots =
            roots.map_err(|why| wrong.push(("upstream", format!("it is https, but {why}"))));
        if wrong.is_empty() {
            let roots = roots.ok().flatten().map(Arc::new);
            Ok(Material { certificate, roots })
        } else {
            Err(wrong)
        }
    }

    fn certificate(&self) -> Result<Option<Arc<Certificate>>, Vec<(&'static str, String)>> {
        let Some((files, [cert, key])) = &self.tls else {
            return Ok(None);
        };
        let named = |path: &Path, why: &dyn std::fmt::Display| format!("{} {why}", path.display());
        let (cert, key) = match (cert, key) {
            (Ok(cert), Ok(key)) => (cert, key),
            (cert, key) => {
                let both = [
                    ("tls.cert", &files.cert, cert),
                    ("tls.key", &files.key, key),
                ];
                let wrong = both.into_iter().filter_map(|(name, path, content)| {
                    let why = content.as_ref().err()?;
                    Some((name, named(path, why)))
                });
                return Err(wrong.collect());
            }
        };
        Certificate::read(cert, key)
            .map(|certificate| Some(Arc::new(certificate)))
            .map_err(|unusable| {
                let path = match unusable {
                    Unusable::Certificate(_) => &files.cert,
                    Unusable::Key(_) => &files.key,
                };
                vec![(unusable.key(), named(path, &unusable))]
            })
    }
}

impl Material {
    /// What is new against what was there, for the log; an error where it would be worse.
    pub(super) fn news(&self, old: &Self) -> Result<Vec<&'static str>, (&'static str, String)> {
        let mut news = Vec::new();
        if let (Some(old), Some(new)) = (&old.certificate, &self.certificate)
            && !new.is(old)
        {
            if let Some(why) = new.out_of_time(SystemTime::now()) {
                return Err(("tls.cert", why));
            }
            news.push("tls");
        }
        let roots = |m: &Self| m.roots.as_ref().map(|store| store.roots.clone());
        if roots(self) != roots(old) {
            news.push("trusted roots");
        }
        Ok(news)
    }
}

fn read(path: &Path) -> Content {
    let cannot = |error: std::io::Error| format!("cannot be read: {error}");
    let file = std::fs::File::open(path).map_err(cannot)?;
    let mut bytes = Vec::new();
    file.take(MAX + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > MAX {
        return Err(format!("is larger than {MAX} bytes, the most allowed"));
    }
    Ok(bytes)
}
