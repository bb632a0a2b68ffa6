"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from molora.serve.tracing import TokenRouting

SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one server, in a registry of its own.

    Args:
        open_requests: how many run or wait now.
    """

    def __init__(self, open_requests: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("molora_requests", "Requests by outcome", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("molora_prompt_tokens", "Tokens of prompts", registry=registry)
        self.tokens = Counter("molora_generated_tokens", "Tokens of answers", registry=registry)
        self.first_token = Histogram(
            "molora_time_to_first_token_seconds", "From request to first token", buckets=SECONDS, registry=registry
        )
        self.between_tokens = Histogram(
            "molora_inter_token_latency_seconds", "Between tokens of a request", buckets=SECONDS, registry=registry
        )
        self.expert_share = Counter(
            "molora_expert_share", "Sum of an expert's shares over traced tokens", ["expert"], registry=registry
        )
        Gauge("molora_open_requests", "Requests that run or wait", registry=registry).set_function(open_requests)

    def count_shares(self, routing: Sequence[TokenRouting]) -> None:
        """Adds the shares of traced tokens."""
        for token in routing:
            for name, value in zip(token.experts, token.share.tolist(), strict=True):
                self.expert_share.labels(name).inc(max(value, 0.0))

    def text(self) -> bytes:
        return generate_latest(self.registry)
