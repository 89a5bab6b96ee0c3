"""What is kept of one op: where it ran, what it was given, what it made; plain data and JSON."""

from dataclasses import dataclass, field

import torch

from sdkit.diagnosis.op_traits import name_arguments, name_tensors, read_traits
from sdkit.emulate.mode import suspended


@dataclass(frozen=True)
class TensorSummary:
    """One tensor that an op was given or made.

    Attributes:
        name: The argument's name in torch's schema of the op, or "output", "output[1]".
        shape: Such as (2, 4, 16, 16).
        stride: In elements.
        dtype: Such as "float16".
        device: Such as "mps".
        minimum: Least finite value, None without one.
        maximum: Greatest finite value, None without one.
        nan_count: Number of NaN values.
        inf_count: Number of infinite values.
        weights: Names of the parameters and buffers that it is, or that lie in it.
        allocated_by: The op that gave out the memory, where nobody has written it yet; else "".
        is_ignored: Whether the op by contract must not read it.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    device: str
    minimum: float | None
    maximum: float | None
    nan_count: int
    inf_count: int
    weights: tuple[str, ...] = ()
    allocated_by: str = ""
    is_ignored: bool = False

    @classmethod
    def from_dict(cls, content) -> "TensorSummary":
        """Returns the summary of which `vars` gave this, from JSON too."""
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in content.items()})

    @property
    def largest(self) -> float:
        """Greatest finite magnitude, 0 without one."""
        return max(abs(self.minimum or 0.0), abs(self.maximum or 0.0))

    def __str__(self):
        """One line."""
        shape = "x".join(map(str, self.shape)) or "scalar"
        span = "" if self.minimum is None else f", {self.minimum:.4g} to {self.maximum:.4g}"
        bad = [f"{self.nan_count} NaN"] * bool(self.nan_count)
        bad += [f"{self.inf_count} Inf"] * bool(self.inf_count)
        counts = ", " + " and ".join(bad) if bad else ""
        more = [f"and {len(self.weights) - 1} more weights"] * (len(self.weights) > 1)
        memory = [f"uninitialised memory of {self.allocated_by}"] * bool(self.allocated_by)
        ignored = ["ignored by contract"] * self.is_ignored
        notes = ", ".join([*self.weights[:1], *more, *memory, *ignored])
        return f"{self.name}: {self.dtype} {shape}{span}{counts}{f' ({notes})' if notes else ''}"


@dataclass(frozen=True)
class OpCall:
    """The op itself with its arguments as they were before it ran, so that it can run again.

    Attributes:
        func: The aten overload.
        args: Positional arguments; what the op writes and reads is a copy from before.
        kwargs: Keyword arguments, `out=` among them.
        output: What it returned, tensors only, in order.
        ignored: Names of arguments that the op by contract does not read.
        undefined: Names of arguments that nobody has written yet.
        places: {argument: identity of the memory it was in}.
        weights: {argument: names of the parameters and buffers that lie in it}.
    """

    func: object
    args: tuple
    kwargs: dict
    output: tuple[torch.Tensor, ...]
    ignored: tuple[str, ...] = ()
    undefined: tuple[str, ...] = ()
    places: dict[str, int] = field(default_factory=dict)
    weights: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def named(self) -> dict:
        """{name: value} of all arguments."""
        return name_arguments(self.func, self.args, self.kwargs)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """The tensors that the op reads, by name."""
        tensors = name_tensors(self.named)
        return {n: t for n, t in tensors if n.partition("[")[0] not in self.ignored}


@dataclass(frozen=True)
class BadOp:
    """The first op of a call with finite inputs and a non-finite output, or with bad weights.

    Attributes:
        op: The overload, "aten.baddbmm.default"; None where memory changed between two ops.
        module: Dotted path from the pipeline of the module that ran it; "" where none was running:
            in the pipeline's own code, the scheduler, a callback.
        source: "attention_processor.py:690 in get_attention_scores", the innermost line outside
            torch and sdkit; None where there is none.
        source_line: The text of that line.
        inputs: Summaries of the tensors it was given.
        outputs: Summaries of the tensors it made.
        options: Its other arguments, {name: text}.
        before: The ops that ran before it, oldest first, "unet.conv_in: aten.convolution.default".
        bad_weights: Names of parameters and buffers with NaN or Inf among its inputs.
        inherited: Names of arguments that were bad already and that no op of this call had made.
        swallowed_by: Where the NaN was lost again, if it was: "vae.decoder: aten.clamp.default".
        changed_after: The op that had left the tensor finite, where memory changed without an op.
        hooks: Then, what others hooked to the module: "spoil (own.py:12)".
        after: Where no module was running, the component that had run last, "vae"; else "".
        call: For running it again; not in the JSON.
    """

    op: str | None
    module: str
    source: str | None
    source_line: str | None
    inputs: tuple[TensorSummary, ...]
    outputs: tuple[TensorSummary, ...]
    options: dict[str, str]
    before: tuple[str, ...]
    bad_weights: tuple[str, ...] = ()
    inherited: tuple[str, ...] = ()
    swallowed_by: str | None = None
    changed_after: str | None = None
    hooks: tuple[str, ...] = ()
    after: str = ""
    call: OpCall | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict:
        """Everything but the live tensors, as JSON types."""
        kept = {name: value for name, value in vars(self).items() if name != "call"}
        for name in ("inputs", "outputs"):
            kept[name] = [vars(summary) for summary in kept[name]]
        return kept

    @classmethod
    def from_dict(cls, content) -> "BadOp":
        """Returns what `to_dict` gave, from JSON too, without its call."""
        kept = {name: tuple(v) if isinstance(v, list) else v for name, v in content.items()}
        for name in ("inputs", "outputs"):
            kept[name] = tuple(TensorSummary.from_dict(summary) for summary in kept[name])
        return cls(**kept)

    def __str__(self):
        """A few lines: where, what went in, what came out."""
        where = self.module or f"after {self.after}"
        lines = [f"{where}: {self.op or f'changed after {self.changed_after}'}"]
        if self.source:
            lines.append(f"  at {self.source}: {self.source_line}")
        lines += [f"  in   {summary}" for summary in self.inputs]
        lines += [f"       {name} = {value}" for name, value in self.options.items()]
        lines += [f"  out  {summary}" for summary in self.outputs]
        if self.swallowed_by:
            lines.append(f"  lost again in {self.swallowed_by}")
        return "\n".join(lines)


def summarize(name: str, tensor: torch.Tensor, **known) -> TensorSummary:
    """Counts and extremes of a tensor, judged on a float64 copy on the CPU.

    A device whose own clamp or max hides NaN cannot judge itself. What else is `known` of it goes
    to the summary: weights, allocated_by, is_ignored.
    """
    values = tensor.detach().cpu()
    nan_count = inf_count = 0
    minimum = maximum = None
    if values.is_floating_point():
        values = values.double()
        nan_count, inf_count = int(values.isnan().sum()), int(values.isinf().sum())
        values = values[values.isfinite()] if nan_count or inf_count else values
    if values.numel() and not values.is_complex():
        values = values.double() if values.dtype is torch.bool else values
        minimum, maximum = (float(value) for value in values.aminmax())
    return TensorSummary(
        name=name,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        dtype=str(tensor.dtype).removeprefix("torch."),
        device=tensor.device.type,
        minimum=minimum,
        maximum=maximum,
        nan_count=nan_count,
        inf_count=inf_count,
        **known,
    )


def keep_overwritten(func, args, kwargs, ignored):
    """Returns (args, kwargs) as they are before the op: copies of what it reads and writes.

    What it writes without reading is not copied: it says nothing about the result.
    """
    traits = read_traits(func)
    read_and_written = traits.written - ignored
    if not read_and_written:
        return args, kwargs

    def keep(name, value):
        if name not in read_and_written:
            return value
        with suspended():
            if isinstance(value, torch.Tensor):
                return value.clone()
            return [v.clone() if isinstance(v, torch.Tensor) else v for v in value or ()]

    return (
        tuple(keep(name, value) for name, value in zip(traits.names, args, strict=False)),
        {name: keep(name, value) for name, value in kwargs.items()},
    )
