"""Bundles: a round trip, every way in which one is refused, and what an interrupted writer leaves behind: nothing."""

import errno
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exeunt.compression import bundle_writer, tensor_file
from exeunt.compression.bundle import BundleError, checkpoint_sha256, file_sha256, is_bundle, open_bundle
from exeunt.compression.bundle_writer import BundleContents, check_target, write_bundle
from exeunt.compression.exits import ExitHead, ExitProbe
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.manifest import (
    BaseModelRecord,
    ExitRecord,
    LinearBlockRecord,
    Manifest,
)
from exeunt.compression.norm import Norm

HIDDEN = 8


def _exit(block: int) -> ExitHead:
    probe = ExitProbe(torch.randn(4, HIDDEN), torch.randn(4), torch.randn(4), torch.tensor(0.5))
    norm = Norm("rms", torch.ones(HIDDEN), None, 1e-6)
    return ExitHead(block, norm, torch.randn(HIDDEN, HIDDEN), probe, torch.randn(4), 0.25)


def _manifest(name: str = "tiny") -> Manifest:
    return Manifest(
        created=datetime(2026, 1, 2, tzinfo=UTC),
        exeunt_version="0.1.0",
        base_model=BaseModelRecord(name=name, architecture="llama", sha256="0" * 64, parameters=9, blocks=4),
        weights=("int4", "full"),
        kv_cache=("int4", "full"),
        int4_group_size=32,
        linear_block=LinearBlockRecord(index=2, rank=3, r2=0.9, parameters=1, replaced_parameters=2),
        exits=(ExitRecord(block=1, name="block_1", agreement=0.5),),
    )


@pytest.fixture
def contents(tmp_path: Path) -> BundleContents:
    """What a small bundle holds; its checkpoint has a tokenizer and weights that must not be copied."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    (checkpoint / "tokenizer.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"not copied")
    return BundleContents(
        checkpoint=checkpoint,
        manifest=_manifest(),
        full={"model.weight": torch.randn(6, HIDDEN)},
        int4={"blocks.0.qkv.codes": torch.arange(12, dtype=torch.uint8)},
        linear_block=LinearBlock(2, torch.randn(3, HIDDEN), torch.randn(HIDDEN, 3), torch.randn(HIDDEN)),
        exits=[_exit(1)],
        report_html="<p>résumé</p>",
        report_json="{}",
    )


def _changed(contents: BundleContents, **changes: object) -> BundleContents:
    fields = {name: getattr(contents, name) for name in BundleContents.__dataclass_fields__}
    return BundleContents(**(fields | changes))


class _Failing(Mapping[str, Tensor]):
    """Tensors of which the last runs `event` while the file is being written."""

    def __init__(self, event: Callable[[], None]) -> None:
        self._event = event
        self._looks = 0

    def __getitem__(self, name: str) -> Tensor:
        if name == "b":
            self._looks += 1
            if self._looks > 1:  # the first look is for the header
                self._event()
        return torch.zeros(100)

    def __iter__(self) -> Iterator[str]:
        return iter("ab")

    def __len__(self) -> int:
        return 2


def test_a_bundle_survives_a_round_trip(contents: BundleContents, tmp_path: Path) -> None:
    written = write_bundle(tmp_path / "new" / "bundle", contents)
    bundle = open_bundle(tmp_path / "new" / "bundle")

    assert bundle == written
    assert bundle.manifest.model_copy(update={"files": {}}) == contents.manifest
    assert sorted(path.name for path in bundle.path.iterdir()) == [
        "config.json",
        "exits.safetensors",
        "linear_block.safetensors",
        "manifest.json",
        "report.html",
        "report.json",
        "tokenizer.json",
        "weights.int4.safetensors",
        "weights.safetensors",
    ]
    assert {name: (bundle.path / name).stat().st_size for name in bundle.manifest.files} == {
        name: record.bytes for name, record in bundle.manifest.files.items()
    }
    assert contents.full is not None
    assert torch.equal(bundle.tensors("weights.safetensors")["model.weight"], contents.full["model.weight"])
    assert (bundle.path / "report.html").read_text(encoding="utf-8") == "<p>résumé</p>"
    hidden = torch.randn(3, HIDDEN)
    linear_block = bundle.linear_block()
    assert linear_block is not None
    assert contents.linear_block is not None
    assert torch.equal(linear_block.apply(hidden), contents.linear_block.apply(hidden))
    (head,) = bundle.exits()
    assert torch.equal(head.read(hidden)[0], contents.exits[0].read(hidden)[0])
    assert head.screen_ratio == 0.25


def test_a_bundle_may_hold_less(contents: BundleContents, tmp_path: Path) -> None:
    manifest = contents.manifest.model_copy(update={"weights": ("int4",), "linear_block": None, "exits": ()})
    less = _changed(contents, manifest=manifest, full=None, linear_block=None, exits=[])
    write_bundle(tmp_path / "bundle", less)
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.linear_block() is None
    assert bundle.exits() == ()
    assert not (bundle.path / "weights.safetensors").exists()


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda path: (path / "manifest.json").unlink(), "is not a bundle: it holds no manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{}"), "not that of an Exeunt bundle"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
        (lambda path: (path / "weights.safetensors").unlink(), r"weights\.safetensors is missing"),
        (lambda path: (path / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda path: os.truncate(path / "exits.safetensors", 100), r"was truncated, it has 100 bytes"),
        (lambda path: os.truncate(path / "manifest.json", 300), "not valid JSON"),
        (lambda path: (path / "report.json").write_text("{ }"), r"report\.json was altered, it has 3 bytes"),
        (lambda path: _flip_last_byte(path / "weights.int4.safetensors"), r"SHA-256 does not match"),
        (lambda path: _flip_last_byte(path / "config.json"), r"config\.json was altered"),
        (lambda path: _edit(path, "format_version", 99), "format version 99, this Exeunt reads up to "),
        (lambda path: _edit(path, "weights", ["full"]), r"manifest\.json was altered"),
    ],
)
def test_a_broken_bundle_is_refused_with_the_reason(
    break_it: Callable[[Path], None], reason: str, contents: BundleContents, tmp_path: Path
) -> None:
    path = tmp_path / "bundle"
    write_bundle(path, contents)
    open_bundle(path)
    break_it(path)
    with pytest.raises(BundleError, match=reason) as caught:
        open_bundle(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _edit(path: Path, key: str, value: object) -> None:
    fields = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(fields | {key: value}))


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match="does not exist"):
        open_bundle(tmp_path / ("long" * 100))
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="is not a directory"):
        open_bundle(tmp_path / "file")


def test_files_that_the_manifest_does_not_list_are_left_alone(
    contents: BundleContents, tmp_path: Path
) -> None:
    write_bundle(tmp_path / "bundle", contents)
    (tmp_path / "bundle" / "notes.txt").write_text("mine")
    open_bundle(tmp_path / "bundle")


def test_a_manifest_that_promises_more_than_there_is_is_not_written(
    contents: BundleContents, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match=r"promises weights\.int4\.safetensors"):
        write_bundle(tmp_path / "bundle", _changed(contents, int4=None))
    assert not (tmp_path / "bundle").exists()


def test_tensors_of_other_exits_than_the_manifest_lists_are_refused(
    contents: BundleContents, tmp_path: Path
) -> None:
    write_bundle(tmp_path / "bundle", _changed(contents, exits=[_exit(2)]))
    with pytest.raises(
        BundleError, match=r"lists exits after blocks \[1\], the tensors hold those after \[2\]"
    ):
        open_bundle(tmp_path / "bundle").exits()


def _fill_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def _fail() -> None:
    raise RuntimeError("a bug")


_INTERRUPTIONS = [
    pytest.param(_fill_disk, BundleError, id="full disk"),
    pytest.param(_press_ctrl_c, KeyboardInterrupt, id="SIGINT"),
    pytest.param(_fail, RuntimeError, id="exception"),
]


@pytest.mark.parametrize(("event", "raised"), _INTERRUPTIONS)
def test_an_interrupted_write_leaves_nothing(
    event: Callable[[], None], raised: type[BaseException], contents: BundleContents, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    with pytest.raises(raised):
        write_bundle(tmp_path / "deep" / "er" / "bundle", _changed(contents, full=_Failing(event)))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("event", "raised"), _INTERRUPTIONS)
def test_an_interrupted_write_leaves_the_old_bundle(
    event: Callable[[], None], raised: type[BaseException], contents: BundleContents, tmp_path: Path
) -> None:
    old = write_bundle(tmp_path / "bundle", contents)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(raised):
        write_bundle(tmp_path / "bundle", _changed(contents, full=_Failing(event)))
    assert sorted(tmp_path.iterdir()) == before
    assert open_bundle(tmp_path / "bundle") == old


@pytest.mark.parametrize("failing_write", range(1, 16))
def test_a_disk_that_fills_at_any_write_leaves_nothing(
    failing_write: int, contents: BundleContents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, count = tensor_file.HashingWriter.write, 0

    def limited(self: tensor_file.HashingWriter, data: bytes | memoryview) -> None:
        nonlocal count
        count += 1
        if count == failing_write:
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, data)

    monkeypatch.setattr(tensor_file.HashingWriter, "write", limited)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BundleError, match=r"the disk is full .* make room or give another --out"):
        write_bundle(tmp_path / "bundle", contents)
    assert sorted(tmp_path.iterdir()) == before


def test_a_real_limit_of_the_file_system_leaves_nothing(contents: BundleContents, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = _changed(contents, full={"weight": torch.zeros(1 << 16)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(BundleError, match="could not be written"):
            write_bundle(tmp_path / "bundle", big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_interrupted_exchange_brings_the_old_bundle_back(
    contents: BundleContents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_writer, "_exchange", lambda *_: False)  # as on a file system that cannot
    old = write_bundle(tmp_path / "bundle", contents)
    before = sorted(tmp_path.iterdir())
    rename = Path.rename

    def interrupted(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "bundle", contents)
    assert sorted(tmp_path.iterdir()) == before
    assert open_bundle(tmp_path / "bundle") == old


def test_there_is_always_a_bundle_at_the_target(
    contents: BundleContents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path / "bundle", contents)
    exchange, rename = bundle_writer._exchange, Path.rename
    there: list[bool] = []

    def watched(one: Path, other: Path) -> bool:
        done = exchange(one, other)
        there.append(done)
        return done

    def renamed(self: Path, target: Path) -> Path:
        there.append(is_bundle(tmp_path / "bundle"))
        found = rename(self, target)
        there.append(is_bundle(tmp_path / "bundle"))
        return found

    monkeypatch.setattr(bundle_writer, "_exchange", watched)
    monkeypatch.setattr(Path, "rename", renamed)
    write_bundle(tmp_path / "bundle", _changed(contents, manifest=_manifest("second")))
    if not there[0]:
        pytest.skip("this file system cannot exchange two directories in one step")
    assert there == [True] * 3
    assert open_bundle(tmp_path / "bundle").manifest.base_model.name == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]


def test_what_a_killed_writer_set_aside_is_put_back_by_the_next_one(
    contents: BundleContents, tmp_path: Path
) -> None:
    target, aside = tmp_path / "bundle", tmp_path / ".bundle.old-0123abcd"
    old = write_bundle(target, contents)
    target.rename(aside)
    with pytest.raises(RuntimeError):
        write_bundle(target, _changed(contents, full=_Failing(_fail)))
    assert open_bundle(target) == old
    assert not aside.exists()
    target.rename(aside)
    (target / "mine").mkdir(parents=True)
    with pytest.raises(BundleError, match="is not a bundle"):
        write_bundle(target, contents)
    assert is_bundle(aside)


def test_what_killed_writers_set_aside_goes_once_a_new_bundle_stands(
    contents: BundleContents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for replaced in (False, True):
        monkeypatch.setattr(bundle_writer, "_exchange", lambda *_: False)
        for name in (
            ".bundle.old-0123abcd",
            ".bundle.old-89abcdef",
            ".bundle.old-notours",
            ".other.old-0123abcd",
        ):
            (tmp_path / name).mkdir(exist_ok=True)
        assert (tmp_path / "bundle").exists() is replaced
        write_bundle(tmp_path / "bundle", contents)
        left = sorted(path.name for path in tmp_path.iterdir())
        assert left == [".bundle.old-notours", ".other.old-0123abcd", "bundle", "checkpoint"]


def test_a_bundle_replaces_a_bundle_even_a_broken_one(contents: BundleContents, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle", contents)
    (tmp_path / "bundle" / "config.json").unlink()
    write_bundle(tmp_path / "bundle", _changed(contents, manifest=_manifest("second")))
    assert open_bundle(tmp_path / "bundle").manifest.base_model.name == "second"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "checkpoint"]


def test_a_bundle_goes_into_an_empty_directory_and_through_a_link(
    contents: BundleContents, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    write_bundle(tmp_path / "link", contents)
    assert (tmp_path / "link").is_symlink()
    assert is_bundle(tmp_path / "empty")


def test_targets_that_are_something_else_are_refused(contents: BundleContents, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BundleError, match="exists and is not a directory"):
        write_bundle(tmp_path / "file", contents)
    with pytest.raises(BundleError, match="exists and is not a bundle"):
        write_bundle(contents.checkpoint, contents)
    write_bundle(tmp_path / "bundle", contents)
    (tmp_path / "bundle" / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match=r"also holds 'notes\.txt'"):
        check_target(tmp_path / "bundle")
    assert (tmp_path / "file").read_text() == "mine"
    assert (contents.checkpoint / "model.safetensors").read_bytes() == b"not copied"
    assert check_target(tmp_path / "free") == tmp_path / "free"


def test_a_target_that_cannot_be_made_is_refused(contents: BundleContents, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for impossible in (tmp_path / ("long" * 100), tmp_path / "file" / "bundle"):
        with pytest.raises(BundleError, match=r"could not be written .*; give another --out"):
            write_bundle(impossible, contents)


def test_one_hash_stands_for_a_checkpoint_of_several_files(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    assert checkpoint_sha256([first]) == file_sha256(first)
    both = checkpoint_sha256([first, second])
    assert both == checkpoint_sha256([second, first])
    second.write_bytes(b"3")
    assert checkpoint_sha256([first, second]) != both
