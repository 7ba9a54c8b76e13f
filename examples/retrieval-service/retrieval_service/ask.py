"""`ask`: one question to a running service."""

import sys

import grpc
from retrieval.v1 import retrieval_pb2, retrieval_pb2_grpc


class AskError(Exception):
    """There is no answer; the message says why."""


def ask(service: str, question: str, policy: str, seconds: float) -> None:
    """Prints the answer as it comes to standard output, sources and usage to standard error."""
    with grpc.insecure_channel(service) as channel:
        stub = retrieval_pb2_grpc.RetrievalStub(channel)
        request = retrieval_pb2.AskRequest(question=question, policy=policy)
        begun = False
        try:
            for event in stub.Ask(request, timeout=seconds):
                if event.WhichOneof("event") == "token":
                    # The first piece of an answer begins with the space that stands before it in the prompt.
                    print(event.token if begun else event.token.lstrip(), end="", flush=True)
                    begun = True
                else:
                    print(flush=True)
                    report(event.answered)
        except grpc.RpcError as error:
            if begun:
                print(flush=True)
            raise AskError(explain(error, service)) from error


def report(answered: retrieval_pb2.Answered) -> None:
    """What the answer stands on, for people."""
    for source in answered.sources:
        how = "the question" if source.hop == 0 else f"a link (hop {source.hop})"
        cached = "from cache" if source.cached else "computed"
        print(f"  {source.name}: found for {how}, similarity {source.score:.2f}, {cached}", file=sys.stderr)
    usage = answered.usage
    reuse = f"{usage.cached_tokens} from cache, {usage.recomputed_tokens} recomputed"
    first = f"first token after {usage.first_token_seconds * 1e3:.0f} ms"
    print(f"  {usage.prompt_tokens} prompt tokens: {reuse}; {first}", file=sys.stderr)


def explain(error: grpc.RpcError, service: str) -> str:
    """One line for a failed call."""
    details = " ".join((error.details() or "").split())
    if error.code() == grpc.StatusCode.UNAVAILABLE and "failed to connect" in details and "gateway" not in details:
        return f"no retrieval service answers at {service}; start one: python -m retrieval_service serve"
    return f"{error.code().name}: {details}"
