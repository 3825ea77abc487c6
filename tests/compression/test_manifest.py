"""The manifest: a round trip, and each way in which it is refused."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from exeunt.compression.bundle_format import FORMAT_VERSION
from exeunt.compression.manifest import (
    CHECKSUM_KEY,
    BaseModelRecord,
    DraftRecord,
    ExitRecord,
    Manifest,
    ManifestError,
    RiskEntry,
    RiskTarget,
    manifest_json,
    read_manifest,
)
from exeunt.compression.variant import Variant


def _manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "created": datetime(2026, 1, 2, tzinfo=UTC),
        "exeunt_version": "0.1.0",
        "base_model": BaseModelRecord(
            name="tiny", architecture="llama", sha256="a" * 64, parameters=10, blocks=4
        ),
        "weights": ("int4", "full"),
        "kv_cache": ("int4", "full"),
        "int4_group_size": 32,
        "exits": (ExitRecord(block=2, name="block_2", agreement=0.5),),
        "risk_table": (
            RiskEntry(
                weights="int4",
                kv_cache="int4",
                linear_block=False,
                skipped_kv="propagate",
                targets=(
                    RiskTarget(target=0.01, certified=False, reason="too few tokens left"),
                    RiskTarget(target=0.05, certified=True, threshold=0.9, exit_rate=0.2, tokens=100),
                ),
            ),
        ),
    }
    return Manifest(**(fields | changes))


def _altered(change: dict[str, Any], *, seal: bool) -> str:
    """The manifest's text with keys changed; sealed: with a checksum that matches again."""
    fields = json.loads(manifest_json(_manifest())) | change
    return json.dumps(sealed(fields) if seal else fields)


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields with a checksum that matches."""
    from exeunt.compression.manifest import _checksum

    own = {key: value for key, value in fields.items() if key != CHECKSUM_KEY}
    return own | {CHECKSUM_KEY: _checksum(own)}


def test_it_survives_a_round_trip() -> None:
    manifest = _manifest()
    again = read_manifest(manifest_json(manifest))
    assert again == manifest
    assert again.risk_table[0].variant == Variant("int4", "int4", False)


def test_reformatting_the_text_does_no_harm() -> None:
    assert read_manifest(json.dumps(json.loads(manifest_json(_manifest())), indent=7)) == _manifest()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"format_version": ' + "9" * 5_000 + "}", "manifest.json is not valid JSON"),
        ("[]", "not that of an Exeunt bundle"),
        ('{"model": 1}', "not that of an Exeunt bundle"),
        (_altered({"format_version": "1"}, seal=True), "format version '1'"),
        (_altered({"format_version": True}, seal=True), "format version True"),
        (_altered({"exeunt_version": "0.0.1"}, seal=False), "altered after"),
        (_altered({CHECKSUM_KEY: None}, seal=False), "altered after"),
        (_altered({"weights": ["int8"]}, seal=True), r"weights\.0: input should be 'int4' or 'full'"),
        (_altered({"weights": []}, seal=True), "at least one weight format"),
        (_altered({"created": "yesterday"}, seal=True), "created"),
        (_altered({"int4_group_size": None}, seal=True), "int4_group_size"),
        (_altered({"files": {"../x": {"sha256": "a" * 64, "bytes": 1}}}, seal=True), "'../x'"),
        (_altered({"files": {"x": {"sha256": "zz", "bytes": 1}}}, seal=True), r"files\.x\.sha256"),
    ],
)
def test_what_cannot_be_used_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ManifestError, match=reason):
        read_manifest(text)


def test_a_newer_format_is_refused_before_anything_else_is_read() -> None:
    text = json.dumps({"kind": "exeunt-bundle", "format_version": FORMAT_VERSION + 1, "weights": 5})
    with pytest.raises(
        ManifestError, match=rf"format version {FORMAT_VERSION + 1}, .* up to {FORMAT_VERSION}"
    ):
        read_manifest(text)


def test_a_bundle_made_before_exits_had_uses_still_opens() -> None:
    fields = json.loads(manifest_json(_manifest()))
    for record in fields["exits"]:
        for key in ("certified", "drafting", "draft"):
            del record[key]
    text = json.dumps(sealed(fields | {"format_version": 1}))
    assert read_manifest(text).exits == _manifest().exits
    assert _manifest().exits[0].certified
    assert not _manifest().exits[0].drafting


def test_what_was_measured_of_drafts_survives_a_round_trip() -> None:
    draft = DraftRecord(threshold=0.4, length=3, drafted=0.8, acceptance=0.7, speed=0.9)
    exits = (
        ExitRecord(block=0, name="block_0", agreement=0.4, certified=False, drafting=True, draft=draft),
        ExitRecord(block=2, name="block_2", agreement=0.5),
    )
    assert read_manifest(manifest_json(_manifest(exits=exits))).exits == exits


def test_keys_of_a_later_release_are_ignored_butsealed() -> None:
    assert read_manifest(_altered({"colour": "blue"}, seal=True)) == _manifest()
    with pytest.raises(ManifestError, match="altered"):
        read_manifest(_altered({"colour": "blue"}, seal=False))


def test_records_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValidationError, match="no threshold"):
        RiskTarget(target=0.05, certified=True)
    with pytest.raises(ValidationError, match="block 3 is named 'block_2'"):
        ExitRecord(block=3, name="block_2", agreement=0.5)
    drafting = (
        ExitRecord(block=block, name=f"block_{block}", agreement=0.5, drafting=True) for block in (0, 2)
    )
    with pytest.raises(ValidationError, match="more than one exit"):
        _manifest(exits=tuple(drafting))
    with pytest.raises(ValidationError, match="finite"):
        RiskTarget(target=0.05, certified=False, exit_rate=float("nan"))
