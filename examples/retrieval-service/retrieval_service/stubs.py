"""Stubs for the gateway's protocol and this service's own, made from the .proto files when they are first needed.

Generated code is not committed: it would have to match the installed protobuf, and nobody reads it. The build
directory is named after what goes into it, so a changed .proto or another grpcio-tools makes a new one.
"""

import hashlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from importlib import resources
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
# Where cacheclip/v1/*.proto are: in this repository, or wherever a copy of this directory keeps them.
GATEWAY_PROTO = Path(os.environ.get("RETRIEVAL_GATEWAY_PROTO", HERE.parent.parent / "proto"))
OWN_PROTO = HERE / "proto"
BUILD = Path(os.environ.get("RETRIEVAL_BUILD_DIR", HERE / "build"))


class StubsError(Exception):
    """Stubs cannot be made; the message says which file or directory is the matter."""


def install() -> None:
    """Makes the stubs unless they are there, and makes them importable."""
    path = str(generate())
    if path not in sys.path:
        sys.path.insert(0, path)


def generate() -> Path:
    """The directory with the stubs."""
    wanted = {
        "cacheclip/v1/common.proto": GATEWAY_PROTO,
        "cacheclip/v1/gateway.proto": GATEWAY_PROTO,
        "retrieval/v1/retrieval.proto": OWN_PROTO,
    }
    digest = hashlib.sha256(importlib.metadata.version("grpcio-tools").encode())
    try:
        for name, root in wanted.items():
            digest.update(name.encode() + b"\0" + (root / name).read_bytes() + b"\0")
        ready = BUILD / f"stubs-{digest.hexdigest()[:16]}"
        if not ready.is_dir():
            _compile(list(wanted), ready)
        return ready
    except OSError as error:
        settings = "RETRIEVAL_GATEWAY_PROTO says where cacheclip/v1 is, RETRIEVAL_BUILD_DIR where to write"
        raise StubsError(f"stubs: {error}; {settings}") from error


def _compile(names: list[str], ready: Path) -> None:
    # Imported here: it is slow, and only the first start needs it.
    from grpc_tools import protoc

    BUILD.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix="making-", dir=BUILD))
    try:
        google = resources.files("grpc_tools") / "_proto"
        arguments = ["protoc", f"-I{GATEWAY_PROTO}", f"-I{OWN_PROTO}", f"-I{google}"]
        arguments += [f"--python_out={making}", f"--grpc_python_out={making}", *names]
        if protoc.main(arguments) != 0:
            raise StubsError("stubs: protoc refused the .proto files; its message stands above")
        try:
            # Another process may have been faster; both made the same.
            making.rename(ready)
        except OSError:
            if not ready.is_dir():
                raise
    finally:
        shutil.rmtree(making, ignore_errors=True)
