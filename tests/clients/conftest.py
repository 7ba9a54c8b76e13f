"""Stubs for the clients under test, made from the .proto files as any client's author would make them."""

import os
import sys
import tempfile
import warnings
from importlib import resources
from pathlib import Path

import pytest
from grpc_tools import protoc

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fleet import EXAMPLE, ROOT, Fleet, LocalFleet  # noqa: E402

# Everything here talks over loopback, whatever proxy the environment names; child processes inherit this.
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"
# Kept until the interpreter ends: modules are imported from it at any time.
STUBS = tempfile.TemporaryDirectory(prefix="cacheclip-stubs-")
# The example makes its own; not in the source tree. Inherited, too.
os.environ["RETRIEVAL_BUILD_DIR"] = str(Path(STUBS.name) / "example")


def make_stubs() -> None:
    roots = [ROOT / "proto", EXAMPLE / "proto", resources.files("grpc_tools") / "_proto"]
    files = ["cacheclip/v1/common.proto", "cacheclip/v1/gateway.proto", "retrieval/v1/retrieval.proto"]
    arguments = ["protoc", *(f"-I{root}" for root in roots)]
    arguments += [f"--python_out={STUBS.name}", f"--grpc_python_out={STUBS.name}", *files]
    if protoc.main(arguments) != 0:
        raise pytest.UsageError("protoc refused the .proto files")
    sys.path.insert(0, STUBS.name)


make_stubs()
# The example's modules, for tests of its parts.
sys.path.insert(0, str(EXAMPLE))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    """An embedded fleet with a store of its own for the tests of one file."""
    with Fleet(tmp_path_factory.mktemp("fleet")) as running:
        yield running
        assert running.terminate() == 0, running.output()


@pytest.fixture(scope="module")
def local_fleet(tmp_path_factory):
    """A fleet of real processes, as the local script starts them; the embedded one where that cannot run."""
    directory = tmp_path_factory.mktemp("local-fleet")
    if lacks := LocalFleet.lacks():
        warnings.warn(f"against the embedded fleet and not real processes: {lacks}", stacklevel=1)
        start = Fleet
    else:
        start = LocalFleet
    with start(directory) as running:
        yield running
        assert running.terminate() == 0, running.output()
