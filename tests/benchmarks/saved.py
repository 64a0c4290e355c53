"""What autograd keeps for the backward pass."""

from __future__ import annotations

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Saved:
    """Counts storages that autograd keeps, each once, but not the module's own.

    Args:
        module: its parameters and buffers are there anyway.

    Attributes:
        bytes: so far.
    """

    def __init__(self, module: nn.Module) -> None:
        # Held, so that no other storage gets the same address.
        kept = [*module.parameters(), *module.buffers()]
        self._known = {s._cdata: s for s in (tensor.untyped_storage() for tensor in kept)}
        self.bytes = 0

    def hooks(self) -> saved_tensors_hooks:
        """Within this context, what is kept is counted."""
        return saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known:
            self._known[storage._cdata] = storage
            self.bytes += storage.nbytes()
        return tensor
