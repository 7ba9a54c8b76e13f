"""The corpus: one report per line of a JSONL file."""

import json
from dataclasses import dataclass
from pathlib import Path

DEFAULT = Path(__file__).resolve().parent.parent / "corpus.jsonl"


class CorpusError(Exception):
    """The corpus cannot be used; the message names file and line."""


@dataclass(frozen=True)
class Report:
    """One passage. It becomes one chunk, byte for byte the same at ingest and in every prompt: KV is found again
    by the text's tokens, so a stray space would be another chunk."""

    number: int
    name: str
    text: str


def load(path: Path) -> list[Report]:
    """Reads `path`, reports in ascending order of their numbers."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"corpus {path}: {error}") from error
    reports: dict[int, Report] = {}
    for at, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        report = _report(path, at, line)
        if report.number in reports:
            raise CorpusError(f"corpus {path}, line {at}: number {report.number} is there twice")
        reports[report.number] = report
    if not reports:
        raise CorpusError(f"corpus {path}: holds no reports")
    return [reports[number] for number in sorted(reports)]


def _report(path: Path, at: int, line: str) -> Report:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(f"corpus {path}, line {at}: {error}") from error
    kinds = {"number": int, "name": str, "text": str}
    for field, kind in kinds.items():
        if not isinstance(fields, dict) or type(fields.get(field)) is not kind:
            raise CorpusError(f"corpus {path}, line {at}: needs {field!r} ({kind.__name__})")
    # Numbers travel as uint32.
    if not 0 <= fields["number"] < 1 << 32:
        raise CorpusError(f"corpus {path}, line {at}: 'number' must be within 0..{(1 << 32) - 1}")
    if not fields["text"].strip():
        raise CorpusError(f"corpus {path}, line {at}: 'text' must not be empty")
    return Report(fields["number"], fields["name"], fields["text"])
