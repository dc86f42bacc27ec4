//! Which coded payloads came to nothing.

/// Places of the hop of which nothing was restored, for the sender to send again.
#[derive(Debug, Default)]
pub(super) struct Unrestored {
    /// The first of them; nothing after it was restored.
    from: Option<u64>,
    /// The last place that was.
    restored: Option<u64>,
    /// What the last report said of [`Unrestored::from`].
    told: Option<u64>,
}

impl Unrestored {
    /// Nothing comes of the payload at `place`.
    pub(super) fn failed(&mut self, place: u64) {
        if self.restored.is_none_or(|restored| restored < place) {
            self.from = Some(self.from.map_or(place, |from| from.min(place)));
        }
    }

    /// The payload at `place` was restored: what failed before it is over.
    pub(super) fn restored(&mut self, place: u64) {
        self.restored = self.restored.max(Some(place));
        self.from.take_if(|from| *from <= place);
    }

    /// The sender doesn't know of it yet.
    pub(super) fn is_news(&self) -> bool {
        self.from.is_some() && self.from != self.told
    }

    /// The first place, as the sender is told of it now; `waiting` is the first that it is as well to send again.
    pub(super) fn tell(&mut self, waiting: Option<u64>) -> Option<u64> {
        self.told = self.from;
        self.from.into_iter().chain(waiting).min()
    }
}
