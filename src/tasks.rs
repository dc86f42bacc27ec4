//! Nothing ends unseen: what runs as long as the process does is started here. A task that can begin anew is restarted, the end of
//! any other ends the process; metrics, `/readyz` and the log say which. A panic anywhere is counted.

use crate::admin::metrics::{PANICS, TASK_RESTARTS};
use metrics::counter;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A task is restarted so long after its end, so that one that ends at once takes no processor for itself.
const PAUSE: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 1000 });

/// For so long `/readyz` tells of a restart: a few scrapes, and somebody who looks.
const TOLD: Duration = Duration::from_secs(300);

/// The process' tasks.
#[derive(Debug, Clone)]
pub(crate) struct Tasks(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    /// Why the process cannot go on.
    ended: watch::Sender<Option<String>>,
    /// The last task that was restarted, and when.
    restarted: Mutex<Option<(&'static str, Instant)>>,
    stopping: watch::Sender<bool>,
}

impl Inner {
    /// The first reason is the one that matters.
    fn fail(&self, why: String) {
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(why);
            first
        });
    }

    fn restarted(&self, name: &'static str) {
        let mut restarted = self
            .restarted
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *restarted = Some((name, Instant::now()));
    }
}

/// How a task has ended.
fn how(ended: &Result<(), tokio::task::JoinError>) -> Option<&'static str> {
    match ended {
        Ok(()) => Some("has ended"),
        Err(error) if error.is_panic() => Some("panicked"),
        // The runtime is being taken down.
        Err(_) => None,
    }
}

impl Tasks {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Inner {
            ended: watch::channel(None).0,
            restarted: Mutex::default(),
            stopping: watch::channel(false).0,
        }))
    }

    /// Runs a task that may begin anew at any time, and has it do so whenever it ends.
    pub(crate) fn keep<F>(&self, name: &'static str, mut make: impl FnMut() -> F + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let inner = self.0.clone();
        tokio::spawn(async move {
            loop {
                let ended = tokio::spawn(make()).await;
                let Some(how) = how(&ended).filter(|_| !*inner.stopping.borrow()) else {
                    return;
                };
                tracing::error!(task = name, "a task {how}; it is restarted");
                counter!(TASK_RESTARTS.name, "task" => name).increment(1);
                inner.restarted(name);
                tokio::time::sleep(PAUSE).await;
            }
        });
    }

    /// Runs a task without which the process cannot go on. The handle ends with it.
    pub(crate) fn need<F>(&self, name: &'static str, task: F) -> JoinHandle<()>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let inner = self.0.clone();
        tokio::spawn(async move {
            let ended = tokio::spawn(task).await;
            if let Some(how) = how(&ended).filter(|_| !*inner.stopping.borrow()) {
                inner.fail(format!("{name} {how}"));
            }
        })
    }

    /// From now on tasks may end.
    pub(crate) fn stop(&self) {
        self.0.stopping.send_replace(true);
    }

    /// Says that the process cannot go on.
    pub(crate) fn fail(&self, why: &str) {
        self.0.fail(why.to_owned());
    }

    /// Waits until the process cannot go on, and says why.
    pub(crate) async fn ended(&self) -> String {
        let mut ended = self.0.ended.subscribe();
        loop {
            if let Some(why) = ended.borrow_and_update().clone() {
                return why;
            }
            if ended.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// Why the process cannot go on.
    pub(crate) fn failed(&self) -> Option<String> {
        self.0.ended.borrow().clone()
    }

    /// The task that was restarted last, for a while.
    pub(crate) fn restarted(&self) -> Option<&'static str> {
        let restarted = self.0.restarted.lock();
        let restarted = *restarted.unwrap_or_else(PoisonError::into_inner);
        restarted
            .filter(|(_, at)| at.elapsed() < TOLD)
            .map(|(name, _)| name)
    }
}

/// Has every panic counted, and logged as everything else is: where it was, and what it said unless that was made of data, which may be a
/// stranger's, or a token.
pub(crate) fn see_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed").to_owned();
        let said = panic.payload().downcast_ref::<&'static str>();
        let place = panic.location().map(ToString::to_string);
        let trace = std::backtrace::Backtrace::capture();
        let traced = trace.status() == std::backtrace::BacktraceStatus::Captured;
        tracing::error!(
            thread,
            place,
            said = said.copied().unwrap_or("(made of data, not shown)"),
            trace = traced.then(|| trace.to_string()),
            "panic"
        );
        counter!(PANICS.name, "thread" => thread).increment(1);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const SOON: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn a_task_that_ends_or_panics_is_restarted_and_told_of() {
        let tasks = Tasks::new();
        let runs = Arc::new(AtomicUsize::new(0));
        let counted = runs.clone();
        tasks.keep("probe", move || {
            let run = counted.fetch_add(1, Ordering::Relaxed);
            async move {
                match run {
                    0 => panic!("as this test wants it"),
                    1 => {}
                    _ => std::future::pending().await,
                }
            }
        });
        assert_eq!(tasks.restarted(), None);
        let third = async {
            while runs.load(Ordering::Relaxed) < 3 {
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::time::timeout(SOON, third).await.unwrap();
        assert_eq!(tasks.restarted(), Some("probe"));
        assert_eq!(tasks.failed(), None, "the process goes on");
    }

    #[tokio::test]
    async fn the_end_of_a_task_that_is_needed_ends_the_process() {
        for (panics, why) in [
            (true, "signalling panicked"),
            (false, "signalling has ended"),
        ] {
            let tasks = Tasks::new();
            let other = tasks.need("media events", std::future::pending());
            tasks.need("signalling", async move {
                assert!(!panics, "as this test wants it");
            });
            let ended = tokio::time::timeout(SOON, tasks.ended()).await;
            assert_eq!(ended.as_deref(), Ok(why));
            assert_eq!(tasks.failed().as_deref(), Some(why));
            tasks.fail("something else");
            assert_eq!(
                tasks.failed().as_deref(),
                Some(why),
                "the first reason stays"
            );
            other.abort();
        }
    }

    #[tokio::test]
    async fn what_ends_while_the_process_stops_is_no_fault() {
        let tasks = Tasks::new();
        tasks.stop();
        tasks.need("signalling", async {}).await.unwrap();
        tasks.keep("probe", || async {});
        tokio::time::sleep(PAUSE * 50).await;
        assert_eq!((tasks.failed(), tasks.restarted()), (None, None));
    }
}
