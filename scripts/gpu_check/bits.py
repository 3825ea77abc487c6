"""Whether logits are the same bits, however they came about."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from exeunt.compression.decode_graphs import DecodeGraphs
from exeunt.kernels import gpu
from scripts.gpu_check.report import Context, Found


def check_bits(
    context: Context,
    name: str,
    expected: Tensor,
    ways: Mapping[str, Callable[[], Tensor]],
    *,
    graphs: DecodeGraphs | None = None,
) -> None:
    """Every way must give the expected one's first rows, bit for bit; on a GPU that the Triton kernels computed.

    With `graphs` every way must have had one captured. Ways that the time did not suffice for are named, but the first.
    """
    before = graphs.count if graphs is not None else 0
    differ: Found = {}
    compared: list[str] = []
    for how, logits_by in ways.items():
        if compared and context.clock.left() < 0:
            break
        logits = logits_by()
        compared.append(how)
        wanted = expected[: len(logits)]
        if not torch.equal(logits, wanted):
            rows_off = (logits != wanted).any(-1).nonzero().flatten().tolist()
            differ[how] = {
                "rows": len(rows_off),
                "first": rows_off[0],
                "largest": float((logits - wanted).abs().max()),
            }
    triton = gpu.triton_runs(context.device) or not context.cuda
    finite = bool(expected.isfinite().all())
    captured = {} if graphs is None else {"graphs": graphs.count - before}
    context.report.check(
        name,
        not differ and finite and triton and captured.get("graphs", len(compared)) >= len(compared),
        compared=len(compared),
        left_out=[how for how in ways if how not in compared],
        differ=differ,
        finite=finite,
        triton=gpu.triton_runs(context.device),
        **captured,
    )
