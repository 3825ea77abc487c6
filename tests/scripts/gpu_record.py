"""Records of the GPU check for tests: a small one of round figures, and one that the script left at toy sizes."""

import json
from pathlib import Path
from typing import Any

_TOY = Path(__file__).with_name("toy_gpu_check.json")
_COPY, _READ = 4e12, 5e12


def toy_record() -> dict[str, Any]:
    """What the script left with `--device cpu --quick` and all sections named; answers and the like are cut out."""
    found: dict[str, Any] = json.loads(_TOY.read_text(encoding="utf-8"))
    return found


def gpu_record() -> dict[str, Any]:
    """Every section that a GPU's run writes, at round figures: a fastest read of 5 TB/s, a copy of 4."""
    return {
        "started": "2026-01-02T03:04:05",
        "seconds_given": 460.0,
        "quick": False,
        "metrics": "counted",
        "checks": [
            {"name": "text against PyTorch", "good": True, "tokens": 64, "chosen_alike": 63}
            | {"worst_margin": 0.1, "tolerance": 0.25},
            {"name": "logits against PyTorch", "good": True, "error": 0.01, "tolerance": 0.05},
            {"name": "rows to the bit", "good": True, "compared": 6, "differ": {}, "left_out": ["one"]},
            {"name": "a kernel runs", "good": False, "error": "RuntimeError: a | b"},
            {"name": "tests on the device", "good": True, "passed": 4, "failed": 0, "skipped": 1},
        ],
        "sections": {
            "machine": _machine(),
            "memory": {"status": "done", "mistral-7b": _kv(3.71), "llama-1.1b": _kv(3.46)},
            "decode": {"status": "done", "steps": _steps()},
            "kernels": {"status": "done", "cases": [*_linears(), *_attention(), *_others()]},
            "end_to_end": {"status": "done", "packaged": _packaged(), "mistral-7b": _random()},
            "long_contexts": _long(),
            "grid": _grid(),
            "exits": _exits(),
            "host": {"off, 16 streams": {"us": 1000.0, "functions": {"server.runner: Runner.run": 400.0}}},
            "compiled": {"status": "done", "packaged": _compiled()},
            "tuning": {
                "calls": 4,
                "tried": 2,
                "faster": 1,
                "search_seconds": 40.0,
                "failed": [],
                "unequal": [],
            }
            | {"launches": [{"speed_up": 1.0}, {"speed_up": 1.25}]},
            "tests": {"status": "needs", "needs": ["pytest"]},
        },
    }


def _machine() -> dict[str, Any]:
    return {
        "status": "done",
        "device": "cuda",
        "python": "3.12.3",
        "exeunt": "0.1.0",
        "torch": "2.11.0",
        "triton": "3.6.0",
        "transformers": "5.17.0",
        "cuda": "13.0",
        "driver": "580.1",
        "gpu": "NVIDIA B1",
        "multiprocessors": 100,
        "memory_bytes": 80_000_000_000,
        "commit": "0123456789abcdef",
        "changed": True,
        "kernels": "fedcba",
        "linear_kernels": "abcdef",
        "int4_group_size": 32,
        "matmul_bf16_flop_per_s": 7e14,
        "copy_bytes_per_s": _COPY,
        "read_bytes_per_s": _READ,
        "seconds": 0.6,
    }


def _kv(ratio: float) -> dict[str, Any]:
    return {
        "context": 4096,
        "full_bytes_per_token": 4000,
        "int4_bytes_per_token": 1000,
        "sequences_in_the_same_memory": ratio,
        "wanted": 3.5,
    }


def _steps() -> list[dict[str, Any]]:
    """Full weights at 3.2 TB/s in 4 ms, INT4 at 2 TB/s in 2 ms; a token's keys and values take 4 and 1 kB."""
    return [
        {
            "model": "mistral-7b",
            "weights": kind,
            "kv": kind,
            "sequences": sequences,
            "context": context,
            "ms": ms,
            "tokens_per_s": 1e3 * sequences / ms,
            "bytes": ms / 1e3 * rate + token * sequences * (context - 512),
            "bytes_per_s": rate,
            "eager_ms": 20.0,
        }
        for kind, ms, rate, token in (("full", 4.0, 3.2e12, 4000), ("int4", 2.0, 2e12, 1000))
        for sequences, context in ((1, 512), (16, 512), (16, 4096))
    ]


def _linears() -> list[dict[str, Any]]:
    """INT4 in 10 µs, full weights in 20, PyTorch in 16; freely chosen, INT4 of one layer in 8."""
    return [
        {
            "op": "int4_linear",
            "layer": f"mistral-7b {part}",
            "rows": rows,
            "us": 10.0,
            "bytes_per_s": 2.5e12,
            "full_linear": {"us": 20.0, "bytes_per_s": 4e12},
            "torch": {"us": 16.0, "bytes_per_s": 4.5e12},
            **({"int4_free": {"us": 8.0}} if part == "gate_up" and rows == 1 else {}),
        }
        for rows in (1, 64)
        for part in ("gate_up", "out", "down", "qkv", "head")
    ]


def _attention() -> list[dict[str, Any]]:
    return [
        {"op": "paged_attention", "kv": kv, "sequences": sequences, "context": context, "us": us}
        | {"bytes_per_s": 1e12}
        | ({"sdpa": {"us": 9.0, "bytes_per_s": 2e12}} if kv == "full" else {})
        for sequences, context in ((1, 512), (1, 16384), (16, 16384))
        for kv, us in (("full", 10.0), ("int4", 4.0))
    ]


def _others() -> list[dict[str, Any]]:
    draw = {"us": 8.0, "softmax and multinomial": {"us": 50.0}}
    return [
        {"op": "write_kv", "kv": "full", "tokens": 1, "us": 1.0},
        {"op": "write_kv", "kv": "int4", "tokens": 1, "us": 2.0},
        {"op": "rms_norm", "rows": 64, "size": 4096, "us": 3.21, "torch": {"us": 6.0}},
        {"op": "turn_and_write_kv", "kv": "int4", "tokens": 1, "us": 4.0},
        {"op": "gated_linear", "rows": 1, "us": 28.0, "full": {"us": 60.0}, "torch": {"us": 59.0}},
        {"op": "draw_tokens", "rows": 16, "vocab": 32000, **draw},
        {"op": "exit_gate", "rows": 1, "error": "RuntimeError: no"},
    ]


def load(tokens_per_s: float, decode: float | None = None, **more: Any) -> dict[str, Any]:
    """An engine's load of 1000 tokens, `decode` tokens per second from the last prompt on."""
    return {
        "tokens_per_s": tokens_per_s,
        "seconds": 1000 / tokens_per_s,
        "decode_tokens_per_s": decode or 2 * tokens_per_s,
        "exit_rate": 0.0,
        "drafts": 0,
        "drafts_accepted": 0,
        "kv_bytes_per_sequence": 2e6,
        "kv_bytes_by_layout": 1.9e6,
        "device_bytes_at_most": 3_000_000_000,
        **more,
    }


def _packaged() -> dict[str, Any]:
    tried = {"attention": "paged|sdpa", "use_cuda_graph": [False, True], "use_async_batching": False}
    own = {"tokens_per_s": 500.0, **tried}
    return {
        "gates": "calibrated",
        "engine int4/int4, 1 streams": load(100),
        "engine int4/int4 verified, 1 streams": load(120, drafts=500, drafts_accepted=300),
        "engine int4/int4, 64 streams": load(2000),
        "transformers generate_batch, 64 streams": {
            "tokens_per_s": 500.0,
            "tries": {"its own choice": own, "graphs asked for": {"error": "no"}},
            "chosen": "its own choice",
        },
        "transformers generate, 64 streams": {
            "tokens_per_s": 800.0,
            "seconds": 4.0,
            "forward_loop": {"seconds": 3.0, "tokens_per_s": 900.0},
        },
    }


def _random() -> dict[str, Any]:
    """Half of the tokens leave half-way: the skipped blocks alone would make it 4/3 times as fast."""
    return {
        "gates": "synthetic, after block 15 of 32",
        "wanted_exit_rate": 0.5,
        "engine full/full, 1 streams": load(200),
        "engine int4/int4, 16 streams": load(1000, 3000),
        "engine int4/int4 exits at 0.5 (synthetic), 16 streams": load(1100, 3600, exit_rate=0.5),
        "engine int4/int4 backfilled exits at 0.5 (synthetic), 16 streams": load(900, exit_rate=0.5),
        "skipped": ["engine full/full, 64 streams: no room"],
        "broken": {"transformers on mistral-7b": "RuntimeError: no"},
    }


def _grid() -> dict[str, Any]:
    """Two numbers of streams in one context."""
    speed = {"tokens_per_s": 100.0, "decode_tokens_per_s": 120.0, "exit_rate": 0.5}
    loads = {f"engine int4/int4 exits at 0.5 (synthetic), {streams} streams": speed for streams in (64, 1)}
    of_model = {"gates": "synthetic, after block 15 of 32", "wanted_exit_rate": 0.5}
    return {
        "status": "done",
        "engine mistral-7b": of_model,
        "mistral-7b, contexts of 512": {"prompt": 512, "answer": 32, **loads},
        "compiled": {"skipped": ["compiled: no time left"]},
    }


def _long() -> dict[str, Any]:
    gates = {"gates": "synthetic, after block 15 of 32"}
    return {
        "status": "done",
        **gates,
        "wanted_exit_rate": 0.5,
        "mistral-7b, contexts of 4096": {
            "prompt": 4096,
            "answer": 32,
            **gates,
            "engine int4/int4, 4 streams": load(80.2, 300),
            "transformers generate, 4 streams": {"tokens_per_s": 9.0},
        },
        "mistral-7b, contexts of 16384": {"transformers generate, 2 streams": {"tokens_per_s": 3.0}},
    }


def _exits() -> dict[str, Any]:
    return {
        "status": "done",
        "gates": "synthetic, after block 15 of 32",
        "contexts of 256, queues": {
            "engine off, 16 streams": load(1000),
            "engine propagate, 16 streams": load(700, exit_rate=0.5),
            "engine backfill, 16 streams": load(600, exit_rate=0.5),
        },
    }


def _compiled() -> dict[str, Any]:
    return {
        "transformers generate compiled, 1 streams": {"tokens_per_s": 321.0},
        "transformers generate compiled, 64 streams": {"error": "not done in 30 s"},
    }
