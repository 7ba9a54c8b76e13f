"""The script that copies and checks a model's files, as the chart renders it, with real files and a real server."""

import functools
import hashlib
import http.server
import os
import pathlib
import shutil
import tempfile
import threading

from common import Skip, check, one, profile, run

FILES = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 4096, "tokenizer.json": b"[]"}


def script(folder):
    """The script, out of the ConfigMap that pods mount."""
    path = folder / "fetch-model.sh"
    path.write_text(one(profile("gpu"), "ConfigMap", "models")["data"]["fetch-model.sh"])
    return path


class Scene:
    """A source with the files, a list of their digests, and an empty target."""

    def __init__(self, folder):
        self.script = script(folder)
        self.source, self.target, self.list = folder / "from", folder / "into", folder / "list.txt"
        self.source.mkdir()
        self.target.mkdir()
        for name, content in FILES.items():
            (self.source / name).write_bytes(content)
        self.lines = {name: f"sha256:{hashlib.sha256(content).hexdigest()} {name}" for name, content in FILES.items()}

    def fetch(self, source=None, shell=("sh",), **environment):
        """Runs the script; `environment` replaces variables."""
        self.list.write_text("".join(line + "\n" for line in self.lines.values()))
        variables = {"PATH": os.environ["PATH"], **environment}
        return run(*shell, self.script, source or self.source, self.list, self.target, env=variables)

    def there(self):
        """What stands in the target, hidden files too."""
        return {path.name: path.read_bytes() for path in self.target.iterdir()}


def scene(function):
    """Gives a check a fresh scene."""

    @functools.wraps(function)
    def with_scene():
        with tempfile.TemporaryDirectory() as folder:
            function(Scene(pathlib.Path(folder)))

    return with_scene


def shells():
    """The shells at hand: images bring dash, bash or busybox."""
    found = [("sh",)] + [(name,) for name in ["dash", "bash"] if shutil.which(name)]
    return found + ([("busybox", "sh")] if shutil.which("busybox") else [])


@check
@scene
def files_with_the_right_digests_are_copied(scene):
    for shell in shells():
        shutil.rmtree(scene.target)
        scene.target.mkdir()
        answer = scene.fetch(shell=shell)
        assert answer.returncode == 0, f"{shell}: {answer.stderr}"
        assert scene.there() == FILES


@check
@scene
def a_file_with_another_digest_stops_the_pod_and_never_gets_its_name(scene):
    damaged = bytearray(FILES["model.safetensors"])
    damaged[500_000] ^= 1
    (scene.source / "model.safetensors").write_bytes(damaged)
    answer = scene.fetch()
    assert answer.returncode == 1
    expected, found = hashlib.sha256(FILES["model.safetensors"]).hexdigest(), hashlib.sha256(damaged).hexdigest()
    says = ["model.safetensors: wrong digest", f"expected sha256:{expected}", f"found sha256:{found}", "models.*.files"]
    for part in says:
        assert part in answer.stderr, answer.stderr
    assert "model.safetensors" not in scene.there() and ".model.safetensors.partial" not in scene.there()
    # The control: the same file, undamaged.
    (scene.source / "model.safetensors").write_bytes(FILES["model.safetensors"])
    assert scene.fetch().returncode == 0 and scene.there() == FILES


@check
@scene
def a_restart_copies_only_what_is_missing_or_damaged(scene):
    assert scene.fetch().returncode == 0
    (scene.target / "config.json").write_bytes(b"cut")
    os.remove(scene.source / "model.safetensors")
    answer = scene.fetch()
    assert answer.returncode == 0, answer.stderr
    assert "model.safetensors is there already" in answer.stdout and "config.json copied" in answer.stdout
    assert scene.there() == FILES


@check
@scene
def what_cannot_be_copied_is_named(scene):
    digest = "sha256:" + "0" * 64
    cases = [
        ("missing.json", f"{digest} missing.json", "there is no such file"),
        ("up", f"{digest} ../up", "is no file name"),
        ("hidden", f"{digest} .hidden", "is no file name"),
        ("words", f"{digest} two words", "is no file name"),
        ("bare", "0000 bare", "is no digest"),
        ("md5", "md5:00 config.json", "unknown digest algorithm 'md5'"),
    ]
    sound = dict(scene.lines)
    for name, line, says in cases:
        scene.lines = {**sound, name: line}
        answer = scene.fetch()
        assert answer.returncode == 1 and says in answer.stderr, f"{line}: {answer}"
    scene.lines = {}
    answer = scene.fetch()
    assert answer.returncode == 1 and "names no file" in answer.stderr, answer


@check
@scene
def an_image_without_the_tool_for_a_digest_is_named(scene):
    tools = scene.target.parent / "tools"
    tools.mkdir()
    for name in ["sh", "rm", "mv", "cp", "sha256sum"]:
        os.symlink(shutil.which(name), tools / name)
    scene.lines = {"config.json": "blake3:" + "0" * 64 + " config.json"}
    answer = scene.fetch(PATH=str(tools))
    assert answer.returncode == 1 and "b3sum is not in this image" in answer.stderr, answer
    # A tool of that name, with the right answer, is all that was missing.
    fake = tools / "b3sum"
    fake.write_text("#!/bin/sh\necho '" + "0" * 64 + "  -'\n")
    fake.chmod(0o755)
    assert scene.fetch(PATH=str(tools)).returncode == 0


@check
@scene
def files_are_fetched_from_an_address(scene):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Quiet, directory=scene.source)
    clients = [name for name in ["curl", "wget"] if shutil.which(name)]
    if not clients:
        raise Skip("neither curl nor wget is installed")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for client in clients:
            tools = scene.target.parent / client
            tools.mkdir()
            for name in ["sh", "rm", "mv", "sha256sum", client]:
                os.symlink(shutil.which(name), tools / name)
            shutil.rmtree(scene.target)
            scene.target.mkdir()
            for base in [address, address + "/"]:
                answer = scene.fetch(source=base, PATH=str(tools))
                assert answer.returncode == 0, f"{client}: {answer.stderr}"
            assert scene.there() == FILES
            (scene.target / "config.json").unlink()
            answer = scene.fetch(source=f"{address}/nowhere", PATH=str(tools))
            assert answer.returncode == 1 and "nowhere/config.json: cannot be fetched" in answer.stderr, answer
        server.shutdown()


@check
def gateways_take_no_weights_and_the_others_take_all():
    data = one(profile("gpu"), "ConfigMap", "models")["data"]
    names = {key: [line.split()[1] for line in text.splitlines()] for key, text in data.items() if key.endswith(".txt")}
    everything = ["config.json", "tokenizer.json", "prompt.json", "model.safetensors"]
    assert names == {"primary.txt": everything, "primary-text.txt": everything[:3], "auxiliary.txt": everything}
    used = {}
    for component in ["gateway", "gpu-worker", "aux-scorer"]:
        pod = one(profile("gpu"), "Deployment", component)["spec"]["template"]["spec"]
        used[component] = pod["initContainers"][0]["args"][1].rsplit("/", 1)[1]
    assert used == {"gateway": "primary-text.txt", "gpu-worker": "primary.txt", "aux-scorer": "auxiliary.txt"}
