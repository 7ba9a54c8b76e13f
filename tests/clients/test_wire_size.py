"""What one very large text may cost the gateway: about what it takes to receive it.

A message may have 16 MiB. A text that long is longer than any prompt, and the gateway can know that from its length in
bytes: no token of a model's vocabulary is so long that it would fit. Whoever sends one must not make the gateway pay
with seconds of computing and hundreds of bytes per byte.
"""

import time

import grpc
import pytest
from cacheclip.v1 import gateway_pb2_grpc
from fleet import CALL_SECONDS, Fleet
from test_wire import A, ANSWER, answer, ask, document, refusal

TEXT = "word " * (3 << 20)
# The message as bytes, decoded, and copied once to the thread that looks at it, and twice that for the transport's
# buffers and for what the allocator rounds up. The control below needs less than half of it.
MAY_COST_BYTES = 6 * len(TEXT)
# Receiving fifteen megabytes over loopback takes some tenth of a second.
MAY_TAKE_SECONDS = 2.0


def price(directory, call) -> tuple[grpc.RpcError, int, float]:
    """The refusal, the bytes that the fleet needed for it at most, and the seconds."""
    # A fleet of its own: memory that another request had needed would hide what this one needs.
    with Fleet(directory) as fleet, grpc.insecure_channel(fleet.address) as channel:
        gateway = gateway_pb2_grpc.GatewayStub(channel)
        assert answer(gateway).text.strip() == ANSWER
        before, began = fleet.memory(), time.monotonic()
        error = refusal(call(gateway))
        took, cost = time.monotonic() - began, fleet.memory("VmHWM") - before
        assert answer(gateway).text.strip() == ANSWER
        return error, cost, took


def test_a_text_of_fifteen_megabytes_for_an_unknown_model_costs_what_it_takes_to_receive_it(tmp_path):
    """The control: the bound can be kept, by a refusal that does not look at the text."""
    call = lambda gateway: gateway.Generate(ask(A, TEXT, model="other"), timeout=CALL_SECONDS)  # noqa: E731
    error, cost, took = price(tmp_path, call)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    assert cost < MAY_COST_BYTES and took < MAY_TAKE_SECONDS, f"{cost >> 20} MiB, {took:.1f} s"


REQUESTS = {
    "a_chunk": ("chunks[1].text", lambda gateway: gateway.Generate(ask(A, TEXT), timeout=CALL_SECONDS)),
    "a_question": ("question", lambda gateway: gateway.Generate(ask(question=TEXT), timeout=CALL_SECONDS)),
    "a_prefix": ("prefix", lambda gateway: gateway.Generate(ask(prefix=TEXT), timeout=CALL_SECONDS)),
    "a_documents_chunk": (
        "documents[0].chunks[1].text",
        lambda gateway: gateway.Ingest(iter([document(A, TEXT)]), timeout=CALL_SECONDS),
    ),
}


@pytest.mark.parametrize("what", REQUESTS)
def test_fifteen_megabytes_are_refused_by_their_length_at_the_price_of_receiving_them(tmp_path, what):
    named, call = REQUESTS[what]
    error, cost, took = price(tmp_path, call)
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT, error
    assert cost < MAY_COST_BYTES and took < MAY_TAKE_SECONDS, f"{cost >> 20} MiB, {took:.1f} s"
    assert error.details().startswith(f"{named}: "), error.details()
