"""A Llama checkpoint as a GGUF file, which llama.cpp reads; for `scripts/bench_llama_cpp.py`. Needs the package `gguf`.

As llama.cpp's own converter makes it, in float32, but without a tokenizer: who runs it gives and gets token ids.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import gguf
from torch import Tensor

from exeunt.compression.architecture import Architecture
from exeunt.compression.checkpoint import open_checkpoint
from exeunt.compression.weights import SafetensorsFiles


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Write the Llama in the folder `checkpoint`, whose rotary embedding must be unscaled, to `path`."""
    found = open_checkpoint(checkpoint)
    spec = found.spec
    if spec.family != "llama" or spec.rope is None or spec.rope.kind != "default":
        raise ValueError(f"{checkpoint} is not a Llama with unscaled rotary embedding.")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(spec.vocab_size)
    writer.add_context_length(spec.max_position_embeddings)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(spec.blocks)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_dim)
    writer.add_value_length(spec.head_dim)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_rope_dimension_count(spec.head_dim)
    writer.add_rope_freq_base(_rope_theta(checkpoint))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, spec.blocks)
    tensors = SafetensorsFiles(found.files)
    for name in tensors:
        turned = _in_pairs(name, tensors.read(name).float(), spec)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), turned.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensor_types(path: Path) -> Mapping[str, int]:
    """How many tensors of a GGUF file are of which type."""
    return Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors)


def rotary_pairs(weight: Tensor, heads: int) -> Tensor:
    """The rows of queries or keys [heads × head_dim, hidden] in the order of llama.cpp's rotary embedding.

    It turns neighbours (0 and 1, 2 and 3, …), a Hugging Face Llama 0 and head_dim / 2, 1 and head_dim / 2 + 1, ….
    """
    return weight.reshape(heads, 2, -1, weight.shape[-1]).transpose(1, 2).reshape(weight.shape)


def _in_pairs(name: str, tensor: Tensor, spec: Architecture) -> Tensor:
    heads = {"q_proj.weight": spec.heads, "k_proj.weight": spec.kv_heads}
    turned = next((count for ending, count in heads.items() if name.endswith(ending)), None)
    return tensor if turned is None else rotary_pairs(tensor, turned)


def _rope_theta(checkpoint: Path) -> float:
    return float(json.loads((checkpoint / "config.json").read_text())["rope_parameters"]["rope_theta"])
