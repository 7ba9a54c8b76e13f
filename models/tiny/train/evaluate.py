#!/usr/bin/env python3
"""Held-out accuracy of the pair: full attention, stale reuse, and repair of a few tokens.

    python evaluate.py accuracy --model ../primary      # full attention only
    python evaluate.py reuse --count 100                 # full, stale, repaired
    python evaluate.py search --count 60                 # compare ways to reduce attention to scores

*full*    the prompt is computed as a whole.
*stale*   every chunk is computed alone behind `<s>` + prefix and the prefix is cut off;
          keys are kept before RoPE and rotated to their place in the prompt.
*repair*  some chunk tokens are computed again on the stale cache: in every layer their new
          keys and values are written first, then they attend to all earlier positions.

Which tokens are repaired is decided by question attention on a stale cache: the auxiliary's
(`aux`), or for comparison the primary's own (`probe`), the tokens of the asked chain
(`chain`) or none of that (`random`).  Exact match: every token of the answer, up to and
with `</s>`, is the arg-max given the tokens before it, as greedy decoding would need.
"""

import argparse
import itertools
import json
import math
import random
from pathlib import Path

import torch

from model import Llama, rope_tables, rotate
from tokenizers_build import character_offsets
from train import ROOT, Encoder
from world import FAMILIES, PREFIX, World, make_example, split_question


class Cache:
    """Keys before RoPE and values of one token sequence, per layer [kv heads, tokens, head_dim]."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values

    def __len__(self):
        return self.keys[0].shape[1]

    @staticmethod
    def join(caches):
        layers = range(len(caches[0].keys))
        return Cache([torch.cat([c.keys[n] for c in caches], 1) for n in layers],
                     [torch.cat([c.values[n] for c in caches], 1) for n in layers])

    def slice(self, start, stop):
        return Cache([k[:, start:stop] for k in self.keys], [v[:, start:stop] for v in self.values])

    def grown(self, extra):
        grow = lambda x: torch.cat([x, x.new_zeros(x.shape[0], extra, x.shape[2])], 1)
        return Cache([grow(k) for k in self.keys], [grow(v) for v in self.values])


@torch.no_grad()
def run_rows(model, cache, ids, positions, keep_attention=False):
    """Compute tokens `ids` at `positions` on a cache and write their keys and values into it.

    Returns (cache, logits [rows, vocabulary], attention [layers, heads, rows, positions]).
    """
    config, positions = model.config, torch.as_tensor(positions)
    missing = max(0, int(positions.max()) + 1 - len(cache)) if len(positions) else 0
    cache = cache.grown(missing)
    x = model.embed_tokens(torch.tensor(ids))[None]
    row_tables = rope_tables(positions, config)
    all_tables = rope_tables(torch.arange(len(cache)), config)
    hidden = torch.arange(len(cache)) > positions[:, None]
    attention = []
    for n, layer in enumerate(model.layers):
        q, k, v = layer.project(x)
        cache.keys[n][:, positions], cache.values[n][:, positions] = k[0], v[0]
        keys, values = layer.share(rotate(cache.keys[n], all_tables)[None]), layer.share(cache.values[n][None])
        scores = rotate(q, row_tables) @ keys.mT / math.sqrt(config.head_dim)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        if keep_attention:
            attention.append(weights[0])
        x = layer.finish(x, weights @ values)
    return cache, model.head(x[0]), torch.stack(attention) if keep_attention else None


def empty_cache(model):
    c = model.config
    blank = lambda: [torch.zeros(c.num_key_value_heads, 0, c.head_dim) for _ in range(c.num_hidden_layers)]
    return Cache(blank(), blank())


class Prompt:
    """One prompt for one model: its sections as ids, and its two caches."""

    def __init__(self, model, encoder, chunk_texts, question, answer):
        self.model = model
        self.prefix = [1] + encoder.text(PREFIX)
        self.chunks = [encoder.text(text) for text in chunk_texts]
        self.question = encoder.text(question)
        self.answer = encoder.text(answer.removesuffix("</s>")) + [2]
        self.context = self.prefix + [i for chunk in self.chunks for i in chunk]

    def full(self):
        return run_rows(self.model, empty_cache(self.model), self.context, range(len(self.context)))[0]

    def stale(self):
        parts = []
        for i, chunk in enumerate(self.chunks):
            ids = self.prefix + chunk
            alone = run_rows(self.model, empty_cache(self.model), ids, range(len(ids)))[0]
            parts.append(alone.slice(0 if i == 0 else len(self.prefix), len(ids)))
        return Cache.join(parts)

    def repair(self, stale, selected):
        """`selected`: indices of chunk tokens, counted from the first chunk's first token."""
        if not selected:
            return stale
        positions = [len(self.prefix) + i for i in sorted(selected)]
        return run_rows(self.model, stale.grown(0), [self.context[p] for p in positions], positions)[0]

    def is_right(self, cache):
        ids = self.question + self.answer
        start = len(self.context)
        logits = run_rows(self.model, cache, ids, range(start, start + len(ids)))[1]
        given = logits[len(self.question) - 1:-1].argmax(-1).tolist()
        return given == self.answer

    def question_attention(self, cache):
        """[layers, heads, question rows, chunk tokens]"""
        start = len(self.context)
        rows = range(start, start + len(self.question))
        attention = run_rows(self.model, cache, self.question, rows, keep_attention=True)[2]
        return attention[..., len(self.prefix):start]


REDUCTIONS = dict(layers=("all", "deep"), heads=("mean", "max"), rows=("mean", "max", "last"))


def reduce_attention(attention, layers="all", heads="mean", rows="mean"):
    """One score per chunk token from [layers, heads, rows, tokens]; layers are averaged last."""
    if layers == "deep":
        attention = attention[attention.shape[0] // 2:]
    attention = attention.mean(1) if heads == "mean" else attention.amax(1)
    attention = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "last": lambda a: a[:, -1]}[rows](attention)
    return attention.mean(0)


def follow(prompt, stale, scores, rounds=2, keep=0.02):
    """Closure: the best tokens, computed again, point on to tokens of earlier chunks.

    A link's own token looks for its source.  In every round the `keep` best tokens are
    computed on a copy of the stale cache; what they attend to in *other* chunks is scored by
    the largest attention over heads and layers, times the score of the token that points.
    """
    chunk_of = torch.repeat_interleave(torch.arange(len(prompt.chunks)), torch.tensor([len(c) for c in prompt.chunks]))
    first, total = len(prompt.prefix), scores / scores.max()
    for _ in range(rounds):
        best = total.topk(max(1, round(keep * len(total)))).indices.sort().values
        ids = [prompt.context[first + t] for t in best.tolist()]
        attention = run_rows(prompt.model, stale.grown(0), ids, best + first, keep_attention=True)[2][..., first:]
        pointed = attention.amax((0, 1)) * (chunk_of != chunk_of[best][:, None]) * total[best][:, None]
        total = torch.maximum(total, pointed.amax(0))
    return total


def map_scores(fine_scores, fine_spans, coarse_spans, how="max"):
    """Scores of one chunk's auxiliary tokens -> its primary tokens, by character overlap."""
    scores = []
    for start, stop in coarse_spans:
        inside = [(s, min(stop, b) - max(start, a), b - a) for s, (a, b) in zip(fine_scores, fine_spans) if a < stop and b > start]
        scores.append(max(s for s, _, _ in inside) if how == "max" else sum(s * o / n for s, o, n in inside))
    return scores


def select_windows(scores, lengths, share, window=8, how="max"):
    """Token indices of the best windows that fit into `share` of all tokens.

    Windows start at the first token of each chunk; the last one of a chunk may be shorter.
    """
    windows, start = [], 0
    for length in lengths:
        for at in range(start, start + length, window):
            tokens = list(range(at, min(at + window, start + length)))
            part = [scores[t] for t in tokens]
            windows.append((max(part) if how == "max" else sum(part) / len(part), tokens))
        start += length
    budget, selected = round(share * start), []
    for _, tokens in sorted(windows, key=lambda w: -w[0]):
        if len(selected) + len(tokens) <= budget:
            selected += tokens
    return selected


def chain_tokens(context, name, spans_per_chunk):
    """Indices of the tokens of the statements that `name` depends on."""
    selected, texts = [], context.texts()
    for link in context.chain(name):
        chunk = context.places[link][0]
        first = texts[chunk].index(f" {link} ")
        stop = texts[chunk].index(".", first)
        offset = sum(len(spans) for spans in spans_per_chunk[:chunk])
        selected += [offset + i for i, (a, b) in enumerate(spans_per_chunk[chunk]) if a < stop and b > first]
    return selected


def interval(right, count):
    """95% Wilson interval."""
    z, p = 1.96, right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return [round(max(0, middle - half), 3), round(min(1, middle + half), 3)]


class Pair:
    def __init__(self, folder):
        self.world = World.load()
        self.models = {name: Llama.load(folder / name).eval() for name in ("primary", "aux")}
        self.encoders = {name: Encoder(ROOT / name / "tokenizer.json") for name in ("primary", "aux")}

    def example(self, rng, family, chunks):
        context, asked, pieces = make_example(rng, self.world, family, chunks)
        texts, (question, answer) = context.texts(), split_question(pieces)
        prompts = {n: Prompt(self.models[n], self.encoders[n], texts, question, answer) for n in self.models}
        spans = {n: [character_offsets(e.tokenizer, t) for t in texts] for n, e in self.encoders.items()}
        return context, asked, prompts, spans


def aux_scores(fine, spans, how="max"):
    """Scores of all auxiliary chunk tokens -> scores of all primary chunk tokens."""
    fine, scores, at = fine.tolist(), [], 0
    for fine_spans, coarse_spans in zip(spans["aux"], spans["primary"]):
        scores += map_scores(fine[at:at + len(fine_spans)], fine_spans, coarse_spans, how)
        at += len(fine_spans)
    return scores


MEAN = dict(layers="all", heads="mean", rows="mean")
BEST = dict(layers="all", heads="max", rows="max")
LAST = dict(layers="all", heads="max", rows="last")


def measure(pair, family, count, seed, chunks, variants, shares):
    """Exact-match counts per method.  

    variants: name -> (selector, reduction of the attention, way to map, way to rate a window,
    rounds of `follow`).
    """
    rng, coin = random.Random(f"{seed}-{family}"), random.Random(seed)
    right = {}
    note = lambda method, ok: right.__setitem__(method, right.get(method, 0) + bool(ok))
    for _ in range(count):
        context, asked, prompts, spans = pair.example(rng, family, chunks)
        primary, aux = prompts["primary"], prompts["aux"]
        lengths = [len(chunk) for chunk in primary.chunks]
        stale, stale_aux = primary.stale(), aux.stale()
        note("full", primary.is_right(primary.full()))
        note("full aux", aux.is_right(aux.full()))
        note("stale", primary.is_right(stale))
        note("stale aux", aux.is_right(stale_aux))
        attention = dict(aux=aux.question_attention(stale_aux), probe=primary.question_attention(stale))
        chain = {t for e in asked for t in chain_tokens(context, e.name, spans["primary"])}
        note("chain only", primary.is_right(primary.repair(stale, chain)))
        for name, (selector, reduction, mapping, window, rounds) in variants.items():
            if selector == "random":
                scores = [coin.random() for _ in range(sum(lengths))]
            else:
                prompt, cache = (aux, stale_aux) if selector == "aux" else (primary, stale)
                scores = reduce_attention(attention[selector], **reduction)
                if rounds:
                    scores = follow(prompt, cache, scores, rounds)
                scores = aux_scores(scores, spans, mapping) if selector == "aux" else scores.tolist()
            for share in shares:
                selected = select_windows(scores, lengths, share, how=window)
                note(f"{name} {share:.0%}", primary.is_right(primary.repair(stale, selected)))
                covered = right.setdefault("_recall", {}).setdefault(f"{name} {share:.0%}", [])
                covered.append(len(chain & set(selected)) / len(chain))
    recall = {k: round(sum(v) / len(v), 3) for k, v in right.pop("_recall", {}).items()}
    return right, recall


def command_accuracy(args):
    model, world = Llama.load(args.model).eval(), World.load()
    encoder = Encoder(args.tokenizer or Path(args.model) / "tokenizer.json")
    for family in FAMILIES:
        rng, right = random.Random(f"{args.seed}-{family}"), 0
        for _ in range(args.count):
            context, _, pieces = make_example(rng, world, family, args.chunks)
            prompt = Prompt(model, encoder, context.texts(), *split_question(pieces))
            right += prompt.is_right(prompt.full())
        print(f"{family:8} {right / args.count:.3f} {interval(right, args.count)} n={args.count}", flush=True)


def command_reuse(args):
    pair, results = Pair(Path(args.pair)), {}
    variants = {"random": ("random", {}, "max", "max", 0)}
    for selector in ("aux", "probe"):
        for name, reduction in (("mean", MEAN), ("max", BEST), ("last", LAST)):
            variants[f"{selector} {name}"] = (selector, reduction, "max", "max", 0)
        for name, reduction in (("max", BEST), ("last", LAST)):
            variants[f"{selector} {name}+follow"] = (selector, reduction, "max", "max", 2)
    for family in args.families or FAMILIES:
        right, recall = measure(pair, family, args.count, args.seed, args.chunks, variants, args.share)
        results[family] = {m: dict(right=n, count=args.count, share=round(n / args.count, 3),
                                   interval=interval(n, args.count)) for m, n in right.items()}
        print(f"\n{family} (n = {args.count})")
        for m, n in right.items():
            results[family][m]["recall"] = recall.get(m)
            print(f"  {m:24} {n / args.count:.3f}  {n / max(1, right['full']):.0%} of full  recall {recall.get(m)}", flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


def command_search(args):
    pair, variants = Pair(Path(args.pair)), {}
    for selector, *choice in itertools.product(("aux", "probe"), *REDUCTIONS.values()):
        for mapping, window, rounds in (("max", "max", 0), ("max", "mean", 0), ("max", "max", 2)):
            name = " ".join([selector, *choice, window] + ["follow"] * bool(rounds))
            variants[name] = (selector, dict(zip(REDUCTIONS, choice)), mapping, window, rounds)
    totals = {}
    for family in args.families or ("link1", "link2"):
        right, recall = measure(pair, family, args.count, args.seed, args.chunks, variants, args.share)
        print(family, {m: right[m] for m in ("full", "full aux", "stale", "stale aux", "chain only")}, flush=True)
        for name, value in recall.items():
            totals.setdefault(name, {})[family] = (right[name] / max(1, right["full"]), value)
    for name, by in sorted(totals.items(), key=lambda t: -sum(v[0] for v in t[1].values())):
        print(f"{name:40}", "  ".join(f"{f} {ok:.2f} (recall {rec:.2f})" for f, (ok, rec) in by.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("accuracy", "reuse", "search"))
    parser.add_argument("--model", default=str(ROOT / "primary"), help="accuracy: folder of the model")
    parser.add_argument("--tokenizer", help="accuracy: default is the model folder's")
    parser.add_argument("--pair", default=str(ROOT), help="folder that holds primary/ and aux/")
    parser.add_argument("--count", type=int, default=100, help="prompts per family")
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--share", type=float, nargs="+", default=[0.1, 0.2], help="shares of chunk tokens to repair")
    parser.add_argument("--families", nargs="+", help="default: all (search: the links)")
    parser.add_argument("--seed", type=int, default=90001)
    parser.add_argument("--json", help="reuse: also write the results to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"accuracy": command_accuracy, "reuse": command_reuse, "search": command_search}[args.command](args)


if __name__ == "__main__":
    main()
