"""What a checkpoint's config says about the model: one spec that the decoder runs for every supported family.

Supported are GPT-2, Llama, Mistral, Qwen2 and Qwen3. Whatever a config asks for that the decoder does not do is
refused here by name; nothing in a config that would change the logits is passed over.
"""

import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import torch

from exeunt.compression.rope import SUPPORTED_ROPE_TYPES, RopeSpec, rope_spec

Family = Literal["gpt2", "llama", "mistral", "qwen2", "qwen3"]
SUPPORTED_FAMILIES: tuple[Family, ...] = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
SUPPORTED_ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu")
_log = logging.getLogger(__name__)

_ACTIVATION_ALIASES = {"swish": "silu", "gelu_python": "gelu", "gelu_python_tanh": "gelu_pytorch_tanh"}


class UnsupportedModelError(ValueError):
    """The model asks for something the decoder does not do; the message names it and lists what is supported."""


class ConfigError(ValueError):
    """A checkpoint's config.json is missing, unreadable or contradicts itself."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """Everything the decoder needs to know about a model besides its weights."""

    family: Family
    vocab_size: int
    hidden_size: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    norm: Literal["rms", "layer"]  # layer norms have biases, RMS norms have none
    norm_eps: float
    activation: str  # one of SUPPORTED_ACTIVATIONS
    gated: bool  # down(activation(gate(x)) * up(x)) rather than down(activation(up(x)))
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMS norm over each head of queries and keys, before the rotation
    rope: RopeSpec | None  # None: learned position embeddings
    tied: bool  # the output matrix is the token embedding
    windows: tuple[int | None, ...]  # [blocks], sliding attention window in tokens, None is the whole context
    attention_scales: tuple[float, ...]  # [blocks], what the scores are multiplied by
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str  # what the checkpoint is stored in, as config.json says: "float32", "bfloat16" or "float16"

    @property
    def query_size(self) -> int:
        """Width of all queries of a token, heads × head_dim."""
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of one block's keys, and of its values."""
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Number of weights, a tied output matrix counted once."""
        return self.block_parameters * self.blocks + self._outer_parameters

    @property
    def block_parameters(self) -> int:
        """Number of weights of one block, norms and biases included."""
        hidden, inner, qkv = self.hidden_size, self.intermediate_size, self.query_size + 2 * self.kv_size
        fan_in = (2 if self.gated else 1) * inner
        linears = hidden * qkv + self.query_size * hidden + hidden * fan_in + inner * hidden
        biases = qkv * self.qkv_bias + hidden * self.out_bias + (fan_in + hidden) * self.mlp_bias
        return linears + biases + 2 * self._norm_parameters + 2 * self.head_dim * self.qk_norm

    @property
    def _norm_parameters(self) -> int:
        return self.hidden_size * (2 if self.norm == "layer" else 1)

    @property
    def _outer_parameters(self) -> int:
        matrices = self.vocab_size * (1 if self.tied else 2)
        positions = 0 if self.rope else self.max_position_embeddings
        return (matrices + positions) * self.hidden_size + self._norm_parameters


def load_architecture(directory: Path) -> Architecture:
    """The architecture of a checkpoint or bundle directory, from its config.json and generation_config.json.

    Raises ConfigError where there is no readable config, UnsupportedModelError for what the decoder does not do.
    """
    raw = _read_json(directory / "config.json")
    if raw is None:
        raise ConfigError(f"{directory} has no config.json; give the directory of a Hugging Face checkpoint.")
    _refuse_before_parsing(raw, directory)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory)
    except Exception as error:  # transformers raises many kinds here, all about the file's content
        raise ConfigError(f"{directory / 'config.json'} does not describe a model: {error}") from error
    generation = _read_json(directory / "generation_config.json") or {}
    return read_architecture(config, eos_token_id=generation.get("eos_token_id"))


def read_architecture(config: Any, *, eos_token_id: object = None) -> Architecture:
    """The architecture of a transformers config.

    `eos_token_id` is what generation_config.json says, which has the last word where it says anything (Llama 3's
    instruct models end turns with ids that only stand there): a token's id, a list of them, or None. An id beyond the
    vocabulary is left out with a warning. Raises UnsupportedModelError or ConfigError.
    """
    family = _family(config.model_type)
    _refuse_quantised(getattr(config, "quantization_config", None))
    spec = _gpt2(config, eos_token_id) if family == "gpt2" else _llama_like(config, family, eos_token_id)
    check_architecture(spec)
    return spec


def _refuse_before_parsing(raw: dict[str, Any], directory: Path) -> None:
    if "model_type" not in raw:
        raise ConfigError(
            f"{directory / 'config.json'} names no model_type; it is not a Hugging Face config."
        )
    _family(str(raw["model_type"]))
    _token_ids("config.json", raw.get("eos_token_id"))
    _refuse_quantised(raw.get("quantization_config"))


def _family(model_type: str) -> Family:
    for family in SUPPORTED_FAMILIES:
        if family == model_type:
            return family
    raise UnsupportedModelError(
        f"Architecture {model_type!r} is not supported; supported are {', '.join(SUPPORTED_FAMILIES)}."
    )


def _refuse_quantised(quantisation: Any) -> None:
    if quantisation:
        settings = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
        method = settings.get("quant_method", "an unnamed method")
        raise UnsupportedModelError(
            f"The checkpoint is already quantised ({method}); give the full-precision checkpoint "
            "(float32, bfloat16 or float16), which `exeunt calibrate` quantises itself."
        )


def _gpt2(config: Any, eos_token_id: object) -> Architecture:
    if config.add_cross_attention:
        raise UnsupportedModelError(
            "GPT-2 with cross-attention is not supported; supported is the plain decoder."
        )
    head_dim = _quotient(config.n_embd, config.n_head, "n_embd", "n_head")
    scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
    by_depth = config.scale_attn_by_inverse_layer_idx
    return Architecture(
        family="gpt2",
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        blocks=config.n_layer,
        heads=config.n_head,
        kv_heads=config.n_head,
        head_dim=head_dim,
        intermediate_size=config.n_inner or 4 * config.n_embd,
        norm="layer",
        norm_eps=config.layer_norm_epsilon,
        activation=_activation(config.activation_function),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=False,
        rope=None,
        tied=bool(config.tie_word_embeddings),
        windows=(None,) * config.n_layer,
        attention_scales=tuple(scale / (i + 1 if by_depth else 1) for i in range(config.n_layer)),
        max_position_embeddings=config.n_positions,
        bos_token_id=config.bos_token_id,
        eos_token_ids=_eos_token_ids(config, eos_token_id),
        dtype=_dtype(config),
    )


def _llama_like(config: Any, family: Family, eos_token_id: object) -> Architecture:
    head_dim = getattr(config, "head_dim", None) or _quotient(
        config.hidden_size, config.num_attention_heads, "hidden_size", "num_attention_heads"
    )
    attention_bias = bool(getattr(config, "attention_bias", False))
    return Architecture(
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        blocks=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        intermediate_size=config.intermediate_size,
        norm="rms",
        norm_eps=config.rms_norm_eps,
        activation=_activation(config.hidden_act),
        gated=True,
        qkv_bias=family == "qwen2" or (family in ("llama", "qwen3") and attention_bias),
        out_bias=family in ("llama", "qwen3") and attention_bias,
        mlp_bias=family == "llama" and bool(config.mlp_bias),
        qk_norm=family == "qwen3",
        rope=_rope(config, head_dim),
        tied=bool(config.tie_word_embeddings),
        windows=_windows(config, family),
        attention_scales=(head_dim**-0.5,) * config.num_hidden_layers,
        max_position_embeddings=config.max_position_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_ids=_eos_token_ids(config, eos_token_id),
        dtype=_dtype(config),
    )


def _rope(config: Any, head_dim: int) -> RopeSpec:
    parameters = config.rope_parameters or {}
    kind = parameters.get("rope_type", parameters.get("type"))
    if kind not in SUPPORTED_ROPE_TYPES:
        named = repr(kind) if kind else f"per layer type ({', '.join(map(str, parameters))})"
        why = " (its base moves with the length of the text)" if kind == "dynamic" else ""
        raise UnsupportedModelError(
            f"RoPE type {named} is not supported{why}; supported are {', '.join(SUPPORTED_ROPE_TYPES)}."
        )
    rotary = parameters.get("partial_rotary_factor")
    if rotary not in (None, 1, 1.0):
        raise UnsupportedModelError(
            f"Partial rotary embedding (partial_rotary_factor {rotary}) is not supported; supported is 1."
        )
    if head_dim % 2:
        raise ConfigError(f"RoPE needs an even head size; this config's is {head_dim}.")
    return rope_spec(kind, head_dim, config)


def _windows(config: Any, family: Family) -> tuple[int | None, ...]:
    """The window of every block: Mistral's holds for all of them, Qwen's for those that `layer_types` names.

    A Mistral config that names layer types never comes here: transformers reads it as a model of its own.
    """
    window: int | None = getattr(config, "sliding_window", None)
    layer_types: list[str] = getattr(config, "layer_types", None) or []
    blocks: int = config.num_hidden_layers
    if family == "llama":
        return (None,) * blocks
    if family == "mistral":
        return (window,) * blocks
    kinds = {"full_attention": None, "sliding_attention": window}
    for kind in layer_types:
        if kind not in kinds:
            raise UnsupportedModelError(
                f"Layer type {kind!r} is not supported; supported are {', '.join(kinds)}."
            )
    if len(layer_types) != config.num_hidden_layers:
        raise ConfigError(
            f"layer_types names {len(layer_types)} blocks; the config has {config.num_hidden_layers}."
        )
    if "sliding_attention" in layer_types and window is None:
        raise ConfigError(
            "layer_types names sliding_attention but there is no window: set use_sliding_window."
        )
    return tuple(kinds[kind] for kind in layer_types)


def _activation(name: str) -> str:
    known = _ACTIVATION_ALIASES.get(name, name)
    if known not in SUPPORTED_ACTIVATIONS:
        raise _unsupported_activation(name)
    return known


def _unsupported_activation(name: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Activation {name!r} is not supported; supported are {', '.join(SUPPORTED_ACTIVATIONS)}."
    )


def check_architecture(spec: Architecture) -> None:
    """Raise ConfigError where the sizes of an architecture are none, or do not fit one another."""
    sizes = ("vocab_size", "hidden_size", "blocks", "heads", "kv_heads", "head_dim", "intermediate_size")
    for name in (*sizes, "max_position_embeddings"):
        if getattr(spec, name) < 1:
            raise ConfigError(f"{name} is {getattr(spec, name)}; it must be at least 1.")
    if spec.heads % spec.kv_heads:
        raise ConfigError(f"{spec.heads} query heads cannot share {spec.kv_heads} key heads evenly.")
    if any(window is not None and window < 1 for window in spec.windows):
        raise ConfigError(
            f"sliding_window is {min(w for w in spec.windows if w is not None)}; it must be at least 1."
        )
    if spec.activation not in SUPPORTED_ACTIVATIONS:
        raise _unsupported_activation(spec.activation)
    if spec.norm_eps < 0:
        raise ConfigError(f"the norms' epsilon is {spec.norm_eps}; it must be at least 0.")
    dtype = getattr(torch, spec.dtype, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(f"dtype is {spec.dtype!r}; it must name a floating-point type such as bfloat16.")
    for token in (*spec.eos_token_ids, *(() if spec.bos_token_id is None else (spec.bos_token_id,))):
        if token < 0:
            raise ConfigError(f"a special token is {token}; the number of a token is at least 0.")
    if any(token >= spec.vocab_size for token in spec.eos_token_ids):
        raise ConfigError(f"a token that ends texts is beyond the vocabulary of {spec.vocab_size}.")
    if (spec.norm, spec.gated, spec.rope is None) != _FORM["gpt2" if spec.family == "gpt2" else "others"]:
        raise ConfigError(f"norms, gate and positions are not those of a {spec.family} model.")
    for name, per_block in (("windows", spec.windows), ("attention_scales", spec.attention_scales)):
        if len(per_block) != spec.blocks:
            raise ConfigError(f"{name} is about {len(per_block)} blocks; the model has {spec.blocks}.")
    if spec.rope is not None and 2 * len(spec.rope.inverse_frequencies) != spec.head_dim:
        raise ConfigError(
            f"{len(spec.rope.inverse_frequencies)} RoPE frequencies do not turn heads of {spec.head_dim} values."
        )


_FORM: Final = {"gpt2": ("layer", False, True), "others": ("rms", True, False)}
"""By family: which norms, whether the MLP is gated, whether positions are learned."""


def _quotient(whole: int, parts: int, whole_name: str, parts_name: str) -> int:
    if parts < 1 or whole % parts:
        raise ConfigError(f"{whole_name} {whole} is not a multiple of {parts_name} {parts}.")
    return whole // parts


def _eos_token_ids(config: Any, generation: object) -> tuple[int, ...]:
    """The ids that end a text, those of generation_config.json where it names any.

    An id beyond the vocabulary is one that the model never writes, and transformers saves such: a GPT-2 with a small
    vocabulary keeps the default 50256. It is left out with a warning; what no vocabulary could hold is refused.
    """
    source = "config.json" if generation is None else "generation_config.json"
    given = config.eos_token_id if generation is None else generation
    ids: list[int] = []
    for token in _token_ids(source, given):
        if token < config.vocab_size:
            ids.append(token)
        else:
            _warn_of_token(source, token, config.vocab_size)
    return tuple(ids)


def _token_ids(source: str, given: object) -> list[int]:
    ids = given if isinstance(given, list | tuple) else [] if given is None else [given]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise ConfigError(
                f"eos_token_id of {source} is {token!r}; it must be the number of a token, which is whole and at "
                "least 0, a list of such, or null where no token ends a text."
            )
    return list(ids)


@cache  # a config is read several times on the way to a model
def _warn_of_token(source: str, token: int, vocab_size: int) -> None:
    _log.warning(
        "eos_token_id of %s names %d, which is left out: the vocabulary ends at %d, so that token never comes.",
        source,
        token,
        vocab_size - 1,
    )


def _dtype(config: Any) -> str:
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except RecursionError as error:
        raise ConfigError(
            f"{path} cannot be read as JSON, it is nested too deeply; copy the checkpoint again."
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds {type(content).__name__}, not an object.")
    return content
