"""The comparison with llama.cpp, on a random model where its packages are installed; no speed is asserted."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import bench_runs
from scripts.result_tables import llama_cpp_tables
from tests.compression.small_bundles import small_bundle, small_checkpoint
from tests.server.conftest import VOCAB, byte_tokenizer


@pytest.fixture
def bench() -> Any:
    for package in ("llama_cpp", "gguf"):
        pytest.importorskip(package)
    return import_module("scripts.bench_llama_cpp")


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("scripts.bench_llama_cpp", "scripts.llama_cpp_runs"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(SystemExit, match=r"no llama_cpp: pip install llama-cpp-python gguf$"):
        import_module("scripts.bench_llama_cpp")


def test_it_compares_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bench: Any) -> None:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    checkpoint = small_checkpoint(
        tmp_path / "checkpoint", vocab_size=VOCAB, head_dim=32, max_position_embeddings=512, **sizes
    )
    byte_tokenizer().save_pretrained(checkpoint)
    bundle = small_bundle(tmp_path / "bundle", checkpoint).path
    monkeypatch.setattr(bench_runs, "packaged_bundle", lambda: bundle)
    monkeypatch.setattr(bench, "checkpoint", lambda: checkpoint)
    bench.main(tmp_path / "out.json", prompt_tokens=8, new_tokens=6, repeats=1, streams=2)
    record = json.loads((tmp_path / "out.json").read_text())
    assert len(record["results"]) == 18
    assert record["texts"]["llama.cpp F32, KV F32"] == {"tokens_equal": 1.0, "equal_before_first_other": 6.0}
    assert record["llama_cpp"]["modes"]["Q4_0, KV F16"]["tensors"] == {"Q4_0": 30, "F32": 9}
    speeds, texts = llama_cpp_tables(record)
    assert speeds.count("\n") == 19
    assert texts.count("\n") == 11


def test_queries_keep_their_products_in_the_other_order(bench: Any) -> None:
    """Turned by halves, or turned by neighbours in the other order: the same numbers in other places."""
    from scripts.gguf_file import rotary_pairs

    heads, dim, hidden = 3, 8, 5
    weight, x = torch.randn(heads * dim, hidden), torch.randn(hidden)
    angles = torch.randn(dim // 2)
    first, second = (weight @ x).view(heads, 2, dim // 2).unbind(1)
    by_halves = torch.polar(torch.ones(dim // 2), angles) * torch.complex(first, second)
    neighbours = (rotary_pairs(weight, heads) @ x).view(heads, dim // 2, 2)
    by_neighbours = torch.polar(torch.ones(dim // 2), angles) * torch.view_as_complex(neighbours)
    torch.testing.assert_close(by_neighbours, by_halves)


def test_texts_are_compared_place_by_place(bench: Any) -> None:
    wanted = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert bench.equal_share([[1, 2, 0, 4], [5, 6, 7, 8]], wanted) == 7 / 8
    assert [bench.equal_before([1, 2, 0, 4], wanted[0]), bench.equal_before(wanted[1], wanted[1])] == [2, 4]
