#!/usr/bin/env python3
"""Time other engines on the shapes that CacheClip's engine is timed on.

    peers.py            answers requests: one JSON object a line on stdin, one a line on stdout (README.md)
    peers.py --check    compares the peers' logits, then prints a table of all of them

A benchmark keeps this process and takes turns with it, so that both sides see the same machine.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import models

HERE = Path(__file__).resolve().parent
MODELS = HERE.parents[2] / "target" / "peers" / "models"

# The first is the default.
DTYPES = {"torch": ("f32", "bf16"), "llama.cpp": ("f16", "f32", "bf16")}
OPS = ("prefill", "decode", "logits")
DEFAULTS = dict(steps=32, threads=2, ubatch=512, flash_attention=True, reversed=False)
# Settings of OpenMP and of the math libraries would make peers slower, or faster, than users find them.
SCRUBBED = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "GGML_", "LLAMA_", "TORCH_", "TRANSFORMERS_", "MALLOC_")

# Largest relative difference of llama.cpp's logits, by dtype and flash attention, which computes in f16.
AGREE = {("f32", False): 1e-4, ("f32", True): 1e-2, ("f16", True): 1e-2, ("f16", False): 1e-2}
# Reversing the prompt must move logits further than that, by this factor.
CONTROL = 50
# What --check prints: peer, dtype, flash attention.
ROWS = [("torch", "f32", True), *(("llama.cpp", *kind) for kind in AGREE)]


class Refused(Exception):
    """A request that cannot be answered; the message says what to change."""


class Peers:
    """A process for every peer that was asked for, with one shape's models at a time."""

    def __init__(self, folder):
        self.folder, self.shape, self.running, self.seen = folder, None, {}, set()

    def ask(self, request):
        request = checked(request)
        shown = {name: request[name] for name in ("peer", "shape", "op", "dtype", "tokens", "threads")}
        if request["op"] == "decode":
            shown["steps"] = request["steps"]
        if request["peer"] == "llama.cpp":
            shown |= {name: request[name] for name in ("ubatch", "flash_attention")}
        known = json.dumps(shown, sort_keys=True)
        reply = self._send(request)
        # The first run of a kind pays for page faults and for what libraries make when first used.
        warm = known in self.seen
        self.seen.add(known)
        return {**shown, "warm": warm, **reply}

    def _send(self, request):
        if self.shape != request["shape"]:
            self.close()
            self.shape = request["shape"]
        key = request["peer"], request["dtype"], str(request["flash_attention"])
        if key not in self.running:
            command = [sys.executable, HERE / "engines.py", self.folder, self.shape, *key]
            self.running[key] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment())
        engine = self.running[key]
        try:
            print(json.dumps(request), file=engine.stdin)
            line = engine.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            del self.running[key]
            raise Refused(f"{' '.join(key[:2])} ended with status {engine.wait()}; stderr says why (a negative status "
                          "is a signal: -9 is most often memory)")
        reply = json.loads(line)
        if "error" in reply:
            raise Refused(reply["error"])
        return reply

    def close(self):
        """Ends the processes, and with them the models."""
        for engine in self.running.values():
            engine.stdin.close()
            engine.wait()
        self.running.clear()
        self.seen.clear()


def checked(request):
    """The request with its defaults, or `Refused`."""
    if not isinstance(request, dict):
        raise Refused("a request is a JSON object")
    allowed = {"peer", "shape", "op", "dtype", "tokens", *DEFAULTS}
    if unknown := sorted(set(request) - allowed):
        raise Refused(f"unknown field {', '.join(unknown)}; known: {', '.join(sorted(allowed))}")
    for name, values in ("peer", DTYPES), ("shape", models.SHAPES), ("op", OPS):
        if request.get(name) not in values:
            raise Refused(f"{name}: {request.get(name)!r}; choose from {', '.join(values)}")
    dtypes = DTYPES[request["peer"]]
    request = {**DEFAULTS, "dtype": dtypes[0], **request}
    if request["dtype"] not in dtypes:
        raise Refused(f"dtype: {request['dtype']!r}; choose from {', '.join(dtypes)}")
    for name in "tokens", "steps", "threads", "ubatch":
        if type(request.get(name)) is not int or request[name] < 1:
            raise Refused(f"{name}: {request.get(name)!r}; must be a whole number of at least 1")
    for name in "flash_attention", "reversed":
        if type(request[name]) is not bool:
            raise Refused(f"{name}: {request[name]!r}; must be true or false")
    if request["peer"] == "torch" and not request["flash_attention"]:
        raise Refused("flash_attention: false is for llama.cpp; PyTorch chooses its kernel")
    if request["tokens"] + request["steps"] > models.MAX_POSITIONS:
        raise Refused(f"tokens and steps are more than {models.MAX_POSITIONS} together")
    return request


def environment():
    kept = {name: value for name, value in os.environ.items() if not name.startswith(SCRUBBED)}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def serve(peers):
    for line in sys.stdin:
        try:
            reply = peers.ask(json.loads(line))
        except (Refused, json.JSONDecodeError) as error:
            reply = {"error": str(error)}
        print(json.dumps(reply), flush=True)


def check(peers, options):
    """Prints a table of all; whether the peers agree on what they compute."""
    agreed = True
    columns = "{:<13} {:<8} {:<18} {:>9} {:>8} {:>8} {:>7} {:>7} {:>8}"
    versions = {}
    for shape in options.shapes:
        agreed &= compare(peers, shape)
        print(columns.format("shape", "op", "peer", "tokens/s", "lowest", "highest", "CPU s", "others", "peak MB"))
        for op in "prefill", "decode":
            runs = {row: [] for row in ROWS}
            # In turns, and the first turn is not counted.
            for turn in range(options.runs + 1):
                for peer, dtype, flash in ROWS:
                    reply = peers.ask(dict(
                        peer=peer, dtype=dtype, flash_attention=flash, shape=shape, op=op, tokens=options.tokens,
                        steps=options.steps, threads=options.threads))
                    versions[peer] = f"{reply['peer_version']}; {reply['features']}"
                    if turn > 0:
                        runs[peer, dtype, flash].append(reply)
            for row, replies in runs.items():
                def middle(field):
                    return statistics.median(reply[field] for reply in replies)
                rates = sorted(reply["tokens_per_second"] for reply in replies)
                print(columns.format(
                    shape, op, label(*row), f"{middle('tokens_per_second'):.1f}", f"{rates[0]:.1f}",
                    f"{rates[-1]:.1f}", f"{middle('cpu_seconds'):.2f}", f"{middle('others_cpus'):.2f}",
                    f"{middle('peak_rss_bytes') / 1e6:.0f}"), flush=True)
        print()
    print(f"{options.tokens} tokens, {options.steps} steps, {options.threads} threads, median of {options.runs}; "
          "fa: flash attention; others: cores that other processes took meanwhile")
    for peer, version in versions.items():
        print(f"{peer}: {version}")
    return agreed


def label(peer, dtype, flash):
    return f"{peer} {dtype}{' fa' if flash and peer == 'llama.cpp' else ''}"


def compare(peers, shape, tokens=96):
    """Whether llama.cpp computes what transformers computes, from the same weights."""
    def logits(peer, dtype, flash, backwards=False):
        return peers.ask(dict(peer=peer, dtype=dtype, flash_attention=flash, shape=shape, op="logits",
                              tokens=tokens, reversed=backwards))["logits"]

    def distance(a, b):
        return math.dist(a, b) / math.hypot(*b)

    wanted = logits(*ROWS[0])
    control = distance(logits(*ROWS[0], backwards=True), wanted)
    agreed = True
    for row in ROWS[1:]:
        got = distance(logits(*row), wanted)
        good = got <= AGREE[row[1:]] and got * CONTROL <= control
        agreed &= good
        print(f"{shape}: logits of {label(*row)} differ from transformers' by {got:.1e}, those of the reversed "
              f"prompt by {control:.1e}: {'agreed' if good else 'NOT THE SAME MODEL'}", flush=True)
    return agreed


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="folder of the GGUF files (target/peers/models)")
    parser.add_argument("--check", action="store_true", help="print a table of all peers instead of serving")
    parser.add_argument("--shapes", nargs="+", choices=models.SHAPES, default=list(models.SHAPES))
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    peers = Peers(options.models)
    try:
        if not options.check:
            serve(peers)
        elif not check(peers, options):
            sys.exit("the peers do not agree: no figure above means anything")
    except Refused as error:
        sys.exit(str(error))
    finally:
        peers.close()


if __name__ == "__main__":
    main()
