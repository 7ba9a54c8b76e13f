"""The command line."""

import argparse
import asyncio
import logging
import sys
from pathlib import Path

from . import corpus, stubs

EPILOG = """\
a first round, with a gateway on its default port (cacheclip serve):
  python -m retrieval_service serve &
  python -m retrieval_service ask "what does Casrin keep?"
  python -m retrieval_service ask "what do Garmon and Haldan keep?"
  python -m retrieval_service ask --policy stale "what does Alton keep?"
"""

SERVE = """\
Reads the corpus, has the gateway compute every report's KV, then answers questions over gRPC
(proto/retrieval/v1/retrieval.proto). grpc.health.v1 says SERVING once the corpus is ingested. SIGTERM lets answers in
flight end and exits with 0; a gateway that does not answer in time is one line on standard error and exit code 1.
"""

ASK = """\
Asks a running service. The answer goes to standard output as it comes; the reports it stands on and what it cost go
to standard error. Exit code 1 and one line where there is no answer.

The demo's models know one kind of question: what does one person, or what do two, keep. Names are capitalised and are
in corpus.jsonl. Where a report says that Alton carries Belwen's token, the answer is what Belwen keeps.
"""


def main() -> int:
    arguments = parser().parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    try:
        # Before anything that imports them.
        stubs.install()
        return arguments.run(arguments)
    except (stubs.StubsError, corpus.CorpusError) as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130


def fail(error: Exception) -> int:
    print(f"retrieval_service: {error}", file=sys.stderr)
    return 1


def serve(arguments: argparse.Namespace) -> int:
    from .search import Limits
    from .serve import Options, StartError, serve as run

    options = Options(
        gateway=arguments.gateway,
        listen=arguments.listen,
        corpus=arguments.corpus,
        tenant=arguments.tenant,
        limits=Limits(top=arguments.top, hops=arguments.hops, reports=arguments.reports),
        start_seconds=arguments.start_timeout,
        ingest_seconds=arguments.ingest_timeout,
        answer_seconds=arguments.answer_timeout,
        drain_seconds=arguments.drain,
    )
    try:
        asyncio.run(run(options))
    except StartError as error:
        return fail(error)
    return 0


def ask(arguments: argparse.Namespace) -> int:
    from .ask import AskError, ask as run

    try:
        run(arguments.service, arguments.question, arguments.policy, arguments.timeout)
    except AskError as error:
        return fail(error)
    return 0


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="python -m retrieval_service",
        description="Answers questions over a corpus through a CacheClip gateway.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("serve", help="run the service", description=SERVE, formatter_class=raw)
    command.set_defaults(run=serve)
    option = _options(command)
    option("--gateway", "127.0.0.1:7070", "HOST:PORT", str, "the CacheClip gateway")
    option("--listen", "127.0.0.1:7075", "HOST:PORT", str, "where questions come in; port 0 takes a free one")
    option("--corpus", corpus.DEFAULT, "FILE", Path, 'JSON lines {"number": 1, "name": "…", "text": "…"}')
    option("--tenant", "", "NAME", str, "whose KV it is; the gateway keeps tenants apart (default: the gateway's own)")
    option("--top", 8, "N", _count(1), "reports found for the question and for each name in it")
    option("--hops", 2, "N", _count(0), "rounds of following names in found reports; a link to a link needs two")
    option("--reports", 8, "N", _count(1), "most reports in a prompt: what the model's length allows")
    option("--start-timeout", 10.0, "SECONDS", _seconds, "longest wait for the gateway to answer at start")
    option("--ingest-timeout", 600.0, "SECONDS", _seconds, "longest wait for the whole corpus")
    option("--answer-timeout", 60.0, "SECONDS", _seconds, "deadline of an answer; a caller's nearer one goes first")
    option("--drain", 10.0, "SECONDS", _seconds, "how long answers in flight may take after SIGTERM")

    command = commands.add_parser("ask", help="ask a running service", description=ASK, formatter_class=raw)
    command.set_defaults(run=ask)
    command.add_argument("question", metavar="QUESTION", help='e.g. "what does Casrin keep?"')
    option = _options(command)
    option("--service", "127.0.0.1:7075", "HOST:PORT", str, "the retrieval service")
    option("--policy", "", "NAME", str, "cacheclip, stale, full …, for comparisons (default: the gateway's own)")
    option("--timeout", 60.0, "SECONDS", _seconds, "deadline of the whole answer")
    return top


def _options(command: argparse.ArgumentParser):
    def option(flag, default, metavar, kind, text):
        shown = "" if default == "" else f" (default: {default})"
        command.add_argument(flag, default=default, metavar=metavar, type=kind, help=text + shown)

    return option


def _count(least: int):
    def count(text: str) -> int:
        if not (text.isascii() and text.isdigit()) or not least <= int(text) <= 1000:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to 1000")
        return int(text)

    return count


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    # NaN is within no range.
    if not 0.0 < value <= 86_400.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from above 0 to 86400")
    return value


if __name__ == "__main__":
    sys.exit(main())
