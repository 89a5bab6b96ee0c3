"""Bytes that are alive, op by op: on real tensors a measurement, on the meta device a prediction.

Each op's results are counted while their storage lives. What an op takes for itself and gives back
before it returns (packed weights, workspaces) is not seen, nor what an allocator keeps.
"""

import weakref
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of the tensors made inside it while they live.

    Attributes:
        live_bytes: Alive now.
        peak_bytes: The most that were alive at once, between two ops.
    """

    def __init__(self, *modules):
        """Prepares a count that leaves out the parameters and buffers of these modules."""
        super().__init__()
        weights = [tensor for m in modules for tensor in (*m.parameters(), *m.buffers())]
        self.watched = {tensor.untyped_storage()._cdata: None for tensor in weights}
        self.live_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor.untyped_storage())
        return result

    def count(self, storage):
        """Counts a storage, once, until nothing holds it any more."""
        key, size = storage._cdata, storage.nbytes()
        if key in self.watched:
            return

        def forget(_):
            del self.watched[key]
            self.live_bytes -= size

        self.watched[key] = weakref.ref(storage, forget)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


@contextmanager
def sdpa_as_on(device_type):
    """Lets meta tensors attend as a device of this type would allocate it.

    CPU and CUDA answer without the scores ever being there. MPS makes them: for inference its
    kernel hands them out beside the answer, for training it takes the formula apart (torch 2.7 to
    2.13, aten/src/ATen/native/transformers/attention.cpp; its vector kernels for a few queries of
    64, 96 or 128 wide, which do not, are not counted on). What MPSGraph takes for itself is unseen.

    Args:
        device_type: "cpu", "cuda" or "mps".
    """
    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def attend(query, *args, **kwargs):
        if query.device.type != "meta":
            return original(query, *args, **kwargs)
        return attend_as_on(device_type, query, *args, **kwargs)

    # Replaced for the while, not caught by a TorchFunctionMode: that is off in the backward pass,
    # where checkpointed blocks are computed again (torch 2.13; test_checkpointing_is_predicted).
    functional.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = original


def attend_as_on(
    device_type, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None
):
    """`scaled_dot_product_attention` of meta tensors as a device of this type allocates it."""
    options = {"scale": scale}
    if device_type != "mps":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p, is_causal, attn_mask=attn_mask, **options
        )[0]
    arguments = (query, key, value, attn_mask, dropout_p, is_causal, None)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return aten._scaled_dot_product_attention_math(*arguments, **options)[0]
    return aten._scaled_dot_product_attention_math_for_mps(*arguments, **options)[0]
