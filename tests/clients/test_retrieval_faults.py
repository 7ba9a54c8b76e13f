"""What the retrieval service of examples/ does when its gateway fails: tries again where that is safe, and only there.

The gateway here is a script: it answers call by call what a test tells it, and remembers when each call came.
"""

import threading
import time
from concurrent import futures
from contextlib import contextmanager

import grpc
import pytest
from cacheclip.v1 import gateway_pb2, gateway_pb2_grpc
from fleet import CALL_SECONDS, Service, serving, until
from google.rpc import error_details_pb2, status_pb2
from retrieval.v1 import retrieval_pb2, retrieval_pb2_grpc

STARTED = gateway_pb2.GenerateEvent(started=gateway_pb2.Started(request_id="r", model="tiny"))
TOKEN = gateway_pb2.GenerateEvent(token=gateway_pb2.Token(text=" pale"))
DONE = gateway_pb2.GenerateEvent(done=gateway_pb2.Done(text=" pale basket."))
ANSWER = [STARTED, TOKEN, DONE]


class Failure(Exception):
    """A status to end the call with."""

    def __init__(self, code: grpc.StatusCode, message: str, retry_after: float | None = None):
        super().__init__(message)
        self.code, self.message, self.retry_after = code, message, retry_after


UNAVAILABLE = Failure(grpc.StatusCode.UNAVAILABLE, "going away")


def busy(retry_after: float | None) -> Failure:
    return Failure(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests in flight", retry_after)


class Script(gateway_pb2_grpc.GatewayServicer):
    """A gateway. `answers` are lists of events, failures and functions that wait, one list per call to Generate."""

    def __init__(self):
        self.answers: list[list] = []
        self.ingests: list = []
        self.calls: list[float] = []
        self.left: list[float] = []
        self.metadata: list[dict] = []
        # One per call: set when it is over, however it ended.
        self.over: list[threading.Event] = []

    def play(self, *answers: list) -> None:
        self.answers = list(answers)
        self.calls.clear()
        self.left.clear()
        self.metadata.clear()
        self.over.clear()

    def GetCapabilities(self, request, context):  # noqa: N802 (gRPC's names)
        return gateway_pb2.GetCapabilitiesResponse(models=[gateway_pb2.ModelInfo(name="script", max_tokens=1024)])

    def Ingest(self, requests, context):  # noqa: N802
        if self.ingests:
            step = self.ingests.pop(0)
            if isinstance(step, Failure):
                end(context, step)
            step()
        for request in requests:
            yield gateway_pb2.IngestProgress(document=request.document, chunks_done=1, chunks_computed=1)

    def Generate(self, request, context):  # noqa: N802
        self.calls.append(time.monotonic())
        self.left.append(context.time_remaining())
        self.metadata.append(dict(context.invocation_metadata()))
        over = threading.Event()
        self.over.append(over)
        if not context.add_callback(over.set):
            over.set()
        for step in self.answers.pop(0):
            if isinstance(step, Failure):
                end(context, step)
            elif callable(step):
                step()
            else:
                yield step


def end(context, failure: Failure) -> None:
    if failure.retry_after is not None:
        info = error_details_pb2.RetryInfo()
        info.retry_delay.FromNanoseconds(int(failure.retry_after * 1e9))
        status = status_pb2.Status(code=failure.code.value[0], message=failure.message)
        status.details.add().Pack(info)
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(failure.code, failure.message)


@contextmanager
def scripted():
    """The script and the address it is played at."""
    script, pool = Script(), futures.ThreadPoolExecutor(8)
    server = grpc.server(pool)
    gateway_pb2_grpc.add_GatewayServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield script, f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait(CALL_SECONDS)
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def played():
    with scripted() as (script, address):
        yield script, address


@pytest.fixture(scope="module")
def stub(played, tmp_path_factory):
    with Service(tmp_path_factory.mktemp("service"), played[1]).ready() as service:
        with grpc.insecure_channel(service.address) as channel:
            yield retrieval_pb2_grpc.RetrievalStub(channel)


@pytest.fixture
def script(played):
    return played[0]


def start(stub, seconds: float = CALL_SECONDS, metadata=()):
    return stub.Ask(retrieval_pb2.AskRequest(question="what does Casrin keep?"), timeout=seconds, metadata=metadata)


def refused(stub, seconds: float = CALL_SECONDS) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(start(stub, seconds))
    return caught.value


def test_a_gateway_that_is_unavailable_before_the_first_token_is_asked_again(stub, script):
    script.play([UNAVAILABLE], [STARTED, UNAVAILABLE], ANSWER)
    events = list(start(stub))
    assert [event.token for event in events[:-1]] == [" pale"]
    assert events[-1].answered.text == " pale basket."
    assert len(script.calls) == 3


def test_it_is_asked_four_times_at_most(stub, script):
    script.play(*[[UNAVAILABLE]] * 9)
    error = refused(stub)
    assert error.code() == grpc.StatusCode.UNAVAILABLE and "going away" in error.details(), error
    assert len(script.calls) == 4


def test_after_the_first_token_nothing_is_tried_again(stub, script):
    script.play([STARTED, TOKEN, UNAVAILABLE], ANSWER)
    call, tokens = start(stub), []
    with pytest.raises(grpc.RpcError) as caught:
        tokens += [event.token for event in call]
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert len(script.calls) == 1


def test_a_stream_that_ends_without_a_result_is_no_answer(stub, script):
    script.play([STARTED, TOKEN])
    error = refused(stub)
    assert error.code() == grpc.StatusCode.UNAVAILABLE and "without a result" in error.details(), error
    script.play([STARTED], ANSWER)
    assert list(start(stub))[-1].answered.text == " pale basket."


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED]
)
def test_what_another_try_would_not_change_is_not_tried_again(stub, script, code):
    script.play([Failure(code, "no")], ANSWER)
    error = refused(stub)
    assert (error.code(), error.details()) == (code, "gateway: no")
    assert len(script.calls) == 1


def test_a_busy_gateway_is_asked_again_after_the_pause_it_asks_for(stub, script):
    script.play([busy(0.7)], [busy(0.3)], ANSWER)
    assert list(start(stub))[-1].answered.text == " pale basket."
    pauses = [later - earlier for earlier, later in zip(script.calls, script.calls[1:])]
    # Never sooner; how much later is the machine's business.
    assert len(pauses) == 2 and pauses[0] >= 0.7 and pauses[1] >= 0.3, pauses


def test_a_busy_gateway_that_names_no_pause_is_not_asked_again(stub, script):
    script.play([busy(None)], ANSWER)
    assert refused(stub).code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(script.calls) == 1


def test_a_pause_beyond_the_callers_deadline_is_passed_on_at_once_with_its_length(stub, script):
    script.play([busy(30.0)], ANSWER)
    began = time.monotonic()
    error = refused(stub, seconds=20.0)
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error
    assert time.monotonic() - began < 15.0 and len(script.calls) == 1
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    info = error_details_pb2.RetryInfo()
    assert (status.code, status.message) == (error.code().value[0], error.details())
    assert status.details[0].Unpack(info) and info.retry_delay.seconds == 30


def test_the_callers_deadline_and_request_id_reach_the_gateway(stub, script):
    script.play(ANSWER, ANSWER)
    list(start(stub, seconds=7.0, metadata=(("x-request-id", "ask-7"),)))
    list(start(stub, seconds=1000.0))
    # Deadlines are rounded up on their way.
    assert 0 < script.left[0] < 7.5 and script.metadata[0]["x-request-id"] == "ask-7"
    # The service's own limit where the caller's is farther away.
    assert 7.5 < script.left[1] < 60.5 and "x-request-id" not in script.metadata[1]


def test_a_caller_that_leaves_ends_the_gateways_work(stub, script):
    release = threading.Event()
    script.play([STARTED, TOKEN, lambda: release.wait(CALL_SECONDS), DONE])
    call = start(stub)
    assert next(call).token == " pale"
    (over,) = script.over
    assert not over.is_set()
    call.cancel()
    assert over.wait(CALL_SECONDS), "the gateway's call was not cancelled"
    release.set()


def test_a_silent_gateway_is_given_up_at_the_deadline(stub, script):
    release = threading.Event()
    script.play([STARTED, lambda: release.wait(CALL_SECONDS)])
    assert refused(stub, seconds=3.0).code() == grpc.StatusCode.DEADLINE_EXCEEDED
    (over,) = script.over
    assert over.wait(CALL_SECONDS), "the gateway's call was not cancelled"
    release.set()


def test_an_ingest_that_meets_a_busy_gateway_is_tried_again(tmp_path):
    with scripted() as (script, address):
        script.ingests = [busy(0.1), UNAVAILABLE]
        with Service(tmp_path, address).ready() as service:
            assert "24 reports ingested" in service.out() and not script.ingests
            assert service.terminate() == 0


def test_an_ingest_that_is_refused_ends_the_start_with_one_line(tmp_path):
    with scripted() as (script, address):
        script.ingests = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "documents[3].chunks[0].text: too long")]
        with Service(tmp_path, address) as service:
            assert service.wait() == 1
            line = "retrieval_service: INVALID_ARGUMENT: gateway: documents[3].chunks[0].text: too long\n"
            assert service.err() == line


def test_sigterm_in_the_middle_of_an_ingest_exits_with_zero(tmp_path):
    begun, release = threading.Event(), threading.Event()
    with scripted() as (script, address):
        script.ingests = [lambda: (begun.set(), release.wait(CALL_SECONDS))]
        with Service(tmp_path, address) as service:
            assert begun.wait(CALL_SECONDS), service.output()
            assert service.terminate() == 0, service.output()
            assert not service.err(), service.err()
        release.set()


def test_sigterm_lets_the_answer_in_flight_end_refuses_new_ones_and_exits_with_zero(tmp_path):
    release = threading.Event()
    with scripted() as (script, address), Service(tmp_path, address).ready() as service:
        script.play([STARTED, TOKEN, lambda: release.wait(CALL_SECONDS), DONE])
        with grpc.insecure_channel(service.address) as channel:
            call = start(retrieval_pb2_grpc.RetrievalStub(channel))
            assert next(call).token == " pale"
            stopping = threading.Thread(target=service.terminate)
            stopping.start()
            until(lambda: not serving(channel), "health says that the service goes away", CALL_SECONDS)
            # The answer is still being written.
            assert service.code() is None
            release.set()
            assert [event.answered.text for event in call] == [" pale basket."]
            stopping.join(CALL_SECONDS)
        assert service.code() == 0, service.output()
