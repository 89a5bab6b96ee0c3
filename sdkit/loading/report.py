"""What `load_pipeline` did, and why: readable, and JSON that round-trips."""

import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class LoadReport:
    """What `load_pipeline` did, and why.

    Attributes:
        model: The model as it was asked for.
        resolved: What that turned out to mean.
        pipeline_class: The name of the diffusers class.
        device: Where the weights are, and
        device_reason: why.
        dtypes: {component: dtype name}, as found after loading.
        dtype_reason: Why these.
        attention: "sdpa", "sliced" or "diffusers-sliced".
        attention_reason: What that means here.
        border_casts: Components whose inputs are cast, for the dtypes differ.
        weight_bytes: {component: bytes of its parameters and buffers}.
        notices: What was changed or is worth knowing.
        warnings: What diffusers, transformers and this loader warned of while loading.
        load_seconds: Time of the whole call.
        environment: See `describe_environment`.
        guard: Whether a permanent guard is on the pipeline, and how to change that.
    """

    model: str
    resolved: str
    pipeline_class: str
    device: str
    device_reason: str
    dtypes: dict
    dtype_reason: str
    attention: str
    attention_reason: str
    border_casts: tuple
    weight_bytes: dict
    notices: tuple
    warnings: tuple
    load_seconds: float
    environment: dict
    guard: str = "off"  # reports of before it was there still load

    @property
    def total_weight_bytes(self):
        """Bytes of all components."""
        return sum(self.weight_bytes.values())

    def to_json(self):
        """Returns the report as JSON."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text):
        """Returns the report that `to_json` wrote."""
        fields = json.loads(text)
        tuples = {name: tuple(fields[name]) for name in ("border_casts", "notices", "warnings")}
        return cls(**fields | tuples)

    def __str__(self):
        """A short text with aligned lines."""
        rows = [
            ("model", f"{self.resolved} ({self.pipeline_class})"),
            ("device", self.device_reason),
            ("dtype", self.dtype_reason),
            *(
                (f"  {name}", f"{dtype}, {self.weight_bytes[name] / 1024**2:,.1f} MiB")
                for name, dtype in self.dtypes.items()
            ),
            ("attention", f"{self.attention}: {self.attention_reason}"),
            *(("casts", f"at the border of {name}") for name in self.border_casts),
            ("guard", self.guard),
            *(("notice", notice) for notice in self.notices),
            *(("warning", warning) for warning in self.warnings),
            (
                "loaded",
                f"{self.total_weight_bytes / 1024**2:,.1f} MiB in {self.load_seconds:.1f} s",
            ),
        ]
        return "\n".join(f"{name:<16}{text}" for name, text in rows)
