"""How the server is run, apart from how its engine is.

Knows nothing about models and reads no environment: the command line, or who
embeds the application, fills it in. Every default is the careful choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from midspan.errors import SettingsError

MEBIBYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of one server.

    Attributes:
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        api_keys: any of them opens the guarded routes; empty: all routes are open.
        served_model_names: names that requests may give; empty: the model's own, see ``model_naming``.
        chat_template: text of a template that replaces the model's; None: the model's.
        trust_request_chat_template: let a request bring its own template.
        max_body_bytes: larger request bodies are refused with 413.
        max_prompts: prompts in one completion request.
        shutdown_timeout: seconds that running requests get after the first stop signal.
        vllm_metric_names: write the metrics a second time under vLLM's names.
        root_path: path prefix that a proxy in front strips or keeps.
        ssl_keyfile, ssl_certfile: serve TLS with these PEM files.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    served_model_names: tuple[str, ...] = ()
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    max_body_bytes: int = 32 * MEBIBYTE
    max_prompts: int = 1024
    shutdown_timeout: float = 30.0
    vllm_metric_names: bool = True
    root_path: str = ""
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise SettingsError(f"port must be between 0 and 65535, not {self.port}.")
        if self.max_body_bytes < 1:
            raise SettingsError(f"max_body_bytes must be at least 1, not {self.max_body_bytes}.")
        if not self.shutdown_timeout >= 0:
            raise SettingsError(f"shutdown_timeout must be 0 or more seconds, not {self.shutdown_timeout}.")
        if any(not key for key in self.api_keys):
            raise SettingsError("An API key is empty.", remedy="Give a key with --api-key, or leave the flag out.")
        if self.root_path and (not self.root_path.startswith("/") or self.root_path.endswith("/")):
            raise SettingsError(
                f"root_path must begin with a slash and not end with one, unlike {self.root_path!r}.",
                remedy="Give for example --root-path /models.",
            )
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise SettingsError("TLS needs both --ssl-keyfile and --ssl-certfile.")
