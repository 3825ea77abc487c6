"""What configs say, in their older and newer forms, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from exeunt.compression.architecture import (
    ConfigError,
    UnsupportedModelError,
    _warn_of_token,
    load_architecture,
    read_architecture,
)
from exeunt.compression.rope import RopeTables, rotate

SIZES = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _config_json(directory: Path, **fields: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(fields))
    return directory


def test_the_sizes_of_a_real_config_are_read() -> None:
    spec = read_architecture(Qwen3Config(num_hidden_layers=2, eos_token_id=[5, 7], bos_token_id=3))
    assert (spec.family, spec.head_dim, spec.qk_norm, spec.gated, spec.norm) == (
        "qwen3",
        128,
        True,
        True,
        "rms",
    )
    assert (spec.query_size, spec.kv_size) == (32 * 128, 32 * 128)
    assert (spec.eos_token_ids, spec.bos_token_id) == ((5, 7), 3)
    assert spec.windows == (None, None)
    gpt2 = read_architecture(GPT2Config())
    assert gpt2.parameters == 124_439_808
    assert (gpt2.intermediate_size, gpt2.tied, gpt2.rope) == (3072, True, None)
    assert read_architecture(MistralConfig()).parameters == 7_241_732_096


def test_generation_config_has_the_last_word_on_the_end_of_text(tmp_path: Path) -> None:
    directory = _config_json(tmp_path, model_type="llama", eos_token_id=2, **SIZES)
    assert load_architecture(directory).eos_token_ids == (2,)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    assert load_architecture(directory).eos_token_ids == (2, 9)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("given", [-1, [3, -1], "256", ["2"], 2.5, True, {"a": 1}, [[2]]])
def test_an_end_of_text_that_is_no_token_is_refused(name: str, given: object, tmp_path: Path) -> None:
    directory = _config_json(tmp_path, model_type="llama", vocab_size=258, **SIZES)
    path = directory / name
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(said | {"eos_token_id": given}))
    with pytest.raises(ConfigError) as refusal:
        load_architecture(directory)
    token = given[-1] if isinstance(given, list) else given
    assert str(refusal.value) == (
        f"eos_token_id of {name} is {token!r}; it must be the number of a token, which is whole and at least 0, "
        "a list of such, or null where no token ends a text."
    )


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_of_text_beyond_the_vocabulary_is_left_out_with_one_warning(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_of_token.cache_clear()
    directory = _config_json(tmp_path, model_type="llama", vocab_size=258, eos_token_id=[5000, 257], **SIZES)
    if name == "generation_config.json":
        (directory / name).write_text(json.dumps({"eos_token_id": [257, 5000]}))
    for _ in range(2):
        assert load_architecture(directory).eos_token_ids == (257,)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("exeunt")]
    assert ours == [
        f"eos_token_id of {name} names 5000, which is left out: the vocabulary ends at 257, so that token never comes."
    ]


def test_a_small_gpt2_keeps_transformers_end_of_text_and_has_none() -> None:
    config = GPT2Config(vocab_size=258, n_embd=48, n_layer=2, n_head=3)
    assert config.eos_token_id == 50256
    assert read_architecture(config).eos_token_ids == ()


@pytest.mark.parametrize(
    "old",
    [
        {"rope_theta": 5000.0},
        {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {
            "rope_theta": 5000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
    ],
    ids=["default", "linear", "llama3", "yarn"],
)
def test_the_older_form_of_rope_settings_gives_the_same_frequencies(
    old: dict[str, Any], tmp_path: Path
) -> None:
    sizes = {"model_type": "llama", "max_position_embeddings": 128, **SIZES}
    scaling = dict(old.get("rope_scaling", {}))
    kind = scaling.pop("type", scaling.pop("rope_type", "default"))
    new = {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **scaling}}
    for name, form in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        _config_json(tmp_path / name, **sizes, **form)
    spec = load_architecture(tmp_path / "old")
    assert spec == load_architecture(tmp_path / "new")
    assert spec.rope is not None
    assert spec.rope.kind == kind
    if kind != "default":
        config = AutoConfig.from_pretrained(tmp_path / "old")
        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        assert spec.rope.inverse_frequencies == tuple(frequencies.tolist())
        assert spec.rope.attention_scaling == scale
    if kind == "yarn":
        assert spec.rope.attention_scaling > 1.1


def test_rope_tables_grow_without_changing_what_they_held() -> None:
    spec = read_architecture(LlamaConfig(max_position_embeddings=4096, **SIZES)).rope
    assert spec is not None
    tables = RopeTables(spec, torch.device("cpu"), torch.float32, initial=8)
    positions = torch.tensor([0, 7, 3])
    before = tables.at(positions, 8)
    later = tables.at(torch.tensor([0, 7, 3, 900]), 901)
    for old, new in zip(before, later, strict=True):
        assert torch.equal(old, new[:3])
    turned = rotate(torch.ones(4, 2, 8), *later)
    assert torch.equal(turned[0], torch.ones(2, 8)), "position 0 is not turned"
    torch.testing.assert_close(turned.norm(dim=-1), torch.full((4, 2), 8**0.5))
    size = tables.nbytes
    tables.reserve(900)
    assert tables.nbytes == size


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (MistralConfig(sliding_window=9, **SIZES), (9, 9, 9, 9)),
        (MistralConfig(sliding_window=None, **SIZES), (None,) * 4),
        (Qwen2Config(sliding_window=9, **SIZES), (None,) * 4),
        (
            Qwen2Config(use_sliding_window=True, sliding_window=9, max_window_layers=3, **SIZES),
            (None, None, None, 9),
        ),
        (
            Qwen3Config(
                use_sliding_window=True,
                sliding_window=9,
                layer_types=["sliding_attention", "full_attention"] * 2,
                **SIZES,
            ),
            (9, None, 9, None),
        ),
    ],
)
def test_each_block_has_its_window(config: Any, windows: tuple[int | None, ...]) -> None:
    assert read_architecture(config).windows == windows


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"model_type": "mixtral"}, ["'mixtral'", "gpt2, llama, mistral, qwen2, qwen3"]),
        ({"model_type": "qwen2_moe"}, ["'qwen2_moe'"]),
        ({"model_type": "not_in_transformers"}, ["'not_in_transformers'"]),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            ["'dynamic'", "default, linear, llama3, yarn"],
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 64,
                }
            },
            ["'longrope'", "default, linear, llama3, yarn"],
        ),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            ["partial_rotary_factor 0.5"],
        ),
        ({"partial_rotary_factor": 0.25}, ["partial_rotary_factor 0.25"]),
        ({"hidden_act": "mish"}, ["'mish'", "silu"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["already quantised (gptq)"]),
        ({"model_type": "gpt2", "add_cross_attention": True}, ["cross-attention"]),
        (
            {"model_type": "mistral", "layer_types": ["sliding_attention", "full_attention"] * 2},
            ["'ministral'"],
        ),
        ({"model_type": "qwen3", "layer_types": ["chunked_attention"] * 4}, ["'chunked_attention'"]),
    ],
)
def test_what_the_decoder_does_not_do_is_refused_by_name(
    fields: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    directory = _config_json(tmp_path, **{"model_type": "llama", **SIZES, **fields})
    with pytest.raises(UnsupportedModelError) as refusal:
        load_architecture(directory)
    for name in names:
        assert name in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "no config.json"),
        ('{"a": ' + "[" * 200_000, "it is nested too deeply"),
        ("{", "cannot be read as JSON"),
        ("[]", "holds list, not an object"),
        ("{}", "names no model_type"),
        (json.dumps({"model_type": "llama", **SIZES, "num_key_value_heads": 4}), "cannot share 4 key heads"),
        (json.dumps({"model_type": "llama", **SIZES, "vocab_size": 0}), "vocab_size is 0"),
        (json.dumps({"model_type": "llama", **SIZES, "hidden_size": "wide"}), "does not describe a model"),
        (json.dumps({"model_type": "gpt2", "n_embd": 50, "n_head": 3}), "50 is not a multiple of n_head 3"),
        (json.dumps({"model_type": "llama", **SIZES, "head_dim": 7}), "config"),
        (json.dumps({"model_type": "mistral", **SIZES, "sliding_window": 0}), "sliding_window is 0"),
        (
            json.dumps({"model_type": "qwen2", **SIZES, "layer_types": ["sliding_attention"] * 4}),
            "set use_sliding_window",
        ),
    ],
)
def test_a_config_that_is_no_model_says_why(content: str | None, reason: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=reason):
        load_architecture(tmp_path)
