"""What a rebalance did to a model, and what it could not do."""

import json
from collections import Counter
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class RebalanceReport:
    """What `rebalance` or `amplify` did to a model, and what it could not do.

    Attributes:
        model_class: Such as "AutoencoderKL".
        measured_on: What the ranges are from: "3 prompts", "synthetic latents 16x16, seed 0".
        margin_bits: Streams were brought to at most 65504 / 2^margin_bits.
        exponents: {stream: power of two it was multiplied by}; empty if nothing was changed.
        wanted: {stream: power of two that the margin needed}, where a bound forbade it.
        bounds: {stream: the weight that stopped it}, for the same streams: 1 % of it would have
            become float16-subnormal, or it would have overflowed.
        left: (module, op, largest |x| now, why it cannot be moved) of what still overflows.
        on_synthetic: Streams of which the given headroom has no op, as a VAE's encoder where text
            alone was given; their ranges are from synthetic latents.
        error_without_sidecar: Relative RMS error of the float32 output if the eps are not restored,
            as in a plain diffusers load; 0.0 if nothing was changed.
        notices: What else was changed or is worth knowing.
    """

    model_class: str
    measured_on: str
    margin_bits: int
    exponents: dict[str, int]
    wanted: dict[str, int]
    bounds: dict[str, str]
    left: tuple[tuple[str, str, float, str], ...]
    on_synthetic: tuple[str, ...]
    error_without_sidecar: float
    notices: tuple[str, ...] = ()

    @property
    def is_unchanged(self) -> bool:
        """Whether the model is as it was."""
        return not self.exponents

    def to_json(self) -> str:
        """Returns the report as JSON."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text) -> "RebalanceReport":
        """Returns the report that `to_json` wrote."""
        fields = json.loads(text)
        tuples = {name: tuple(fields[name]) for name in ("on_synthetic", "notices")}
        return cls(**fields | tuples | {"left": tuple(map(tuple, fields["left"]))})

    def __str__(self):
        """A short text with aligned lines; one for each kind of stream."""
        rows = [("model", f"{self.model_class}, measured on {self.measured_on}")]
        rows += self._describe_moved()
        rows += [
            ("bound", f"{stream}: 2^{e} needed, stopped by {self.bounds[stream]}")
            for stream, e in self.wanted.items()
        ]
        rows += [
            ("left", f"{module} ({op}): |x| up to {largest:.4g}; {why}")
            for module, op, largest, why in self.left
        ]
        if self.on_synthetic:
            streams = f"{len(self.on_synthetic)} streams, {self.on_synthetic[0]} the first"
            rows += [("on synthetic", f"{streams}: {self.measured_on} did not reach them")]
        if self.exponents:
            error = f"relative error {self.error_without_sidecar:.2g} in float32"
            rows += [("without sidecar", f"{error}, as after a plain diffusers load")]
        rows += [("notice", notice) for notice in self.notices]
        return "\n".join(f"{name:<17}{text}" for name, text in rows)

    def _describe_moved(self):
        """A row for each kind of stream, with how many moved by how much."""
        kinds = {}
        for stream, exponent in self.exponents.items():
            kinds.setdefault(stream.partition(" ")[0], Counter())[exponent] += 1
        moved = [
            ("moved", f"{kind}: " + ", ".join(f"{n} by 2^{e}" for e, n in sorted(counts.items())))
            for kind, counts in kinds.items()
        ]
        return moved or [("moved", "nothing: it fits float16 with the margin")]
