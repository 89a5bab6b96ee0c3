"""What a training step writes: transposed weights, AdamW, gradients that were scaled."""

import torch

from sdkit.diagnosis.probes.probe import HALF, SINGLE, Probe, compare, compare_with, draw
from sdkit.emulate import suspended
from sdkit.emulate.faults.fault import PYTORCH

LOSS_SCALE = 1024.0
SINGLE_TOLERANCE = 1e-5  # of a few float32 operations one after the other


def measure_strided_updates(device, thorough):
    rows, columns = (320, 1280) if thorough else (8, 12)
    inputs = [draw(columns, rows, seed=seed).abs() + 1 for seed in range(3)]

    def divide(weight, update, scale):
        return weight.clone().t().addcdiv_(update.t(), scale.t(), value=-0.5)

    def multiply(weight, update, scale):
        return weight.clone().t().addcmul_(update.t(), scale.t(), value=0.5)

    return [
        check
        for name, function in (("addcdiv_", divide), ("addcmul_", multiply))
        for check in compare(
            name, function, *inputs, device=device, dtype=SINGLE, allowed=SINGLE_TOLERANCE
        )
    ]


def measure_adamw(device, thorough):
    rows, columns = (320, 1280) if thorough else (8, 12)
    checks = []
    for name, is_transposed in (("contiguous", False), ("transposed", True)):
        weight, gradient = draw(columns, rows, seed=1), draw(columns, rows, seed=2)

        def step(weight, gradient, is_transposed=is_transposed):
            start = weight.clone()
            parameter = torch.nn.Parameter(start.t() if is_transposed else start)
            parameter.grad = gradient.t() if is_transposed else gradient
            torch.optim.AdamW([parameter], lr=0.1).step()
            moved = parameter.detach()
            return (moved.t() if is_transposed else moved) - weight

        # The step alone is compared, which moves every weight by about the learning rate.
        checks += compare(
            name, step, weight, gradient, device=device, dtype=SINGLE, allowed=1e-4
        )  # fmt: skip
    return checks


def measure_unscaling(device, thorough):
    number = 10**6 if thorough else 100
    checks = []
    for dtype in (HALF, SINGLE):
        true_gradient = draw(number).to(dtype)
        with suspended():
            scaled = (true_gradient.float() * LOSS_SCALE).to(dtype)
        gradient = scaled.to(device).clone()
        found_inf = torch.zeros(1).to(device)
        inverse_scale = torch.full((1,), 1 / LOSS_SCALE).to(device)
        torch._amp_foreach_non_finite_check_and_unscale_([gradient], found_inf, inverse_scale)
        name = str(dtype).removeprefix("torch.")
        checks += compare_with(name, gradient, true_gradient)
    return checks


PROBES = (
    Probe(
        name="addcdiv-transposed",
        contract="addcdiv_ and addcmul_ write into a transposed tensor.",
        guards=("training",),
        threads=(f"{PYTORCH}/118115",),
        measure=measure_strided_updates,
    ),
    Probe(
        name="adamw-step",
        contract="One AdamW step moves weights as on the CPU, transposed ones too.",
        guards=("training",),
        threads=(f"{PYTORCH}/118115",),
        measure=measure_adamw,
    ),
    Probe(
        name="unscale-gradients",
        contract="GradScaler's unscaling keeps float16 gradients.",
        guards=("training", "float16"),
        threads=(f"{PYTORCH}/184286", f"{PYTORCH}/142397"),
        measure=measure_unscaling,
    ),
)
