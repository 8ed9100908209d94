"""The contract between the core and every plugin.

Plain data and protocols: importing it loads numpy and nothing heavier, and no
name in it belongs to a vendor. A third party can import all of it from here.

Every record is made with keywords only, except ``Found``, ``Unavailable``, ``Yes`` and ``No``.
"""

from __future__ import annotations

from midspan.interface.batch import Adjustments, Batch, SamplingBatch
from midspan.interface.cache import (
    CACHE_ELEMENT_BYTES,
    CACHE_SCALE_BYTES,
    PADDING_BLOCK,
    Cache,
    CacheGroup,
    CacheLayout,
    block_bytes,
    packed_block_bytes,
)
from midspan.interface.capabilities import Capabilities
from midspan.interface.collectives import Collectives, DeviceGroup
from midspan.interface.device import Bounds, Device, DeviceInfo, GroupDevice, MemoryReport
from midspan.interface.graph import Attribute, Dim, Graph, Node, Value, Weight
from midspan.interface.hooks import hookimpl, hookspec
from midspan.interface.kernel import Kernel, KernelSite, No, NodePlacement, Placement, Support, Yes, always
from midspan.interface.operations import OPERATIONS, Operation
from midspan.interface.plugin import DevicePlugin, Found, Unavailable
from midspan.interface.program import FinishedStep, Logprobs, Program, StepOutput, StepResult
from midspan.interface.version import INTERFACE_VERSION
from midspan.interface.weights import PackedTensor, QuantizationReader, StoredTensor, WeightSource

__all__ = [
    "CACHE_ELEMENT_BYTES",
    "CACHE_SCALE_BYTES",
    "INTERFACE_VERSION",
    "OPERATIONS",
    "PADDING_BLOCK",
    "Adjustments",
    "Attribute",
    "Batch",
    "Bounds",
    "Cache",
    "CacheGroup",
    "CacheLayout",
    "Capabilities",
    "Collectives",
    "Device",
    "DeviceGroup",
    "DeviceInfo",
    "DevicePlugin",
    "Dim",
    "FinishedStep",
    "Found",
    "Graph",
    "GroupDevice",
    "Kernel",
    "KernelSite",
    "Logprobs",
    "MemoryReport",
    "No",
    "Node",
    "NodePlacement",
    "Operation",
    "PackedTensor",
    "Placement",
    "Program",
    "QuantizationReader",
    "SamplingBatch",
    "StepOutput",
    "StepResult",
    "StoredTensor",
    "Support",
    "Unavailable",
    "Value",
    "Weight",
    "WeightSource",
    "Yes",
    "always",
    "block_bytes",
    "hookimpl",
    "hookspec",
    "packed_block_bytes",
]
