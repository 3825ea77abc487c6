"""What tells one checkpoint from another: its small files whole, and a sample of each file of weights."""

import hashlib
from pathlib import Path
from typing import Final

from exeunt.compression.checkpoint import Checkpoint

SAMPLES: Final = 64
SAMPLE_BYTES: Final = 4096
_SMALL_ENDINGS: Final = frozenset(
    {".json", ".model", ".txt", ".jinja"}
)  # config, generation config, tokenizer, index
_LENGTH_BYTES: Final = 8  # in front of a safetensors header, its length
_MOST_HEADER: Final = 100 * 2**20  # what the format allows


def checkpoint_contents(checkpoint: Checkpoint) -> list[str]:
    """A line for each file of the checkpoint: its name and a digest.

    Configuration and tokenizer count to the last byte. Of weights, which may be hundreds of gigabytes, the header
    counts and `SAMPLES` blocks of `SAMPLE_BYTES` spread evenly over the file, the last bytes among them: another
    training of a model changes all of them, a single number that was edited by hand may lie between two.
    """
    small = sorted(
        path for path in checkpoint.directory.iterdir() if path.suffix in _SMALL_ENDINGS and path.is_file()
    )
    whole = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in small]
    return whole + [f"{path.name} {weights_sample(path)}" for path in sorted(checkpoint.files)]


def weights_sample(path: Path) -> str:
    """A hexadecimal digest of a safetensors file's size, header and sample."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\0".encode())
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        digest.update(length)
        digest.update(file.read(min(int.from_bytes(length, "little"), _MOST_HEADER)))
        begin, last = file.tell(), max(size - SAMPLE_BYTES, 0)
        for number in range(SAMPLES):
            file.seek(begin + max(last - begin, 0) * number // (SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
