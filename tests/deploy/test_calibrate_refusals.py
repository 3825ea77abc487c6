"""What `exeunt calibrate` and `exeunt eval` cannot use: one sentence that names it, and nothing left behind."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from exeunt.deploy.cli import run
from tests.calibration.conftest import some_text, tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(some_text())
    return path


def refusal(words: Sequence[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    """The one line that the command ends with, with exit status `status`."""
    assert run(list(words)) == status
    lines = capsys.readouterr().err.splitlines()
    told = lines[-1]
    assert told.startswith("exeunt: ")
    assert "Traceback" not in "\n".join(lines)
    return told.removeprefix("exeunt: ")


def calibrate_words(model: Path, data: object, out: Path, *more: str) -> list[str]:
    return ["calibrate", str(model), "--data", str(data), "--out", str(out), "--device", "cpu", *more]


def _short(path: Path) -> None:
    path.write_text("A few words.")


def _empty(path: Path) -> None:
    path.write_text("")


def _blank(path: Path) -> None:
    path.write_text(" \n\n \t\n")


def _binary(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04\x00\x00words")


def _latin(path: Path) -> None:
    path.write_bytes("café ".encode("latin-1") * 1000)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_short, r"has \d+ tokens, but gives the splits 0 .*needs at least 6,000"),
        (_empty, "holds no text"),
        (_blank, "holds no text"),
        (_binary, "is not a text file: byte 4 is zero"),
        (_latin, "is not UTF-8 text: byte 3"),
    ],
)
def test_a_text_that_is_no_text(
    model: Path, tmp_path: Path, spoil: Callable[[Path], None], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data.txt", tmp_path / "out" / "bundle"
    spoil(data)
    told = refusal(calibrate_words(model, data, out), capsys)
    assert re.search(says, told), told
    assert not out.parent.exists()


def test_lines_that_are_no_json(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "words"}) + '\n{"text": 5}\n')
    told = refusal(calibrate_words(model, data, tmp_path / "b"), capsys)
    assert 'line 2, is not an object with a string field "text"' in told


def test_a_data_set_that_cannot_be_reached(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")

    def unreachable(*_args: object, **_named: object) -> None:
        raise ConnectionError("Couldn't reach 'nobody/nothing' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    told = refusal(calibrate_words(model, "hf:nobody/nothing", tmp_path / "b"), capsys)
    assert "the data set nobody/nothing cannot be read" in told
    assert "give a local file" in told
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "tensor", ["model.layers.3.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"]
)
def test_a_checkpoint_with_a_number_that_is_none(
    model: Path, text: Path, tmp_path: Path, tensor: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tiny_checkpoint(tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors[tensor].view(-1)[-1] = value
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    told = refusal(calibrate_words(broken, text, tmp_path / "b"), capsys, status=1)
    assert tensor in told
    assert "NaN or infinity" in told
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--exits", "3"), "no exit after block 3"),
        (("--exits", "0,99"), "no exit after block 99"),
        (("--drafting-exit", "7"), "no exit after block 7"),
        (("--linear-block", "4"), "no block 4 to replace"),
        (("--risk", "0"), "risk target 0"),
        (("--risk", "1"), "risk target 1"),
        (("--risk", "0.05,nan"), "nan"),
        (("--risk", "-0.1"), "risk target -0.1"),
        (("--tokens", "100"), "--tokens is 100; a calibration needs at least 6000"),
        (("--group-size", "3"), "group size is 3; it must be even"),
        (("--group-size", "3", "--weights", "full"), "group size is 3; it must be even"),
        (
            ("--group-size", "1000000"),
            "group size is 1000000, and no layer of the model has more than 48 inputs",
        ),
        (
            ("--seed", "18446744073709551616"),
            "The seed is 18446744073709551616; give a whole number from 0 to",
        ),
    ],
)
def test_what_this_model_does_not_have(
    model: Path,
    text: Path,
    tmp_path: Path,
    more: tuple[str, ...],
    says: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = refusal(calibrate_words(model, text, tmp_path / "b", *more), capsys)
    assert says in told
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(("out", "work"), [("w/bundle", "w"), ("b", "b/work"), ("b", "b")])
def test_a_bundle_inside_the_folder_of_unfinished_work(
    model: Path, text: Path, tmp_path: Path, out: str, work: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = calibrate_words(model, text, tmp_path / out, "--work", str(tmp_path / work))
    assert "one inside the other" in refusal(words, capsys)
    assert not (tmp_path / "w").exists()
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("work", ["file", "file/below", "locked/below"])
def test_unfinished_work_where_nothing_can_be_written_is_refused_before_anything_is_read(
    model: Path,
    tmp_path: Path,
    work: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("here already")
    (tmp_path / "locked").mkdir()
    asked = os.access
    monkeypatch.setattr(  # who runs as root may write anywhere
        os, "access", lambda path, mode: Path(path).name != "locked" and asked(path, mode)
    )
    monkeypatch.setattr("exeunt.calibration.task.read_corpus", pytest.fail)
    words = calibrate_words(model, tmp_path / "file", tmp_path / "b", "--work", str(tmp_path / work))
    told = refusal(words, capsys)
    assert f"Unfinished work is to be kept in {tmp_path / work}, and nothing can be written in" in told
    assert (tmp_path / "file").read_text() == "here already"
    assert list((tmp_path / "locked").iterdir()) == []


def no_utf8(folder: Path) -> Path:
    """A file whose name is no UTF-8."""
    path = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt"))
    try:
        path.write_text(some_text())
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    return path


@pytest.mark.parametrize("option", ["MODEL", "--data", "--out", "--work"])
def test_names_that_are_no_utf8(
    model: Path, text: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = no_utf8(tmp_path)
    named: dict[str, Path] = {
        "MODEL": model,
        "--data": text,
        "--out": tmp_path / "b",
        "--work": tmp_path / "w",
    }
    named[option] = odd
    words = calibrate_words(named["MODEL"], named["--data"], named["--out"], "--work", str(named["--work"]))
    told = refusal(words, capsys)
    assert told.startswith(f"{option} is ")
    assert "caf\\udce9.txt, a name with bytes that are no UTF-8" in told
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("option", ["BUNDLE", "--data"])
def test_names_that_are_no_utf8_are_not_evaluated(
    model: Path, text: Path, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"BUNDLE": str(model), "--data": str(text)} | {option: str(no_utf8(tmp_path))}
    told = refusal(["eval", named["BUNDLE"], "--data", named["--data"], "--device", "cpu"], capsys)
    assert told.startswith(f"{option} is ")


@pytest.mark.parametrize("out", ["b" * 240, "/proc/bundle"])
def test_a_bundle_that_could_not_be_written_is_refused_before_anything_is_read(
    model: Path,
    text: Path,
    tmp_path: Path,
    out: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if not Path(out).parent.is_dir():
        pytest.skip("no such place on this system")
    monkeypatch.setattr("exeunt.calibration.task.read_corpus", pytest.fail)
    told = refusal(calibrate_words(model, text, tmp_path / out), capsys)
    assert told.startswith("--out is ")
    assert "another" in told
    assert list(tmp_path.iterdir()) == [text]


def test_unfinished_work_in_a_folder_of_something_else(
    model: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.png").write_bytes(b"x")
    monkeypatch.setattr("exeunt.calibration.task.read_corpus", pytest.fail)
    words = calibrate_words(model, text, tmp_path / "b", "--work", str(tmp_path / "photos"))
    assert "holds something else than unfinished work" in refusal(words, capsys)
    assert (tmp_path / "photos" / "holiday.png").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--window", "5000"), "window of 5000 tokens is longer than the model's context; give at most 96"),
        (("--stride", "33", "--window", "32"), "stride of 33 tokens is longer than the window of 32"),
        (("--stride", "100"), "stride of 100 tokens is longer than the window of 96"),
        (("--seed", "2147483648"), "The seed is 2147483648"),
    ],
)
def test_what_cannot_be_evaluated_is_wrong_usage_before_the_weights_are_read(
    model: Path,
    text: Path,
    more: tuple[str, ...],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("exeunt.deploy.preparation.load_to_measure", pytest.fail)
    told = refusal(["eval", str(model), "--data", str(text), "--device", "cpu", *more], capsys)
    assert says in told
