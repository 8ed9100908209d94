"""Every exception that Midspan raises on purpose.

An error is written for the person who reads it: the message says what happened
and to what, ``remedy`` says what to do now. This module knows nothing about
models, devices or HTTP; the API turns ``code`` and ``parameter`` into the
wire's error object.
"""

from __future__ import annotations

from collections.abc import Iterable


class MidspanError(Exception):
    """Base of all deliberate errors.

    Attributes:
        message: what happened, and to which model, plugin, file or request.
        remedy: what the reader can do about it, as a full sentence, or "".
        code: a stable snake_case identifier of the kind of error.
    """

    code = "internal_error"

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()


class InvalidRequest(MidspanError, ValueError):
    """A request that can never succeed as it is; only this request fails.

    Attributes:
        parameter: the name of the offending request field, or None.
    """

    code = "invalid_value"

    def __init__(
        self,
        message: str,
        *,
        remedy: str = "",
        parameter: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.parameter = parameter
        if code is not None:
            self.code = code


class ContextLengthExceeded(InvalidRequest):
    """Prompt and wanted output do not fit the model's context."""

    code = "context_length_exceeded"


class RequestFailed(MidspanError):
    """One accepted request failed while it ran; its neighbours did not."""

    code = "request_failed"


class QueueFull(MidspanError):
    """The waiting queue is at its limit; the client may retry later."""

    code = "queue_full"


class SettingsError(MidspanError, ValueError):
    """A setting, flag or environment variable has a value that cannot work."""

    code = "invalid_setting"


class ModelNotFound(MidspanError):
    """No model stands where the given name or path points."""

    code = "model_not_found"


class CheckpointError(MidspanError):
    """A model's files are damaged, incomplete or contradict each other."""

    code = "bad_checkpoint"


class UnsupportedModel(MidspanError):
    """The files are fine, but no builder or tokenizer here understands them."""

    code = "unsupported_model"


class TemplateError(InvalidRequest):
    """A chat template is missing, or failed on these messages."""

    code = "chat_template_error"


class GraphError(MidspanError, ValueError):
    """A graph breaks a rule of the graph language.

    Attributes:
        node: the name of the node at fault, or None for graph-wide errors.
    """

    code = "invalid_graph"

    def __init__(self, message: str, *, node: str | None = None, remedy: str = "") -> None:
        where = f"node '{node}': " if node else ""
        super().__init__(where + message, remedy=remedy)
        self.node = node


class PluginError(MidspanError):
    """A plugin could not be loaded or broke its contract.

    Attributes:
        plugin: the plugin's name.
    """

    code = "plugin_error"

    def __init__(self, message: str, *, plugin: str, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.plugin = plugin


class InterfaceMismatch(PluginError):
    """Plugin and core speak different versions of the device interface."""

    code = "interface_mismatch"


class DeviceNotFound(MidspanError):
    """The asked-for device does not exist here; the message lists what does."""

    code = "device_not_found"


class UnsupportedOperation(MidspanError):
    """No kernel of the device or its runtime can serve a node.

    Attributes:
        node: the node's name.
        reasons: one line for each kernel that refused.
    """

    code = "unsupported_operation"

    def __init__(self, message: str, *, node: str, reasons: Iterable[str] = (), remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.node = node
        self.reasons = tuple(reasons)


class OutOfDeviceMemory(MidspanError):
    """The device has no room for what was asked of it."""

    code = "out_of_device_memory"


class CacheTooSmall(OutOfDeviceMemory):
    """The KV cache cannot hold even one request of the wanted length."""

    code = "cache_too_small"


class DeviceLost(MidspanError):
    """The device stopped answering; every program on it is gone."""

    code = "device_lost"


class EngineDead(MidspanError):
    """The engine process ended and will not serve this request."""

    code = "engine_dead"
