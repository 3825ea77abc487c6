"""Timed generations by llama.cpp, called as a library through the package `llama-cpp-python`, which this needs."""

import ctypes
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import llama_cpp
import numpy as np
import torch

from exeunt.deploy.bench_load import BenchError
from scripts.bench_runs import Prompts, Run
from scripts.gguf_file import tensor_types, write_gguf

_TOLD: Final = ("flash_attn ", "flash attention", "model buffer", "kv buffer")  # kept of what loading says

_said: list[str] = []


@dataclass(frozen=True, slots=True)
class LlamaCppMode:
    """In what llama.cpp holds weights, and keys and values; its default is flash attention."""

    weights: str  # as llama.cpp calls its types: F32, F16, Q4_0
    keys_values: str
    flash_attention: bool = True

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{self.weights}, KV {self.keys_values}" + (
            "" if self.flash_attention else ", no flash attention"
        )


class LlamaCppFiles:
    """The checkpoint's GGUF files in a folder, each made when it is first asked for."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        llama_cpp.llama_log_set(_ON_LOG, None)
        llama_cpp.llama_backend_init()
        self._folder = folder
        write_gguf(checkpoint, self._path("F32"))

    def of(self, weights: str) -> Path:
        """The file whose matrices, the embedding's too, are of that type; norms stay in float32."""
        path = self._path(weights)
        if not path.exists():
            params = llama_cpp.llama_model_quantize_default_params()
            params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{weights}")
            params.pure = True
            params.nthread = torch.get_num_threads()
            paths = (str(each).encode() for each in (self._path("F32"), path))
            if llama_cpp.llama_model_quantize(*paths, ctypes.byref(params)):
                raise BenchError(f"llama.cpp could not quantise the model to {weights}.")
        return path

    def _path(self, weights: str) -> Path:
        return self._folder / f"{weights}.gguf"


class LlamaCppRuns:
    """One mode of llama.cpp, greedy, end-of-text ignored, as many threads as PyTorch has.

    All prompts go through one call, then one call makes the next token of every stream; no server is around it.
    """

    def __init__(
        self, files: LlamaCppFiles, mode: LlamaCppMode, streams: int, prompt_tokens: int, new_tokens: int
    ) -> None:
        """Room for `streams` sequences of `prompt_tokens` and `new_tokens`. Raises BenchError."""
        self._file, self._new_tokens = files.of(mode.weights), new_tokens
        _said.clear()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(self._file).encode(), params)
        if not self._model:
            raise BenchError(f"llama.cpp could not load {mode.name}: {''.join(_said[-3:])}")
        self._context = llama_cpp.llama_init_from_model(
            self._model, _context_params(mode, streams, prompt_tokens, new_tokens)
        )
        if not self._context:
            raise BenchError(f"llama.cpp could not run {mode.name}: {''.join(_said[-3:])}")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._prompts, self._step = _Batch(streams, prompt_tokens), _Batch(streams, 1)
        self._loading = [line for line in _said if any(told in line.lower() for told in _TOLD)]

    def close(self) -> None:
        """Give the memory back."""
        for batch in (self._prompts, self._step):
            llama_cpp.llama_batch_free(batch.raw)
        llama_cpp.llama_free(self._context)
        llama_cpp.llama_model_free(self._model)

    def about(self) -> Mapping[str, Any]:
        """The types of its tensors, and what llama.cpp said of attention and of buffers while it loaded."""
        return {
            "tensors": tensor_types(self._file),
            "threads": llama_cpp.llama_n_threads(self._context),
            "batch_tokens": llama_cpp.llama_n_ubatch(self._context),
            "said": [line.strip() for line in self._loading],
        }

    def at_once(self, prompts: Prompts) -> Run:
        """Read all prompts, then make every stream's tokens, step by step, until the last."""
        began = time.perf_counter()
        llama_cpp.llama_memory_clear(self._memory, False)
        self._prompts.tokens[:] = prompts
        answers = np.empty((len(prompts), self._new_tokens), dtype=np.int32)
        batch = self._prompts
        for place in range(self._new_tokens):
            if llama_cpp.llama_decode(self._context, batch.raw):
                raise BenchError("llama.cpp could not compute a batch.")
            answers[:, place] = self._top_tokens(len(prompts))
            batch = self._step
            batch.tokens[:, 0] = answers[:, place]
            batch.positions[:] = self._prompts.tokens.shape[1] + place
        return Run(answers.size, time.perf_counter() - began, answers=answers.tolist())

    def _top_tokens(self, streams: int) -> Any:
        """[streams] where the logits are largest; NumPy finds it sooner than a `llama_sampler`, which copies them."""
        logits = llama_cpp.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (streams, self._vocab)).argmax(axis=1)


class _Batch:
    """The next `tokens` of each of `streams` sequences, whose last ask for logits; filled in where it stands."""

    def __init__(self, streams: int, tokens: int) -> None:
        count = streams * tokens
        self.raw: Any = llama_cpp.llama_batch_init(count, 0, 1)
        self.raw.n_tokens = count
        self.tokens = np.ctypeslib.as_array(self.raw.token, (streams, tokens))
        self.positions = np.ctypeslib.as_array(self.raw.pos, (streams, tokens))
        self.positions[:] = np.arange(tokens)
        np.ctypeslib.as_array(self.raw.n_seq_id, (count,))[:] = 1
        np.ctypeslib.as_array(self.raw.logits, (streams, tokens))[:] = np.arange(tokens) == tokens - 1
        for place in range(count):
            self.raw.seq_id[place][0] = place // tokens


def system_info() -> str:
    """What llama.cpp was compiled for and uses of the processor."""
    text: bytes = llama_cpp.llama_print_system_info()
    return text.decode().strip(" |\n")


def _context_params(mode: LlamaCppMode, streams: int, prompt_tokens: int, new_tokens: int) -> Any:
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = streams * (prompt_tokens + new_tokens)
    params.n_batch = streams * prompt_tokens
    params.n_seq_max = streams
    params.n_threads = params.n_threads_batch = torch.get_num_threads()
    params.type_k = params.type_v = getattr(llama_cpp, f"GGML_TYPE_{mode.keys_values}")
    if not mode.flash_attention:
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return params


def _on_log(_level: int, text: bytes, _data: object) -> None:
    _said.append(text.decode(errors="replace"))


_ON_LOG: Final = llama_cpp.llama_log_callback(_on_log)  # must live as long as llama.cpp may call it
