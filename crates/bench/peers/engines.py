"""The peers themselves: a process that holds one peer with one model, and answers requests about it.

Started by peers.py as `engines.py FOLDER SHAPE PEER DTYPE FLASH`. A process each, because peak memory is counted by
process, and because two OpenMP runtimes in one process would share its threads.
"""

import ctypes
import json
import os
import resource
import sys
import time

import numpy as np

import models


class Torch:
    """transformers on PyTorch, with scaled dot-product attention, as a user would run it on a CPU."""

    def __init__(self, _folder, shape, dtype, _flash):
        import torch
        import transformers

        self.torch, self.cache_class = torch, transformers.DynamicCache
        classes = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
                   "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM)}
        self.library_rss_bytes = status_bytes("VmRSS")
        fields = dict(models.SHAPES[shape])
        make_config, make_model = classes[fields.pop("family")]
        rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
        config = make_config(
            **fields, rope_parameters=rope, tie_word_embeddings=True, max_position_embeddings=models.MAX_POSITIONS,
            attn_implementation="sdpa", dtype={"f32": torch.float32, "bf16": torch.bfloat16}[dtype])
        with torch.device("meta"):
            model = make_model(config)
        rotary = type(model.model.rotary_emb)(config)
        model = model.to_empty(device="cpu").to(config.dtype).eval()
        # Frequencies are computed, not loaded, and to_empty has emptied them.
        model.model.rotary_emb = rotary
        model.tie_weights()
        slots = dict(model.named_parameters())
        with torch.no_grad():
            for index, (name, _, size) in enumerate(models.tensors(shape)):
                slots.pop(name).copy_(torch.from_numpy(models.draw(index, name, size)))
        assert not slots, f"not drawn: {sorted(slots)}"
        assert model.config._attn_implementation == "sdpa"
        self.model, self.length = model, 0
        self.version = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
        self.features = torch.backends.cpu.get_cpu_capability()

    def prepare(self, _room, threads, _ubatch):
        self.torch.set_num_threads(threads)

    def clear(self):
        self.cache, self.length = None, 0

    def read(self, ids):
        """Logits of the last of these tokens, which go behind what is in the cache."""
        torch = self.torch
        with torch.inference_mode():
            if self.length == 0:
                self.cache = self.cache_class(config=self.model.config)
            out = self.model(input_ids=torch.from_numpy(ids)[None], cache=self.cache, use_cache=True,
                             logits_to_keep=1)
        self.length += len(ids)
        return out.logits[0, -1].float().numpy()

    def drop(self, count):
        with self.torch.inference_mode():
            self.cache.crop(-count)
        self.length -= count


class LlamaCpp:
    """llama.cpp through its C interface, because llama-cpp-python's own class copies logits in Python."""

    def __init__(self, folder, shape, dtype, flash):
        import llama_cpp

        self.lib, self.vocab = llama_cpp, models.SHAPES[shape]["vocab_size"]
        self.library_rss_bytes = status_bytes("VmRSS")
        # Errors only; the callback must outlive the library's use of it.
        self.log = llama_cpp.llama_log_callback(
            lambda level, text, _: sys.stderr.write(text.decode(errors="replace")) if level == 4 else None)
        llama_cpp.llama_log_set(self.log, None)
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        path = models.gguf_file(folder, shape, dtype)
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}; remove it, it is written again")
        self.flash = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED if flash else llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        # Its flash attention reads f16: from an f32 cache it converts everything in every step, for the same logits.
        exact = dtype == "f32" and not flash
        self.kv_type = llama_cpp.GGML_TYPE_F32 if exact else llama_cpp.GGML_TYPE_F16
        self.context, self.made_for, self.length = None, None, 0
        self.version = f"llama-cpp-python {llama_cpp.__version__}, ggml {_ggml(llama_cpp)}"
        self.features = llama_cpp.llama_print_system_info().decode().strip(" |\n")

    def prepare(self, room, threads, ubatch):
        """A context that holds `room` tokens; it is kept, with what is in it, while nothing else is asked for."""
        lib = self.lib
        if self.made_for != (room, ubatch):
            if self.context:
                lib.llama_free(self.context)
            params = lib.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch = room, room, min(ubatch, room)
            params.n_outputs_max = 1
            params.flash_attn_type = self.flash
            params.type_k = params.type_v = self.kv_type
            self.context, self.length = lib.llama_init_from_model(self.model, params), 0
            if not self.context:
                raise RuntimeError(f"llama.cpp cannot make a context of {room} tokens")
            self.made_for = (room, ubatch)
        lib.llama_set_n_threads(self.context, threads, threads)

    def clear(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)
        self.length = 0

    def read(self, ids):
        """As `Torch.read`."""
        tokens = (self.lib.llama_token * len(ids)).from_buffer_copy(ids.astype("int32"))
        status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode answered {status}")
        self.length += len(ids)
        # Waits until they are there.
        logits = self.lib.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, (self.vocab,))

    def drop(self, count):
        kept = self.lib.llama_get_memory(self.context)
        if not self.lib.llama_memory_seq_rm(kept, 0, self.length - count, -1):
            raise RuntimeError("llama.cpp did not drop the tokens")
        self.length -= count


def _ggml(llama_cpp):
    """Version and commit of the ggml that was compiled, as far as it tells."""
    try:
        lib = ctypes.CDLL(str(llama_cpp.llama_cpp._base_path / "libggml-base.so"))
        lib.ggml_version.restype = lib.ggml_commit.restype = ctypes.c_char_p
        return f"{lib.ggml_version().decode()} ({lib.ggml_commit().decode()})"
    except (OSError, AttributeError):
        return "unknown"


ENGINES = {"torch": Torch, "llama.cpp": LlamaCpp}


class Measured:
    """Wall time, CPU time, peak memory, and what other processes took from the cores, of a `with` block."""

    def __enter__(self):
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        self.busy, self.cpu, self.start = _busy(), _cpu(), time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.start
        self.cpu_seconds = _cpu() - self.cpu
        self.others_cpus = max(0.0, (_busy() - self.busy - self.cpu_seconds) / self.seconds)
        self.peak_rss_bytes = status_bytes("VmHWM")


def status_bytes(name):
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _busy():
    """CPU seconds of all processes and of the hypervisor's other guests (user nice system . . irq softirq steal)."""
    with open("/proc/stat") as stat:
        fields = [int(field) for field in stat.readline().split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def answer(engine, shape, request):
    """One request, checked by peers.py, against a loaded engine."""
    op, tokens, steps = request["op"], request["tokens"], request["steps"]
    ids = models.token_ids(shape, tokens + steps)
    engine.prepare(_padded(tokens + max(steps, 128)), request["threads"], request["ubatch"])
    if op == "logits":
        prompt = ids[:tokens]
        if request["reversed"]:
            prompt = np.concatenate([prompt[-2::-1], prompt[-1:]])
        engine.clear()
        logits = engine.read(prompt).tolist()
        engine.clear()
        return {"logits": logits}
    if op == "prefill":
        engine.clear()
        with Measured() as measured:
            engine.read(ids[:tokens])
        rate = tokens / measured.seconds
    else:
        if engine.length != tokens:
            engine.clear()
            engine.read(ids[:tokens])
        with Measured() as measured:
            for at in range(tokens, tokens + steps):
                engine.read(ids[at:at + 1])
        engine.drop(steps)
        rate = steps / measured.seconds
    return {
        "seconds": measured.seconds,
        "tokens_per_second": rate,
        "cpu_seconds": measured.cpu_seconds,
        "others_cpus": measured.others_cpus,
        "peak_rss_bytes": measured.peak_rss_bytes,
        "library_rss_bytes": engine.library_rss_bytes,
        "peer_version": engine.version,
        "features": engine.features,
    }


def _padded(tokens):
    return -(-tokens // 256) * 256


def main():
    # Answers only: whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    folder, shape, peer, dtype, flash = sys.argv[1:]
    engine = ENGINES[peer](folder, shape, dtype, flash == "True")
    for line in sys.stdin:
        try:
            reply = answer(engine, shape, json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers)


if __name__ == "__main__":
    main()
