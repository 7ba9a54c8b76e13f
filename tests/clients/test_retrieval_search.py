"""The retrieval service's search and prompt, without a gateway: what is found, in which order, and what is asked."""

import re
from functools import cache

import numpy as np
import pytest
from retrieval_service import corpus
from retrieval_service.corpus import Report
from retrieval_service.prompt import QuestionError, prompt_template
from retrieval_service.search import Index, Limits, Searcher

REPORTS = corpus.load(corpus.DEFAULT)
STATEMENT = re.compile(r"(\w+) (?:keeps|holds|carries|guards) (?:the|(\w+)'s) ")
# Where each name's statement stands, and whose token it is about.
HOME = {name: (report.number, source) for report in REPORTS for name, source in STATEMENT.findall(report.text)}


def needed(name: str) -> set[int]:
    """The reports that an answer about `name` stands on."""
    number, source = HOME[name]
    return {number} | (needed(source) if source else set())


@cache
def searcher_with(limits: Limits) -> Searcher:
    return Searcher(REPORTS, limits)


def missed(limits: Limits, question: str, *asked: str) -> set[int]:
    found = {hit.report.number for hit in searcher_with(limits).search(question)}
    return set().union(*map(needed, asked)) - found


def test_whoever_is_asked_for_every_report_of_the_chain_is_found():
    assert len(HOME) > 100
    for name in HOME:
        assert not missed(Limits(), f"what does {name} keep?", name), name


def test_of_two_names_neither_crowds_out_the_others_reports():
    names = list(HOME)
    for first, second in zip(names, names[7:] + names[:7]):
        assert not missed(Limits(), f"What do {first} and {second} keep?", first, second), (first, second)


def test_without_following_links_some_sources_are_not_found():
    """The control: it is the hops that find them."""
    linked = [name for name in HOME if len(needed(name)) > 1]
    lost = {hops: [n for n in linked if missed(Limits(hops=hops), f"what does {n} keep?", n)] for hops in (0, 1, 2)}
    assert len(lost[0]) > len(lost[1]) > len(lost[2]) == 0, lost


def test_hits_stand_in_report_order_and_are_no_more_than_fit():
    for most in (1, 3, 8):
        searcher = Searcher(REPORTS, Limits(reports=most))
        for name in HOME:
            numbers = [hit.report.number for hit in searcher.search(f"{name}?")]
            assert numbers == sorted(set(numbers)) and len(numbers) <= most


def test_where_room_is_short_the_reports_that_say_the_names_stay():
    searcher = Searcher(REPORTS, Limits(reports=3))
    for name in HOME:
        if len(needed(name)) == 3:
            numbers = {hit.report.number for hit in searcher.search(f"what does {name} keep?")}
            assert HOME[name][0] in numbers, name


def test_a_circle_of_links_ends():
    circle = [
        Report(1, "a", "Report from Eastdale. Anna keeps Berta's token near the mill."),
        Report(2, "b", "Report from Westdale. Berta keeps Anna's token near the ford."),
    ]
    hits = Searcher(circle, Limits(hops=1000)).search("what does Anna keep?")
    assert [hit.report.number for hit in hits] == [1, 2]


def test_a_report_is_its_own_nearest_and_nothing_is_nearer_than_one():
    index = Index([report.text for report in REPORTS])
    for at, report in enumerate(REPORTS):
        hits = index.nearest(report.text, 5)
        assert hits[0][0] == at and hits[0][1] == pytest.approx(1.0, abs=1e-5)
        scores = [score for _, score in hits]
        assert scores == sorted(scores, reverse=True) and all(0 <= score < 1.0001 for score in scores)


def test_a_text_without_any_of_the_corpuss_terms_is_near_to_nothing():
    index = Index(["a mill", "a ford"])
    assert not index.embed(["!?"]).any() and np.isfinite(index.embed([""])).all()


def test_another_search_can_be_put_in_place_of_the_index():
    asked = []

    def nearest(text: str, count: int) -> list[tuple[int, float]]:
        asked.append(text)
        return [(3, 0.9), (1, 0.5)][:count]

    hits = Searcher(REPORTS, Limits(hops=0), nearest).search("what does Casrin keep?")
    assert [(hit.report.number, hit.score) for hit in hits] == [(2, 0.5), (4, 0.9)]
    assert asked == ["what does Casrin keep?", "Casrin"]


def test_the_prompt_takes_the_form_that_the_models_were_taught():
    one = "\nQuestion: what does Casrin keep?\nAnswer: Casrin's"
    two = "\nQuestion: what do Ulma and Alton keep?\nAnswer: Ulma's"
    assert prompt_template("what does Casrin keep?") == one
    assert prompt_template("Please tell me: what is Casrin's?") == one
    assert prompt_template("Does anybody know what Ulma or Alton keep, or Ulma?") == two
    for question in ("", "what is there?", "Ann, Bob and Cid?"):
        with pytest.raises(QuestionError, match="^question: "):
            prompt_template(question)
