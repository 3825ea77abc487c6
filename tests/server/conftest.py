"""A tiny real model for the engine: a random Llama with a byte tokenizer, and exits whose gates open often."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitConfirmation, ExitHead, ExitJudge, ExitNorm, ExitProbe
from exeunt.compression.linear_block import LinearBlock
from exeunt.compression.model import LoadedModel, load_plain_model

EOS = 256
HIDDEN, BLOCKS, VOCAB = 64, 6, 264


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; id 256 is the end of text, the ids up to 263 are unused pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(alphabet)} | {"<|endoftext|>": EOS}
    vocab |= {f"<|spare{i}|>": EOS + i for i in range(1, VOCAB - EOS)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose logits have clear winners, saved as a Hugging Face checkpoint."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=96,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def random_exit(block: int, model: LoadedModel, seed: int) -> ExitHead:
    """An exit whose gate says something different for every state, about half of it above 0.5."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * scale

    norm = ExitNorm("rms", torch.ones(HIDDEN, dtype=model.dtype), None, model.spec.norm_eps)
    probe = ExitProbe(normal(8, HIDDEN, scale=0.3), normal(8), normal(8), torch.tensor(0.0))
    adapter = normal(HIDDEN, HIDDEN, scale=0.05).to(model.dtype)
    return ExitHead(block, norm, adapter, probe, torch.tensor([1.0, 0.2, 0.1, 0.0]), 0.5)


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path) -> LoadedModel:
    """The tiny checkpoint at full depth, with random exits after blocks 1 and 3 and a linear block.

    The first exit has a judge and looks at a shortlist, which all logits confirm; the second looks at all tokens.
    """
    return with_exits(load_plain_model(tiny_checkpoint, device="cpu", dtype=torch.float32))


def with_exits(model: LoadedModel) -> LoadedModel:
    """The same with `tiny_model`'s exits and linear block, in the model's dtype."""
    g = torch.Generator().manual_seed(3)
    judge = ExitJudge(
        torch.randn(5, 8, generator=g) / 5, torch.zeros(8), torch.randn(8, generator=g), torch.zeros(())
    )
    shortlist = Shortlist(torch.randperm(VOCAB, generator=g)[: VOCAB // 3].sort().values)
    last = ExitConfirmation(judge, torch.tensor([1.0, 0.2, 0.1, 1.5]), 0.5)
    first = replace(random_exit(1, model, 1), judge=judge, shortlist=shortlist, confirmation=last)
    exits = (first, random_exit(3, model, 2))
    g = torch.Generator().manual_seed(3)
    linear = LinearBlock(
        4,
        torch.randn(4, HIDDEN, generator=g) * 0.1,
        torch.randn(HIDDEN, 4, generator=g) * 0.1,
        torch.zeros(HIDDEN),
    )
    decoder = model.decoders[("full", False)]
    linear = linear.to(model.device, model.dtype)
    decoders_by_form = dict(model.decoders) | {("full", True): decoder.with_linear_block(linear)}
    return replace(model, exits=exits, decoders=decoders_by_form)
