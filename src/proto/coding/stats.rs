//! Counters of coded streams.

use super::stream::Stream;
use crate::hop::recode::RecodeStats;
use crate::hop::{NativeReason, Packer};

/// Counters of the hop, over streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HopStats {
    /// Framed packets sent.
    pub framed_sent: u64,
    /// Those that carried a copy of an earlier one.
    pub copies_sent: u64,
    /// Originals that went coded.
    pub coded: u64,
    /// Originals that went as they came, by [`NativeReason`].
    pub natives: [u64; NativeReason::ALL.len()],
    /// Originals that went natively after their coded form, which the receiver couldn't restore.
    pub resent: u64,
    /// Groups that went native because the engine was late.
    pub missed: u64,
    /// Framed packets that came.
    pub framed_received: u64,
    /// What those took on the wire, IP and UDP headers included.
    pub received_bytes: u64,
    /// What was made of them takes there: their ratio is what the hop really saves.
    pub restored_bytes: u64,
    /// Interarrival jitter (RFC 3550 section 6.4.1) in 1/65,536 s; of several streams the largest.
    pub jitter: u32,
    /// Framed packets that were lost, and of which no copy came either.
    pub lost: u64,
    /// Framed packets that were lost and made good by a copy.
    pub copied: u64,
    /// Originals restored from coded payloads, concealed ones included.
    pub restored: u64,
    /// Originals made up.
    pub concealed: u64,
    /// Originals lost for good.
    pub gaps: u64,
    /// Decodings that failed or came too late.
    pub undecoded: u64,
    /// Dropped: framed packets that can't be read.
    pub unreadable: u64,
    /// Streams that are coded anew packet by packet, without a hop.
    pub recode: RecodeStats,
}

impl std::ops::AddAssign for HopStats {
    fn add_assign(&mut self, other: Self) {
        self.framed_sent += other.framed_sent;
        self.copies_sent += other.copies_sent;
        self.coded += other.coded;
        for (sum, native) in self.natives.iter_mut().zip(other.natives) {
            *sum += native;
        }
        self.resent += other.resent;
        self.missed += other.missed;
        self.framed_received += other.framed_received;
        self.received_bytes += other.received_bytes;
        self.restored_bytes += other.restored_bytes;
        self.jitter = self.jitter.max(other.jitter);
        self.lost += other.lost;
        self.copied += other.copied;
        self.restored += other.restored;
        self.concealed += other.concealed;
        self.gaps += other.gaps;
        self.undecoded += other.undecoded;
        self.unreadable += other.unreadable;
        self.recode += other.recode;
    }
}

impl Stream {
    pub(super) fn stats(&self) -> HopStats {
        let mut sum = HopStats::default();
        if let Some(Packer { stats, .. }) = &self.packer {
            sum += HopStats {
                framed_sent: stats.framed,
                copies_sent: stats.copies,
                coded: stats.coded,
                natives: stats.natives,
                resent: stats.resent,
                missed: stats.missed,
                ..HopStats::default()
            };
        }
        if let Some(restorer) = &self.restorer {
            let stats = &restorer.stats;
            sum += HopStats {
                framed_received: stats.framed,
                received_bytes: stats.bytes,
                restored_bytes: stats.restored_bytes,
                jitter: restorer.jitter(),
                lost: stats.lost,
                copied: stats.copied,
                restored: stats.restored,
                concealed: stats.concealed,
                gaps: stats.gaps,
                undecoded: stats.missed + stats.failed,
                unreadable: stats.unreadable,
                ..HopStats::default()
            };
        }
        if let Some(recoder) = &self.recoder {
            sum.recode += recoder.stats;
        }
        sum
    }
}
