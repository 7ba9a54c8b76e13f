"""The chart's own Redis: its configuration and start script, with a real server."""

import os
import pathlib
import signal
import socket
import subprocess
import tempfile
import time

from common import CHART, LIMIT, check, need, one, profile

PASSWORDS = ["plain", "0123", 'a"b', "a\\b", "a b#c$d'e`f", 'end"\nport 1']


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def ask(port, *words):
    """One request in Redis' protocol and the first line of its answer; None while nobody listens."""
    message = f"*{len(words)}\r\n" + "".join(f"${len(word.encode())}\r\n{word}\r\n" for word in words)
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(message.encode())
            return connection.makefile("rb").readline().decode().strip()
    except ConnectionError:
        return None


def started(folder, password):
    """A server started as in the pod, in a folder and on a port of its own."""
    text = one(profile("default"), "ConfigMap", "redis")["data"]["redis.conf"]
    port = free_port()
    changes = {"port 6379": f"port {port}", "dir /data": f"dir {folder}", "bind * -::*": "bind 127.0.0.1"}
    for wanted, instead in changes.items():
        assert wanted in text, f"{wanted!r} is not in redis.conf"
        text = text.replace(wanted, instead)
    config = folder / "redis.conf"
    config.write_text(text)
    environment = {"PATH": os.environ["PATH"], "REDIS_PASSWORD": password}
    script = CHART / "files/redis-start.sh"
    log = open(folder / "log", "w")
    server = subprocess.Popen(["sh", script, config], env=environment, cwd=folder, stdout=log, stderr=log)
    end = time.monotonic() + LIMIT
    while ask(port, "PING") is None:
        assert server.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < end, "redis-server does not listen"
    return server, port


@check
def redis_starts_with_any_password_shows_it_to_nobody_and_keeps_nothing():
    need("redis-server", "Debian: redis-server")
    for password in PASSWORDS[:-1]:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name)
            server, port = started(folder, password)
            try:
                assert ask(port, "PING").startswith("-NOAUTH"), "it answers without a password"
                assert ask(port, "AUTH", password + "x").startswith("-WRONGPASS")
                assert ask(port, "AUTH", password) == "+OK", password
                seen = pathlib.Path(f"/proc/{server.pid}/cmdline").read_bytes().decode()
                assert "redis-server" in seen and password not in seen, seen
            finally:
                # The script has become the server: the kubelet's signal reaches it.
                server.send_signal(signal.SIGTERM)
                code = server.wait(LIMIT)
            assert code == 0, f"exit code {code}"
            left = {path.name for path in folder.iterdir()}
            assert left == {"redis.conf", "log"}, left


@check
def a_password_cannot_bring_settings_of_its_own():
    need("redis-server", "Debian: redis-server")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        try:
            server, _ = started(folder, PASSWORDS[-1])
        except AssertionError as refused:
            # A line break ends the directive in the middle of a string, which Redis refuses to start with.
            assert "FATAL CONFIG FILE ERROR" in str(refused), refused
        else:
            server.kill()
            server.wait(LIMIT)
            raise AssertionError("a password with a line break was taken")


@check
def redis_without_a_password_does_not_start():
    answer = subprocess.run(
        ["sh", CHART / "files/redis-start.sh", os.devnull], env={"PATH": os.environ["PATH"]},
        capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert answer.returncode != 0 and "holds no password" in answer.stderr, answer
