"""A tiny checkpoint whose text is worth calibrating on: what the tests of this layer share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from exeunt.compression.decoder import Decoder
from exeunt.compression.exit_output import Shortlist
from exeunt.compression.exits import ExitConfirmation, ExitHead, ExitJudge, ExitNorm, ExitProbe

EOS = 256
HIDDEN, BLOCKS, VOCAB = 32, 4, 258
SEPARATOR = "<|endoftext|>"


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test of this layer has one thread."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; id 256 is the end of text."""
    vocab = {piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {SEPARATOR: EOS, "<|spare|>": EOS + 1}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SEPARATOR)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `tiny_checkpoint`."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def tiny_checkpoint(folder: Path) -> Path:
    """A random Llama of four blocks, each of which changes the state a little, so that exits often agree."""
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=96,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.25
            layer.mlp.down_proj.weight *= 0.1
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder(checkpoint: Path) -> Decoder:
    """The tiny checkpoint at full precision."""
    return Decoder.load(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See `some_text`."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(some_text())
    return path


def some_text() -> str:
    """Sixty documents of about 150 letters."""
    generator = np.random.default_rng(3)
    words = ["".join(generator.choice(list("abcdefgh"), size=generator.integers(2, 7))) for _ in range(40)]
    documents = [" ".join(generator.choice(words, size=30)) for _ in range(60)]
    return SEPARATOR.join(documents)


def random_exit(block: int, seed: int, hidden: int = HIDDEN) -> ExitHead:
    """An exit whose gate says something different for every state."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=g) * scale

    norm = ExitNorm("rms", 1.0 + normal(hidden, scale=0.1), None, 1e-6)
    probe = ExitProbe(normal(8, hidden, scale=0.3), normal(8), normal(8), torch.tensor(0.0))
    combine = torch.tensor([1.0, 0.2, 0.1, 0.0])
    return ExitHead(block, norm, normal(hidden, hidden, scale=0.05), probe, combine, 0.5)


def confirmed_exit(block: int, seed: int, list_ratio: float | None = 0.7) -> ExitHead:
    """`random_exit` with a shortlist of every third token, which all logits confirm unless the ratio is None."""
    g = torch.Generator().manual_seed(seed + 50)
    first, second = (
        ExitJudge(
            torch.randn(4, 8, generator=g) / 5,
            torch.zeros(8),
            torch.randn(8, generator=g) / 2,
            torch.tensor(1.0),
        )
        for _ in range(2)
    )
    last = None
    if list_ratio is not None:
        last = ExitConfirmation(second, torch.tensor([1.0, 0.3, 0.1, 1.0]), list_ratio)
    shortlist = Shortlist(torch.arange(0, VOCAB, 3))
    return replace(random_exit(block, seed), judge=first, shortlist=shortlist, confirmation=last)
