"""Bytes that are alive, op by op: on real tensors a measurement, on the meta device a prediction.

Each op's results are counted while their storage lives. What an op takes for itself and gives back
before it returns (packed weights, workspaces) is not seen, nor what an allocator keeps.
"""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of the tensors made inside it while they live.

    Attributes:
        live_bytes: Alive now.
        peak_bytes: The most that were alive at once, between two ops.
    """

    def __init__(self, *modules):
        """Prepares a count that leaves out the parameters and buffers of these modules."""
        super().__init__()
        weights = [t for m in modules for t in (*m.parameters(), *m.buffers())]
        self.storages = {tensor.untyped_storage()._cdata: 0 for tensor in weights}
        self.live_bytes = self.peak_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.count(tensor)
        return result

    def count(self, tensor):
        """Counts a tensor's storage, once, until nothing holds it any more."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.storages:
            self.storages[key] = storage.nbytes()
            self.live_bytes += self.storages[key]
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key):
        self.live_bytes -= self.storages.pop(key)
