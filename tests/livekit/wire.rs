//! What crosses loopback, counted by tests/clients/python/wire.py.

use crate::harness::{Process, Trial, array, number, root, setting, string, wait_for};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A count under way.
pub(crate) struct Wire {
    process: Process,
    seconds: f64,
}

/// One direction between two sockets.
#[derive(Debug, Clone)]
pub(crate) struct Flow {
    pub(crate) udp: bool,
    pub(crate) src: u16,
    pub(crate) dst: u16,
    pub(crate) packets: f64,
    /// Headers of IP and UDP or TCP included.
    pub(crate) kbps: f64,
}

impl Wire {
    /// Counts what goes from or to these ports for so long, starting now.
    pub(crate) fn count(trial: &Trial, name: &str, seconds: f64, ports: &[u16]) -> Self {
        let script = root().join("tests/clients/python/wire.py");
        let mut command = Command::new(setting("AURALINK_PYTHON"));
        command
            .arg(script)
            .args(["--seconds", &seconds.to_string()]);
        for port in ports {
            command.args(["--port", &port.to_string()]);
        }
        let mut process = Process::spawn(&trial.dir, name, &mut command, true);
        trial.watch(&process.log);
        wait_for("wire.py to count", Duration::from_secs(20), || {
            let log = fs::read_to_string(&process.log).unwrap_or_default();
            assert!(process.running() || log.contains("ready"), "wire.py: {log}");
            log.contains("ready").then_some(())
        });
        Self { process, seconds }
    }

    /// All flows, once the time is over.
    pub(crate) fn flows(mut self) -> Vec<Flow> {
        let code = self
            .process
            .wait(Duration::from_secs_f64(self.seconds + 30.0));
        let text = fs::read_to_string(&self.process.out).unwrap_or_default();
        assert_eq!(
            code,
            0,
            "wire.py: {}",
            fs::read_to_string(&self.process.log).unwrap_or_default()
        );
        let report: Value = serde_json::from_str(&text).expect("wire.py's report");
        // It looks at every packet of the interface: on a machine that others load too it may miss some.
        let counted: f64 = array(&report, "/flows")
            .iter()
            .map(|flow| number(flow, "/packets"))
            .sum();
        let missed = number(&report, "/dropped");
        assert!(
            missed <= 0.02 * counted,
            "wire.py missed {missed} packets and counted {counted}"
        );
        let port = |flow: &Value, end: &str| {
            string(flow, end)
                .rsplit(':')
                .next()
                .and_then(|port| port.parse().ok())
                .unwrap_or(0)
        };
        array(&report, "/flows")
            .iter()
            .map(|flow| Flow {
                udp: string(flow, "/protocol") == "udp",
                src: port(flow, "/src"),
                dst: port(flow, "/dst"),
                packets: number(flow, "/packets"),
                kbps: number(flow, "/kbps"),
            })
            .collect()
    }
}

/// Sum of kbps of the flows that `which` picks.
pub(crate) fn kbps(flows: &[Flow], which: impl Fn(&Flow) -> bool) -> f64 {
    flows
        .iter()
        .filter(|flow| which(flow))
        .map(|flow| flow.kbps)
        .sum()
}

/// Nanoseconds since 1970, as rtp.py has them.
pub(crate) fn now() -> u128 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_nanos()
}

/// rtp.py on these ports, for so long or until it is told to end.
pub(crate) fn capture(trial: &Trial, ports: &[u16], packets: &Path, seconds: u32) -> Process {
    let mut command = Command::new(setting("AURALINK_PYTHON"));
    command
        .arg(root().join("tests/clients/python/rtp.py"))
        .args(["--seconds", &seconds.to_string()]);
    for port in ports {
        command.args(["--port", &port.to_string()]);
    }
    command.arg(packets);
    let process = Process::spawn(&trial.dir, "rtp", &mut command, true);
    trial.watch(&process.log);
    wait_for("rtp.py to listen", Duration::from_secs(20), || {
        let log = fs::read_to_string(&process.log).unwrap_or_default();
        log.contains("ready").then_some(())
    });
    process
}
