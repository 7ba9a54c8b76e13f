"""The CacheClip gateway as this service calls it: deadlines on every call, and which failures are tried again.

Tried again: UNAVAILABLE before the first token (nothing was promised yet, and the call changes nothing), and
RESOURCE_EXHAUSTED after the pause that its RetryInfo asks for. Never once a token went out: the caller has it.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

import grpc
from cacheclip.v1 import gateway_pb2, gateway_pb2_grpc
from google.rpc import error_details_pb2, status_pb2

from .corpus import Report

# Calls of one request, the first included.
ATTEMPTS = 4
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 2.0
# One call that should answer at once.
CAPABILITIES_SECONDS = 5.0
DETAILS = "grpc-status-details-bin"

CHANNEL_OPTIONS = [
    # Tries are counted in this file; hidden ones below it would multiply them.
    ("grpc.enable_retries", 0),
    # By default a lost connection is dialled again after a second or more, and every call in between fails.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A gateway that vanished without closing is noticed while a call waits for it.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
]


@dataclass
class GatewayError(Exception):
    """What the gateway answered instead of an answer."""

    code: grpc.StatusCode
    message: str
    # When to come back, where the gateway said so.
    retry_after: float | None = None

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}"

    @classmethod
    def of(cls, error: grpc.RpcError, address: str) -> "GatewayError":
        code, message = error.code(), " ".join((error.details() or "").split())
        if code == grpc.StatusCode.UNAVAILABLE:
            message = f"the gateway at {address} cannot be reached or is going away: {message}"
        else:
            message = f"gateway: {message}"
        return cls(code, message, retry_after(error.trailing_metadata()))


def retry_after(metadata) -> float | None:
    """Seconds of the google.rpc.RetryInfo among a status's details."""
    for key, value in metadata or ():
        if key != DETAILS:
            continue
        for detail in status_pb2.Status.FromString(value).details:
            info = error_details_pb2.RetryInfo()
            if detail.Unpack(info):
                return info.retry_delay.seconds + info.retry_delay.nanos / 1e9
    return None


def chunk(report: Report) -> gateway_pb2.Chunk:
    """A report as the gateway takes it: ingest and question must say exactly the same."""
    return gateway_pb2.Chunk(text=report.text)


@dataclass(frozen=True)
class Ingested:
    """What an ingest came to."""

    chunks: int
    computed: int


class Gateway:
    """One gateway. Close it."""

    def __init__(self, address: str, tenant: str = ""):
        self.address = address
        self._metadata = (("x-tenant", tenant),) if tenant else ()
        self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._stub = gateway_pb2_grpc.GatewayStub(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def wait(self, limit: float) -> gateway_pb2.GetCapabilitiesResponse:
        """What the gateway can do, as soon as it answers; it may start later than this service does."""
        ends = time.monotonic() + limit
        attempt = 1
        while True:
            left = ends - time.monotonic()
            try:
                return await self._stub.GetCapabilities(
                    gateway_pb2.GetCapabilitiesRequest(),
                    timeout=max(0.05, min(CAPABILITIES_SECONDS, left)),
                    metadata=self._metadata,
                )
            except grpc.aio.AioRpcError as error:
                failed = GatewayError.of(error, self.address)
            await self._pause(failed, attempt, ends, attempts=None)
            attempt += 1

    async def ingest(self, reports: list[Report], limit: float) -> Ingested:
        """Has every report's KV computed, so that the first question is already fast. What was stored before is not
        computed again, so trying again from the start costs little."""
        ends = time.monotonic() + limit
        attempt = 1
        # A thread with the synchronous API: where a server ends a stream that is still being written, grpc.aio may
        # report INTERNAL instead of the server's status (grpc/grpc issue 36066), and the RetryInfo is lost with it.
        channel = grpc.insecure_channel(self.address, options=CHANNEL_OPTIONS)
        try:
            while True:
                try:
                    return await asyncio.to_thread(self._ingest, channel, reports, ends - time.monotonic())
                except grpc.RpcError as error:
                    failed = GatewayError.of(error, self.address)
                await self._pause(failed, attempt, ends)
                attempt += 1
        finally:
            # Ends the call, too, where nobody waits for it any more.
            channel.close()

    def _ingest(self, channel: grpc.Channel, reports: list[Report], left: float) -> Ingested:
        documents = (gateway_pb2.IngestRequest(document=report.name, chunks=[chunk(report)]) for report in reports)
        stub = gateway_pb2_grpc.GatewayStub(channel)
        last: dict[str, gateway_pb2.IngestProgress] = {}
        # The gateway takes the next document when it has done the one before: the stream is its own brake.
        for progress in stub.Ingest(documents, timeout=left, metadata=self._metadata):
            last[progress.document] = progress
        return Ingested(
            chunks=sum(progress.chunks_done for progress in last.values()),
            computed=sum(progress.chunks_computed for progress in last.values()),
        )

    async def generate(
        self, request: gateway_pb2.GenerateRequest, limit: float, request_id: str = ""
    ) -> AsyncIterator[gateway_pb2.Token | gateway_pb2.Done]:
        """Tokens, then the result. Use with `aclosing`: leaving early cancels the call."""
        ends = time.monotonic() + limit
        metadata = self._metadata + ((("x-request-id", request_id),) if request_id else ())
        attempt = 1
        while True:
            begun = False
            try:
                async with aclosing(self._events(request, ends - time.monotonic(), metadata)) as events:
                    async for event in events:
                        begun = True
                        yield event
                        if isinstance(event, gateway_pb2.Done):
                            return
                failed = GatewayError(grpc.StatusCode.UNAVAILABLE, "the gateway's stream ended without a result")
            except grpc.aio.AioRpcError as error:
                failed = GatewayError.of(error, self.address)
            if begun:
                raise failed
            await self._pause(failed, attempt, ends)
            attempt += 1

    async def _events(self, request, left: float, metadata):
        call = self._stub.Generate(request, timeout=left, metadata=metadata)
        try:
            async for event in call:
                match event.WhichOneof("event"):
                    case "token":
                        yield event.token
                    case "done":
                        yield event.done
        finally:
            # Whoever stops reading stops the gateway's work, too.
            call.cancel()

    @staticmethod
    async def _pause(failed: GatewayError, attempt: int, ends: float, attempts: int | None = ATTEMPTS) -> None:
        """Waits until another try makes sense; raises `failed` where none does."""
        match failed.code:
            case grpc.StatusCode.UNAVAILABLE:
                longest = min(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1), LONGEST_PAUSE_SECONDS)
                # Jitter: callers that failed together should not come back together.
                pause = longest * random.uniform(0.5, 1.0)
            case grpc.StatusCode.RESOURCE_EXHAUSTED if failed.retry_after is not None:
                pause = failed.retry_after
            case _:
                raise failed
        out_of_tries = attempts is not None and attempt >= attempts
        if out_of_tries or time.monotonic() + pause >= ends:
            raise failed
        await asyncio.sleep(pause)
