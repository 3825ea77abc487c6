"""Answers of the packaged model with exits: whether they are what they must be, whoever decides them and wherever.

The bundle's exits, or, where there are none, a synthetic one half-way, which lets a stated share of the tokens leave.
Verified answers are held to those with exits off, approximate ones of an engine whose device decides exits in CUDA
graphs to those of an engine without graphs: the same tokens, each behind as many blocks. With steps begun ahead and in
turn, propagated and backfilled, one stream that takes the likeliest tokens and a crowd that draws by its seeds. Whether
drafts pay is not asked here: some are tried at the exit and from the text. A device that runs no graphs compares what
there is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from exeunt.compression.model import LoadedModel
from exeunt.compression.variant import Variant
from exeunt.deploy.bench_load import Trace
from exeunt.server.drafting import LOOKUP, Proposal
from exeunt.server.request import ExitPolicy, GenerationRequest
from scripts.gpu_check.counted_ticks import Ticks, counted_ticks
from scripts.gpu_check.end_to_end import packaged_model
from scripts.gpu_check.engine_speeds import BACKFILLED, FULL, HALF, INT4, OFF, VERIFIED, engine_driver
from scripts.gpu_check.paged_loads import PagedLoads
from scripts.gpu_check.prompts import packaged_prompts
from scripts.gpu_check.report import Context, Found
from scripts.gpu_check.room import give_back
from scripts.gpu_check.sizes import Sizes
from scripts.gpu_check.synthetic_exit import WANTED, rated_prompts, synthetic_exit, with_rate

VARIANTS: Final = (INT4, FULL)
"""The one that is served first."""
SIZES: Final = Sizes((17, 1), 64, 48)
QUICK_SIZES: Final = Sizes((3, 1), 12, 8)
_DRAWN: Final = 0.8  # temperature of the crowd
_TURNS: Final = 3  # of drafting
_LEAST: Final = 2.0  # seconds left without which a further engine is not begun


@dataclass(frozen=True, slots=True)
class _Engine:
    """How an engine runs."""

    name: str
    cuda_graphs: bool
    async_scheduling: bool = True


class Drafting:
    """A drafter that asks the exit, guesses, or lets a step be begun ahead, in turns by the number of tokens."""

    def __init__(self) -> None:
        self.of_exit = self.of_text = 0  # drafts so far

    def propose(self, tokens: Sequence[int], drafted: int, room: int) -> Proposal:
        """The exit's token where half sure of it, the last two tokens once more, or nothing."""
        turn = len(tokens) % _TURNS
        if turn == 0:
            return Proposal(threshold=0.5)
        return Proposal(tokens=tuple(tokens[-2:])[:room]) if turn == 1 else Proposal()

    def settled(self, stages: Sequence[int], accepted: int) -> None:
        """Nothing is learned; what drafted is counted."""
        self.of_exit += sum(stage != LOOKUP for stage in stages)
        self.of_text += sum(stage == LOOKUP for stage in stages)

    def at_stake(self, tokens: Sequence[int], drafted: int, rows: int) -> float:
        """Nothing where nothing is proposed: then the step may be begun ahead."""
        return 0.0 if len(tokens) % _TURNS == _TURNS - 1 else math.inf


PLAIN: Final = _Engine("without graphs", cuda_graphs=False)
AHEAD: Final = _Engine("in graphs", cuda_graphs=True)
IN_TURN: Final = _Engine("in graphs, steps in turn", cuda_graphs=True, async_scheduling=False)
APPROXIMATE: Final[Mapping[str, ExitPolicy]] = {"propagated": HALF, "backfilled": BACKFILLED}
Answers = dict[str, list[Trace]]
"""By load, of each prompt."""


def run(context: Context, found: Found) -> None:
    """Both variants; the engines of the first at any rate, what the time did not suffice for behind it is named."""
    sizes = QUICK_SIZES if context.quick else SIZES
    model = model_with_exits(context, found)
    prompts = packaged_prompts(sizes.most, sizes.prompt)
    held = [variant for variant in VARIANTS if variant in model.variants]
    for variant in held[:1] if context.quick else held:
        wanted: Answers = {}
        for engine in (PLAIN, AHEAD, IN_TURN):
            name = f"engine {variant.short_name} {engine.name}"
            if variant is not held[0] and not context.fits(_LEAST, name, found):
                continue
            answers = _of_engine(context, name, model, variant, engine, prompts, sizes)
            if engine is PLAIN:
                wanted = answers
            elif wanted:
                _same(context, name, answers, wanted)


def model_with_exits(context: Context, found: Found, rate: float | None = WANTED) -> LoadedModel:
    """The packaged model with its bundle's exits, or with a synthetic one that lets a share `rate` leave.

    So too where the bundle has none at which tokens of the approximate mode may leave. `rate` None: any share.
    """
    model = packaged_model(context)
    if model.certified_exits:
        found["gates"] = "calibrated"
        return model
    head = synthetic_exit(model.spec, model.device)
    found["gates"] = f"synthetic, after block {head.block} of {model.spec.blocks}"
    if rate is not None:
        head = with_rate(head, model.decoder(INT4), INT4.kv_cache, rated_prompts(context), rate)
        found["wanted_exit_rate"] = rate
    return replace(model, exits=(head,), manifest=None)


def _of_engine(
    context: Context,
    name: str,
    model: LoadedModel,
    variant: Variant,
    engine: _Engine,
    prompts: Sequence[Sequence[int]],
    sizes: Sizes,
) -> Answers:
    """The approximate answers of an engine; where it is as a server's, its verified ones are checked too."""
    drafters: list[Drafting] = []

    def new_drafter(request: GenerationRequest) -> Drafting:
        drafters.append(Drafting())
        return drafters[-1]

    driver = engine_driver(
        model,
        sizes.load(sizes.most),
        cuda_graphs=engine.cuda_graphs,
        async_scheduling=engine.async_scheduling,
        new_drafter=new_drafter,
    )
    try:
        with counted_ticks() as ticks:
            answers = {
                f"{how}, {streams} streams": _answers(driver, variant, exits, prompts, sizes, streams)
                for how, exits in APPROXIMATE.items()
                for streams in sizes.streams
            }
        if engine.cuda_graphs and model.decoder(variant).step_graphs is not None:
            _device_decided(context, name, ticks, engine)
        if engine is AHEAD:
            _verified(context, name, driver, variant, prompts, sizes)
            _had_drafts(context, name, drafters)
        return answers
    finally:
        driver.close()
        del driver
        give_back(context)


def _answers(
    driver: PagedLoads,
    variant: Variant,
    exits: ExitPolicy,
    prompts: Sequence[Sequence[int]],
    sizes: Sizes,
    streams: int,
) -> list[Trace]:
    """One stream takes the likeliest tokens, several draw."""
    load = sizes.load(streams, temperature=_DRAWN if streams > 1 else 0.0)
    return driver.run(prompts[:streams], variant, exits, load)


def _verified(
    context: Context,
    name: str,
    driver: PagedLoads,
    variant: Variant,
    prompts: Sequence[Sequence[int]],
    sizes: Sizes,
) -> None:
    """Verified answers, of the likeliest tokens and drawn by their seeds, must be those with exits off."""
    for how, temperature in (("greedy", 0.0), ("drawn", _DRAWN)):
        load = sizes.load(sizes.most, temperature=temperature)
        off, verified = (driver.run(prompts, variant, exits, load) for exits in (OFF, VERIFIED))
        drafted = {
            each: sum(getattr(trace, each) for trace in verified) for each in ("drafts", "drafts_accepted")
        }
        compared = _compared(verified, off, of_ids=True)
        told = f"{name}: verified answers, {how}, are those of exits off"
        context.report.check(told, compared["first_apart"] is None, **compared, **drafted)


def _had_drafts(context: Context, name: str, drafters: Sequence[Drafting]) -> None:
    """There must have been what is verified: drafts of the exit, and of the text."""
    exits, texts = (sum(getattr(each, of) for each in drafters) for of in ("of_exit", "of_text"))
    told = f"{name}: the exit drafted, and the text"
    context.report.check(told, exits > 0 and texts > 0, of_exit=exits, of_text=texts)


def _same(context: Context, name: str, answers: Answers, wanted: Answers) -> None:
    """Answers must be those without graphs, token for token and exit for exit, and tokens must have left."""
    for load, ours in answers.items():
        compared = _compared(ours, wanted[load])
        told = f"{name}: {load}, as without graphs"
        context.report.check(told, compared["first_apart"] is None, **compared)
    traces = [trace for each in answers.values() for trace in each]
    tokens, left = sum(len(trace.ids) for trace in traces), _left(traces)
    told = f"{name}: some tokens left, some did not"
    context.report.check(told, 0 < left < tokens, tokens=tokens, left=left)


def _device_decided(context: Context, name: str, ticks: Ticks, engine: _Engine) -> None:
    """The ways that are compared must have been taken."""
    ahead = ticks.begun_ahead > 0 or not engine.async_scheduling
    told = "the device decided exits" + (", with steps begun ahead" if engine.async_scheduling else "")
    context.report.check(
        f"{name}: {told}", ticks.on_device > 0 and ahead, ticks=ticks.on_device, ahead=ticks.begun_ahead
    )


def _compared(ours: Sequence[Trace], theirs: Sequence[Trace], *, of_ids: bool = False) -> dict[str, Any]:
    """How much was compared, how many tokens left, and the first text and token that differ, if any.

    Tokens differ by themselves or, but for `of_ids`, by the blocks that they passed.
    """
    apart = [
        [text, token]
        for text, (one, other) in enumerate(zip(ours, theirs, strict=True))
        if (token := _first_apart(one, other, of_ids)) is not None
    ]
    tokens = sum(len(trace.ids) for trace in ours)
    first = apart[0] if apart else None
    return {"tokens": tokens, "texts": len(ours), "left": _left(ours), "first_apart": first}


def _first_apart(one: Trace, other: Trace, of_ids: bool) -> int | None:
    ours, theirs = (
        [*zip(each.ids, [0] * len(each.ids) if of_ids else each.token_depths, strict=True)]
        for each in (one, other)
    )
    if ours == theirs:
        return None
    pairs = zip(ours, theirs, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))


def _left(traces: Sequence[Trace]) -> int:
    """Tokens that passed fewer blocks than there are."""
    return sum(depth < trace.blocks for trace in traces for depth in trace.token_depths)
