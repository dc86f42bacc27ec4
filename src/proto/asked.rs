//! Who asks for what: the token, the resume and the `join_request` of a request as LiveKit will read them. One reader for the
//! signalling connection and for WHIP, so that nothing else in the sidecar has an opinion of its own.

use crate::query::{Query, Unclear};
use crate::signal::{JoinRequest, SignalError};
use crate::token::{self, Claims};

/// What of a request LiveKit reads to find out who asks. Holds a token: never to be logged.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// What stands after `?`.
    pub query: &'a str,
    /// The values of all Authorization header fields.
    pub authorization: &'a [&'a [u8]],
    /// The values of all Content-Type header fields.
    pub content_type: &'a [&'a [u8]],
}

impl<'a> Request<'a> {
    /// One that has a query and no header fields.
    #[must_use]
    pub fn of(query: &'a str) -> Self {
        Self {
            query,
            authorization: &[],
            content_type: &[],
        }
    }

    /// The query, if nothing beside it could be taken for more of it. Go's `FormValue` reads bodies that say they are forms, of a
    /// GET too.
    fn parts(&self) -> Result<Query<'a>, Unclear> {
        let is_form = |value: &&[u8]| {
            let end = value.iter().position(|byte| *byte == b';');
            let media_type = value[..end.unwrap_or(value.len())].trim_ascii();
            media_type.eq_ignore_ascii_case(b"application/x-www-form-urlencoded")
                || media_type.eq_ignore_ascii_case(b"multipart/form-data")
        };
        if self.content_type.iter().any(is_form) {
            return Err(Unclear::Form);
        }
        Query::parse(self.query)
    }

    /// What the token claims, by LiveKit's middleware: the Authorization header, if it says anything, else `access_token`.
    fn claims(&self, query: &Query<'_>) -> Result<Option<Claims>, Unclear> {
        // Read even if it doesn't count: a second one is never right.
        let in_query = query.get("access_token")?;
        let token = match self.authorization {
            [] | [b""] => in_query,
            [value] => value
                .strip_prefix(b"Bearer ")
                .and_then(|token| std::str::from_utf8(token).ok()),
            _ => return Err(Unclear::Authorization),
        };
        token.map_or(Ok(None), token::claims)
    }
}

/// A request for a signalling connection, read.
#[derive(Debug, Clone)]
pub struct Asked<'a> {
    query: Query<'a>,
    claims: Option<Claims>,
    join_request: Option<JoinRequest>,
    resumes: Option<String>,
    version: String,
}

impl<'a> Asked<'a> {
    /// Reads it.
    ///
    /// # Errors
    /// When it could be read in two ways, or its `join_request` is not what LiveKit would take.
    pub fn read(request: &Request<'a>) -> Result<Self, SignalError> {
        let query = request.parts()?;
        let mut claims = request.claims(&query)?;
        let join_request = query.get("join_request")?.map(JoinRequest::read);
        let join_request = join_request.transpose()?;
        // All of them are read, so that they are there once, whether they count or not.
        let (reconnect, sid) = (query.get("reconnect")?, query.get("sid")?);
        let publish = query.get("publish")?;
        let resumes = match &join_request {
            Some(join_request) => {
                let info = join_request.info();
                info.reconnect.then(|| info.participant_sid.clone())
            }
            None => {
                // `boolValue`
                let resumes = matches!(reconnect, Some("1" | "true"));
                resumes.then(|| sid.unwrap_or_default().to_owned())
            }
        };
        // A second connection of a participant, which only publishes, is a participant to LiveKit.
        if let (None, Some(publish), Some(claims)) = (&join_request, publish, &mut claims) {
            claims.identity.push('#');
            claims.identity.push_str(publish);
        }
        let version = query.get("version").ok().flatten().unwrap_or_default();
        Ok(Self {
            version: version.to_owned(),
            claims,
            join_request,
            resumes,
            query,
        })
    }

    /// Whom LiveKit will take the client for, if it accepts the token; `None` if it can't.
    #[must_use]
    pub fn claims(&self) -> Option<&Claims> {
        self.claims.as_ref()
    }

    /// The sid of the participant whose session is to go on, empty where the client doesn't know it; `None`: a new session.
    #[must_use]
    pub fn resumes(&self) -> Option<&str> {
        self.resumes.as_deref()
    }

    /// The `join_request`, if there is one.
    #[must_use]
    pub fn join_request(&self) -> Option<&JoinRequest> {
        self.join_request.as_ref()
    }

    /// Version of the client's SDK, where the query says it.
    #[must_use]
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The query with another `join_request`.
    ///
    /// # Errors
    /// Never, after it was read.
    pub(crate) fn with_join_request(&self, new: &str) -> Result<String, Unclear> {
        // Padding is the only character of URL-safe base64 that a query must escape.
        self.query.with("join_request", &new.replace('=', "%3D"))
    }
}

/// Whom LiveKit takes a WHIP client for, if it accepts the token; `None` if it can't.
///
/// # Errors
/// When it could be read in two ways.
pub fn whip_claims(request: &Request<'_>) -> Result<Option<Claims>, Unclear> {
    request.claims(&request.parts()?)
}

#[cfg(test)]
#[path = "asked/tests.rs"]
mod tests;
