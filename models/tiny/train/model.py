#!/usr/bin/env python3
"""A small Llama in PyTorch, saved in the Hugging Face form (config.json + model.safetensors).

`Llama.logits` is the plain model.  `Llama.forward_train` computes many questions about one
context at once.  `project`/`finish` are the two halves of a layer; evaluate.py builds its
cache experiments from them.

    python model.py ../primary        # print the size of a saved model
"""

import argparse
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save_file


@dataclass
class Config:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    head_dim: int = 32
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 1024

    def to_hf(self):
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", **asdict(self),
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32",
        }

    @staticmethod
    def from_hf(values):
        return Config(**{k: values[k] for k in Config.__dataclass_fields__})


def rope_tables(positions, config):
    """cos and sin for integer positions of any shape; the last axis is head_dim."""
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = positions.float()[..., None] * config.rope_theta ** -steps
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x, tables):
    cos, sin = tables
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        heads, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        linear = lambda n_in, n_out: nn.Linear(n_in, n_out, bias=False)
        self.q_proj, self.k_proj, self.v_proj = (linear(c.hidden_size, n) for n in (heads, kv, kv))
        self.o_proj = linear(heads, c.hidden_size)
        self.gate_proj, self.up_proj = (linear(c.hidden_size, c.intermediate_size) for _ in range(2))
        self.down_proj = linear(c.intermediate_size, c.hidden_size)
        self.input_layernorm = nn.Parameter(torch.ones(c.hidden_size))
        self.post_attention_layernorm = nn.Parameter(torch.ones(c.hidden_size))
        for module in (self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.up_proj):
            nn.init.normal_(module.weight, std=c.hidden_size**-0.5)
        for module in (self.o_proj, self.down_proj):
            nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.in_features * c.num_hidden_layers))

    def norm(self, x, weight):
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def project(self, x):
        """Queries, keys and values before RoPE, each [batch, heads, tokens, head_dim]."""
        h = self.norm(x, self.input_layernorm)
        split = lambda y: y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        return split(self.q_proj(h)), split(self.k_proj(h)), split(self.v_proj(h))

    def finish(self, x, attended):
        """Output projection, residual and MLP; `attended` is [batch, heads, tokens, head_dim]."""
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        h = self.norm(x, self.post_attention_layernorm)
        return x + self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))

    def share(self, x):
        """Repeat key/value heads for their groups of query heads."""
        return x.repeat_interleave(self.config.num_attention_heads // self.config.num_key_value_heads, 1)


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        nn.init.normal_(self.embed_tokens.weight)
        nn.init.normal_(self.lm_head.weight, std=0.02)
        self._start_looking_up()

    @torch.no_grad()
    def _start_looking_up(self, strength=0.5, weights=(4, 4, 2, 2, 1, 1, 1, 1), gain=2.5, copied=0.1):
        """Structured start: the first rough form of a look-up, for training to refine.

        A random start spends most of a short run on finding that positions and equal words
        matter at all.  This start gives
          - layer 0: heads that look 1, 2 and 3 tokens back.  All embeddings get a common part
            u; queries and keys read u, so their product depends on the distance alone, and
            RoPE makes it peak at the wanted one.  The words 1 and 3 back are written into two
            reserved subspaces, `near` and `far`;
          - later layers: head 0 matches the word 1 back of the query with the word 3 back of
            the key (` Alder's` finds the value of ` Alder keeps the ..`), head 2 the query's own
            word with the word 1 back of the key (the adjective finds its noun), and both copy
            what they find;
          - an output head that starts as a small copy of the embedding.
        """
        c, width = self.config, 16
        d, half = c.hidden_size, c.head_dim // 2
        basis = torch.linalg.qr(torch.randn(d, d))[0].T
        near, far, copy, word = basis[:16], basis[16:32], basis[32:64], basis[64:80]
        embedding = self.embed_tokens.weight
        common = strength * torch.randn(d)
        embedding += common
        for rows in (near, far):
            embedding -= embedding @ rows.T @ rows
        common = common - common @ near.T @ near - common @ far.T @ far
        self.lm_head.weight.copy_(copied * (embedding - common))
        heads = lambda weight: weight.unflatten(0, (-1, c.head_dim))
        columns = lambda weight: weight.T.unflatten(0, (-1, c.head_dim))

        first = self.layers[0]
        read = common / common.square().sum()
        angles = c.rope_theta ** -(torch.arange(half) / half)
        size = torch.zeros(half)
        size[:len(weights)] = (torch.tensor(weights) * c.head_dim**0.5).sqrt()
        key = torch.cat([size, torch.zeros(half)])
        heads(first.k_proj.weight.mul_(0.3)).add_(key[:, None] * read)
        queries = heads(first.q_proj.weight.mul_(0.3))
        for head, distance in enumerate((1, 2, 3)):
            query = torch.cat([size * (distance * angles).cos(), -size * (distance * angles).sin()])
            queries[head] += query[:, None] * read
        heads(first.v_proj.weight)[:, :width] = word
        columns(first.o_proj.weight)[0, :width] = near
        columns(first.o_proj.weight)[2, :width] = far

        # words are matched in the slow half of the RoPE pairs, which hardly turn with distance
        slow = torch.cat([torch.arange(half // 2, half), torch.arange(half + half // 2, 2 * half)])
        for layer in self.layers[1:]:
            for head, group, q_rows, k_rows in ((0, 0, near, far), (2, 1, word, near)):
                for projection, at, rows in ((layer.q_proj, head, q_rows), (layer.k_proj, group, k_rows)):
                    heads(projection.weight)[at] *= 0.3
                    heads(projection.weight)[at, slow] = gain * rows
                heads(layer.v_proj.weight)[group] = copy
                columns(layer.o_proj.weight)[head] = copy

    def head(self, x):
        return self.lm_head(F.rms_norm(x, (x.shape[-1],), self.norm, self.config.rms_norm_eps))

    def logits(self, ids):
        """Plain causal forward pass: ids [batch, tokens] -> logits."""
        x = self.embed_tokens(ids)
        tables = rope_tables(torch.arange(ids.shape[1]), self.config)
        for layer in self.layers:
            q, k, v = layer.project(x)
            q, k = rotate(q, tables), rotate(k, tables)
            x = layer.finish(x, F.scaled_dot_product_attention(q, layer.share(k), layer.share(v), is_causal=True))
        return self.head(x)

    def forward_train(self, context, lengths, questions, owners, offsets, context_rows, question_rows):
        """Logits of the rows that carry a loss.

        context      [batch, C] token ids, padded on the right to C
        lengths      [batch] tokens that are not padding
        questions    [batch, Q] the tokens of all questions about a context, one after the other
        owners       [batch, Q] number of the question a token belongs to
        offsets      [batch, Q] place of a token in its question
        context_rows, question_rows   flat indices of the rows to return

        Every question continues the context on its own: it starts at the position after
        the context and sees the context and itself, not the other questions.
        """
        config = self.config
        size, width = context.shape[1], questions.shape[1]
        context_tables = rope_tables(torch.arange(size), config)
        question_tables = tuple(t[:, None] for t in rope_tables(lengths[:, None] + offsets, config))

        sees_context = (torch.arange(size) < lengths[:, None])[:, None, :].expand(-1, width, -1)
        sees_own = (owners[:, :, None] == owners[:, None, :]) & (offsets[:, :, None] >= offsets[:, None, :])
        sees = torch.cat([sees_context, sees_own], -1)[:, None]
        bias = torch.zeros(sees.shape).masked_fill_(~sees, float("-inf"))

        x, y = self.embed_tokens(context), self.embed_tokens(questions)
        for layer in self.layers:
            q, k, v = layer.project(x)
            q, k, v = rotate(q, context_tables), layer.share(rotate(k, context_tables)), layer.share(v)
            x = layer.finish(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
            q, own_k, own_v = layer.project(y)
            q, own_k = rotate(q, question_tables), layer.share(rotate(own_k, question_tables))
            k, v = torch.cat([k, own_k], 2), torch.cat([v, layer.share(own_v)], 2)
            y = layer.finish(y, F.scaled_dot_product_attention(q, k, v, attn_mask=bias))
        return self.head(torch.cat([x.flatten(0, 1)[context_rows], y.flatten(0, 1)[question_rows]]))

    def _hf_names(self):
        """Our parameter name -> name in the Hugging Face file."""
        names = {}
        for name, _ in self.named_parameters():
            hf = name if name.startswith("lm_head") else "model." + name
            for part in ("q", "k", "v", "o"):
                hf = hf.replace(f".{part}_proj", f".self_attn.{part}_proj")
            for part in ("gate", "up", "down"):
                hf = hf.replace(f".{part}_proj", f".mlp.{part}_proj")
            names[name] = hf if hf.endswith(".weight") else hf + ".weight"
        return names

    def save(self, folder):
        """Write config.json and model.safetensors; a reader never sees a half-written file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = self._hf_names()
        tensors = {names[n]: p.detach().contiguous() for n, p in self.named_parameters()}
        save_file(tensors, folder / "model.safetensors.tmp", metadata={"format": "pt"})
        (folder / "model.safetensors.tmp").chmod(0o644)
        (folder / "config.json.tmp").write_text(json.dumps(self.config.to_hf(), indent=2) + "\n")
        for name in ("model.safetensors", "config.json"):
            os.replace(folder / (name + ".tmp"), folder / name)

    @staticmethod
    def load(folder):
        folder = Path(folder)
        model = Llama(Config.from_hf(json.loads((folder / "config.json").read_text())))
        tensors = load_file(folder / "model.safetensors")
        model.load_state_dict({ours: tensors[hf] for ours, hf in model._hf_names().items()})
        return model


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    model = Llama.load(parser.parse_args().folder)
    count = sum(p.numel() for p in model.parameters())
    print(model.config, f"{count} parameters, {count * 4 / 2**20:.2f} MiB", sep="\n")


if __name__ == "__main__":
    main()
