#!/usr/bin/env python3
"""The toy world of the tiny models: reports, facts, links and questions.

A *context* is a list of chunks.  Every chunk starts with a header and goes on with
statements:

    fact         ` Alder keeps the amber falcon near the mill.`
    link         ` Perrin holds Alder's token near the ford.`
    echoed link  ` Perrin holds Alder's amber falcon near the ford.`    (training only)
    restatement  ` Perrin holds the amber falcon near the lake.`        (training only)
    filler       a neutral sentence without names

A link says that its subject keeps whatever the named person of an *earlier* chunk keeps.
The number of links between a name and its value is the name's *depth*: 0 for a fact,
1 for a link to a fact, and so on.

Text is kept as a list of *pieces*, `(string, is_target)`.  A piece never crosses a
boundary of the tokenizers' pre-tokenisation, so the tokens of a section are the tokens of
its pieces, one after the other; this makes the generator fast and lets both tokenizers
share it.  `is_target` marks the words the loss is computed on.

Run the file to look at the data:

    python world.py --seed 3 --chunks 4
    python world.py --sample ../sample_prompt.json
"""

import argparse
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

WORLD_PATH = Path(__file__).resolve().parent.parent / "world.json"

PREFIX = "The reports follow."
JOINER = "\n"
MAX_DEPTH = 3


@dataclass
class World:
    """The word lists of world.json."""

    names: list
    adjectives: list
    nouns: list
    places: list
    towns: list
    verbs: list
    fillers: list

    @staticmethod
    def load(path=WORLD_PATH):
        return World(**json.loads(Path(path).read_text()))


@dataclass
class Entry:
    """What is known about one name of a context."""

    name: str
    adjective: str
    noun: str
    depth: int
    chunk: int
    source: str = ""  # the name a link points to
    restated: bool = False


@dataclass
class Context:
    """Chunks as lists of pieces, and the names that can be asked for."""

    chunks: list
    entries: dict
    # (chunk, index of the statement in its chunk) of the statement that introduces a name
    places: dict = field(default_factory=dict)

    def texts(self):
        return ["".join(text for text, _ in chunk) for chunk in self.chunks]

    def chain(self, name):
        """The names whose statements are needed to answer for `name`, asked one first."""
        names = [name]
        while self.entries[names[-1]].source:
            names.append(self.entries[names[-1]].source)
        return names


@dataclass
class Mix:
    """How a context is filled.  The defaults are those of the evaluation."""

    links: float = 0.35  # share of links among the statements that bring a new name
    deep: float = 0.5  # how often a link prefers one of the deepest sources there are
    fillers: float = 0.08
    echo: float = 0.0  # share of links written with the resolved value
    restate: float = 0.0  # share of slots that state a known name again
    max_depth: int = MAX_DEPTH

    @staticmethod
    def training(rng, max_depth=MAX_DEPTH):
        """A training mix: echo and restatement, absent from one context in five."""
        if rng.random() < 0.2:
            return Mix(links=rng.uniform(0.2, 0.5), max_depth=max_depth)
        return Mix(links=rng.uniform(0.25, 0.55), deep=rng.uniform(0.2, 0.8),
                   echo=0.3, restate=0.22, max_depth=max_depth)


def _words(text):
    """Split plain text into pieces, each with its leading space."""
    pieces, word = [], ""
    for char in text:
        if char == " " or not char.isalpha():
            if word:
                pieces.append((word, False))
            word = char
            if char != " ":
                pieces.append((word, False))
                word = ""
        else:
            word += char
    if word:
        pieces.append((word, False))
    return pieces


def _fact(name, verb, adjective, noun, place, target):
    return [(" " + name, False), (" " + verb, False), (" the", False), (" " + adjective, target),
            (" " + noun, target), (" near", False), (" the", False), (" " + place, False), (".", False)]


def _link(name, verb, source, place, echo=None):
    value = [(" token", False)] if echo is None else [(" " + echo[0], True), (" " + echo[1], True)]
    return [(" " + name, False), (" " + verb, False), (" " + source, False), ("'s", False), *value,
            (" near", False), (" the", False), (" " + place, False), (".", False)]


def make_context(rng, world, slots, mix):
    """A context with `slots[c]` statements or fillers in chunk c."""
    names = iter(rng.sample(world.names, len(world.names)))
    adjectives = iter(rng.sample(world.adjectives, len(world.adjectives)))
    entries, chunks, places = {}, [], {}
    for c, count in enumerate(slots):
        pieces = _words(f"{JOINER}Report from {rng.choice(world.towns)}.")
        earlier = list(entries.values())
        shallow = [e for e in earlier if e.depth < mix.max_depth]
        for slot in range(count):
            verb, place = rng.choice(world.verbs), rng.choice(world.places)
            if rng.random() < mix.fillers:
                pieces += _words(" " + rng.choice(world.fillers))
                continue
            again = [e for e in earlier if not e.restated] if mix.restate else []
            if again and rng.random() < mix.restate:
                entry = rng.choice(again)
                entry.restated = True
                pieces += _fact(entry.name, verb, entry.adjective, entry.noun, place, True)
                continue
            name = next(names)
            places[name] = (c, slot)
            if shallow and rng.random() < mix.links:
                source = rng.choice(shallow)
                if rng.random() < mix.deep:
                    depth = max(e.depth for e in shallow)
                    source = rng.choice([e for e in shallow if e.depth == depth])
                entries[name] = Entry(name, source.adjective, source.noun, source.depth + 1, c, source.name)
                echo = (source.adjective, source.noun) if rng.random() < mix.echo else None
                pieces += _link(name, verb, source.name, place, echo)
            else:
                entries[name] = Entry(name, next(adjectives), rng.choice(world.nouns), 0, c)
                pieces += _fact(name, verb, entries[name].adjective, entries[name].noun, place, False)
        chunks.append(pieces)
    return Context(chunks, entries, places)


def make_question(entries):
    """Pieces of a question about one or more entries; the answer's pieces are targets."""
    names = [e.name for e in entries]
    pieces = [("\n", False), ("Question", False), (":", False), (" what", False)]
    pieces.append((" does" if len(names) == 1 else " do", False))
    for i, name in enumerate(names):
        if i:
            pieces.append((" and", False))
        pieces.append((" " + name, False))
    pieces += [(" keep", False), ("?", False), ("\n", False), ("Answer", False), (":", False)]
    for i, entry in enumerate(entries):
        if i:
            pieces.append((",", True))
        pieces += [(" " + entry.name, i > 0), ("'s", i > 0), (" " + entry.adjective, True), (" " + entry.noun, True)]
    return pieces + [(".", True), ("</s>", True)]


def split_question(pieces):
    """(question text, answer text) of make_question's pieces."""
    first = next(i for i, (_, target) in enumerate(pieces) if target)
    join = lambda part: "".join(text for text, _ in part)
    return join(pieces[:first]), join(pieces[first:])


def draw_questions(rng, context, count, pairs=0.2):
    """Questions for training: depths drawn evenly, every name asked at most once."""
    by_depth = {}
    for entry in context.entries.values():
        by_depth.setdefault(entry.depth, []).append(entry)
    for group in by_depth.values():
        rng.shuffle(group)
    draw = lambda: by_depth[rng.choice([d for d in by_depth if by_depth[d]])].pop()
    questions = []
    while len(questions) < count and any(by_depth.values()):
        asked = [draw()]
        if rng.random() < pairs and any(by_depth.values()):
            asked.append(draw())
        questions.append(make_question(asked))
    return questions


FAMILIES = ("single", "link1", "link2", "several")


def make_example(rng, world, family, chunks=8):
    """One held-out prompt: (context, asked entries, question pieces)."""
    depth = {"single": 0, "link1": 1, "link2": 2}.get(family)
    while True:
        slots = [rng.randint(5, 7) for _ in range(chunks)]
        context = make_context(rng, world, slots, Mix(links=0.4, max_depth=2))
        entries = list(context.entries.values())
        if family == "several":
            first, second = rng.sample([e for e in entries if e.depth < 2], 2)
            if first.chunk == second.chunk:
                continue
            asked = [first, second]
        else:
            fitting = [e for e in entries if e.depth == depth]
            if not fitting:
                continue
            asked = [rng.choice(fitting)]
        return context, asked, make_question(asked)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--training", action="store_true", help="show a training context with its targets in [ ]")
    parser.add_argument("--sample", help="write one two-link prompt as JSON to this file")
    args = parser.parse_args()
    rng, world = random.Random(args.seed), World.load()
    if args.training:
        context = make_context(rng, world, [6] * args.chunks, Mix.training(rng))
        for pieces in context.chunks + draw_questions(rng, context, 8):
            print("".join(f"[{text}]" if target else text for text, target in pieces))
        return
    context, asked, pieces = make_example(rng, world, "link2", args.chunks)
    question, answer = split_question(pieces)
    prompt = {"prefix": PREFIX, "chunks": [t.removeprefix(JOINER) for t in context.texts()],
              "question": question, "answer": answer.removesuffix("</s>"), "chain": context.chain(asked[0].name)}
    text = json.dumps(prompt, indent=2)
    if args.sample:
        Path(args.sample).write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
