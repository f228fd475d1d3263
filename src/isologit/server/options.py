"""What a server is asked to do, checked when built. Knows nothing of how it is done."""

from __future__ import annotations

import re
from dataclasses import dataclass

from isologit.config import EngineOptions
from isologit.errors import ConfigError

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s]+", re.IGNORECASE)


@dataclass(frozen=True)
class ServerOptions:
    """What `isologit serve` can be told. Raises ConfigError for limits that no model could make sense of.

    port: 0 takes any free one. allowed_origins: of pages that may call from a browser, "*" for all. plain_user_content:
    text of a conversation never becomes control tokens. max_model_len: prompt and answer of a request in tokens; None
    is the model's context. commit: streams carry commitments for a judge.
    """

    engine: EngineOptions = EngineOptions()  # noqa: RUF009 - frozen
    served_model_name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8835
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    plain_user_content: bool = False
    max_model_len: int | None = None
    max_queue: int = 4096
    max_body_bytes: int = 4 << 20
    request_timeout_s: float | None = None
    strict_contest: bool = False
    commit: bool = False

    def __post_init__(self) -> None:
        for option, value in (("--max-queue", self.max_queue), ("--max-body-bytes", self.max_body_bytes)):
            if value < 1:
                raise ConfigError(f"{option} must be at least 1, not {value}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(
                f"--max-model-len (in a contest YAML seq_length and max_generate_length) must be at least 2, not "
                f"{self.max_model_len}"
            )
        if self.request_timeout_s is not None and not self.request_timeout_s > 0:
            raise ConfigError(f"--request-timeout must be above 0, not {self.request_timeout_s}")
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    f"--allowed-origins must be * or an origin such as https://example.org, without a path, not "
                    f"{origin!r}"
                )
        if self.api_key == "":
            raise ConfigError("the API key is empty; give one, or leave it out")
