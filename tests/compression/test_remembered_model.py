"""What a bundle's manifest remembers of its model, so that loading need not work it out of config.json again."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
)

from exeunt.compression.architecture import Architecture, read_architecture
from exeunt.compression.bundle import open_bundle
from exeunt.compression.manifest import Manifest, ManifestError, manifest_json, read_manifest
from exeunt.compression.model import load_bundle
from exeunt.compression.tokenizer import TokenizerError, load_tokenizer, tokenizer_class
from tests.compression.family_configs import CONFIGS
from tests.compression.reference_models import build_model
from tests.compression.small_bundles import small_bundle, small_checkpoint
from tests.compression.test_manifest import sealed

_LOADING = """
import sys
from exeunt.compression.model import load_bundle
load_bundle(sys.argv[1])
late = ("transformers.models.auto.configuration_auto", "transformers.models.auto.tokenization_auto", "torch._dynamo")
print(*[name for name in late if name in sys.modules])
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    return small_bundle(tmp_path_factory.mktemp("new") / "bundle", checkpoint).path


@pytest.fixture(scope="module")
def old_bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    """A bundle of before, whose manifest says neither."""
    path = small_bundle(tmp_path_factory.mktemp("old") / "bundle", checkpoint).path
    _write(path, _manifest(path).model_copy(update={"architecture": None, "tokenizer_class": None}))
    return path


def _manifest(bundle: Path) -> Manifest:
    return read_manifest((bundle / "manifest.json").read_text())


def _write(bundle: Path, manifest: Manifest) -> None:
    (bundle / "manifest.json").write_text(manifest_json(manifest))


def _imported_by_loading(bundle: Path) -> list[str]:
    command = [sys.executable, "-c", _LOADING, str(bundle)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=300).stdout.split()


def test_loading_imports_no_more_of_transformers_than_the_tokenizer(bundle: Path, old_bundle: Path) -> None:
    assert _imported_by_loading(bundle) == []
    assert "transformers.models.auto.configuration_auto" in _imported_by_loading(old_bundle)


def test_a_bundle_of_before_is_the_same_model(bundle: Path, old_bundle: Path) -> None:
    new, old = load_bundle(bundle), load_bundle(old_bundle)
    assert old.spec == new.spec
    assert type(old.tokenizer) is type(new.tokenizer)
    assert old.tokenizer.get_vocab() == new.tokenizer.get_vocab()
    assert open_bundle(old_bundle).architecture() == open_bundle(bundle).architecture()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_survives_a_round_trip(name: str, bundle: Path) -> None:
    family, changes = CONFIGS[name]
    spec = read_architecture(build_model(family, **changes).config)
    again = read_manifest(manifest_json(_manifest(bundle).model_copy(update={"architecture": spec})))
    assert again.architecture == spec
    assert isinstance(again.architecture, Architecture)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"blocks": 0}, "blocks is 0"),
        ({"kv_heads": 4}, "6 query heads cannot share 4"),
        ({"blocks": 5}, "windows is about 4 blocks; the model has 5"),
        ({"head_dim": 16}, "4 RoPE frequencies do not turn heads of 16 values"),
        ({"family": "bert"}, "architecture.family"),
        ({"family": "gpt2"}, "not those of a gpt2 model"),
        ({"gated": False}, "not those of a llama model"),
        ({"rope": None}, "not those of a llama model"),
        ({"dtype": "nn"}, "dtype is 'nn'; it must name a floating-point type"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"norm_eps": -1.0}, "epsilon is -1.0"),
        ({"eos_token_ids": (5, 1_000_000)}, "beyond the vocabulary of 131"),
        ({"eos_token_ids": (-5,)}, "a special token is -5"),
        ({"bos_token_id": -1}, "a special token is -1"),
        ({"activation": "tanh"}, "'tanh' is not supported"),
        ({"attention_scales": (float("nan"),) * 4}, "attention_scales.0: input should be a finite number"),
    ],
)
def test_an_architecture_that_cannot_be_is_refused(
    changes: dict[str, object], reason: str, bundle: Path
) -> None:
    manifest = _manifest(bundle)
    assert manifest.architecture is not None
    wrong = replace(manifest.architecture, **changes)  # type: ignore[arg-type]
    with pytest.raises(ManifestError, match=reason):
        read_manifest(manifest_json(manifest.model_copy(update={"architecture": wrong})))


@pytest.mark.parametrize(
    "change",
    [
        lambda spec: spec | {"logit_softcap": 30.0},
        lambda spec: {name: value for name, value in spec.items() if name != "dtype"},
        lambda spec: spec | {"rope": spec["rope"] | {"interleaved": True}},
    ],
)
def test_what_another_release_says_of_an_architecture_is_left_to_the_config(
    change: Callable[[dict[str, Any]], dict[str, Any]], bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "bundle"
    shutil.copytree(bundle, path)
    fields = json.loads((path / "manifest.json").read_text())
    fields["architecture"] = change(fields["architecture"])
    (path / "manifest.json").write_text(json.dumps(sealed(fields)))
    found = open_bundle(path)
    assert found.manifest.architecture is None
    assert load_bundle(path).spec == load_bundle(bundle).spec


class TestTokenizer:
    def test_a_class_is_remembered_by_its_name(self, checkpoint: Path) -> None:
        found = load_tokenizer(checkpoint)
        name = tokenizer_class(found)
        again = load_tokenizer(checkpoint, name)
        assert type(again) is type(found)
        assert again.get_vocab() == found.get_vocab()
        assert again.special_tokens_map == found.special_tokens_map

    @pytest.mark.parametrize(
        ("tokenizer", "family"),
        [
            (GPT2Tokenizer, "gpt2"),
            (Qwen2Tokenizer, "qwen3"),
            (LlamaTokenizer, "llama"),
            (LlamaTokenizer, "mistral"),
        ],
    )
    def test_a_familys_own_class_is_the_one_that_transformers_chooses(
        self, tokenizer: Any, family: str, tmp_path: Path
    ) -> None:
        pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "\u2581", "<unk>", "<s>", "</s>"]
        vocab = {piece: place for place, piece in enumerate(dict.fromkeys(pieces))}
        tokenizer(vocab=vocab, merges=[("t", "h")]).save_pretrained(tmp_path)
        AutoConfig.for_model(family).save_pretrained(tmp_path)
        chosen = AutoTokenizer.from_pretrained(tmp_path)  # not always of the class that was saved
        again = load_tokenizer(tmp_path, tokenizer_class(chosen))
        assert type(again) is type(chosen)
        ids = chosen.encode("the  naïve \U0001f600\n\n</s>this")
        assert again.encode("the  naïve \U0001f600\n\n</s>this") == ids
        assert again.decode(ids) == chosen.decode(ids)

    @pytest.mark.parametrize(
        "name", ["NoSuchTokenizer", "LlamaConfig", "PreTrainedTokenizerBase", "__name__", ""]
    )
    def test_a_name_that_is_no_tokenizers_is_looked_for_anew(self, name: str, checkpoint: Path) -> None:
        found = load_tokenizer(checkpoint, name)
        assert isinstance(found, PreTrainedTokenizerBase)
        assert found.get_vocab() == load_tokenizer(checkpoint).get_vocab()

    def test_what_transformers_does_not_know_has_no_name(self) -> None:
        class Own(PreTrainedTokenizerBase):  # type: ignore[misc]
            pass

        assert tokenizer_class(Own()) is None

    def test_a_folder_without_one_is_an_error_either_way(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
        for name in (None, "TokenizersBackend"):
            with pytest.raises(TokenizerError, match="no tokenizer that transformers can load"):
                load_tokenizer(tmp_path, name)
