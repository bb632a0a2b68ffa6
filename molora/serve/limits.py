"""What one server takes at once, and how much memory its cache gets."""

from __future__ import annotations

from dataclasses import dataclass

from molora.checks import check_number


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Bounds of a server; beyond one a request gets 400, 408, 413, 429 or 504, and none waits without end."""

    max_model_len: int
    """Tokens of a prompt and its answer together."""
    cache_tokens: int
    """Tokens of all running requests together, whose keys and values are kept."""
    page_size: int = 16
    """Tokens of a page of that cache."""
    max_batch_tokens: int = 512
    """Tokens of one forward; longer prompts go in parts."""
    max_running: int = 64
    """Requests in one forward."""
    max_waiting: int = 256
    """Requests beyond those that run; more get 429."""
    max_body_bytes: int = 4 * 2**20
    body_s: float = 30.0
    """Within which a body must have come."""
    timeout_s: float = 600.0
    """From the request to its last token."""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "cache_tokens", "page_size", "max_batch_tokens", "max_running", "max_body_bytes"):
            check_number(f"limits.{name}", getattr(self, name), at_least=1)
        check_number("limits.max_waiting", self.max_waiting, at_least=0)
        if self.cache_tokens < self.max_model_len + self.page_size:
            raise ValueError(
                f"the cache has {self.cache_tokens} tokens and one request may have {self.max_model_len}; give at "
                f"least --cache-tokens {self.max_model_len + self.page_size}, or a smaller --max-model-len"
            )
