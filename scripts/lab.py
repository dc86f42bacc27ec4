"""What demo.py and measure.py share: a stock LiveKit server with one or two AuraLinks in front, on free loopback ports, and stock clients.

The programs come from scripts/setup.sh, whose paths are in ${XDG_CACHE_HOME:-~/.cache}/auralink/env, and from `cargo build`.
Everything that a `Lab` starts is ended by its own process handle when the `with` block is left. Logs stay in its folder.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = ROOT / "tests" / "clients"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "auralink"
KEY = "devkey"
SECRET = "secret-of-at-least-32-chars-for-auralink-tests"


class Failed(Exception):
    """Something that the whole run depends on did not work; the text says what and what to do."""


def environment() -> dict[str, str]:
    """The KEY=VALUE lines of scripts/setup.sh; the process's own environment goes before them."""
    try:
        lines = (CACHE / "env").read_text().splitlines()
    except FileNotFoundError:
        raise Failed(f"{CACHE}/env is missing: run scripts/setup.sh all") from None
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    return found | {k: v for k, v in os.environ.items() if k.startswith("AURALINK_")}


def free_ports(count: int) -> int:
    """First of `count` consecutive ports that are free for UDP and TCP on loopback."""
    for _ in range(200):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind(("127.0.0.1", 0))
            first = probe.getsockname()[1]
        taken = []
        try:
            for port in range(first, first + count):
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                    s = socket.socket(socket.AF_INET, kind)
                    taken.append(s)
                    s.bind(("127.0.0.1", port))
            return first
        except (OSError, OverflowError):
            continue
        finally:
            for s in taken:
                s.close()
    raise Failed(f"found no {count} consecutive free ports on 127.0.0.1")


def tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, indented."""
    try:
        text = path.read_text(errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return "    (no log)"
    return "\n".join("    " + line[:300] for line in text) or "    (empty)"


class Process:
    """A child whose standard error, and standard output where it is no report, go to a log."""

    def __init__(self, name: str, command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
        self.name, self.log = name, log
        self.out = log.with_suffix(".out")
        with open(self.log, "wb") as err, open(self.out, "wb") as out:
            try:
                self.child = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=env)
            except OSError as e:
                raise Failed(f"{name}: {command[0]}: {e.strerror}; run scripts/setup.sh all and cargo build --release") from None

    @property
    def pid(self) -> int:
        return self.child.pid

    def stop(self, patience: float = 5) -> None:
        """SIGTERM, then SIGKILL."""
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(patience)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()

    def report(self, timeout: float) -> dict:
        """Waits for the end and returns the JSON object on the last line of standard output."""
        try:
            code = self.child.wait(timeout)
        except subprocess.TimeoutExpired:
            self.stop()
            raise Failed(f"{self.name} did not end within {timeout:.0f} s; the end of {self.log}:\n{tail(self.log)}") from None
        text = self.out.read_text(errors="replace").strip().splitlines()
        try:
            found = json.loads(text[-1])
        except (IndexError, ValueError):
            raise Failed(f"{self.name} ended with {code} and without a report; the end of {self.log}:\n{tail(self.log)}") from None
        if code != 0:
            raise Failed(f"{self.name} failed: {found.get('errors')}; the end of {self.log}:\n{tail(self.log)}")
        return found

    def cpu_seconds(self) -> float:
        """User and system time of the process so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """Resident memory now."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        return 0


class Lab:
    """LiveKit and AuraLink, running.

    `direct` and `sidecar` are the ws:// addresses to join at; `media_ports` are AuraLink's UDP ports towards clients. Rooms called
    `MODE-...` have that mode, for each of `modes`; every other room is off. With `hop` there is a second AuraLink, `edge`, whose
    upstream is the first: `edge_url` and `edge_ports` are for its clients, and both have the codec engine. `scheduling` is that of media threads.
    """

    def __init__(self, folder: Path, auralink: Path, modes: dict[str, str], workers: int = 1, hop: bool = False, scheduling: str = "normal") -> None:
        self.folder, self.auralink, self.modes, self.workers, self.hop, self.scheduling = folder, auralink, modes, workers, hop, scheduling
        self.env = environment()
        self.processes: list[Process] = []

    def __enter__(self) -> "Lab":
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for process in reversed(self.processes):
            process.stop()

    def tool(self, key: str) -> str:
        """A path from scripts/setup.sh."""
        path = self.env.get(key)
        if not path or not os.path.exists(path):
            how = "make models" if key in ("AURALINK_MODELS", "AURALINK_ONNXRUNTIME") else "scripts/setup.sh all"
            raise Failed(f"{key} is not set up{f' ({path} is missing)' if path else ''}: run {how}")
        return path

    def _start(self) -> None:
        if not self.auralink.exists():
            raise Failed(f"{self.auralink} is missing: run make build (or give --auralink PATH)")
        server = self.tool("AURALINK_LIVEKIT_SERVER")
        port = free_ports(6 + self.workers + (2 + self.workers if self.hop else 0))
        http, tcp, udp, listen, admin, side_tcp = range(port, port + 6)
        side_udp = port + 6
        config = (ROOT / "livekit" / "livekit.yaml").read_text()
        for old, new in (("port: 7880", http), ("udp_port: 7882", udp), ("tcp_port: 7881", tcp)):
            key = old.split(":")[0]
            if config.count(old) != 1:
                raise Failed(f"livekit/livekit.yaml: '{old}' is not there exactly once")
            config = config.replace(old, f"{key}: {new}")
        livekit_yaml = self.folder / "livekit.yaml"
        livekit_yaml.write_text(config)
        self.livekit = self.spawn("livekit-server", [server, "--config", str(livekit_yaml)])
        self._await_http(self.livekit, http)
        self.side = self._sidecar("origin" if self.hop else "auralink", http, listen, admin, side_udp, side_tcp)
        self.servers = [self.livekit, self.side]
        self.direct, self.sidecar = f"ws://127.0.0.1:{http}", f"ws://127.0.0.1:{listen}"
        self.livekit_udp = udp
        self.media_ports = list(range(side_udp, side_udp + self.workers))
        self.admin = f"http://127.0.0.1:{admin}"
        if self.hop:
            edge_listen, edge_admin, edge_udp = range(side_udp + self.workers, side_udp + self.workers + 3)
            self.edge = self._sidecar("edge", listen, edge_listen, edge_admin, edge_udp, None)
            self.servers.append(self.edge)
            self.edge_url, self.edge_admin = f"ws://127.0.0.1:{edge_listen}", f"http://127.0.0.1:{edge_admin}"
            self.edge_ports = list(range(edge_udp, edge_udp + self.workers))

    def _sidecar(self, name: str, upstream: int, listen: int, admin: int, udp: int, tcp: int | None) -> Process:
        """An AuraLink on these loopback ports, once it answers."""
        rules = "".join(f'  - match: "{mode}-*"\n    {settings}\n' for mode, settings in self.modes.items())
        tcp_port = f"tcp_port: {tcp}, " if tcp else ""
        engine = ""
        if self.hop:
            engine = f"engine: {{ models: {self.tool('AURALINK_MODELS')}, runtime: {self.tool('AURALINK_ONNXRUNTIME')} }}\n"
        path = self.folder / f"{name}.yaml"
        path.write_text(
            f"listen: 127.0.0.1:{listen}\nupstream: http://127.0.0.1:{upstream}\n"
            f"media: {{ ip: 127.0.0.1, udp_port: {udp}, {tcp_port}workers: {self.workers}, scheduling: {self.scheduling} }}\n"
            f"admin: {{ listen: 127.0.0.1:{admin} }}\n{engine}"
            f"limits: {{ handshakes: 1024 }}\nrooms:\n{rules}"
        )
        process = self.spawn(name, [str(self.auralink), "--config", str(path)])
        # AuraLink passes "/" on, so an answer means that what is behind it is there too.
        self._await_http(process, listen)
        return process

    def _await_http(self, process: Process, port: int) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if process.child.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).read()
                return
            except urllib.error.HTTPError:
                time.sleep(0.1)
            except OSError:
                time.sleep(0.05)
        raise Failed(f"{process.name} does not answer on 127.0.0.1:{port}; the end of its output:\n{tail(process.log)}\n{tail(process.out)}")

    def check(self) -> None:
        """Raises if LiveKit or an AuraLink has ended."""
        for process in self.servers:
            if process.child.poll() is not None:
                raise Failed(f"{process.name} ended with {process.child.returncode}; the end of {process.log}:\n{tail(process.log)}")

    def spawn(self, name: str, command: list[str]) -> Process:
        """Starts a program that ends with the lab."""
        process = Process(name, command, self.folder / f"{name}.log", os.environ | self.env)
        self.processes.append(process)
        return process

    def python_client(self, name: str, *args: str) -> Process:
        return self.spawn(name, [self.tool("AURALINK_PYTHON"), str(CLIENTS / "python" / "client.py"), *args])

    def browser_client(self, name: str, *args: str) -> Process:
        return self.spawn(name, [self.tool("AURALINK_NODE"), str(CLIENTS / "browser" / "client.mjs"), *args])

    def go_client(self, name: str, *args: str) -> Process:
        return self.spawn(name, [self.tool("AURALINK_GO_CLIENT"), *args])

    def wire(self, name: str, seconds: float, ports: list[int] | None = None) -> Process:
        """Starts counting what crosses these UDP ports, AuraLink's towards clients by default; `report` returns wire.py's object."""
        command = [self.tool("AURALINK_PYTHON"), str(CLIENTS / "python" / "wire.py"), "--seconds", str(seconds)]
        return self.spawn(name, [*command, *port_options(ports or self.media_ports)])

    def rtp(self, name: str, seconds: float, ports: list[int], sample: int = 1) -> tuple[Process, Path]:
        """Starts writing down the RTP packets of these UDP ports; the file is there when the process has reported. Of what comes from them
        only the streams whose SSRC is divisible by `sample`."""
        path = self.folder / f"{name}.txt"
        command = [self.tool("AURALINK_PYTHON"), str(CLIENTS / "python" / "rtp.py"), "--seconds", str(seconds)]
        command += ["--sample", str(sample)]
        return self.spawn(name, [*command, *port_options(ports), str(path)]), path

    @staticmethod
    def status(admin: str) -> dict:
        """/status.json of an AuraLink."""
        with urllib.request.urlopen(f"{admin}/status.json", timeout=5) as answer:
            return json.load(answer)


def port_options(ports: list[int]) -> list[str]:
    """`--port P` for each."""
    return [x for port in ports for x in ("--port", str(port))]


def socket_drops(ports: list[int]) -> int:
    """Datagrams that the kernel threw away because the sockets on these UDP ports were full, since they were opened."""
    lines = Path("/proc/net/udp").read_text().splitlines()[1:]
    return sum(int(f[-1]) for f in (line.split() for line in lines) if int(f[1].split(":")[1], 16) in ports)


def machine() -> str:
    """Processor, cores and kernel, in a line."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return f"{os.cpu_count()} cores of {model}, Linux {os.uname().release}"


def busy_cores() -> tuple[float, float]:
    """(time, core seconds that the whole machine has been busy): the difference of two is its load."""
    values = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    idle = values[3] + values[4]
    return time.monotonic(), (sum(values[:8]) - idle) / os.sysconf("SC_CLK_TCK")


def raise_file_limit() -> None:
    """Lets the children open as many files as the hard limit allows: a session through AuraLink takes several sockets."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def main_guard(main) -> None:
    """Runs `main`, turning a `Failed` into one message and exit code 1."""
    # SIGTERM ends the children too, as an exception on its way through the `with` block.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except Failed as e:
        print(f"\nFAILED: {e}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
