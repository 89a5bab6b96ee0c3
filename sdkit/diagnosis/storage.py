"""Whose memory a tensor is: several parameters may be views of one buffer, as FSDP keeps them."""

import torch

from sdkit.validation import is_finite


def storage_of(tensor) -> int:
    """Identity of the memory behind a tensor, for as long as it lives."""
    return tensor.untyped_storage()._cdata


def fills_storage(tensor) -> bool:
    """Whether nothing lies in the tensor's memory but the tensor."""
    return tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def span_of(tensor) -> tuple[int, int]:
    """The bytes of its storage that a tensor reaches from and to."""
    first = tensor.storage_offset()
    reach = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    end = first + (reach + 1 if tensor.numel() else 0)
    return first * tensor.element_size(), end * tensor.element_size()


class WeightNames:
    """Names of parameters and buffers, by the bytes in which they lie."""

    def __init__(self):
        self.named = {}  # {name: tensor}
        self.places = {}  # {storage: [(first byte, end, name)]}

    def add(self, name: str, tensor: torch.Tensor):
        """Takes a parameter or buffer."""
        self.named[name] = tensor
        self.places.setdefault(storage_of(tensor), []).append((*span_of(tensor), name))

    def find(self, tensor) -> tuple[str, ...]:
        """Names of those that are this tensor or a view of the same bytes, else all that overlap.

        One name unless the tensor is a buffer of many, or the weights are tied.
        """
        places = self.places.get(storage_of(tensor))
        if not places:
            return ()
        first, end = span_of(tensor)
        exact = tuple(name for *span, name in places if span == [first, end])
        return exact or tuple(name for low, high, name in places if low < end and first < high)

    def find_all(self, tensors) -> dict[str, tuple[str, ...]]:
        """{argument: names of the weights that it is or holds}, of {argument: tensor}."""
        return {n: names for n, t in tensors.items() if (names := self.find(t))}

    def find_bad(self, names, dtype) -> tuple[str, ...]:
        """Which of these hold NaN or Inf, or would after a cast to a dtype."""

        def is_bad(tensor):
            return not is_finite(tensor.to(dtype) if dtype.is_floating_point else tensor)

        return tuple(name for name in names if is_bad(self.named[name].detach()))
