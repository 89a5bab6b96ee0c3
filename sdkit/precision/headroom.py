"""How much room each op of a pipeline has in float16 and bfloat16, from one run in float32."""

import json
import math
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import pandas as pd
import torch

from sdkit.guarding import find_components, unguarded
from sdkit.loading.border_casts import map_floats
from sdkit.loading.lifting import in_float32
from sdkit.loading.recipe import take_fingerprint
from sdkit.loading.sidecar import find_shift
from sdkit.precision.drawing import check_request
from sdkit.precision.op_ranges import OpRanges
from sdkit.steps import find_position
from sdkit.validation import ValidationError, is_finite

MAXIMUM = {name: torch.finfo(getattr(torch, name)).max for name in ("float16", "bfloat16")}
# Half a step above the maximum rounds to Inf: 65520 in float16.
OVERFLOW = {"float16": 65520.0, "bfloat16": MAXIMUM["bfloat16"] * (1 + 2.0**-9)}
# bfloat16 has 8 significant bits. Where a common offset takes 4 of them, what differs between the
# values, which is all that a norm leaves of them, keeps 4: errors of 3 %.
OFFSET_BITS = 4.0


@dataclass(frozen=True)
class OpHeadroom:
    """One op's output over the run.

    Attributes:
        stage: "text_encoder", "unet", "vae", or "scheduler" for what runs in no component.
        module: Dotted path of the module that ran it, "" in no module.
        op: Such as "aten.convolution.default"; "aten.split[0]" is the first part of a split.
        index: 0 for the first such op of a call of the module, 1 for the second, and so on.
        steps: Indices of the denoising loop; (None,) outside of it.
        largest: Greatest |x|, one a step.
        flushed_share: Share of values that float16 rounds to zero, one a step; from a sample.
        subnormal_share: Share of values below float16's normal range, one a step; from a sample.
        offset_bits: Bits that an offset common to all values uses up, one a step; from a sample.
    """

    stage: str
    module: str
    op: str
    index: int
    steps: tuple
    largest: tuple
    flushed_share: tuple
    subnormal_share: tuple
    offset_bits: tuple

    @property
    def largest_of_all(self) -> float:
        """Greatest |x| of the run."""
        return max(self.largest)

    def overflows(self, dtype: str) -> bool:
        """Whether a value is Inf once it is rounded to "float16" or "bfloat16"."""
        return self.largest_of_all >= OVERFLOW[dtype]


@dataclass(frozen=True)
class Headroom:
    """What a float32 run of a pipeline says about reduced precision.

    Attributes:
        ops: In the order in which they ran.
        overflowing_weights: Names of weights that float16 cannot hold.
        prompts: Of the run.
        seed: Of its noise.
        source: What was run: "3 prompts" or "synthetic latents".
        exponents: {component: {stream: e}} of those that were rebalanced when they were measured.
        fingerprint: {component: what identifies it}, see `take_fingerprint`; empty where that was
            not asked.
    """

    ops: tuple[OpHeadroom, ...]
    overflowing_weights: tuple[str, ...]
    prompts: tuple[str, ...]
    seed: int
    source: str
    exponents: dict[str, dict[str, int]] = field(default_factory=dict)
    fingerprint: dict[str, dict] = field(default_factory=dict)

    def predict(self, dtype="float16") -> list[tuple[str, str]]:
        """(module, op) of what goes wrong in a dtype, in the order of the run.

        Args:
            dtype: "float16": outputs that overflow, and modules whose weights do. "bfloat16": that,
                and outputs that lose precision: an offset takes half of their 8 bits or more.
        """
        if dtype not in OVERFLOW:
            raise ValidationError(
                f'dtype={dtype!r}: expected "float16" or "bfloat16"; float32 is what was measured.'
            )
        weights = [(name.rpartition(".")[0], "weight") for name in self.overflowing_weights]
        loses = dtype == "bfloat16"
        found = [
            (op.module, op.op)
            for op in self.ops
            if op.overflows(dtype) or (loses and max(op.offset_bits) >= OFFSET_BITS)
        ]
        return list(dict.fromkeys([*(weights if dtype == "float16" else ()), *found]))

    def to_frame(self) -> pd.DataFrame:
        """One row for each op and step; `float16_bits` is log2 of the room left, below 0: none."""
        rows = [
            {
                "stage": op.stage, "module": op.module, "op": op.op, "index": op.index,
                "step": step, "largest": largest,
                **{f"{name}_bits": find_bits(largest, name) for name in MAXIMUM},
                "flushed_share": flushed, "subnormal_share": subnormal, "offset_bits": offset,
            }
            for op in self.ops
            for step, largest, flushed, subnormal, offset in zip(
                op.steps, op.largest, op.flushed_share, op.subnormal_share, op.offset_bits,
                strict=True,
            )
        ]  # fmt: skip
        return pd.DataFrame(rows).astype({"step": "Int64"})

    def to_json(self) -> str:
        """Returns the headroom as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text) -> "Headroom":
        """Returns the headroom that `to_json` wrote."""
        fields = json.loads(text)
        tuples = {name: tuple(fields[name]) for name in ("overflowing_weights", "prompts")}
        ops = tuple(
            OpHeadroom(**{k: tuple(v) if isinstance(v, list) else v for k, v in op.items()})
            for op in fields["ops"]
        )
        return cls(**fields | tuples | {"ops": ops})

    def __str__(self):
        """A few lines: the least room in each stage, and what overflows."""
        lines = [f"headroom from {self.source}, seed {self.seed}, {len(self.ops)} ops"]
        for stage in dict.fromkeys(op.stage for op in self.ops):
            worst = max(
                (op for op in self.ops if op.stage == stage), key=lambda op: op.largest_of_all
            )
            largest = worst.largest_of_all
            lines.append(
                f"{stage:<16}{find_bits(largest, 'float16'):6.1f} bits left in float16: |x| up to "
                f"{largest:.4g} in {worst.module or 'no module'} ({worst.op})"
            )
        for dtype in MAXIMUM:
            places = [f"{module or 'no module'} ({op})" for module, op in self.predict(dtype)]
            more = f" and {len(places) - 3} more" if len(places) > 3 else ""
            lines.append(f"{dtype:<16}{', '.join(places[:3]) or 'everything fits'}{more}")
        return "\n".join(lines)


def find_bits(largest: float, dtype: str) -> float:
    """log2 of the distance from a magnitude to a dtype's maximum; infinite for 0."""
    return math.log2(MAXIMUM[dtype] / largest) if largest else math.inf


def measure_headroom(pipe, prompts, *, seed=0, **pipe_kwargs) -> Headroom:
    """Runs a pipeline in float32 and records the range of every op's output.

    Components in float16 or bfloat16 are lifted for the run and hold the very same tensors after.
    It costs at most three generations (tests/benchmarks/bench_headroom.py). Attention that is one
    fused op shows its result and not its scores, which such an op never stores.

    Args:
        pipe: A diffusers pipeline.
        prompts: One prompt or several: each is one call, with noise from the same seed.
        seed: Of the noise, drawn on the CPU.
        pipe_kwargs: For the pipeline's call, such as `num_inference_steps`.

    Returns:
        A Headroom.

    Raises:
        ValidationError: NaN or Inf in float32 itself, with the first place; a weight that is not
            finite, which a cast cannot undo; no prompt, or arguments that the pipeline does not
            take.
    """
    prompts = tuple(check_request(pipe, prompts, seed, pipe_kwargs))
    check_weights_are_finite(pipe)
    ranges = OpRanges(find_components(pipe))
    pipe_kwargs = map_floats(pipe_kwargs, torch.Tensor.float)
    with unguarded(pipe), in_float32(pipe), ranges.installed():
        with following_steps(pipe, ranges):
            for prompt in prompts:
                ranges.step = ranges.position = None
                generator = torch.Generator("cpu").manual_seed(seed)
                pipe(prompt, generator=generator, **pipe_kwargs)
        overflowing = find_overflowing_weights(find_components(pipe))
    return Headroom(
        ops=make_ops(ranges.records),
        overflowing_weights=overflowing,
        prompts=prompts,
        seed=seed,
        source=f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}",
        exponents=find_exponents(find_components(pipe)),
        fingerprint=take_fingerprint(pipe),
    )


@contextmanager
def following_steps(pipe, ranges):
    """Tells the recorder at which step of the denoising loop it is."""

    def note(module, args, kwargs):
        timestep = kwargs.get("timestep", args[1] if len(args) > 1 else None)
        if isinstance(timestep, torch.Tensor):
            timestep = timestep.flatten()[0].item()
        position = find_position(pipe, timestep, ranges.position)
        is_next = position is None or position != ranges.position
        ranges.step = 0 if ranges.step is None else ranges.step + is_next
        ranges.position = position

    components = find_components(pipe)
    denoiser = next(c for n, c in components.items() if n.startswith(("unet", "transformer")))
    handle = denoiser.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def make_ops(records) -> tuple[OpHeadroom, ...]:
    """The records of `OpRanges` as frozen data."""
    return tuple(
        OpHeadroom(*key, tuple(by_step), *(tuple(column) for column in zip(*rows, strict=True)))
        for key, by_step in records.items()
        for rows in [[values[:4] for values in by_step.values()]]
    )


def find_exponents(components) -> dict[str, dict[str, int]]:
    """{component: {stream: e}} of those that are rebalanced."""
    shifts = {name: find_shift(component) for name, component in components.items()}
    return {name: dict(shift.exponents) for name, shift in shifts.items() if shift}


def check_weights_are_finite(pipe):
    """Names a weight that no cast to float32 can mend."""
    for root, component in find_components(pipe).items():
        for name, tensor in component.named_parameters():
            if tensor.is_floating_point() and not is_finite(tensor):
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise ValidationError(
                    f"{root}.{name} ({dtype}): holds NaN or Inf, so nothing can be measured. "
                    "Expected finite weights. Load the model again in float32."
                )


def find_overflowing_weights(components) -> tuple[str, ...]:
    """Names of parameters that are Inf once they are rounded to float16."""
    return tuple(
        f"{root}.{name}"
        for root, component in components.items()
        for name, tensor in component.named_parameters()
        if tensor.is_floating_point() and float(tensor.detach().abs().max()) >= OVERFLOW["float16"]
    )
