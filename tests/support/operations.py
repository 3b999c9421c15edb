"""A recorder of the operations that a computation consists of."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """The size of the largest tensor that any operation makes, and what it waits for."""

    # These read the device's values: how many elements there are depends on them.
    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount")

    def __init__(self):
        super().__init__()
        self.largest, self.waits, self.names = 0, set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        self.names.add(name)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                # A view of a large tensor is small, an expanded one takes no memory.
                size = min(x.numel() * x.element_size(), x.untyped_storage().nbytes())
                self.largest = max(self.largest, size)
        indices = tree_leaves(args[1:]) if name in ("index", "index_put", "index_put_") else []
        if name in self.WAITS or any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in indices
        ):
            self.waits.add(name)
        return result
