#!/usr/bin/env python3
"""Recomputes the golden keys and reads the golden containers from their specification alone.

The specification is in crates/chunk/src/keys.rs and crates/chunk/src/container/mod.rs. This file shares no
code with the Rust implementation: where the two differ, one of them is wrong. Needs: pip install blake3 zstandard
"""

import json
import pathlib
import struct
import sys

import zstandard
from blake3 import blake3

HERE = pathlib.Path(__file__).parent


def frames(*fields):
    return b"".join(struct.pack("<Q", len(field)) + field for field in fields)


def derive(context, *fields):
    return blake3(frames(*fields), derive_key_context=context).hexdigest()


def u32(*values):
    return struct.pack(f"<{len(values)}I", *values)


def f64(value):
    return struct.pack("<d", value)


def unhex(text):
    return bytes.fromhex(text) if text else b""


def layout_id(spec, key_spec):
    scaling = b""
    if spec["scaling"]:
        it = spec["scaling"]
        scaling = b"llama3" + f64(it["factor"]) + f64(it["low_freq_factor"]) + f64(it["high_freq_factor"])
        scaling += u32(it["original_max_position"])
    return derive(
        "cacheclip.v1 layout id",
        u32(key_spec),
        unhex(spec["weights"]),
        unhex(spec["adapter"]),
        unhex(spec["tokenizer"]),
        f64(spec["theta"]),
        scaling,
        u32(spec["layers"]),
        u32(spec["kv_heads"]),
        u32(spec["head_dim"]),
        spec["dtype"].encode(),
    )


def scope_id(it):
    fields = (b"cacheclip.v1 scope id", u32(it["key_id"]), it["kind"].encode(), it["name"].encode(), it["salt"].encode())
    return blake3(frames(*fields), key=unhex(it["key"])).hexdigest()


def check_keys(golden):
    def same(what, made, published):
        assert made == published, f"{what}: made {made}, published {published}"

    for it in golden["layouts"]:
        same("layout", layout_id(it, golden["key_spec"]), it["id"])
    for it in golden["anchors"]:
        same("anchor", derive("cacheclip.v1 anchor id", unhex(it["layout"]), u32(*it["ids"])), it["id"])
    for it in golden["scopes"]:
        same("scope", scope_id(it), it["id"])
    for it in golden["chunk_keys"]:
        fields = (unhex(it["layout"]), unhex(it["anchor"]), unhex(it["scope"]), u32(*it["ids"]))
        same("chunk key", derive("cacheclip.v1 chunk key", *fields), it["key"])
    for it in golden["text_digests"]:
        made = derive("cacheclip.v1 text digest", unhex(it["scope"]), it["text"].encode())
        same("text digest", made, it["digest"])
    for it in golden["documents"]:
        made = derive("cacheclip.v1 document id", unhex(it["scope"]), it["name"].encode())
        same("document", made, it["id"])


def align(offset):
    return (offset + 4095) // 4096 * 4096


def read_container(data):
    """Header fields and the decoded segments; every byte of the file is checked."""
    magic, version, header_len, entry_len, dtype, key_spec, count = struct.unpack_from("<8s4H2I", data)
    layers, kv_heads, head_dim, tokens, length = struct.unpack_from("<4IQ", data, 24)
    assert magic == b"\x89CCKV\r\n\x1a" and version == 1 and (header_len, entry_len) == (128, 64)
    assert key_spec == 1 and length == len(data)
    head = data[: 128 + 64 * count]
    assert data[112:128] == blake3(head[:112] + head[128:]).digest()[:16], "check of the head"
    size = {1: 4, 2: 2, 3: 2}[dtype]
    raw_lens = {1: 2 * kv_heads * tokens * head_dim * size, 2: 8 * tokens, 3: 2 + tokens, 4: 4 * tokens}
    element = {1: size, 2: 4, 3: 1, 4: 4}
    end, segments = len(head), []
    for index in range(count):
        kind, codec, layer, offset, stored_len, raw_len = struct.unpack_from("<2HI3Q", head, 128 + 64 * index)
        digest = head[128 + 64 * index + 32 :][:32]
        assert offset == align(end) and not any(data[end:offset]), "padding"
        assert layer == (index if index < layers else 0) and (kind == 1) == (index < layers)
        assert raw_len == raw_lens[kind]
        stored, end = data[offset : offset + stored_len], offset + stored_len
        assert blake3(stored).digest() == digest, f"digest of segment {index}"
        if codec == 1:
            planes = zstandard.ZstdDecompressor().decompress(stored, max_output_size=raw_len)
            elements = raw_len // element[kind]
            stored = b"".join(bytes(planes[i::elements]) for i in range(elements))
        assert len(stored) == raw_len
        segments.append((kind, stored))
    assert end == length
    return data[48:80].hex(), data[80:112].hex(), blake3(head).hexdigest(), tokens, segments


def check_containers(golden):
    for it in golden:
        layout, key, digest, tokens, segments = read_container((HERE / it["file"]).read_bytes())
        assert (layout, key, digest, tokens) == (it["layout"], it["key"], it["hash"], it["tokens"]), it["file"]
        assert [blake3(raw).hexdigest() for kind, raw in segments if kind == 1] == it["layers_blake3"]
        optional = {kind: raw for kind, raw in segments if kind != 1}
        spans, rank, ids = (optional.get(kind) for kind in (2, 3, 4))
        assert it["spans"] == (spans and [list(span) for span in struct.iter_unpack("<2I", spans)])
        assert it["ranks"] == (rank and list(rank[2:]))
        assert rank is None or struct.unpack_from("<H", rank)[0] == it["rank_version"]
        assert it["ids"] == (ids and [word for (word,) in struct.iter_unpack("<I", ids)])


def main():
    check_keys(json.loads((HERE / "keys.json").read_text()))
    check_containers(json.loads((HERE / "containers.json").read_text()))
    print("golden keys and containers agree with their specification")


if __name__ == "__main__":
    sys.exit(main())
