"""What a pass through a whole model does not take, and says so."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import exeunt.kernels.model_pass.native
from exeunt.compression.decoder import Decoder
from exeunt.compression.model_pass import ModelPass
from exeunt.kernels.model_pass import AtExit, PassBatch, PassRows
from exeunt.kernels.native.library import native_library
from tests.compression.staged_pass import STEP, Prepared, prepared, random_exits
from tests.compression.test_native_blocks import a_decoder

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    native_library() is None, reason="needs the native kernels (a C++ compiler, and EXEUNT_NATIVE not 0)"
)


def test_what_the_kernels_do_not_take_has_no_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    exits = random_exits(decoder)
    whole = ModelPass.of(decoder, exits)
    assert whole is not None
    made = prepared(decoder, "full", STEP, None)
    most = made.native.most_logits
    assert most == len(STEP)
    monkeypatch.setattr(exeunt.kernels.model_pass.native, "MOST_LOGITS", decoder.spec.vocab_size * most)
    assert whole.takes(made.native, made.held.pages)
    monkeypatch.setattr(exeunt.kernels.model_pass.native, "MOST_LOGITS", decoder.spec.vocab_size * most - 1)
    assert not whole.takes(made.native, made.held.pages)
    with pytest.raises(ValueError, match="room is for"):
        whole.run(made.states, made.native, made.held.pages)
    monkeypatch.undo()

    class Other(type(decoder.output)):  # type: ignore[misc] # a matrix of another kind
        pass

    decoder.let_exits_read(Other(torch.randn(decoder.spec.vocab_size, decoder.spec.hidden_size)))
    assert ModelPass.of(decoder, exits) is None
    assert ModelPass.of(decoder, ()) is not None  # nothing asks them
    monkeypatch.setattr(Decoder, "native_blocks", None)
    assert ModelPass.of(decoder, ()) is None


WRONG: list[tuple[str, str, list[int]]] = [
    ("entries", "come in", [0, 3]),
    ("entries", "come in", [0, -1]),
    ("asks", "exit to be asked", [0, 4]),
    ("asks", "exit to be asked", [0, -1]),
    ("ids", "vocabulary", [0, 1 << 20]),
    ("ids", "vocabulary", [0, -1]),
]


@pytest.mark.parametrize(("name", "message", "values"), WRONG)
def test_a_token_that_names_what_there_is_not_is_refused(
    name: str, message: str, values: list[int], tmp_path: Path
) -> None:
    whole, made, rows = _two_rows(tmp_path)
    before = made.held.pages.arena.clone()
    setattr(made.tokens, name, values)
    with pytest.raises(ValueError, match=f"2 tokens names .*{message}"):
        whole.run(made.states, PassBatch(made.tokens, rows), made.held.pages)
    assert torch.equal(made.held.pages.arena, before)


@pytest.mark.parametrize(
    ("name", "message", "values"),
    [
        ("entries", "begins", [0, 3]),
        ("entries", "begins", [-1, 0]),
        ("at_exits", "action", [AtExit.STAYS, 3]),
        ("at_exits", "action", [AtExit.STAYS, -1]),
        ("tokens", "without a token", [2, 0]),
        ("tokens", "without a token", [3, -1]),
    ],
)
def test_a_row_that_names_what_there_is_not_is_refused(
    name: str, message: str, values: list[int], tmp_path: Path
) -> None:
    whole, made, rows = _two_rows(tmp_path)
    setattr(rows, name, values)
    with pytest.raises(ValueError, match=f"2 tokens names .*{message}"):
        whole.run(made.states, PassBatch(made.tokens, rows), made.held.pages)


def _two_rows(tmp_path: Path) -> tuple[ModelPass, Prepared, PassRows]:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    whole = ModelPass.of(decoder, random_exits(decoder))
    assert whole is not None
    made = prepared(decoder, "full", STEP[:2], None)
    rows = PassRows([1, 1], [0, 0], [AtExit.STAYS] * 2, [table.numpy() for table in made.held.tables[:2]])
    return whole, made, rows


def test_positions_past_the_learned_ones_are_refused(tmp_path: Path) -> None:
    decoder = a_decoder("gpt2", tmp_path, torch.float32, False, False)
    whole = ModelPass.of(decoder, random_exits(decoder))
    assert whole is not None
    made = prepared(decoder, "full", STEP[:1], None)
    assert decoder.embedding.positions is not None
    made.tokens.positions = [len(decoder.embedding.positions)]
    rows = PassRows([1], [0], [AtExit.STAYS], [made.held.tables[0].numpy()])
    with pytest.raises(ValueError, match="position past"):
        whole.run(made.states, PassBatch(made.tokens, rows), made.held.pages)


OF_TOKENS = ("slots", "entries", "asks", "wants_logits", "ids", "thresholds", "temperatures", "keys")


@pytest.mark.parametrize("name", OF_TOKENS)
@pytest.mark.parametrize("other", ["positions", *OF_TOKENS])
def test_lists_of_different_lengths_are_no_batch(name: str, other: str, tmp_path: Path) -> None:
    _, made, rows = _two_rows(tmp_path)
    assert PassBatch(made.tokens, rows).token_count == 2
    getattr(made.tokens, name).append(0)
    if other != name:  # one too many here and one too few there add up to the same
        getattr(made.tokens, other).pop()
    with pytest.raises(ValueError, match="tokens came with"):
        PassBatch(made.tokens, rows)


@pytest.mark.parametrize(
    ("name", "other"), [("entries", "at_exits"), ("at_exits", "entries"), ("pages", None)]
)
def test_lists_of_rows_of_different_lengths_are_no_batch(
    name: str, other: str | None, tmp_path: Path
) -> None:
    _, made, rows = _two_rows(tmp_path)
    getattr(rows, name).append(getattr(rows, name)[0])
    if other is not None:
        getattr(rows, other).pop()
    with pytest.raises(ValueError, match="2 rows came with"):
        PassBatch(made.tokens, rows)


def test_tables_and_keys_of_another_kind_are_no_batch(tmp_path: Path) -> None:
    whole, made, rows = _two_rows(tmp_path)
    vocab = whole.decoder.spec.vocab_size
    for keys in (torch.zeros(vocab, dtype=torch.int64), torch.zeros(2 * vocab, dtype=torch.int32)[::2]):
        with pytest.raises(TypeError, match="token keys"):
            PassBatch(made.tokens, rows, keys)
    short = PassBatch(made.tokens, rows, torch.zeros(vocab - 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="token keys"):
        whole.run(made.states, short, made.held.pages)
    tables = rows.pages
    for wrong in (tables[0].astype("int64"), tables[0][:0]):
        rows.pages = [wrong, tables[1]]
        with pytest.raises(TypeError, match="page tables"):
            PassBatch(made.tokens, rows)


def test_more_exits_than_fit_a_number_have_no_pass(tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    exits = random_exits(decoder)
    whole = ModelPass.of(decoder, exits)
    assert whole is not None
    assert ModelPass.of(decoder, exits * 32) is None
    with pytest.raises(ValueError, match="64 exits"):
        replace(whole.native, exits=whole.native.exits * 32)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    decoder = a_decoder("llama", tmp_path, torch.float32, False, False)
    exits = random_exits(decoder)
    whole = ModelPass.of(decoder, exits)
    assert whole is not None
    made = prepared(decoder, "full", STEP, None)
    with pytest.raises(ValueError, match="hidden is"):
        whole.run(made.states[:8], made.native, made.held.pages)
    with pytest.raises(ValueError, match="hidden is"):
        whole.run(made.states.double(), made.native, made.held.pages)
    for depths, message in (((2, 2), "behind"), ((0, 2), "behind"), ((2, 99), "behind")):
        gates = tuple((depth, gate) for depth, (_, gate) in zip(depths, whole.native.exits, strict=True))
        with pytest.raises(ValueError, match=message):
            replace(whole.native, exits=gates)
    with pytest.raises(ValueError, match="a gate takes"):
        replace(whole.native, vocab=whole.native.vocab - 1)
    assert whole.native.head is not None
    with pytest.raises(ValueError, match="the head is"):
        replace(whole.native, exits=(), head=(whole.native.head[0][:-1], whole.native.head[1]))
    with pytest.raises(ValueError, match="an embedding is"):
        replace(whole.native, embedding=(decoder.embedding.tokens[:, :-1], None))


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from exeunt.compression.model_pass import ModelPass
from exeunt.kernels.model_pass import AtExit, PassBatch, PassRows, PassTokens
from tests.compression.paged_generation import Sequences
from tests.compression.test_native_blocks import a_decoder

count = 300_000
decoder = a_decoder("llama", Path(sys.argv[1]), torch.float32, False, False)
whole, held = ModelPass.of(decoder, ()), Sequences(decoder)
none, zeros = [0] * count, [0.0] * count
tokens = PassTokens([*range(count)], none, none, none, none, none, zeros, zeros, [0] * (2 * count))
batch = PassBatch(tokens, PassRows([count], [0], [AtExit.STAYS], [np.zeros(1, np.int32)]))
states = torch.empty(count, decoder.spec.hidden_size)
decoder.rotation_table(count)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (48 << 20),) * 2)
try:
    whole.run(states, batch, held.pages)
except MemoryError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, which says and limits what a process maps")
def test_a_pass_for_which_there_is_no_memory_is_an_error_of_that_pass(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OUT_OF_MEMORY, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "no memory for what a pass of 300000 tokens holds" in done.stdout
