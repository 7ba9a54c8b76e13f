"""The service: question in, reports found, prompt sent, tokens and sources out."""

import asyncio
import logging
import time
from contextlib import aclosing

import grpc
from cacheclip.v1 import common_pb2, gateway_pb2
from google.rpc import error_details_pb2, status_pb2
from retrieval.v1 import retrieval_pb2, retrieval_pb2_grpc

from .gateway import DETAILS, Gateway, GatewayError, chunk
from .prompt import ANSWER_TOKENS, QuestionError, prompt_template
from .search import Hit, Searcher, mentions, names

log = logging.getLogger("retrieval_service")

NAME = "retrieval.v1.Retrieval"
# A question is a sentence; whoever sends more sends something else.
LONGEST_QUESTION = 500


class Retrieval(retrieval_pb2_grpc.RetrievalServicer):
    """The gRPC service."""

    def __init__(self, searcher: Searcher, gateway: Gateway, answer_seconds: float):
        self._searcher = searcher
        self._gateway = gateway
        self._answer_seconds = answer_seconds

    async def Ask(self, request, context):  # noqa: N802 (gRPC's name)
        began = time.monotonic()
        tail = await self._tail(request.question, context)
        # In a thread: a deployment's search waits for other machines, and other answers go on meanwhile.
        hits = await asyncio.to_thread(self._searcher.search, request.question)
        unknown = [name for name in names(request.question) if not any(mentions(hit.report, [name]) for hit in hits)]
        if unknown:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no report mentions {' or '.join(unknown)}")
        prompt = gateway_pb2.GenerateRequest(
            chunks=[chunk(hit.report) for hit in hits],
            question=tail,
            policy=request.policy,
            sampling=common_pb2.Sampling(max_tokens=ANSWER_TOKENS),
        )
        first_token = 0.0
        try:
            async with aclosing(self._gateway.generate(prompt, self._limit(context), request_id(context))) as events:
                async for event in events:
                    if isinstance(event, gateway_pb2.Token):
                        first_token = first_token or time.monotonic() - began
                        yield retrieval_pb2.AskEvent(token=event.text)
                    else:
                        yield retrieval_pb2.AskEvent(answered=answered(event, hits, first_token))
        except GatewayError as failed:
            log.warning("%s", failed)
            await refuse(context, failed)

    def _limit(self, context) -> float:
        """The caller's deadline where it is the nearer one: nobody waits for what comes after it."""
        remaining = context.time_remaining()
        return self._answer_seconds if remaining is None else min(self._answer_seconds, remaining)

    @staticmethod
    async def _tail(question: str, context) -> str:
        why = ""
        if not question.strip():
            why = "question: must not be empty"
        elif len(question) > LONGEST_QUESTION:
            why = f"question: has {len(question)} characters, {LONGEST_QUESTION} are allowed"
        else:
            try:
                return prompt_template(question)
            except QuestionError as error:
                why = str(error)
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, why)


def answered(done: gateway_pb2.Done, hits: list[Hit], first_token: float) -> retrieval_pb2.Answered:
    """The last event: what the answer stands on and what it cost."""
    from_cache = {report.index for report in done.explain.chunks if report.hit}
    sources = [
        retrieval_pb2.Source(
            number=hit.report.number, name=hit.report.name, score=hit.score, hop=hit.hop, cached=at in from_cache
        )
        for at, hit in enumerate(hits)
    ]
    usage = retrieval_pb2.Usage(
        prompt_tokens=done.usage.prompt_tokens,
        cached_tokens=done.usage.cached_tokens,
        recomputed_tokens=done.usage.recomputed_tokens,
        completion_tokens=done.usage.completion_tokens,
        first_token_seconds=first_token,
    )
    return retrieval_pb2.Answered(text=done.text, sources=sources, usage=usage)


async def refuse(context, failed: GatewayError) -> None:
    """The gateway's failure as this service's own; when to come back is passed on."""
    trailing = ()
    if failed.retry_after is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(int(failed.retry_after * 1e9))
        status = status_pb2.Status(code=failed.code.value[0], message=failed.message)
        status.details.add().Pack(info)
        trailing = ((DETAILS, status.SerializeToString()),)
    await context.abort(failed.code, failed.message, trailing_metadata=trailing)


def request_id(context) -> str:
    """The caller's request id, which then also stands in the logs of the gateway and behind it."""
    return next((value for key, value in context.invocation_metadata() or () if key == "x-request-id"), "")
