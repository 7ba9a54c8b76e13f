#!/usr/bin/env python3
"""Train one model of the pair from scratch, on one thread.

    python train.py primary start  --seed 1 --out /tmp/start --log ../train.log.json
    python train.py primary main   --seed 2 --out /tmp/main --log ../train.log.json --init /tmp/start
    python train.py primary finish --seed 3 --out ../primary --log ../train.log.json --init /tmp/main

and the same with `aux`.  A stage walks through phases of growing contexts.  The learning
rate is warmed up and held, and in the last stage falls linearly to zero.  Matrices inside
the layers are trained with Muon, everything else with AdamW.  The loss is taken only on
words that can be known: answers, echoed values and restated values.

Phases are bounded by steps, so a run is a function of its seed (and of the floating-point
behaviour of the machine).
"""

import argparse
import copy
import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from model import Config, Llama
from world import PREFIX, Mix, World, draw_questions, make_context

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Phase:
    steps: int
    batch: int  # contexts per step
    questions: int  # questions per context
    chunks: tuple  # fewest and most chunks
    slots: tuple  # fewest and most statements per chunk
    max_depth: int


START = [
    Phase(120, 40, 4, (1, 2), (2, 3), 1),
    Phase(80, 32, 8, (2, 3), (3, 4), 2),
]
MAIN = [
    Phase(120, 24, 10, (3, 4), (3, 5), 3),
    Phase(160, 12, 16, (4, 6), (4, 6), 3),
    Phase(470, 6, 24, (4, 8), (5, 7), 3),
]
FINISH = [
    Phase(800, 6, 24, (4, 8), (5, 7), 3),
]
# phases of each stage, and the share of its steps before the learning rate falls to zero
STAGES = dict(start=(START, 1.0), main=(MAIN, 1.0), finish=(FINISH, 0.0))

ARCHITECTURES = {
    "primary": dict(hidden_size=128, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
                    intermediate_size=256, max_position_embeddings=1024),
    "aux": dict(hidden_size=96, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
                intermediate_size=192, max_position_embeddings=2048),
}


class Encoder:
    """Tokens of pieces, with a cache; equal to encoding whole sections (see tokenizers_build)."""

    def __init__(self, tokenizer_path):
        self.tokenizer = Tokenizer.from_file(str(tokenizer_path))
        self.cache = {}

    def piece(self, text):
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return self.cache[text]

    def text(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def pieces(self, pieces):
        """(ids, target flag per id)"""
        ids, flags = [], []
        for text, target in pieces:
            tokens = self.piece(text)
            ids += tokens
            flags += [target] * len(tokens)
        return ids, flags


def pad(rows, width):
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def make_batch(rng, world, encoder, phase):
    """Arguments of Llama.forward_train and the target ids."""
    start = [1] + encoder.text(PREFIX)
    contexts, questions = [], []
    for _ in range(phase.batch):
        slots = [rng.randint(*phase.slots) for _ in range(rng.randint(*phase.chunks))]
        context = make_context(rng, world, slots, Mix.training(rng, phase.max_depth))
        ids, flags = list(start), [False] * len(start)
        for chunk in context.chunks:
            more, flag = encoder.pieces(chunk)
            ids, flags = ids + more, flags + flag
        contexts.append((ids, flags))
        packed = dict(ids=[], flags=[], owners=[], offsets=[])
        for number, question in enumerate(draw_questions(rng, context, phase.questions)):
            ids, flags = encoder.pieces(question)
            packed["ids"] += ids
            packed["flags"] += flags
            packed["owners"] += [number] * len(ids)
            packed["offsets"] += range(len(ids))
        questions.append(packed)
    size = max(len(ids) for ids, _ in contexts)
    width = max(len(packed["ids"]) for packed in questions)
    rows_of = lambda flags, first: [first + i - 1 for i, flag in enumerate(flags) if flag]
    context_rows, question_rows, targets, question_targets = [], [], [], []
    for b, ((ids, flags), packed) in enumerate(zip(contexts, questions)):
        context_rows += rows_of(flags, b * size)
        targets += [i for i, flag in zip(ids, flags) if flag]
        question_rows += rows_of(packed["flags"], b * width)
        question_targets += [i for i, flag in zip(packed["ids"], packed["flags"]) if flag]
    inputs = (pad([ids for ids, _ in contexts], size), torch.tensor([len(ids) for ids, _ in contexts]),
              *(pad([packed[key] for packed in questions], width) for key in ("ids", "owners", "offsets")),
              torch.tensor(context_rows, dtype=torch.long), torch.tensor(question_rows, dtype=torch.long))
    return inputs, torch.tensor(targets + question_targets)


class Muon:
    """Momentum whose update is replaced by its nearest (roughly) orthogonal matrix."""

    def __init__(self, parameters, momentum=0.95):
        self.momentum, self.groups = momentum, {}
        for p in parameters:
            self.groups.setdefault((min(p.shape), max(p.shape)), []).append((p, torch.zeros_like(p)))

    @torch.no_grad()
    def step(self, rate):
        for group in self.groups.values():
            updates = []
            for p, buffer in group:
                buffer.lerp_(p.grad, 1 - self.momentum)
                update = p.grad.lerp(buffer, self.momentum)
                updates.append(update.T if p.shape[0] > p.shape[1] else update)
            x = torch.stack(updates)
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):  # Newton-Schulz iteration, quintic
                gram = x @ x.mT
                x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
            for (p, _), update in zip(group, x):
                tall = p.shape[0] > p.shape[1]
                p.add_(update.T if tall else update, alpha=-rate * max(1, p.shape[0] / p.shape[1]) ** 0.5)


def learning_rate(step, progress, flat, warm_up=50):
    """Multiplier: linear warm-up, plateau, linear decay; progress runs from 0 to 1."""
    return min(1, (step + 1) / warm_up) * min(1, (1 - progress) / max(1 - flat, 1e-9))


def write_json(path, key, value):
    """Set one key of a JSON file that the other training process may write as well."""
    path = Path(path)
    data = json.loads(path.read_text()) if path.exists() else {}
    data[key] = value
    temporary = path.with_suffix(f".{key}.tmp")
    temporary.write_text(json.dumps(data) + "\n")
    os.replace(temporary, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(ARCHITECTURES))
    parser.add_argument("stage", choices=sorted(STAGES), help="short contexts first, then the trained length")
    parser.add_argument("--out", required=True, help="folder for config.json and model.safetensors")
    parser.add_argument("--log", required=True, help="JSON file for the loss curve")
    parser.add_argument("--init", help="folder of a model to go on from")
    parser.add_argument("--tokenizer", help="default: tokenizer.json of models/tiny/<model>")
    parser.add_argument("--last-steps", type=int, help="length of the stage's last phase, where it is to differ")
    parser.add_argument("--seed", type=int, default=1, help="of the data and the fresh weights")
    parser.add_argument("--matrix-rate", type=float, default=0.02, help="Muon's learning rate")
    parser.add_argument("--other-rate", type=float, default=4e-3, help="AdamW's learning rate")
    parser.add_argument("--minutes", type=float, default=math.inf, help="end (and decay) earlier than the steps say")
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    rng, world = random.Random(args.seed), World.load()
    encoder = Encoder(args.tokenizer or ROOT / args.model / "tokenizer.json")
    if args.init:
        model = Llama.load(args.init)
    else:
        model = Llama(Config(vocab_size=encoder.tokenizer.get_vocab_size(), **ARCHITECTURES[args.model]))
    phases, flat = copy.deepcopy(STAGES[args.stage])
    if args.last_steps:
        phases[-1].steps = args.last_steps
    total = sum(p.steps for p in phases)

    matrices = [p for n, p in model.named_parameters() if n.startswith("layers") and p.ndim == 2]
    others = [p for n, p in model.named_parameters() if not (n.startswith("layers") and p.ndim == 2)]
    muon, adam = Muon(matrices), torch.optim.AdamW(others, lr=args.other_rate, betas=(0.9, 0.98), weight_decay=0.0)

    print(f"{args.model}: {sum(p.numel() for p in model.parameters())} parameters, {total} steps", flush=True)
    curve, begin, step, tokens, sums = [], time.time(), 0, 0, [0.0, 0.0, 0]
    for number, phase in enumerate(phases):
        for _ in range(phase.steps):
            progress = max(step / total, (time.time() - begin) / (60 * args.minutes))
            if progress >= 1:
                break
            inputs, targets = make_batch(rng, world, encoder, phase)
            logits = model.forward_train(*inputs)
            loss = F.cross_entropy(logits, targets)
            loss.backward()
            rate = learning_rate(step, progress, flat)
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            muon.step(args.matrix_rate * rate)
            adam.param_groups[0]["lr"] = args.other_rate * rate
            adam.step()
            model.zero_grad(set_to_none=True)

            step += 1
            tokens += int((inputs[0] > 0).sum() + (inputs[2] > 0).sum())
            sums[0] += loss.item()
            sums[1] += (logits.argmax(-1) == targets).float().mean().item()
            sums[2] += 1
            if step % 25 == 0:
                seconds = time.time() - begin
                point = dict(phase=number, step=step, tokens=tokens, seconds=round(seconds, 1),
                             loss=round(sums[0] / sums[2], 4), accuracy=round(sums[1] / sums[2], 4))
                curve.append(point)
                sums = [0.0, 0.0, 0]
                print(f"{point} {tokens / seconds:.0f} tokens/s", flush=True)
            if step % args.save_every == 0:
                model.save(args.out)
                write_json(args.log, f"{args.model}-{args.stage}", curve)
    model.save(args.out)
    write_json(args.log, f"{args.model}-{args.stage}", curve)


if __name__ == "__main__":
    main()
