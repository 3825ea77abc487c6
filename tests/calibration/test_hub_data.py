"""Data sets of the Hugging Face hub, read by its own package over HTTP, from a hub of this test's."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.calibration.hub_server import hub_server

README = b"""---
configs:
- config_name: plain
  data_files:
  - {split: train, path: plain/train.jsonl}
  - {split: test, path: plain/test.jsonl}
- config_name: other
  data_files:
  - {split: train, path: other/train.jsonl}
---
"""
READ = """
import sys
from exeunt.calibration.corpus import read_corpus
from exeunt.calibration.errors import CorpusError
for source in sys.argv[1:]:
    try:
        documents = read_corpus(source, None).documents
        print(len(documents), documents[-1][:9])
    except CorpusError as error:
        print(error)
"""


def lines(name: str, count: int, field: str = "text") -> bytes:
    texts = (f"{name} {number:02} " + "and so it went on. " * 30 for number in range(count))
    return b"".join(json.dumps({field: text}).encode() + b"\n" for text in texts)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    several = {
        "README.md": README,
        "plain/train.jsonl": lines("plain", 30),
        "plain/test.jsonl": lines("tests", 20),
        "other/train.jsonl": lines("other", 10),
    }
    stories = {"train.jsonl": lines("story", 40)}
    bodies = {"train.jsonl": lines("story", 10, "body")}
    with hub_server({"me/stories": stories, "me/several": several, "me/bodies": bodies}) as address:
        yield address


def said(address: str, home: Path, *sources: str) -> list[str]:
    """A line for each of `sources`, as a process finds it whose hub is at `address`."""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", READ, *sources]
    environment = {**os.environ, **own, "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_data_sets_are_read_from_a_hub(hub: str, tmp_path: Path) -> None:
    found = said(
        hub,
        tmp_path,
        "hf:me/stories",
        "hf:me/several:plain:test",
        "hf:me/several:other:train",
        "hf:me/several",
        "hf:me/several:plain:dev",
        "hf:me/several:none:train",
        "hf:me/bodies",
        "hf:me/nothing",
    )
    assert found[:3] == ["40 story 39 ", "20 tests 19 ", "10 other 09 "]
    assert "several configurations" in found[3]
    assert "['plain', 'other']); name one and a split, as in hf:me/several:CONFIG:train." in found[3]
    assert "me/several cannot be read from the Hugging Face hub (Bad split: dev. Available" in found[4]
    assert "BuilderConfig 'none' not found. Available: ['plain', 'other']" in found[5]
    assert found[6] == 'the data set me/bodies has no field "text"; give a local JSONL file instead.'
    assert "me/nothing cannot be read from the Hugging Face hub" in found[7]
    assert "check the name, the configuration, the split and the network" in found[7]
