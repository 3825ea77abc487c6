"""Random Llamas of any size with the packaged model's tokenizer: what memory is measured on."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file

from exeunt.compression.architecture import load_architecture
from exeunt.compression.checkpoint_names import block_prefix, block_sources, shared_sources
from exeunt.deploy import packaged_model

_TOKENIZER: Final = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama's shape; four query heads share a pair of key and value heads."""

    hidden: int
    inner: int
    blocks: int
    heads: int


def write_model(size: Size, folder: Path, seed: int = 0) -> Path:
    """A checkpoint in bfloat16 with an untied output matrix, one file for every block, written one by one."""
    folder.mkdir(parents=True)
    packaged = packaged_model.path()
    for name in _TOKENIZER:
        shutil.copy(packaged / name, folder)
    config = json.loads((packaged / "config.json").read_text())
    config |= {
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.blocks,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads // 4,
        "head_dim": size.hidden // size.heads,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _write_weights(folder, torch.Generator().manual_seed(seed))
    return folder


def _write_weights(folder: Path, generator: torch.Generator) -> None:
    spec = load_architecture(folder)
    files = {"outside": {"": shared_sources(spec)}}
    files |= {
        f"block-{index}": {block_prefix(spec, index): block_sources(spec)} for index in range(spec.blocks)
    }
    weight_map: dict[str, str] = {}
    for file, groups in files.items():
        tensors = {}
        for prefix, sources in groups.items():
            for name, shape in (part for source in sources.values() for part in source.parts):
                full = name if name == "lm_head.weight" else f"model.{prefix}{name}"
                drawn = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
                tensors[full] = (torch.ones(shape) if len(shape) == 1 else drawn).to(torch.bfloat16)
        save_file(tensors, folder / f"{file}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{file}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
