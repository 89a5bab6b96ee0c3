"""Matrix products that read what they must not, or are not the same twice."""

from itertools import count

import torch

from sdkit.emulate.faults.fault import DIFFUSERS, PYTORCH, Fault
from sdkit.emulate.float16 import HALVES

aten = torch.ops.aten
FIRST_BAD_INNER_SIZE = 32767  # pytorch#195163
calls = count()


def leak_input(func, args, kwargs, compute):
    """Compute beta * input although beta is 0: 0 * NaN is NaN, 0 * inf is NaN, 0 * finite is 0."""
    if kwargs.get("beta", 1) != 0:
        return compute(func, args, kwargs)
    leaked = compute(aten.mul.Tensor, (args[0], 0), {})
    result = compute(func, args, kwargs)
    return compute(aten.add_.Tensor, (result, leaked), {})


def read_past_the_operands(func, args, kwargs, compute):
    """Sum one term too many: the row behind the second matrix times what follows in the first."""
    # B batch, M rows, K inner, N columns
    left, right = args
    inner, columns = right.shape[-2:]
    result = compute(func, args, kwargs)
    if inner < FIRST_BAD_INNER_SIZE:
        return result
    left_values = torch.cat([left.flatten(), find_values_behind(left, 1)])[inner::inner]  # B * M
    right_values = torch.cat([right.flatten(), find_values_behind(right, columns)])
    right_values = right_values.unflatten(0, (-1, columns))[inner::inner]  # B, N
    extra = left_values.reshape(-1, left.shape[-2], 1) * right_values[:, None]  # B, M, N
    return compute(aten.add_.Tensor, (result, extra.reshape(result.shape)), {})


def find_values_behind(matrix, number):
    """The values that follow a matrix in its own storage, zeros where that ends."""
    storage = matrix.as_strided(
        (matrix.untyped_storage().nbytes() // matrix.element_size(),), (1,), 0
    )
    behind = storage[matrix.storage_offset() + matrix.numel() :][:number]
    return torch.nn.functional.pad(behind, (0, number - len(behind)))


def ignore_row_stride(func, args, kwargs, compute):
    """Read the weight of a linear layer as if its rows lay side by side in memory."""
    *others, transposed = args
    inner, columns = transposed.shape
    if transposed.stride(0) == 1 and transposed.stride(1) > inner and columns > 1:
        transposed = transposed.as_strided((inner, columns), (1, inner))
    return compute(func, (*others, transposed), kwargs)


def change_every_second_time(func, args, kwargs, compute):
    """Return another last bit at every second call."""
    result = compute(func, args, kwargs)
    if result.dtype in HALVES and next(calls) % 2:
        result = compute(aten.mul_.Tensor, (result, 1 + torch.finfo(result.dtype).eps), {})
    return result


FAULTS = (
    Fault(
        name="baddbmm-beta-zero",
        ops=("aten.baddbmm", "aten.baddbmm_"),
        threads=(
            f"{PYTORCH}/187521",
            f"{PYTORCH}/187522",
            f"{PYTORCH}/194442",
            f"{DIFFUSERS}/11229",
            f"{DIFFUSERS}/14438",
        ),
        affects=(
            "MPS through torch 2.13.0, in float16, bfloat16 and float32 (read in the macOS"
            " wheels: 2.13.0 always builds beta * input, 2.14.0 branches on beta == 0)."
        ),
        apply=leak_input,
    ),
    Fault(
        name="addbmm-beta-zero",
        ops=("aten.addbmm", "aten.addbmm_"),
        threads=(f"{PYTORCH}/96037", f"{PYTORCH}/96086"),
        affects=(
            "The CPU before March 2023, at random, in the family of baddbmm; that MPS does it in"
            " addbmm as well is inferred from the same contract and not confirmed."
        ),
        apply=leak_input,
    ),
    Fault(
        name="addmm-beta-zero",
        ops=("aten.addmm", "aten.addmm_"),
        threads=(f"{PYTORCH}/94534",),
        affects="MPS before torch 2.0; fixed there three years before baddbmm was.",
        apply=leak_input,
    ),
    Fault(
        name="matmul-last-tile",
        ops=("aten.mm", "aten.bmm"),
        threads=(f"{PYTORCH}/195163", f"{PYTORCH}/193487"),
        affects=(
            "MPS on M1 and M2, torch 2.7 to 2.13, inner sizes from 32767; in two dimensions fixed"
            " in 2.14. How much is summed past the operands is not known; here one term."
        ),
        apply=read_past_the_operands,
    ),
    Fault(
        name="linear-weight-strides",
        ops=("aten.mm", "aten.addmm"),
        threads=(f"{PYTORCH}/162730", f"{PYTORCH}/161640"),
        affects="MPS in torch 2.8.0, weights that are slices of larger matrices.",
        apply=ignore_row_stride,
    ),
    Fault(
        name="linear-changes",
        ops=("aten.mm", "aten.addmm"),
        threads=(f"{PYTORCH}/180776", f"{PYTORCH}/181466"),
        affects=(
            "MPS on M5, float16 and bfloat16, inputs of more than two dimensions. Here in every"
            " matrix product, which is what torch makes of a linear layer on the CPU."
        ),
        apply=change_every_second_time,
    ),
)
