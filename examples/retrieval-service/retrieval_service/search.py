"""Which reports a question needs: vector search, then the same for what the first hits point to.

Vectors are TF-IDF over words and their parts: no download, nothing to train, good enough where the words of a question
stand in the report. A real deployment keeps `Searcher` and gives it another `nearest`.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from .corpus import Report

WORD = re.compile(r"[^\W\d_]+")
SENTENCE = re.compile(r"[^.!?]+")
# Capitalised for where they stand and not for what they name.
NO_NAMES = frozenset(
    "a an and are at by can did do does for from has have how i in is it of on or please report tell that the there "
    "they this to was were what when where which who whose why with you".split()
)


def words(text: str) -> list[str]:
    """The words of a text, lower case; a possessive counts as its owner ("Casrin's": "casrin", "s")."""
    return [word.lower() for word in WORD.findall(text)]


def terms(text: str) -> list[str]:
    """What is counted: words, and their runs of three letters, so that "keep" is near "keeps"."""
    found = words(text)
    return found + [f"-{word}-"[at : at + 3] for word in found for at in range(len(word))]


def names(text: str) -> list[str]:
    """Capitalised words that can be names, each once, in order."""
    capitalised = (word for word in WORD.findall(text) if word[0].isupper())
    return list(dict.fromkeys(word for word in capitalised if word.lower() not in NO_NAMES))


def mentions(report: Report, wanted: Iterable[str]) -> bool:
    """Whether a report says one of these names."""
    return not set(wanted).isdisjoint(names(report.text))


class Index:
    """All reports' vectors, in RAM."""

    def __init__(self, texts: list[str]):
        vocabulary = dict.fromkeys(term for text in texts for term in terms(text))
        self._places = {term: place for place, term in enumerate(vocabulary)}
        reports_with = (self._counts(texts) > 0).sum(axis=0)
        self._weights = (np.log((1 + len(texts)) / (1 + reports_with)) + 1).astype(np.float32)
        self._vectors = self.embed(texts)

    # ------------------------------------------------------------------------------------------------------------
    # SWAP THIS. In a deployment `nearest` sends the text through the embedding model and asks the vector database;
    # `embed` and the arrays above then go away. Nothing else in this package knows what a vector is.
    # ------------------------------------------------------------------------------------------------------------
    def nearest(self, text: str, count: int) -> list[tuple[int, float]]:
        """Positions and cosines of the `count` nearest reports, best first."""
        scores = self._vectors @ self.embed([text])[0]
        best = np.argsort(-scores, kind="stable")[:count]
        return [(int(at), float(scores[at])) for at in best]

    def embed(self, texts: list[str]) -> np.ndarray:
        """One unit vector per text; all zeros where the corpus has none of its terms."""
        vectors = np.log1p(self._counts(texts)) * self._weights
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / np.maximum(lengths, np.finfo(np.float32).tiny)

    def _counts(self, texts: list[str]) -> np.ndarray:
        counts = np.zeros((len(texts), len(self._places)), dtype=np.float32)
        for row, text in enumerate(texts):
            for term in terms(text):
                # A term that no report has says nothing about which report is near.
                if (place := self._places.get(term)) is not None:
                    counts[row, place] += 1
        return counts


@dataclass(frozen=True)
class Hit:
    """A report, how near it was, and what it was found for."""

    report: Report
    score: float
    hop: int


@dataclass(frozen=True)
class Limits:
    """How much is searched for."""

    # Reports found for the question and for each name in it.
    top: int = 8
    # Reports found for each name that a hit points to.
    follow: int = 4
    # Rounds of following. A link to a link needs two.
    hops: int = 2
    # Reports in the prompt: what the model's length allows.
    reports: int = 8


class Searcher:
    """Search with follow-up over one corpus."""

    def __init__(
        self,
        reports: list[Report],
        limits: Limits,
        nearest: Callable[[str, int], list[tuple[int, float]]] | None = None,
    ):
        self._reports = reports
        self._limits = limits
        self._nearest = nearest or Index([report.text for report in reports]).nearest

    def search(self, question: str) -> list[Hit]:
        """Reports for a question, in report order: what a report refers to stands in an earlier report, and the
        model reads from the front."""
        limits = self._limits
        # What was searched for already, so that a circle of links ends.
        known = set(names(question))
        # Each name by itself, too: of two names the rarer one would crowd the other's reports out.
        found = self._hits([question, *names(question)], limits.top, 0)
        for hop in range(1, limits.hops + 1):
            pointed = self._pointed_to(found.values(), known)
            if not pointed:
                break
            for at, hit in self._hits(pointed, limits.follow, hop).items():
                found.setdefault(at, hit)
            known.update(pointed)
        # Where there are more than fit, those that say a name we looked for go first: the rest is near by chance.
        order = sorted(found.values(), key=lambda hit: (not mentions(hit.report, known), hit.hop, -hit.score))
        return sorted(order[: limits.reports], key=lambda hit: hit.report.number)

    def _hits(self, queries: list[str], count: int, hop: int) -> dict[int, Hit]:
        hits: dict[int, Hit] = {}
        for query in queries:
            for at, score in self._nearest(query, count):
                if at not in hits or score > hits[at].score:
                    hits[at] = Hit(self._reports[at], score, hop)
        return hits

    @staticmethod
    def _pointed_to(hits: Iterable[Hit], known: set[str]) -> list[str]:
        """Names that share a sentence with a known name. Other sentences of a report are about other things."""
        pointed = []
        for hit in hits:
            for sentence in SENTENCE.findall(hit.report.text):
                in_sentence = names(sentence)
                if known.intersection(in_sentence):
                    pointed += in_sentence
        return [name for name in dict.fromkeys(pointed) if name not in known]
