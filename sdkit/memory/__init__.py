"""What a model takes, from shapes alone: the live bytes of a run that computes nothing."""

from sdkit.memory.architectures import ARCHITECTURES, build_architecture, read_architecture
from sdkit.memory.live_bytes import LiveBytes
from sdkit.memory.stages import LoraTraining, trace_inference, trace_training

__all__ = [
    "ARCHITECTURES",
    "LiveBytes",
    "LoraTraining",
    "build_architecture",
    "read_architecture",
    "trace_inference",
    "trace_training",
]
