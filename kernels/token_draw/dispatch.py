"""The public token draw: native on the CPU, Triton on a GPU, plain PyTorch elsewhere."""

import torch
from torch import Tensor

from exeunt.kernels.gpu import check_one_device, triton_runs
from exeunt.kernels.native.library import native_library
from exeunt.kernels.token_draw.reference import draw_tokens_reference


def draw_tokens(
    logits: Tensor, scores: Tensor, temperatures: Tensor, keys: Tensor, token_keys: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a token for each row, [rows] int64, and its log-probability under `logits`, [rows] float32.

    `logits` and `scores` are [rows, vocab] float32, `scores` (perhaps the same tensor) being what is drawn from; the
    token maximises scores / temperature + Gumbel noise of the row's `keys` [rows, 2] and the tokens' [vocab], int32.
    `temperatures` [rows] float32: at 0 the highest score is taken, the lowest id among equals. A log-probability is NaN
    where the row is not usable: NaN or an infinite value in it, or nothing left to choose from. Raises ValueError for
    other shapes and for tensors of several devices, TypeError for other dtypes.
    """
    tensors = (logits, scores, temperatures, keys, token_keys)
    rows, vocab = _checked(*tensors)
    if triton_runs(logits.device):
        from exeunt.kernels.token_draw.triton import draw_tokens_triton  # Triton is there only where a GPU is

        return draw_tokens_triton(*tensors)
    library = native_library()
    if library is None or not all(tensor.is_contiguous() and tensor.is_cpu for tensor in tensors):
        return draw_tokens_reference(*tensors)
    ids, logprobs = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    library.draw(
        ids.data_ptr(),
        logprobs.data_ptr(),
        logits.data_ptr(),
        scores.data_ptr(),
        rows,
        vocab,
        temperatures.data_ptr(),
        keys.data_ptr(),
        token_keys.data_ptr(),
        torch.get_num_threads(),
    )
    return ids, logprobs


def _checked(
    logits: Tensor, scores: Tensor, temperatures: Tensor, keys: Tensor, token_keys: Tensor
) -> tuple[int, int]:
    """Return the rows and the vocabulary's size; raises ValueError or TypeError."""
    rows, vocab = logits.shape
    if (
        vocab < 1
        or scores.shape != logits.shape
        or temperatures.shape != (rows,)
        or keys.shape != (rows, 2)
        or token_keys.shape != (vocab,)
    ):
        raise ValueError(
            f"logits {list(logits.shape)}, scores {list(scores.shape)}, temperatures {list(temperatures.shape)}, keys "
            f"{list(keys.shape)} and token keys {list(token_keys.shape)} do not fit each other"
        )
    if not logits.dtype == scores.dtype == temperatures.dtype == torch.float32:
        raise TypeError(
            f"logits, scores and temperatures are {logits.dtype}, {scores.dtype} and {temperatures.dtype}, expected "
            "float32"
        )
    if not keys.dtype == token_keys.dtype == torch.int32:
        raise TypeError(f"keys and token keys are {keys.dtype} and {token_keys.dtype}, expected int32")
    check_one_device(
        "logits, scores, temperatures, keys and token keys", logits, scores, temperatures, keys, token_keys
    )
    return rows, vocab
