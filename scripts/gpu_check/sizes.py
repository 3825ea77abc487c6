"""How much of a model's text is timed: streams at once, and tokens of prompts and answers."""

from dataclasses import dataclass

from exeunt.deploy.bench_load import Load


@dataclass(frozen=True, slots=True)
class Sizes:
    """Streams at once, the most wanted number first, and tokens of each prompt and answer."""

    streams: tuple[int, ...]
    prompt: int
    answer: int

    @property
    def most(self) -> int:
        """The most streams."""
        return max(self.streams)

    def load(self, streams: int, answer: int | None = None, temperature: float = 0.0) -> Load:
        """The load of so many streams."""
        return Load(streams, self.prompt, answer or self.answer, streams, temperature)


PACKAGED_SIZES, LARGE_SIZES, SMALL_SIZES = (
    Sizes((64, 1, 16), 64, 64),
    Sizes((64, 1, 16), 256, 64),
    Sizes((16, 1, 64), 256, 64),
)
"""Of the packaged model, and of a large and a small shape."""
QUICK_SIZES = (Sizes((2, 1), 16, 4), Sizes((1, 2), 16, 4), Sizes((2,), 16, 4))
"""Toy sizes of the same."""
