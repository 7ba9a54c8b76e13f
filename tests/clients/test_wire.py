"""What the gateway does with bad input from a client that knows nothing but the .proto files.

Every mistake is refused with a code that tells the caller what to do, INVALID_ARGUMENT names the field, and nothing
that a caller does wrong is paid for by the others: the fleet still answers, and it has not grown. What a single very
large text may cost is in test_wire_size.py.
"""

import math
import threading
from dataclasses import dataclass
from typing import Callable

import grpc
import pytest
from cacheclip.v1 import common_pb2, gateway_pb2, gateway_pb2_grpc
from fleet import CALL_SECONDS, Fleet, until
from google.rpc import error_details_pb2, status_pb2

A = "Report from Westhaven. Belmon keeps the sunny bell near the library. Marvin carries the clay mirror near the dune."
B = "Report from Northmoor. Rosden carries Marvin's token near the school. Pelden holds the worn thimble near the dune."
QUESTION = "\nQuestion: what does Pelden keep?\nAnswer: Pelden's"
ANSWER = "worn thimble."
# The gateway's default limit on a message.
LARGEST_MESSAGE = 16 << 20
# gRPC's own implementations say RESOURCE_EXHAUSTED; tonic says OUT_OF_RANGE. Neither is worth a retry.
TOO_LARGE = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.OUT_OF_RANGE)
SYLLABLES = [a + b for a in "abcd" for b in "efgh"]
IN_FLIGHT = "cacheclip_rpc_in_flight_requests"


def ask(*texts: str, **fields) -> gateway_pb2.GenerateRequest:
    chunks = [gateway_pb2.Chunk(text=text) for text in texts or (A, B)]
    return gateway_pb2.GenerateRequest(**{"chunks": chunks, "question": QUESTION, **fields})


def sampled(**fields) -> gateway_pb2.GenerateRequest:
    return ask(sampling=common_pb2.Sampling(**fields))


def document(*texts: str, **fields) -> gateway_pb2.IngestRequest:
    return gateway_pb2.IngestRequest(chunks=[gateway_pb2.Chunk(text=text) for text in texts], **fields)


@pytest.fixture(scope="module")
def channel(fleet):
    with grpc.insecure_channel(fleet.address) as channel:
        yield channel


@pytest.fixture(scope="module")
def gateway(channel):
    return gateway_pb2_grpc.GatewayStub(channel)


@pytest.fixture(scope="module")
def max_tokens(gateway) -> int:
    return gateway.GetCapabilities(gateway_pb2.GetCapabilitiesRequest(), timeout=CALL_SECONDS).models[0].max_tokens


def answer(gateway, request=None) -> gateway_pb2.Done:
    events = list(gateway.Generate(request or ask(), timeout=CALL_SECONDS))
    assert [event.WhichOneof("event") for event in events[:1] + events[-1:]] == ["started", "done"]
    return events[-1].done


def refusal(call) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    return caught.value


def violations(error: grpc.RpcError) -> list[str]:
    """Fields of the google.rpc.BadRequest among the status's details."""
    details = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    fields = []
    for detail in status_pb2.Status.FromString(details).details:
        bad = error_details_pb2.BadRequest()
        if detail.Unpack(bad):
            fields += [violation.field for violation in bad.field_violations]
    return fields


@dataclass(frozen=True)
class Case:
    """A mistake. `make` gets the model's length in tokens; one word of its texts is at least one token."""

    what: str
    field: str
    make: Callable[[int], object]
    metadata: tuple = ()

    def parameter(self):
        return pytest.param(self, id=self.what)


CASES = [
    Case("an_empty_request", "question", lambda most: gateway_pb2.GenerateRequest()),
    Case("an_empty_question", "question", lambda most: ask(question="")),
    Case("an_empty_chunk_text", "chunks[1].text", lambda most: ask(A, "", B)),
    Case("a_chunk_without_fields", "chunks[0].text", lambda most: ask(chunks=[gateway_pb2.Chunk()])),
    Case("a_chunk_longer_than_the_model", "chunks[0].text", lambda most: ask("word " * most)),
    Case("chunks_that_are_together_longer_than_the_model", "chunks", lambda most: ask(*["word " * (most // 3)] * 4)),
    Case("fifty_thousand_chunks", "chunks", lambda most: ask(*(f"word {n}" for n in range(50_000)))),
    Case("fifty_thousand_times_the_same_chunk", "chunks", lambda most: ask(*["word"] * 50_000)),
    Case("a_question_longer_than_the_model", "question", lambda most: ask(chunks=[], question="word " * most)),
    Case("a_question_longer_than_the_model_behind_chunks", "question", lambda most: ask(question="word " * most)),
    Case("a_prefix_longer_than_the_model", "prefix", lambda most: ask(prefix="word " * most)),
    Case("an_answer_longer_than_the_model", "sampling.max_tokens", lambda most: sampled(max_tokens=most)),
    Case("an_endless_answer", "sampling.max_tokens", lambda most: sampled(max_tokens=(1 << 32) - 1)),
    Case("a_negative_temperature", "sampling.temperature", lambda most: sampled(temperature=-1.0)),
    Case("a_temperature_that_is_no_number", "sampling.temperature", lambda most: sampled(temperature=math.nan)),
    Case("a_temperature_beyond_use", "sampling.temperature", lambda most: sampled(temperature=1e9)),
    Case("a_nucleus_above_one", "sampling.top_p", lambda most: sampled(top_p=1.5)),
    Case("a_nucleus_that_is_no_number", "sampling.top_p", lambda most: sampled(top_p=math.nan)),
    Case("an_empty_stop_text", "sampling.stop[1]", lambda most: sampled(stop=["x", ""])),
    Case("a_ratio_below_zero", "ratio", lambda most: ask(ratio=-0.01)),
    Case("a_ratio_above_one", "ratio", lambda most: ask(ratio=1.01)),
    Case("a_ratio_that_is_no_number", "ratio", lambda most: ask(ratio=math.nan)),
    Case("an_infinite_ratio", "ratio", lambda most: ask(ratio=math.inf)),
    Case("an_unknown_model", "model", lambda most: ask(model="other")),
    Case("an_unknown_policy", "policy", lambda most: ask(policy="fastest")),
    Case("a_salt_that_is_too_long", "salt", lambda most: ask(salt="x" * 257)),
    Case("a_corpus_name_that_is_too_long", "chunks[0].corpus",
         lambda most: ask(chunks=[gateway_pb2.Chunk(text=A, corpus="x" * 257)])),
    Case("an_empty_tenant", "x-tenant", lambda most: ask(), (("x-tenant", ""),)),
    Case("a_tenant_name_that_is_too_long", "x-tenant", lambda most: ask(), (("x-tenant", "x" * 257),)),
    Case("an_empty_document", "documents[0].chunks", lambda most: [gateway_pb2.IngestRequest()]),
    Case("a_document_with_an_empty_text", "documents[1].chunks[1].text", lambda most: [document(A), document(B, "")]),
    Case("a_document_with_a_chunk_longer_than_the_model", "documents[0].chunks[0].text",
         lambda most: [document("word " * most)]),
    Case("a_document_for_an_unknown_model", "documents[0].model", lambda most: [document(A, model="other")]),
    Case("a_document_with_a_salt_that_is_too_long", "documents[0].salt", lambda most: [document(A, salt="x" * 257)]),
]


def send(gateway, case: Case, max_tokens: int) -> grpc.RpcError:
    request = case.make(max_tokens)
    method = gateway.Ingest if isinstance(request, list) else gateway.Generate
    request = iter(request) if isinstance(request, list) else request
    return refusal(method(request, timeout=CALL_SECONDS, metadata=case.metadata))


@pytest.mark.parametrize("case", [case.parameter() for case in CASES])
def test_a_mistake_is_an_invalid_argument_that_names_its_field(gateway, max_tokens, case):
    error = send(gateway, case, max_tokens)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    assert violations(error) == [case.field], error.details()
    assert error.details().startswith(f"{case.field}: "), error.details()
    # Short enough to be read: what was sent is not sent back.
    assert len(error.details()) < 500, error.details()[:1000]


def test_the_same_request_without_a_mistake_is_answered(gateway):
    assert answer(gateway).text.strip() == ANSWER


def test_a_ratio_at_its_limits_is_no_mistake(gateway):
    for ratio in (0.0, 1.0):
        assert answer(gateway, ask(ratio=ratio)).text.strip() == ANSWER


def test_a_message_above_the_limit_is_refused_and_the_connection_lives_on(gateway):
    error = refusal(gateway.Generate(ask("x" * (LARGEST_MESSAGE + 1)), timeout=CALL_SECONDS))
    assert error.code() in TOO_LARGE, error
    assert str(LARGEST_MESSAGE) in error.details(), error.details()
    assert answer(gateway).text.strip() == ANSWER


@pytest.mark.parametrize(
    "message",
    [b"\xff\xff\xff\xff", b"\x22\x7f short", b"\x22\x02\xff\xfe"],
    ids=["no_protobuf_at_all", "a_field_cut_short", "a_question_that_is_not_utf8"],
)
def test_bytes_that_are_no_request_are_refused(channel, gateway, message):
    call = channel.unary_stream("/cacheclip.v1.Gateway/Generate", request_serializer=bytes)
    error = refusal(call(message, timeout=CALL_SECONDS))
    assert error.code() == grpc.StatusCode.INTERNAL, error
    assert answer(gateway).text.strip() == ANSWER


def test_an_unknown_method_is_unimplemented(channel):
    call = channel.unary_unary("/cacheclip.v1.Gateway/Explode", request_serializer=bytes)
    with pytest.raises(grpc.RpcError) as caught:
        call(b"", timeout=CALL_SECONDS)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_client_that_leaves_in_the_middle_of_an_ingest_leaves_nothing_behind(fleet, gateway):
    before = fleet.metric(IN_FLIGHT)
    release = threading.Event()

    def documents():
        yield document(A, B, document="first")
        # Long enough to be under way when the client leaves: hundreds of chunks that nobody sent before.
        texts = [f"Report from Westhaven. {a} {b} keeps the bell." for a in SYLLABLES for b in SYLLABLES]
        yield document(*texts, document="second")
        release.wait(CALL_SECONDS)

    call = gateway.Ingest(documents(), timeout=CALL_SECONDS)
    progress = next(call)
    assert (progress.document, progress.chunks_done) == ("first", 2)
    progress = next(call)
    assert progress.document == "second" and progress.chunks_done < len(SYLLABLES) ** 2, progress
    call.cancel()
    release.set()
    until(lambda: fleet.metric(IN_FLIGHT) <= before, "the ingest is over", CALL_SECONDS, fleet)
    # What was done before the client left is done.
    again = list(gateway.Ingest(iter([document(A, B, document="first")]), timeout=CALL_SECONDS))
    assert [(p.chunks_done, p.chunks_computed) for p in again] == [(2, 0)]


def test_clients_that_never_read_their_answers_do_not_keep_others_from_theirs(fleet, gateway, max_tokens):
    before = fleet.metric(IN_FLIGHT)
    silent = 32
    # A window of a few bytes stands for a client that stopped reading: the gateway cannot hand the answer over to
    # the network. Hot sampling without a stop makes answers far longer than what the gateway buffers.
    options = [("grpc.http2.lookahead_bytes", 16), ("grpc.http2.bdp_probe", 0)]
    endless = sampled(temperature=100.0, max_tokens=max_tokens // 2, stop=["\u2603 never said"])
    with grpc.insecure_channel(fleet.address, options=options) as channel:
        stub = gateway_pb2_grpc.GatewayStub(channel)
        calls = [stub.Generate(endless, timeout=CALL_SECONDS * 5) for _ in range(silent)]
        for call in calls:
            # The answer has begun …
            assert next(call).WhichOneof("event") == "started"
        # … and is not read on. Others are served, again and again.
        for _ in range(5):
            assert answer(gateway).text.strip() == ANSWER
        stalled = fleet.metric(IN_FLIGHT) - before
        print(f"{stalled} requests are in flight for {silent} silent clients")
        # The control: were they not stalled, this test would show nothing.
        assert stalled >= silent * 0.75, f"only {stalled} requests of {silent} clients are in flight"
        for call in calls:
            call.cancel()
    until(lambda: fleet.metric(IN_FLIGHT) <= before, "the silent clients' requests are over", CALL_SECONDS, fleet)


# What bad input may leave behind for good. Refused requests reach neither worker nor scorer, so what can grow is the
# gateway: 64 MiB is its cache of tokenisations (token_cache_bytes), full, and the allocator keeps what the largest of
# these requests needed for a while: 50,000 chunks at about half a kilobyte each. A round makes 100,000 chunks: if only
# one in three of them were kept, ROUNDS rounds would pass this bound.
MAY_GROW_BYTES = (64 << 20) + (32 << 20)
ROUNDS = 6


def test_after_all_of_it_the_fleet_still_answers_and_has_not_grown(tmp_path, max_tokens):
    # A fleet of its own: memory that other tests had needed and given back would hide growth.
    with Fleet(tmp_path) as fleet, grpc.insecure_channel(fleet.address) as channel:
        gateway = gateway_pb2_grpc.GatewayStub(channel)
        # What good requests need is there before the count begins.
        list(gateway.Ingest(iter([document(A, B)]), timeout=CALL_SECONDS))
        answer(gateway)
        before = fleet.memory()
        for _ in range(ROUNDS):
            for case in CASES:
                assert send(gateway, case, max_tokens).code() == grpc.StatusCode.INVALID_ARGUMENT, case.what
            error = refusal(gateway.Generate(ask("x" * (LARGEST_MESSAGE + 1)), timeout=CALL_SECONDS))
            assert error.code() in TOO_LARGE, error
        assert answer(gateway).text.strip() == ANSWER
        grown = fleet.memory() - before
        print(f"{grown >> 20} MiB more than before")
        assert grown < MAY_GROW_BYTES, f"{grown >> 20} MiB more, at most {fleet.memory('VmHWM') >> 20} MiB in all"
        assert fleet.terminate() == 0, fleet.output()
