"""`serve`: start, ingest, answer until told to stop."""

import asyncio
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from retrieval.v1 import retrieval_pb2_grpc

from . import service
from .corpus import Report, load
from .gateway import Gateway, GatewayError
from .search import Limits, Searcher

# Questions answered at the same time; one more gets RESOURCE_EXHAUSTED.
CONCURRENT_QUESTIONS = 64

SERVER_OPTIONS = [
    # By default two processes may listen on one port and share its callers by chance.
    ("grpc.so_reuseport", 0),
    # Questions are short.
    ("grpc.max_receive_message_length", 64 << 10),
]


class StartError(Exception):
    """The service cannot start; the message says why."""


@dataclass(frozen=True)
class Options:
    """What `serve` is told on the command line."""

    gateway: str
    listen: str
    corpus: Path
    tenant: str
    limits: Limits
    start_seconds: float
    ingest_seconds: float
    answer_seconds: float
    drain_seconds: float


async def serve(options: Options) -> None:
    """Runs until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    # First of all: a signal during the start is a stop, too.
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    reports = load(options.corpus)
    gateway = Gateway(options.gateway, options.tenant)
    searcher = Searcher(reports, options.limits)
    server, checks, port = await _listen(options.listen, service.Retrieval(searcher, gateway, options.answer_seconds))
    try:
        starting = asyncio.create_task(_ingest(gateway, reports, options))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([starting, stopping], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            # Raises what kept the service from starting.
            _say(starting.result())
            for name in ("", service.NAME):
                await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
            _say(f"listening on {options.listen.rpartition(':')[0]}:{port}")
            await stopping
        starting.cancel()
        stopping.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)
        # Health first, so that no new question comes; then the answers in flight may end.
        await checks.enter_graceful_shutdown()
    finally:
        await server.stop(options.drain_seconds)
        await gateway.close()


async def _listen(address: str, retrieval: service.Retrieval):
    server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=CONCURRENT_QUESTIONS)
    checks = health.aio.HealthServicer()
    # Not ready before the corpus is there. A question in between is answered, only not as fast.
    for name in ("", service.NAME):
        await checks.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    retrieval_pb2_grpc.add_RetrievalServicer_to_server(retrieval, server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartError(f"cannot listen on {address}: is another service there?") from error
    await server.start()
    return server, checks, port


async def _ingest(gateway: Gateway, reports: list[Report], options: Options) -> str:
    try:
        capabilities = await gateway.wait(options.start_seconds)
        models = ", ".join(f"{model.name} ({model.max_tokens} tokens)" for model in capabilities.models)
        ingested = await gateway.ingest(reports, options.ingest_seconds)
    except GatewayError as error:
        raise StartError(str(error)) from error
    return (
        f"gateway {gateway.address} with {models}: {ingested.chunks} reports ingested, "
        f"{ingested.computed} of them computed now"
    )


def _say(line: str) -> None:
    print(line, file=sys.stdout, flush=True)
