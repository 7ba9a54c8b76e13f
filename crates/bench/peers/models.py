"""Random-weight models at true shapes, the same weights for every peer.

The logits of two peers are compared, so the weights are drawn so that a wrong shape, rotation or bias shows:
activations stay near 1, scores of attention too, and biases are not small.
"""

import os
from pathlib import Path

import numpy as np

SEED = 4
# Raise when other weights are drawn, so that files of the old ones are not taken for the new.
RECIPE = 1
# Both models are published for less; longer contexts are timed too, and time does not depend on what was trained.
MAX_POSITIONS = 32768

SHAPES = {
    "smollm2-135m": dict(
        family="llama", hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, vocab_size=49152, rope_theta=100000.0, rms_norm_eps=1e-5),
    "qwen2.5-0.5b": dict(
        family="qwen2", hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, head_dim=64, vocab_size=151936, rope_theta=1000000.0, rms_norm_eps=1e-6),
}


def tensors(shape):
    """(name in transformers, name in GGUF, size) of every tensor. The output head is the embedding table."""
    s = SHAPES[shape]
    hidden, inner = s["hidden_size"], s["intermediate_size"]
    queries, keys = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    projections = {"q": queries, "k": keys, "v": keys}
    yield "model.embed_tokens.weight", "token_embd.weight", (s["vocab_size"], hidden)
    for i in range(s["num_hidden_layers"]):
        layer, block = f"model.layers.{i}", f"blk.{i}"
        yield f"{layer}.input_layernorm.weight", f"{block}.attn_norm.weight", (hidden,)
        for name, width in projections.items():
            yield f"{layer}.self_attn.{name}_proj.weight", f"{block}.attn_{name}.weight", (width, hidden)
            if s["family"] == "qwen2":
                yield f"{layer}.self_attn.{name}_proj.bias", f"{block}.attn_{name}.bias", (width,)
        yield f"{layer}.self_attn.o_proj.weight", f"{block}.attn_output.weight", (hidden, queries)
        yield f"{layer}.post_attention_layernorm.weight", f"{block}.ffn_norm.weight", (hidden,)
        yield f"{layer}.mlp.gate_proj.weight", f"{block}.ffn_gate.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", f"{block}.ffn_up.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", f"{block}.ffn_down.weight", (hidden, inner)
    yield "model.norm.weight", "output_norm.weight", (hidden,)


def draw(index, name, size):
    """The values of the tensor at this place in `tensors`, in f32."""
    if "norm" in name:
        return np.ones(size, np.float32)
    values = np.random.default_rng([SEED, index]).standard_normal(size, np.float32)
    return values * np.float32(size[-1] ** -0.5 if len(size) == 2 else 0.5)


def token_ids(shape, count):
    """The first ids of one fixed stream; every peer and every run reads the same."""
    return np.random.default_rng([SEED, RECIPE]).integers(0, SHAPES[shape]["vocab_size"], MAX_POSITIONS)[:count]


def gguf_file(folder, shape, dtype):
    """The path of the shape's GGUF file, which is written where it is missing."""
    path = Path(folder) / f"{shape}-{dtype}-r{RECIPE}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        try:
            _write_gguf(unfinished, shape, dtype)
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path


def _write_gguf(path, shape, dtype):
    import gguf
    s = SHAPES[shape]
    kind = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16,
            "bf16": gguf.GGMLQuantizationType.BF16}[dtype]
    writer = gguf.GGUFWriter(path, s["family"])
    writer.add_context_length(MAX_POSITIONS)
    writer.add_embedding_length(s["hidden_size"])
    writer.add_block_count(s["num_hidden_layers"])
    writer.add_feed_forward_length(s["intermediate_size"])
    writer.add_head_count(s["num_attention_heads"])
    writer.add_head_count_kv(s["num_key_value_heads"])
    writer.add_rope_dimension_count(s["head_dim"])
    writer.add_rope_freq_base(s["rope_theta"])
    writer.add_layer_norm_rms_eps(s["rms_norm_eps"])
    writer.add_vocab_size(s["vocab_size"])
    writer.add_tokenizer_model("none")

    # Vectors stay f32, as llama.cpp's own converter leaves them.
    kinds = {target: kind if len(size) == 2 else gguf.GGMLQuantizationType.F32
             for _, target, size in tensors(shape)}
    for _, target, size in tensors(shape):
        quantized = kinds[target]
        stored = {"F32": np.float32, "F16": np.float16, "BF16": np.uint8}[quantized.name]
        size = gguf.quant_shape_to_byte_shape(size, quantized) if stored is np.uint8 else size
        length = int(np.prod(size)) * np.dtype(stored).itemsize
        writer.add_tensor_info(target, size, np.dtype(stored), length,
                               raw_dtype=quantized if stored is np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for index, (name, target, size) in enumerate(tensors(shape)):
        values = draw(index, name, size)
        if s["family"] == "llama" and (".q_proj" in name or ".k_proj" in name):
            values = _interleave(values, s["head_dim"])
        writer.write_tensor_data(gguf.quants.quantize(values, kinds[target]))
    writer.close()


def _interleave(rows, head_dim):
    """llama.cpp rotates neighbouring rows of a Llama head, transformers rows that are half a head apart."""
    heads = rows.shape[0] // head_dim
    return rows.reshape(heads, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(rows.shape).copy()
