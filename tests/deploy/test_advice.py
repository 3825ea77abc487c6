"""The line at the end of a calibration: what its report advises, and how to serve that."""

import json
from pathlib import Path

import pytest

from exeunt.deploy.advice import advice_line


def bundle(folder: Path, held: tuple[str, ...] = ("int4", "full"), /, **asked: object) -> Path:
    """A folder with what the line is made of: advice for `asked`, INT4 where that is silent."""
    compression = {"weights": "int4", "kv_cache": "int4", "linear_block": False} | asked
    advice = [{"use": "Quality first", "compression": compression | {"early_exit": {"mode": "verified"}}}]
    (folder / "report.json").write_text(json.dumps({"verdict": {"advice": advice}}))
    (folder / "manifest.json").write_text(json.dumps({"weights": held, "kv_cache": ["int4", "full"]}))
    return folder


@pytest.mark.parametrize(
    ("asked", "called", "option"),
    [
        (
            {"weights": "full", "kv_cache": "full"},
            "nothing compressed",
            '{"weights": "full", "kv_cache": "full"}',
        ),
        ({"kv_cache": "full"}, "INT4 weights", '{"kv_cache": "full"}'),
        ({"linear_block": True}, "INT4 weights + INT4 KV + linear block", '{"linear_block": true}'),
    ],
)
def test_what_the_default_is_not_comes_with_what_to_copy(
    tmp_path: Path, asked: dict[str, object], called: str, option: str
) -> None:
    assert advice_line(bundle(tmp_path, **asked)) == (
        f"Its report advises, quality first: {called}. By default exeunt serve takes INT4 weights + INT4 KV; "
        f"give it --default-compression '{option}'"
    )


def test_advice_that_is_the_default_says_so(tmp_path: Path) -> None:
    line = advice_line(bundle(tmp_path))
    assert line == (
        "Its report advises, quality first: INT4 weights + INT4 KV, which is what exeunt serve takes by default."
    )


def test_advised_weights_that_the_bundle_does_not_hold_are_no_option(tmp_path: Path) -> None:
    line = advice_line(bundle(tmp_path, ("int4",), weights="full", kv_cache="full"))
    assert line == (
        "Its report advises, quality first: nothing compressed, but the bundle holds int4 weights alone."
    )


def test_a_report_without_advice_has_no_line(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"verdict": {"advice": []}}')
    assert advice_line(tmp_path) is None
