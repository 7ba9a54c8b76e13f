#!/usr/bin/env python3
"""Build the two tokenizers (byte-level BPE with the full byte alphabet).

* primary: every word of the world is one token with its leading space;
* auxiliary: at most half the vocabulary; names, adjectives, verbs and grammar words stay
  whole, nouns, places, towns and filler words are split.

    python tokenizers_build.py --out ..
"""

import argparse
import json
import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from world import PREFIX, Mix, World, make_context, make_example, split_question

SPECIALS = ["<pad>", "<s>", "</s>"]
GRAMMAR = ["\n", "Report", " from", " the", "'s", " token", " near", ".", ",", "Question", ":", " what", " does",
           " do", " and", " keep", "?", "Answer", "The", " reports", " follow"]


def train_bpe(weighted_words, vocab_size):
    """BPE over (word, weight) pairs; equal input gives an equal tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.train_from_iterator((word for word, weight in weighted_words for _ in range(weight)), trainer)
    return tokenizer


def word_lists(world):
    """Words that must stay whole in the auxiliary, and all others."""
    whole = GRAMMAR + [" " + w for w in world.names + world.adjectives + world.verbs]
    rest = [" " + w for w in world.nouns + world.places + world.towns]
    for text in world.fillers:
        rest += [" " + w for w in text.rstrip(".").split()]
    return whole, sorted(set(rest) - set(whole))


def is_whole(tokenizer, word):
    return len(tokenizer.encode(word, add_special_tokens=False).ids) == 1


def build_primary(world):
    """The smallest vocabulary (in steps of 16) that keeps every word whole.

    Names and towns are also kept whole at the start of a text, without their space.
    """
    whole, rest = word_lists(world)
    rest = rest + world.names + world.towns
    words = [(w, 2) for w in whole + rest]
    for size in range(1600, 4000, 16):
        tokenizer = train_bpe(words, size)
        if all(is_whole(tokenizer, w) for w in whole + rest):
            return tokenizer
    raise SystemExit("no vocabulary size keeps every word whole")


def build_auxiliary(world, limit):
    """The smallest vocabulary that keeps the whole-word list whole."""
    whole, rest = word_lists(world)
    words = [(w, 200) for w in whole] + [(w, 1) for w in rest]
    for size in range(900, limit + 1, 4):
        tokenizer = train_bpe(words, size)
        if all(is_whole(tokenizer, w) for w in whole):
            return tokenizer
    raise SystemExit("the auxiliary vocabulary does not fit its limit")


def character_offsets(tokenizer, text):
    """(start, end) per token in characters; the world is ASCII, so bytes are characters."""
    spans, at = [], 0
    for token in tokenizer.encode(text, add_special_tokens=False).tokens:
        spans.append((at, at + len(token)))
        at += len(token)
    assert at == len(text), text
    return spans


def inside_share(world, primary, auxiliary, contexts=200):
    """Share of the auxiliary's token edges that fall inside a primary token."""
    rng, inside, total, tokens = random.Random(5), 0, 0, [0, 0]
    for _ in range(contexts):
        context, _, question = make_example(rng, world, "single")
        for text in context.texts() + [split_question(question)[0]]:
            coarse = {end for _, end in character_offsets(primary, text)}
            fine = [end for _, end in character_offsets(auxiliary, text)]
            inside += sum(end not in coarse for end in fine)
            total += len(fine)
            tokens[0] += len(coarse)
            tokens[1] += len(fine)
    return inside / total, tokens[1] / tokens[0]


def check_pieces(world, tokenizer):
    """Tokens of a section are the tokens of its pieces (world.py relies on it)."""
    rng = random.Random(6)
    for _ in range(50):
        context = make_context(rng, world, [6] * 4, Mix.training(rng))
        for pieces in context.chunks:
            whole = tokenizer.encode("".join(t for t, _ in pieces), add_special_tokens=False).ids
            assert whole == [i for t, _ in pieces for i in tokenizer.encode(t, add_special_tokens=False).ids]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="..", help="folder that holds primary/ and aux/")
    args = parser.parse_args()
    world, out = World.load(), Path(args.out)
    primary = build_primary(world)
    auxiliary = build_auxiliary(world, primary.get_vocab_size() // 2)
    for folder, tokenizer in (("primary", primary), ("aux", auxiliary)):
        check_pieces(world, tokenizer)
        (out / folder).mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(out / folder / "tokenizer.json"))
        prompt = {"anchor": PREFIX, "joiner": "\n", "stop": ["\n"]}
        (out / folder / "prompt.json").write_text(json.dumps(prompt) + "\n")
    inside, ratio = inside_share(world, primary, auxiliary)
    print(f"primary {primary.get_vocab_size()}  auxiliary {auxiliary.get_vocab_size()} tokens")
    print(f"auxiliary edges inside a primary token: {inside:.1%}; auxiliary/primary tokens: {ratio:.2f}")


if __name__ == "__main__":
    main()
