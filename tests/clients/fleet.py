"""Processes under test: a fleet, embedded or of real processes, and the retrieval service, started as an operator
starts them.

Nothing here sleeps for a guessed time. `until` polls a condition, has a deadline, and shows the processes' output when
the deadline passes or a process ends that should run.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "retrieval-service"
BINARIES = ROOT / os.environ.get("TESTS_BIN_DIR", "target/release")
BINARY = BINARIES / "cacheclip"
# Generous: other work may share the machine's cores. What is waited for usually takes a tenth of a second.
START_SECONDS = 60.0
STOP_SECONDS = 60.0
CALL_SECONDS = 60.0
POLL_SECONDS = 0.05


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def free_block(offsets: list[int]) -> int:
    """A port of which these others, counted from it, are free as well; below those that outgoing connections get."""
    first = 10_000 + os.getpid() % 400 * 25
    for tried in range(400):
        base = 10_000 + (first - 10_000 + tried * 25) % 10_000
        if all(is_free(base + offset) for offset in offsets):
            return base
    raise AssertionError("no block of free ports")


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As the servers do: a port whose last connection has just been closed can be had.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def until(condition, what: str, seconds: float, process: "Process | None" = None):
    """The first truthy value of `condition()`."""
    ends = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        output = process.output() if process else ""
        if process and process.code() is not None:
            raise AssertionError(f"{what}: the process ended with {process.code()}:\n{output}")
        if time.monotonic() > ends:
            raise AssertionError(f"{what}: not within {seconds} s\n{output}")
        time.sleep(POLL_SECONDS)


def health(channel: grpc.Channel, service: str = "") -> str:
    """What grpc.health.v1 says; empty where nobody answers."""
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
    except grpc.RpcError:
        return ""
    return health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)


def serving(channel: grpc.Channel, service: str = "") -> bool:
    return health(channel, service) == "SERVING"


class Process:
    """A child process with its output in files."""

    def __init__(self, arguments: list, directory: Path, name: str, cwd: Path = ROOT, leads: bool = False):
        """`leads`: it has children of its own, which are killed with it."""
        self._leads = leads
        self._out, self._err = directory / f"{name}.out", directory / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._child = subprocess.Popen(
                [str(argument) for argument in arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=cwd,
                start_new_session=leads,
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def code(self) -> int | None:
        return self._child.poll()

    def out(self) -> str:
        return self._out.read_text()

    def err(self) -> str:
        return self._err.read_text()

    def output(self) -> str:
        return f"--- standard output\n{self.out()}\n--- standard error\n{self.err()}"

    def terminate(self) -> int:
        """SIGTERM, and the exit code it led to."""
        if self.code() is None:
            self._child.send_signal(signal.SIGTERM)
        return self.wait()

    def wait(self, seconds: float = STOP_SECONDS) -> int:
        try:
            return self._child.wait(seconds)
        except subprocess.TimeoutExpired as error:
            self.kill()
            raise AssertionError(f"the process did not end within {seconds} s\n{self.output()}") from error

    def kill(self) -> None:
        if self.code() is None:
            if self._leads:
                os.killpg(self.pid, signal.SIGKILL)
            self._child.kill()
            self._child.wait(STOP_SECONDS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def memory(self, field: str = "VmRSS") -> int:
        """Bytes: VmRSS now, VmHWM at most so far."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)[1]) * 1024


class Fleet(Process):
    """`cacheclip serve`, ready."""

    def __init__(self, directory: Path, port: int | None = None, name: str = "fleet"):
        assert BINARY.is_file(), f"{BINARY} is missing; build it first: cargo build --release"
        self.address = f"127.0.0.1:{port or free_port()}"
        self._admin = f"127.0.0.1:{free_port()}"
        arguments = ["serve", "--listen", self.address, "--admin", self._admin]
        arguments += ["--data", directory / "data", "--models", ROOT / "models" / "tiny", "--log", "warn"]
        super().__init__([BINARY, *arguments], directory, name)
        try:
            with grpc.insecure_channel(self.address, options=[("grpc.max_reconnect_backoff_ms", 200)]) as channel:
                until(lambda: serving(channel, "cacheclip.v1.Gateway"), "the fleet is ready", START_SECONDS, self)
        except BaseException:
            self.kill()
            raise

    def metric(self, name: str) -> float:
        """The sum of a metric's series."""
        return metric(self._admin, name)


def metric(admin: str, name: str) -> float:
    with urllib.request.urlopen(f"http://{admin}/metrics", timeout=5) as reply:
        text = reply.read().decode()
    values = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)$", text, re.MULTILINE)
    assert values, f"there is no metric {name}"
    return sum(float(value) for value in values)


def ready(admin: str) -> bool:
    """Whether a process' admin port says so."""
    try:
        with urllib.request.urlopen(f"http://{admin}/ready", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


class LocalFleet(Process):
    """`deploy/local/fleet`: a gateway, two workers, two stores, a scorer and a Redis, all ready."""

    # As `--help` says: gRPC ports from the gateway's on, admin ports ten above, Redis in between.
    PARTS = {"gateway": 0, "worker-1": 1, "worker-2": 2, "store-0": 3, "store-1": 4, "scorer": 5}
    REDIS = 6

    @staticmethod
    def lacks() -> str:
        """Why it cannot be started here; empty where it can."""
        return "" if shutil.which("redis-server") else "redis-server is not installed (apt-get install redis-server)"

    def __init__(self, directory: Path, name: str = "local-fleet"):
        grpc_ports = list(self.PARTS.values())
        port = free_block([*grpc_ports, self.REDIS, *(offset + 10 for offset in grpc_ports)])
        self.address = f"127.0.0.1:{port}"
        self.admin = {part: f"127.0.0.1:{port + offset + 10}" for part, offset in self.PARTS.items()}
        arguments = [ROOT / "deploy" / "local" / "fleet", "--port", port, "--data", directory / "data"]
        arguments += ["--models", ROOT / "models" / "tiny", "--bin", BINARIES]
        super().__init__(arguments, directory, name, leads=True)
        try:
            until(lambda: "ready: gateway" in self.out(), "the fleet says that it is ready", START_SECONDS, self)
            for part, admin in self.admin.items():
                until(lambda: ready(admin), f"{part} is ready", START_SECONDS, self)
        except BaseException:
            self.kill()
            raise

    def metric(self, part: str, name: str) -> float:
        """The sum of a metric's series in one of the processes."""
        return metric(self.admin[part], name)


def retrieval(*arguments) -> list:
    """A command line of the retrieval service."""
    return [sys.executable, "-m", "retrieval_service", *arguments]


class Service(Process):
    """The retrieval service; `ready()` waits until its corpus is ingested."""

    def __init__(self, directory: Path, gateway: str, *options, name: str = "service"):
        self.address = f"127.0.0.1:{free_port()}"
        command = retrieval("serve", "--gateway", gateway, "--listen", self.address, *options)
        super().__init__(command, directory, name, EXAMPLE)

    def ready(self) -> "Service":
        try:
            with grpc.insecure_channel(self.address, options=[("grpc.max_reconnect_backoff_ms", 200)]) as channel:
                until(lambda: serving(channel, "retrieval.v1.Retrieval"), "the service is ready", START_SECONDS, self)
        except BaseException:
            self.kill()
            raise
        return self
