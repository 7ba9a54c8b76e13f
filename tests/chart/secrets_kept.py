"""Secrets that the chart draws itself: once, whatever comes after. A small stand-in plays the Kubernetes API."""

import base64
import contextlib
import http.server
import json
import pathlib
import tempfile
import threading

import yaml

from common import CHART, LOADER, NAMESPACE, RELEASE, ROOT, check, helm

DISCOVERY = {
    "/version": {"major": "1", "minor": "33", "gitVersion": "v1.33.0"},
    "/api": {"kind": "APIVersions", "versions": ["v1"]},
    "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": []},
    "/api/v1": {
        "kind": "APIResourceList",
        "groupVersion": "v1",
        "resources": [{"name": "secrets", "namespaced": True, "kind": "Secret", "verbs": ["get", "list"]}],
    },
}


class Cluster:
    """The answers of a cluster that has some Secrets, and what it was asked for."""

    def __init__(self):
        self.secrets, self.asked = {}, []

    def answer(self, path):
        """Status and body for a path."""
        path = path.split("?")[0]
        if path in DISCOVERY:
            return 200, DISCOVERY[path]
        self.asked.append(path)
        folder, _, name = path.rpartition("/")
        if folder == f"/api/v1/namespaces/{NAMESPACE}/secrets" and name in self.secrets:
            return 200, self.secrets[name]
        return 404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}

    @contextlib.contextmanager
    def serving(self):
        """A kubeconfig for it, while it serves."""
        cluster = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                status, body = cluster.answer(self.path)
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_):
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, tempfile.TemporaryDirectory() as folder:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            here = {"server": f"http://127.0.0.1:{server.server_port}"}
            config = {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "here", "cluster": here}],
                "contexts": [{"name": "here", "context": {"cluster": "here", "user": ""}}],
                "current-context": "here",
            }
            path = pathlib.Path(folder) / "config"
            path.write_text(yaml.safe_dump(config))
            yield ["--kubeconfig", path, "--kube-apiserver", here["server"]]
            server.shutdown()

    def render(self, connection, *arguments):
        """Renders the way an installation does: with a look into the cluster."""
        return helm(
            "template", RELEASE, CHART, "--namespace", NAMESPACE, "--dry-run=server", *connection, *arguments
        )  # fmt: skip


def secrets(answer):
    """The rendered Secrets by name."""
    assert answer.returncode == 0, answer.stderr
    objects = yaml.load_all(answer.stdout, Loader=LOADER)
    return {each["metadata"]["name"]: each for each in objects if each and each["kind"] == "Secret"}


def text(secret, key):
    """A value of a Secret."""
    return base64.b64decode(secret["data"][key]).decode()


@check
def drawn_secrets_are_drawn_once_and_found_again():
    cluster = Cluster()
    with cluster.serving() as connection:
        first, other = secrets(cluster.render(connection)), secrets(cluster.render(connection))
        assert set(first) == {f"{RELEASE}-cacheclip-scope", f"{RELEASE}-cacheclip-redis"}
        scope, password = f"{RELEASE}-cacheclip-scope", f"{RELEASE}-cacheclip-redis"
        # In an empty cluster each rendering draws its own, in the form that the services want.
        for name, key in [(scope, "scope-secret"), (password, "redis-password")]:
            assert text(first[name], key) != text(other[name], key), name
            assert f"/api/v1/namespaces/{NAMESPACE}/secrets/{name}" in cluster.asked, cluster.asked
        assert len(text(first[scope], "scope-secret")) == 64 and int(text(first[scope], "scope-secret"), 16) > 2**200
        assert text(first[password], "redis-password").isalnum() and len(text(first[password], "redis-password")) > 32
        assert first[scope]["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
        # Once installed they stay what they are.
        cluster.secrets = first
        again = secrets(cluster.render(connection))
        assert {name: each["data"] for name, each in again.items()} == {name: each["data"] for name, each in first.items()}
        # But for a scope secret that is given.
        given = secrets(cluster.render(connection, "--set-string", "scopeSecret.value=" + "ab" * 32))
        assert text(given[scope], "scope-secret") == "ab" * 32


@check
def the_development_secret_is_refused_where_it_stands_in_the_cluster():
    source = (ROOT / "services/gateway/src/options.rs").read_text()
    development = next(line for line in source.splitlines() if "const DEVELOPMENT_SECRET" in line).split('"')[1]
    cluster = Cluster()
    with cluster.serving() as connection:
        for secret, refused in [(development, True), ("ab" * 32, False)]:
            data = {"scope-secret": base64.b64encode(secret.encode()).decode()}
            metadata = {"name": "mine", "namespace": NAMESPACE}
            cluster.secrets = {"mine": {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": data}}
            answer = cluster.render(connection, "--set", "scopeSecret.existingSecret=mine")
            assert (answer.returncode != 0) == refused, answer.stderr
            assert ("development secret" in answer.stderr) == refused, answer.stderr


@check
def a_secret_of_yours_is_used_and_none_is_drawn_beside_it():
    cluster = Cluster()
    with cluster.serving() as connection:
        mine = ["--set", "scopeSecret.existingSecret=mine,redis.existingSecret=yours"]
        answer = cluster.render(connection, *mine)
        assert secrets(answer) == {}, answer.stdout
        assert "name: mine" in answer.stdout and "name: yours" in answer.stdout
