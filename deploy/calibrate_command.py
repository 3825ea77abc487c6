"""`exeunt calibrate`: its words on the command line."""

from pathlib import Path
from typing import Annotated

import typer

from exeunt.deploy.arguments import block, numbers, one_of
from exeunt.deploy.cli_options import DEVICE, LEVEL, count, log_from

_CHECKPOINT = typer.Argument(metavar="MODEL", help="A checkpoint's directory or a Hugging Face id.")
_OUT = typer.Option(help="Where the bundle goes; one that is there already is replaced.", show_default=False)
_TEXT = typer.Option(
    help="Text to calibrate on: a file (txt or JSONL), a folder, or hf:NAME[[:CONFIG]:SPLIT]. Needed, but for the "
    "packaged model, which has a text of its own."
)
_TOKENS = count("--tokens", 1, "Use so many tokens of it. [by preset: 24000, 48000, all]")
_PRESET = typer.Option(
    help="quick, default or thorough: how much text is looked at, how many alternatives are tried, and what the report "
    "compares."
)
_EXITS = typer.Option(help="`auto`, or the blocks that certified exits follow, e.g. 3,8.")
_DRAFTING_EXIT = typer.Option(
    help="`auto`, `none`, or the block that the exit follows which drafts when verified."
)
_LINEAR_BLOCK = typer.Option(help="`auto`, `none`, or the block to replace.")
_WEIGHTS = typer.Option(help="both, or int4 or full alone: what the bundle holds, and can be asked for.")
_GROUP = count(
    "--group-size", 2, "Inputs of a layer that share an INT4 scale: 32, 64, 128 or another even number."
)
_KV = typer.Option(help="int4 adds the INT4 KV cache, full does not.")
_RISK = typer.Option(help="Disagreement targets of approximate exits: shares of the tokens that leave.")
_NLL_RISK = typer.Option(
    help="Targets of the other risk: by how many nats per token exits may raise the mean NLL; `none` for none."
)
_SEED = count("--seed", 0, "Same seed, same bundle, on one machine.")
_COSTS = typer.Option(
    help="remembered: exits are chosen by times measured before on this machine, if there are any; anew: measure again."
)
_WORK = typer.Option(
    metavar="DIR",
    help="Keep unfinished work there, to go on from by the same command; `none` keeps nothing; `auto` keeps it beside "
    "--out for models of at least 200M parameters.",
)


def calibrate(
    model: Annotated[str, _CHECKPOINT],
    out: Annotated[Path, _OUT],
    data: Annotated[str | None, _TEXT] = None,
    tokens: Annotated[int | None, _TOKENS] = None,
    preset: Annotated[str, _PRESET] = "default",
    exits: Annotated[str, _EXITS] = "auto",
    drafting_exit: Annotated[str, _DRAFTING_EXIT] = "auto",
    linear_block: Annotated[str, _LINEAR_BLOCK] = "auto",
    weights: Annotated[str, _WEIGHTS] = "both",
    group_size: Annotated[int, _GROUP] = 32,
    kv: Annotated[str, _KV] = "int4",
    risk: Annotated[str, _RISK] = "0.01,0.02,0.05,0.1",
    nll_risk: Annotated[str, _NLL_RISK] = "0.01,0.02,0.05,0.1",
    device: Annotated[str, DEVICE] = "auto",
    seed: Annotated[int, _SEED] = 0,
    costs: Annotated[str, _COSTS] = "remembered",
    work: Annotated[str, _WORK] = "auto",
    log_level: Annotated[str, LEVEL] = "warning",
) -> None:
    """Make a bundle from a model: INT4 weights, a linear block, exits with certified thresholds."""
    log_from(log_level)
    from exeunt.calibration.option_limits import check_names
    from exeunt.calibration.options import CalibrationOptions
    from exeunt.calibration.presets import PRESETS
    from exeunt.deploy.calibrate import calibration_data, check_checkpoint, check_out, make_bundle
    from exeunt.deploy.loading import resolve_device

    check_names({"MODEL": model, "--out": out, "--data": data, "--work": work})
    resolve_device(device)
    check_checkpoint(model)
    check_out(out)
    sizes = dict(PRESETS[one_of("--preset", preset, *PRESETS)])
    if tokens is not None:
        sizes["tokens"] = tokens
    make_bundle(
        CalibrationOptions(
            model=model,
            out=out,
            exits="auto" if exits == "auto" else numbers("--exits", exits, int),
            drafting_exit=block("--drafting-exit", drafting_exit),
            linear_block=block("--linear-block", linear_block),
            weights=one_of("--weights", weights, "both", "int4", "full"),
            group_size=group_size,
            kv_cache=one_of("--kv", kv, "int4", "full"),
            risk=numbers("--risk", risk, float),
            nll_risk=() if nll_risk == "none" else numbers("--nll-risk", nll_risk, float),
            device=device,
            seed=seed,
            costs=one_of("--costs", costs, "remembered", "anew"),
            work={"auto": "auto", "none": None}.get(work, Path(work)),
            data=calibration_data(model, data),
            **sizes,
        )
    )
