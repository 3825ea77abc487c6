"""Configs of every family with what each of them can ask for: family and changes for `reference_models.build_model`."""

from typing import Any

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
_YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 6.0, "original_max_position_embeddings": 24}
_YARN_ALL = {
    **_YARN,
    "beta_fast": 8.0,
    "beta_slow": 2.0,
    "mscale": 0.9,
    "mscale_all_dim": 0.4,
    "truncate": False,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-untied-scaled-by-depth": (
        "gpt2",
        {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True, "n_inner": None},
    ),
    "gpt2-relu-unscaled": (
        "gpt2",
        {"activation_function": "relu", "scale_attn_weights": False, "n_layer": 3},
    ),
    "llama": ("llama", {}),
    "llama-tied-biased": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads-gelu": ("llama", {"head_dim": 20, "num_key_value_heads": 3, "hidden_act": "gelu"}),
    "llama-one-kv-head": (
        "llama",
        {"hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 1, "num_hidden_layers": 5},
    ),
    "llama-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 700.0, "factor": 3.0}},
    ),
    "llama-llama3": ("llama", {"rope_parameters": _LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": _YARN}),
    "llama-yarn-every-setting": ("llama", {"rope_parameters": _YARN_ALL}),
    "llama-yarn-attention-factor": ("llama", {"rope_parameters": {**_YARN, "attention_factor": 1.4}}),
    "mistral-window": ("mistral", {"sliding_window": 9}),
    "mistral-whole-context": ("mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window-from-block-2": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen2-unused-window": (
        "qwen2",
        {"use_sliding_window": False, "sliding_window": 7, "max_window_layers": 0},
    ),
    "qwen2-layer-types": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 14}),
    "qwen3-biased-yarn": (
        "qwen3",
        {"attention_bias": True, "head_dim": 10, "tie_word_embeddings": True, "rope_parameters": _YARN},
    ),
}
