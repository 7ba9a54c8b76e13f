#!/usr/bin/env python3
"""PyTorch on the GPU that cacheclip-gpu-check measures: one request a line on stdin, one answer a line on stdout.

    {"op": "describe"}                                            {"version": ...}
    {"op": "product", "side": 8192, "times": 10}                  {"seconds": of one}
    {"op": "attend", "heads", "kv_heads", "dim", "tokens"}        {"seconds": of one, "kv": "grouped" or "repeated"}
    {"op": "prefill", "name", "tokens", and the shape}            {"seconds": to the last row's logits on the host}

Attention is scaled_dot_product_attention with the backend FLASH_ATTENTION and no other. Prefill is a decoder written in
PyTorch with fused projections (queries, keys and values in one; gate and up in one), all rows at once and without a cache:
less than a serving engine does. Weights are random and bf16; PyTorch runs eagerly.
"""

import json
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class Refused(Exception):
    """A request that cannot be answered; the message says what to change."""


class Peer:
    """What was made for earlier requests is used again; one model at a time."""

    def __init__(self):
        if not torch.cuda.is_available():
            raise Refused(f"PyTorch {torch.__version__} sees no CUDA device")
        self.queries, self.sides, self.model, self.name = {}, {}, None, None

    def describe(self, _request):
        return {"version": f"torch {torch.__version__} (CUDA {torch.version.cuda}) on {torch.cuda.get_device_name()}, "
                           "eager, bf16, SDPA backend FLASH_ATTENTION"}

    def product(self, request):
        side = request["side"]
        if side not in self.sides:
            self.sides[side] = [numbers(side, side) for _ in range(2)]
        a, b = self.sides[side]
        return {"seconds": timed(lambda: a @ b, request["times"])}

    def attend(self, request):
        key = request["heads"], request["kv_heads"], request["dim"], request["tokens"]
        if key not in self.queries:
            self.queries = {key: self._attention(*key)}
        q, k, v, grouped = self.queries[key]
        once = lambda: flash(q, k, v, grouped)
        # About as long as a round of the kernel beside it.
        times = max(1, min(200, int(0.02 / timed(once, 1))))
        return {"seconds": timed(once, times), "kv": "grouped" if grouped else "repeated"}

    def _attention(self, heads, kv_heads, dim, tokens):
        q, k, v = (numbers(1, count, tokens, dim) for count in (heads, kv_heads, kv_heads))
        grouped = heads != kv_heads
        if grouped:
            try:
                flash(q, k, v, True)
            except RuntimeError:
                # A version whose flash kernel takes no groups; repeating is not in the time.
                k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
                grouped = False
        return q, k, v, grouped

    def prefill(self, request):
        if self.name != request["name"]:
            self.model, self.name = None, None
            torch.cuda.empty_cache()
            self.model, self.name = Decoder(request), request["name"]
        ids = torch.arange(request["tokens"], device="cuda") * 7919 % request["vocab"]
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.inference_mode():
            self.model.logits(ids).float().cpu()
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "kv": "grouped" if self.model.grouped else "repeated"}


class Decoder:
    """Random weights of a Llama or Qwen2 shape."""

    def __init__(self, shape):
        self.heads, self.kv_heads, self.dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
        self.eps, self.theta, self.grouped = shape["eps"], shape["theta"], shape["heads"] != shape["kv_heads"]
        hidden, inner = shape["hidden"], shape["intermediate"]
        width = (self.heads + 2 * self.kv_heads) * self.dim
        self.ones = torch.ones(hidden, device="cuda", dtype=torch.bfloat16)
        self.table = numbers(shape["vocab"], hidden)
        self.head = self.table if shape["tied"] else weights(shape["vocab"], hidden)
        self.layers = [
            (weights(width, hidden), numbers(width) if shape["biases"] else None,
             weights(hidden, self.heads * self.dim), weights(2 * inner, hidden), weights(hidden, inner))
            for _ in range(shape["layers"])]
        with torch.inference_mode():
            q, k, v = (numbers(1, count, 128, self.dim) for count in (self.heads, self.kv_heads, self.kv_heads))
            try:
                flash(q, k, v, self.grouped)
            except RuntimeError:
                self.grouped = False

    def logits(self, ids):
        tokens, x = len(ids), self.table[ids]
        pairs = torch.arange(0, self.dim, 2, device="cuda").float() / self.dim
        angles = torch.arange(tokens, device="cuda").float()[:, None] * self.theta ** -pairs
        angles = torch.cat((angles, angles), dim=-1)
        cosines, sines = angles.cos().bfloat16(), angles.sin().bfloat16()
        for index, (qkv, bias, output, gate_up, down) in enumerate(self.layers):
            rows = F.linear(self.norm(x), qkv, bias).view(tokens, -1, self.dim).transpose(0, 1)[None]
            q, k, v = rows.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
            q, k = rotated(q, cosines, sines), rotated(k, cosines, sines)
            if not self.grouped and self.heads != self.kv_heads:
                k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
            last = index + 1 == len(self.layers)
            if last:
                # As the engine beside it: behind the last layer's keys and values one row goes on.
                q, x = q[:, :, -1:], x[-1:]
            attended = flash(q, k, v.contiguous(), self.grouped, causal=not last)
            x = x + F.linear(attended[0].transpose(0, 1).reshape(len(x), -1), output)
            gate, up = F.linear(self.norm(x), gate_up).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, down)
        return F.linear(self.norm(x), self.head)

    def norm(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.ones, self.eps)


def numbers(*size):
    return torch.randn(size, device="cuda", dtype=torch.bfloat16)


def weights(outputs, inputs):
    return numbers(outputs, inputs).mul_(inputs ** -0.5)


def rotated(x, cosines, sines):
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


def flash(q, k, v, grouped, causal=True):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def timed(work, times):
    """Seconds of one, by the device's clock, after one that is not counted."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.inference_mode():
        work()
        begin.record()
        for _ in range(times):
            work()
        end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / times


def main():
    try:
        peer = Peer()
    except Refused as error:
        peer = error
    for line in sys.stdin:
        try:
            if isinstance(peer, Refused):
                raise peer
            request = json.loads(line)
            operations = {op: getattr(peer, op) for op in ("describe", "product", "attend", "prefill")}
            if request.get("op") not in operations:
                raise Refused(f"op: {request.get('op')!r}; choose from {', '.join(operations)}")
            reply = operations[request["op"]](request)
        except (Refused, KeyError, RuntimeError) as error:
            # Out of memory is one of these; what is left of it would disturb who measures beside.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
