//! What the kernel says of this process, by the names that Prometheus' clients have for it. Read from `/proc` at each scrape, and
//! written without the `metrics` crate, whose counters hold whole numbers only: of a CPU the fraction counts.

use super::metrics::Metric;
use nix::sys::resource::{Resource, getrlimit};
use std::fmt::Write;
use std::fs;

/// Units of times in `/proc`, a second: `USER_HZ`, which is 100 wherever this program runs (proc_pid_stat(5)).
const USER_HZ: f64 = 100.0;

/// Appends what can be read; what can't is left out.
pub(super) fn render(out: &mut String) {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let booted = fs::read_to_string("/proc/stat").unwrap_or_default();
    let times = Times::read(&stat);
    let (cpu, start) = times.map_or((None, None), |times| {
        let start = booted_at(&booted).map(|booted| booted + times.start);
        (Some(times.cpu), start)
    });
    // The descriptor by which the folder is read is one of them.
    let fds = fs::read_dir("/proc/self/fd").map(|fds| fds.count().saturating_sub(1));
    let most = getrlimit(Resource::RLIMIT_NOFILE).map(|(soft, _)| soft);
    let resident = bytes(&status, "VmRSS:");
    let space = bytes(&status, "VmSize:");
    let threads = field(&status, "Threads:");
    let (fds, most) = (fds.ok().map(count), most.ok().map(count));
    write(out, &super::metrics::PROCESS_CPU, cpu);
    write(out, &super::metrics::PROCESS_RESIDENT, resident);
    write(out, &super::metrics::PROCESS_VIRTUAL, space);
    write(out, &super::metrics::PROCESS_FDS, fds);
    write(out, &super::metrics::PROCESS_MAX_FDS, most);
    write(out, &super::metrics::PROCESS_THREADS, threads);
    write(out, &super::metrics::PROCESS_START, start);
}

fn write(out: &mut String, metric: &Metric, value: Option<f64>) {
    if let Some(value) = value {
        metric.head(out);
        let _ = writeln!(out, "{} {value}\n", metric.name);
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "Prometheus' numbers are floating point"
)]
fn count<N: TryInto<u64>>(n: N) -> f64 {
    n.try_into().unwrap_or(u64::MAX) as f64
}

/// Seconds.
#[derive(Debug, PartialEq)]
struct Times {
    cpu: f64,
    /// After the system's start.
    start: f64,
}

impl Times {
    /// From `/proc/self/stat`: the second field, the program's name in brackets, may hold blanks and brackets.
    fn read(stat: &str) -> Option<Self> {
        let (_, rest) = stat.rsplit_once(')')?;
        // Numbers as in proc_pid_stat(5); the first here is the third.
        let field = |n: usize| rest.split_whitespace().nth(n - 3)?.parse::<f64>().ok();
        Some(Self {
            cpu: (field(14)? + field(15)?) / USER_HZ,
            start: field(22)? / USER_HZ,
        })
    }
}

/// When the system started, in seconds since 1970, from `/proc/stat`.
fn booted_at(stat: &str) -> Option<f64> {
    field(stat, "btime")
}

/// The first number behind a name at the beginning of a line.
fn field(text: &str, name: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

/// The same of a line that counts in KiB (proc_pid_status(5)).
fn bytes(text: &str, name: &str) -> Option<f64> {
    field(text, name).map(|kib| kib * 1024.0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

    /// The value of a metric that has no labels.
    fn value(text: &str, name: &str) -> f64 {
        let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok();
        text.lines().find_map(value).unwrap()
    }

    #[test]
    fn what_the_kernel_says_is_read() {
        let stat = "7 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 3 0 4200 99 8";
        let times = Times::read(stat).unwrap();
        assert_eq!(
            times,
            Times {
                cpu: 2.0,
                start: 42.0
            }
        );
        assert_eq!(Times::read("7 (a) S 1 2"), None);
        assert_eq!(Times::read(""), None);
        assert_eq!(
            booted_at("cpu 1 2\nbtime 1700000000\nx 1"),
            Some(1_700_000_000.0)
        );
        assert_eq!(
            bytes("VmPeak:\t 9 kB\nVmRSS:\t  12 kB\n", "VmRSS:"),
            Some(12_288.0)
        );
        assert_eq!(field("", "Threads:"), None);
    }

    #[test]
    fn this_process_is_told_of() {
        let mut before = String::new();
        render(&mut before);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let age = now.as_secs_f64() - value(&before, "process_start_time_seconds");
        // Times are cut to 10 ms, and the system's start to a second.
        assert!((-2.0..86_400.0).contains(&age), "{before}");
        assert!(value(&before, "process_threads") >= 1.0);
        assert!(
            value(&before, "process_virtual_memory_bytes")
                > value(&before, "process_resident_memory_bytes")
        );
        let open = value(&before, "process_open_fds");
        assert!(
            open >= 3.0 && open < value(&before, "process_max_fds"),
            "{before}"
        );

        // What is used is counted: CPU, and descriptors, of which other tests open and close some at the same time.
        let files: Vec<_> = (0..200)
            .map(|_| fs::File::open("/dev/null").unwrap())
            .collect();
        let cpu = value(&before, "process_cpu_seconds_total");
        let end = Instant::now() + Duration::from_secs(60);
        let after = loop {
            let mut after = String::new();
            render(&mut after);
            if value(&after, "process_cpu_seconds_total") >= cpu + 0.05 {
                break after;
            }
            assert!(Instant::now() < end, "{after}");
        };
        assert!(value(&after, "process_open_fds") > open, "{after}");
        drop(files);
    }
}
