"""What the kernels of one program share while a graph is compiled and run.

One for each program: the torch device, weight tensors that several nodes read
(a tied embedding exists once), values that are derived once in a step and read
by every layer, and the account of the memory that prepared weights take. Knows
no operation.

Invariants: a shared weight lives as long as some kernel holds it; nothing here
outlives the program.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar
from weakref import WeakValueDictionary

import torch

from midspan.interface.device import Bounds
from midspan.interface.weights import DENSE, PackedTensor
from midspan.runtimes.torch.element_types import copy_in, type_name
from midspan.weights.quantization import dequantize

Shared = TypeVar("Shared")
Derived = TypeVar("Derived")


class Preparation:
    """Passed to whatever makes kernels; kernels keep what they need of it.

    Attributes:
        device: the torch device of all tensors.
        bounds: limits of the program.
        widens_products: matrix products of 16-bit types are done in float32, because
            the device multiplies those types slowly or rounds them early.
    """

    def __init__(self, *, device: torch.device, bounds: Bounds, widens_products: bool = False) -> None:
        self.device = device
        self.bounds = bounds
        self.widens_products = widens_products
        self._tensors: WeakValueDictionary[tuple[str, torch.dtype], torch.Tensor] = WeakValueDictionary()
        self._shared: dict[Hashable, Any] = {}
        self._packed_bytes = 0

    def tensor(self, weight: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        """The weight as a tensor in its logical shape, the same tensor for all who ask.

        Args:
            weight: dense, or in any packed format of ``midspan.weights.quantization``; unpacked then.
            dtype: the tensor's type; values are rounded to it once.

        Returns:
            A contiguous tensor that must not be written to.
        """
        key = (weight.name, dtype)
        tensor = self._tensors.get(key)
        if tensor is None:
            # Unpacked numbers come in the wanted type at once: no float32 copy of the whole is made.
            array = weight.parts["data"] if weight.format == DENSE else dequantize(weight, type_name(dtype))
            tensor = copy_in(array.reshape(weight.shape), dtype, self.device)
            self._tensors[key] = tensor
        return tensor

    def vector(self, weight: PackedTensor, dtype: torch.dtype) -> torch.Tensor:
        """A small weight in float32, its values rounded to the activation type as the definition has it.

        Args:
            weight: a bias, a norm's weight or the like.
            dtype: the activation type.

        Returns:
            A contiguous float32 tensor that must not be written to.
        """
        wide = self.tensor(weight, dtype).float()
        self._tensors[(f"wide {weight.name}", dtype)] = wide
        return wide

    def shared(self, key: Hashable, make: Callable[[], Shared]) -> Shared:
        """What an earlier kernel made under this key, or else what ``make`` gives now."""
        if key not in self._shared:
            self._shared[key] = make()
        found: Shared = self._shared[key]
        return found

    def account(self, nbytes: int) -> None:
        """Count memory of a kernel's own packed weight."""
        self._packed_bytes += nbytes

    def memory_bytes(self) -> int:
        """Bytes of the weights on the device, shared ones once."""
        return self._packed_bytes + sum(tensor.nbytes for tensor in self._tensors.values())

    def clear(self) -> None:
        """Forget what was shared."""
        self._shared.clear()
        self._packed_bytes = 0


class OncePerStep(Generic[Derived]):
    """A function of a step's inputs, computed at the first call and remembered until they change.

    Inputs are told apart by identity: each step brings new tensors. The last inputs
    are held, so that no later tensor can be taken for them.
    """

    def __init__(self, function: Callable[..., Derived]) -> None:
        self._function = function
        self._inputs: tuple[Any, ...] = ()
        self._value: Derived | None = None

    def __call__(self, *inputs: Any) -> Derived:
        """The function's value for these inputs."""
        known = self._inputs
        if len(known) == len(inputs) and all(map(_is, known, inputs)) and self._value is not None:
            return self._value
        self._value = self._function(*inputs)
        self._inputs = inputs
        return self._value


def _is(left: object, right: object) -> bool:
    return left is right
