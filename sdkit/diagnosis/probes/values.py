"""Numbers drawn, copied, written, kept, summed and stretched."""

import torch
import torch.nn.functional as F

from sdkit.device import synchronize
from sdkit.diagnosis.probes.probe import HALF, SINGLE, Check, Probe, compare, count_different, draw
from sdkit.emulate import suspended
from sdkit.emulate.faults.fault import DIFFUSERS, PYTORCH

NAN = float("nan")
STANDARD_ERRORS = 6  # of a mean and a variance: an honest generator is beyond in one of 5e8


def make_generator(device):
    """A seeded generator of the device's own, so that the global one stays as it is."""
    return torch.Generator(device).manual_seed(0)


def measure_normal_draws(device, thorough):
    checks = []
    number = 10**7 if thorough else 10**6
    for dtype in (SINGLE, HALF):
        drawn = torch.randn(number, generator=make_generator(device), dtype=dtype, device=device)
        drawn = drawn.cpu()
        with suspended():
            name = str(dtype).removeprefix("torch.")
            nonfinite_count = int((~drawn.isfinite()).sum())
            kept = drawn[drawn.isfinite()].float()
            mean, variance = kept.mean().item(), kept.var().item()
        allowed = STANDARD_ERRORS * number**-0.5
        checks += [
            Check(f"{name}: NaN or Inf", nonfinite_count),
            Check(f"{name}: mean off by", abs(mean), allowed),
            Check(f"{name}: variance off by", abs(variance - 1), 2**0.5 * allowed),
        ]
    return checks


def measure_distinct_draws(device, thorough):
    checks = []
    for shape in ((4, 64), (4, 4, 8, 8), (4, 2, 2, 4, 4), (4, 2, 2, 2, 2, 4)):
        generator = make_generator(device)
        first, second = (
            torch.randn(shape, generator=generator, device=device).cpu() for _ in range(2)
        )
        again = torch.randn(shape, generator=make_generator(device), device=device)
        with suspended():
            batches = torch.cat([first, second]).flatten(1)
            repeated = len(batches) - len(batches.unique(dim=0))
        checks += [
            Check(f"{len(shape)}-D: repeated", repeated),
            count_different(f"{len(shape)}-D, same seed", again, first),
        ]
    return checks


def measure_uniform_draws(device, thorough):
    number = 10**7 if thorough else 10**5
    drawn = torch.rand(number, generator=make_generator(device), dtype=HALF, device=device).cpu()
    with suspended():
        return (
            Check("1 or more", int((drawn >= 1).sum())),
            Check("below 0 or NaN", int((~(drawn >= 0)).sum())),
        )


def measure_copies(device, thorough):
    numbers = (1, 17, 4096, 10**6) if thorough else (1, 17, 4096)
    checks = []
    for name, non_blocking in (("blocking", False), ("non_blocking", True)):
        sources = [draw(number, seed=seed) for seed, number in enumerate(numbers)]
        sources += [source.to(HALF) for source in sources]
        copies = []
        for source in sources:
            pageable = source.clone()  # gone, and its memory taken, before the device may read it
            copies.append(pageable.to(device, non_blocking=non_blocking, copy=True))
            copies.append(torch.zeros_like(source, device=device))
            copies[-1].copy_(pageable, non_blocking=non_blocking)
            del pageable
        synchronize(device)
        pairs = zip(copies, (s for source in sources for s in (source, source)), strict=True)
        different = sum(count_different(name, copy, source).value for copy, source in pairs)
        checks.append(Check(f"{name}: different values", different))
    return checks


def measure_writes(device, thorough):
    number = 512 if thorough else 32
    written = torch.zeros(number, device=device)
    for index in range(number):
        written[index] = index + 1.0
    rows = torch.zeros(number, 4, device=device)
    for index in range(number):
        rows[index] = index + 1.0
    with suspended():
        expected = torch.arange(1.0, number + 1)
    return (
        count_different("numbers", written, expected),
        count_different("rows", rows, expected[:, None].expand(-1, 4)),
    )


def count_kept_nan(operations, device):
    """Checks that the NaN of each dtype comes out of each operation."""
    checks = []
    for dtype in (HALF, SINGLE):
        tensor = torch.tensor([0.5, NAN, -0.5], dtype=dtype).to(device)
        for name, operation in operations.items():
            result = operation(tensor).cpu()
            with suspended():
                case = f"{name} {str(dtype).removeprefix('torch.')}: NaN lost"
                checks.append(Check(case, int(not result.isnan().any())))
    return checks


def measure_clamp(device, thorough):
    operations = {
        "clamp": lambda x: x.clamp(0, 1),
        "clamp_": lambda x: x.clone().clamp_(0, 1),
        "clamp min": lambda x: x.clamp(min=0),
        "clamp max": lambda x: x.clamp(max=1),
    }
    return count_kept_nan(operations, device)


def measure_maximum(device, thorough):
    operations = {
        "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
        "minimum": lambda x: torch.minimum(torch.zeros_like(x), x),
        "max": lambda x: x.max(),
        "min": lambda x: x.min(),
        "amax": lambda x: x.abs().amax(),
        "amin": lambda x: x.amin(0),
    }
    return count_kept_nan(operations, device)


def measure_cumsum(device, thorough):
    length = 10_000 if thorough else 1000
    checks = []
    for dtype in (torch.int64, torch.int32, torch.bool):
        with suspended():
            numbers = draw(length, 2).gt(0).to(dtype)
            expected = numbers.numpy().cumsum(0)
        summed = numbers.to(device).cumsum(0)
        name = str(dtype).removeprefix("torch.")
        checks.append(count_different(name, summed, torch.from_numpy(expected)))
    betas = torch.linspace(0.00085, 0.012, length)
    summed = compare("float32", lambda x: x.cumsum(0), betas, device=device, dtype=SINGLE,
                     allowed=1e-4)  # fmt: skip
    return *checks, *summed


def measure_interpolation(device, thorough):
    image = draw(2, 320, 64, 64) if thorough else draw(2, 4, 8, 8)

    def stretch(mode, align_corners=None):
        return lambda x: F.interpolate(x, scale_factor=2, mode=mode, align_corners=align_corners)

    cases = {
        "nearest": (stretch("nearest"), image),
        "bilinear": (stretch("bilinear", False), image),
        "bilinear corners": (stretch("bilinear", True), image),
        "one pixel corners": (stretch("linear", True), image[:, :, :1, 0]),
    }
    return [
        check
        for name, (function, pixels) in cases.items()
        for check in compare(name, function, pixels, device=device, dtype=SINGLE, allowed=1e-4)
    ]


PROBES = (
    Probe(
        name="randn-values",
        contract="Normal numbers are finite, with a mean of 0 and a variance of 1.",
        guards=("sampling", "training"),
        threads=(f"{PYTORCH}/89283", "https://github.com/JuliaGPU/Metal.jl/issues/474"),
        measure=measure_normal_draws,
    ),
    Probe(
        name="randn-distinct",
        contract="Every item of a batch is drawn anew, and a seed draws it again.",
        guards=("sampling", "training"),
        threads=(f"{PYTORCH}/147624", f"{PYTORCH}/78009", f"{PYTORCH}/84288"),
        measure=measure_distinct_draws,
    ),
    Probe(
        name="rand-below-one",
        contract="Uniform float16 numbers are at least 0 and below 1.",
        guards=("training",),
        threads=(f"{PYTORCH}/197079",),
        measure=measure_uniform_draws,
    ),
    Probe(
        name="host-copies",
        contract="What is copied to the device arrives unchanged, non_blocking too.",
        guards=("loading",),
        threads=(f"{PYTORCH}/189690", f"{DIFFUSERS}/13227", f"{PYTORCH}/139550"),
        measure=measure_copies,
    ),
    Probe(
        name="writes",
        contract="Numbers written one after the other into a tensor are all there.",
        guards=("loading", "sampling"),
        threads=(f"{PYTORCH}/122016",),
        measure=measure_writes,
    ),
    Probe(
        name="clamp-keeps-nan",
        contract="clamp keeps NaN: a bad image must not turn black unseen.",
        guards=("checks",),
        threads=(f"{PYTORCH}/120899", f"{PYTORCH}/122710"),
        measure=measure_clamp,
    ),
    Probe(
        name="maximum-keeps-nan",
        contract="maximum, minimum, max and min keep NaN, for checks to see it.",
        guards=("checks",),
        threads=(f"{PYTORCH}/143976", f"{PYTORCH}/130295"),
        measure=measure_maximum,
    ),
    Probe(
        name="cumsum",
        contract="cumsum is right for int64, int32, bool and float32.",
        guards=("loading", "sampling"),
        threads=(f"{PYTORCH}/89784", f"{PYTORCH}/90635", f"{PYTORCH}/96614"),
        measure=measure_cumsum,
    ),
    Probe(
        name="interpolate",
        contract="interpolate is right in all modes used, for one pixel as well.",
        guards=("sampling",),
        threads=(f"{PYTORCH}/144245", f"{PYTORCH}/79383"),
        measure=measure_interpolation,
    ),
)
