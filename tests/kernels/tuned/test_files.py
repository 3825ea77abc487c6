"""Measured launches as files: what is written is read, what is not good is left alone with one warning."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exeunt.kernels.tuned import files
from exeunt.kernels.tuned.files import (
    PACKAGED,
    Finding,
    LaunchFileError,
    cached_file,
    kernels_digest,
    packaged_file,
    read_known,
    read_launches,
    slug,
    write_launches,
)
from tests.kernels.tuned.measured import FULL, GPU, HALF, INT4, NARROW, WIDE, findings

EXPECTED = {finding.key: finding.launch for finding in findings()}


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, Path]:
    """The files of a GPU in the package and in the cache, neither of which is there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cached = cached_file(GPU)
    monkeypatch.setattr(files, "packaged_file", lambda gpu: tmp_path / f"{slug(gpu)}.json")
    return tmp_path / "nvidia-q100-80gb.json", cached


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "q100.json"
    write_launches(path, GPU, findings())
    assert read_launches(path, GPU) == EXPECTED
    found = json.loads(path.read_text())
    assert found["measured"]["torch"] == torch.__version__
    assert set(found["measured"]) == {"date", "exeunt", "torch", "triton", "kernels"}
    assert found["measured"]["kernels"] == kernels_digest()
    assert "earlier" not in found
    assert found["launches"][0] == {
        "format": "int4",
        "dtype": "bfloat16",
        "in_features": 4096,
        "outputs": 28672,
        "gated": True,
        "group_size": 64,
        "rows": 1,
        "tile": [8, 32, 4, 1],
        "split": True,
        "us": 20.0,
        "rule_us": 30.0,
    }
    assert [line["group_size"] for line in found["launches"]] == [64, 0, 0]
    assert [path.name for path in path.parent.iterdir()] == ["q100.json"]


def test_groups_of_other_sizes_are_other_calls(tmp_path: Path) -> None:
    small, path = replace(INT4, group_size=32), tmp_path / "q100.json"
    write_launches(
        path, GPU, [Finding(small.key(1), None, 1e-5, 1e-5), Finding(INT4.key(1), NARROW, 1e-5, 2e-5)]
    )
    assert read_launches(path, GPU) == {small.key(1): None, INT4.key(1): NARROW}
    assert replace(FULL, group_size=32).key(1) == FULL.key(1)


def test_what_is_added_leaves_the_other_calls(tmp_path: Path) -> None:
    path = tmp_path / "q100.json"
    write_launches(path, GPU, findings())
    write_launches(path, GPU, [Finding(FULL.key(1), WIDE, 1e-6, 2e-6)], add=True)
    assert read_launches(path, GPU) == {**EXPECTED, FULL.key(1): WIDE}
    write_launches(path, GPU, findings()[:1])
    assert read_launches(path, GPU) == {INT4.key(1): NARROW}
    path.write_text("spoilt")
    write_launches(path, GPU, findings()[:1], add=True)
    assert read_launches(path, GPU) == {INT4.key(1): NARROW}


def test_the_package_comes_before_the_cache(folders: tuple[Path, Path]) -> None:
    packaged, cached = folders
    assert read_known(GPU) == {}
    write_launches(cached, GPU, findings()[:1])
    assert read_known(GPU) == {INT4.key(1): NARROW}
    write_launches(packaged, GPU, [Finding(INT4.key(1), None, 1e-5, 1e-5), *findings()[1:]])
    assert read_known(GPU) == {**EXPECTED, INT4.key(1): None}
    write_launches(cached, GPU, [Finding(HALF.key(1), WIDE, 1e-6, 2e-6)], add=True)
    assert read_known(GPU) == {**EXPECTED, INT4.key(1): None, HALF.key(1): WIDE}


@pytest.mark.parametrize("other", [{"triton": "0.9"}, {"kernels": "0123456789ab"}])
def test_what_was_measured_of_others_is_used_where_the_cache_says_nothing(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture, other: dict[str, str]
) -> None:
    packaged, cached = folders
    write_launches(packaged, GPU, findings())
    found = json.loads(packaged.read_text())
    found["measured"] |= other
    packaged.write_text(json.dumps(found))
    ((name, told),) = other.items()
    with caplog.at_level(logging.DEBUG, files.__name__):
        assert read_known(GPU) == EXPECTED
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert f"in {packaged} were measured with {name} {told}:" in record.message
    write_launches(cached, GPU, [Finding(INT4.key(1), None, 1e-5, 1e-5)])
    assert read_known(GPU) == {**EXPECTED, INT4.key(1): None}


def test_what_is_added_to_lines_of_other_kernels_says_so(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    packaged, cached = folders
    with monkeypatch.context() as patch:
        patch.setattr(files, "kernels_digest", lambda: "before")
        write_launches(packaged, GPU, findings())
    for _ in range(2):
        write_launches(packaged, GPU, findings()[:1], add=True)
        found = json.loads(packaged.read_text())
        assert found["measured"]["kernels"] == kernels_digest()
        assert [each["kernels"] for each in found["earlier"]] == ["before"]
    write_launches(cached, GPU, [Finding(FULL.key(1), WIDE, 1e-5, 2e-5)])
    assert read_known(GPU) == {**EXPECTED, FULL.key(1): WIDE}
    write_launches(packaged, GPU, findings(), add=True)  # no line of the other kernels is left
    assert "earlier" not in json.loads(packaged.read_text())
    assert read_known(GPU) == EXPECTED


def test_a_bad_file_of_the_package_hides_no_good_one(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    packaged, cached = folders
    packaged.write_text("spoilt")
    write_launches(cached, GPU, findings())
    assert read_known(GPU) == EXPECTED
    assert len(caplog.messages) == 1


def test_a_cached_file_is_of_these_kernels_and_this_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cached_file(GPU)
    assert path.parent == tmp_path / "exeunt" / "tuned"
    assert path.name.startswith("nvidia-q100-80gb-")
    monkeypatch.setattr(files, "_version", lambda name: "another")
    assert cached_file(GPU) != path


def _without(entry: dict[str, Any], name: str) -> None:
    del entry[name]


BAD: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another GPU's": (lambda found: found.update(gpu="NVIDIA T4"), "it is of 'NVIDIA T4'"),
    "another format": (lambda found: found.update(format=1), "not of format 2"),
    "no compiler": (lambda found: _without(found["measured"], "triton"), "which kernels were measured"),
    "nothing measured": (lambda found: _without(found, "measured"), "which kernels were measured"),
    "earlier": (lambda found: found.update(earlier={}), "is no list"),
    "twice": (lambda found: found["launches"].append(found["launches"][0]), "two lines about one call"),
    "no group size": (lambda found: _without(found["launches"][0], "group_size"), "says nothing of a call"),
    "INT4, no groups": (lambda found: found["launches"][0].update(group_size=0), "says nothing of a call"),
    "full, groups": (lambda found: found["launches"][2].update(group_size=64), "says nothing of a call"),
    "no launches": (lambda found: found.update(launches={}), "no list of launches"),
    "no launch": (lambda found: found["launches"].append(3), "3 is no launch"),
    "no dtype": (lambda found: _without(found["launches"][0], "dtype"), "says nothing of a call"),
    "float32": (lambda found: found["launches"][0].update(dtype="float32"), "says nothing of a call"),
    "unhashable": (lambda found: found["launches"][0].update(dtype=[1]), "says nothing of a call"),
    "other rows": (lambda found: found["launches"][0].update(rows=3), "says nothing of a call"),
    "no inputs": (lambda found: found["launches"][0].update(in_features=0), "says nothing of a call"),
    "half a gate": (lambda found: found["launches"][0].update(gated=1), "says nothing of a call"),
    "a short tile": (lambda found: found["launches"][0].update(tile=[8, 64, 4]), "is not rows, outputs"),
    "INT4, three warps": (lambda found: found["launches"][0].update(tile=[8, 64, 4, 3]), "3 warps"),
    "full, one warp": (lambda found: found["launches"][2].update(tile=[8, 64, 4, 1]), "1 warps"),
    "an odd tile": (lambda found: found["launches"][0].update(tile=[8, 48, 4, 2]), "no kernel has"),
    "no split": (lambda found: _without(found["launches"][0], "split"), "programs of their own"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_left_alone_with_one_warning(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    packaged, _ = folders
    write_launches(packaged, GPU, findings())
    found = json.loads(packaged.read_text())
    spoil, words = BAD[kind]
    spoil(found)
    packaged.write_text(json.dumps(found))
    with caplog.at_level(logging.WARNING):
        assert read_known(GPU) == {}
    (message,) = caplog.messages
    assert message.startswith(f"The measured launches in {packaged} are not used: ")
    assert words in message


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff\xfe", b"null"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "q100.json"
    path.write_bytes(content)
    with pytest.raises(LaunchFileError):
        read_launches(path, GPU)


def test_a_folder_in_the_place_of_a_file_is_left_alone(
    folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    folders[0].mkdir()
    assert read_known(GPU) == {}
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("path", sorted(PACKAGED.glob("*.json")), ids=lambda path: path.name)
def test_the_packages_files_are_good_and_named_by_their_gpu(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert packaged_file(found["gpu"]) == path
    assert set(found["measured"]) == {"date", "exeunt", "torch", "triton", "kernels"}
    assert len(read_launches(path, found["gpu"])) == len(found["launches"]) > 0
