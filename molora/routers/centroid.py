"""Centroid routing: the experts whose example prompts are most similar, without a gradient (LoRA-TLE)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from molora.checks import check_int, check_number
from molora.routers.base import RouterConfig, Routing, Tokens, widest
from molora.routers.fixed_vectors import FixedVectorRouter


def largest_similarity_weights(similarities: Tensor, temperature: float) -> Tensor:
    """``softmax(c)`` after the largest c of each row was multiplied by the temperature: (T, E) to (T, E).

    Where every similarity is negative this pushes the best expert down, as published.
    """
    largest = torch.zeros_like(similarities).scatter(1, similarities.argmax(1, keepdim=True), 1.0)
    return (similarities * (1 + (temperature - 1) * largest)).softmax(1)


def cosine_similarities(query: Tensor, vectors: Tensor) -> Tensor:
    """``q . c / max(|q| |c|, 1e-6)``: (T, D') and (E, D') to (T, E), accumulated in fp64."""
    accumulate = widest(query)
    q, c = query.to(accumulate), vectors.to(accumulate)
    norms = q.norm(dim=1, keepdim=True) * c.norm(dim=1)
    return (q @ c.T) / norms.clamp(min=1e-6)


def check_embedder(embedder: Any, layer: Any) -> None:
    """Raises ValueError unless `embedder` is "base" or could name a sentence-transformers model, and `layer` goes with
    it."""
    if not isinstance(embedder, str) or not ("/" in embedder or embedder == "base"):
        raise ValueError(
            f"embedder={embedder!r} must be 'base' or a sentence-transformers model: a hub id as "
            "'sentence-transformers/all-MiniLM-L6-v2' or a directory as './minilm'"
        )
    if layer is not None:
        check_int("layer", layer, at_least=0)
        if embedder != "base":
            raise ValueError(f"layer={layer} is for embedder='base'; {embedder} reads text, leave layer out")


@dataclass(frozen=True, kw_only=True)
class Centroid(RouterConfig):
    """Gates from the cosine similarity between a query and one centroid for each expert; nothing is trained.

    ``c_i = cos(query, centroid_i)``, the largest c is multiplied by `temperature`, the gates are softmax(c). A centroid
    is the plain mean of the embeddings of an expert's example prompts (`model.set_centroids`).
    Source: LoRA-TLE, arXiv 2311.10847, jb-01/LoRA-TLE (moe.py, similarity). The experts' outputs are mixed; the paper
    merges parameters, which adds the cross terms B_j A_i.

    Attributes:
        embedder: "base": the token's own hidden state, which carries its past, so that packed, cached and
            shared-prefix decoding work; or a sentence-transformers model (hub id as
            "sentence-transformers/all-MiniLM-L6-v2", or a directory), which reads the whole running text again, as in
            the paper; works in `generate(..., tokenizer=tokenizer)` only.
        layer: with embedder "base", the decoder layer whose input is the query for every mixture of the model; the
            mixtures before it weigh all experts alike. None: each mixture compares its own input with centroids of its
            own.
        temperature: > 0, of the largest similarity only.
        reweight_every: with a sentence-transformers embedder, the gates are made anew every so many tokens and kept in
            between (the paper's best: 2).
        top_k: only the k largest gates, renormalised; None: all experts (published).
    """

    name: ClassVar[str] = "centroid"

    embedder: str = "base"
    layer: int | None = None
    temperature: float = 4.0
    reweight_every: int = 1
    top_k: int | None = None

    def __post_init__(self) -> None:
        check_embedder(self.embedder, self.layer)
        check_number("temperature", self.temperature, above=0)
        check_int("reweight_every", self.reweight_every)
        if self.top_k is not None:
            check_int("top_k", self.top_k)
        if self.reweight_every > 1 and not self.reads_text:
            raise ValueError(
                f"reweight_every={self.reweight_every} needs a sentence-transformers embedder: with embedder='base' "
                "each token is its own query, so that no state is kept between tokens"
            )

    @property
    def reads_text(self) -> bool:
        """Whether the query is an embedding of the running text."""
        return "/" in self.embedder

    @property
    def reads_embedding(self) -> bool:
        """Whether the query comes from outside the mixture's own input."""
        return self.reads_text or self.layer is not None

    @property
    def has_centroids(self) -> bool:
        return True

    def check(self, num_experts: int, r: int, placement: str) -> None:
        if self.top_k is not None and self.top_k > num_experts:
            raise ValueError(f"top_k={self.top_k} exceeds num_experts={num_experts}; lower router.top_k")

    def num_chosen(self, num_experts: int, r: int) -> int:
        return self.top_k or num_experts

    def build(self, in_features: int, num_experts: int, r: int = 0) -> CentroidRouter:
        return CentroidRouter(self, in_features, num_experts)


class CentroidRouter(FixedVectorRouter):
    """The router of `Centroid`. centroid_bits: (E, D') int32, the bits of fp32."""

    config: Centroid
    bits = "centroid_bits"
    advice = (
        "this centroid router has no centroids yet; give example prompts for each expert with "
        "model.set_centroids({'expert': [prompts]}, tokenizer)"
    )

    @property
    def reads_by_itself(self) -> bool:
        return True

    @property
    def centroids(self) -> Tensor:
        """(E, D') fp32."""
        return self.vectors

    def route(self, x: Tensor, tokens: Tokens, with_stats: bool) -> Routing:
        config = self.config
        self.check_set()
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        if config.reads_text and tokens.embedding is None:
            raise ValueError(
                f"embedder={config.embedder!r} reads the running text, which only model.generate(..., "
                "tokenizer=tokenizer) of a PeftModel has; use embedder='base' for training, scoring and serving"
            )
        if tokens.embedding is None and config.reads_embedding:
            # A mixture before the layer that is read: all experts alike.
            present = (~self.absent()).to(dtype)
            similarities = gates = (present / present.sum()).expand(x.shape[0], -1)
        else:
            query = x if tokens.embedding is None else tokens.embedding
            similarities = cosine_similarities(query.detach(), self.vectors).to(dtype)
            similarities = similarities.masked_fill(self.absent(), float("-inf"))
            gates = largest_similarity_weights(similarities, config.temperature)
            if config.top_k is not None:
                kept = torch.zeros_like(gates).scatter(1, gates.topk(config.top_k, dim=1).indices, 1.0)
                gates = gates * kept / (gates * kept).sum(1, keepdim=True)
            repeats = x.shape[0] // query.shape[0]
            gates, similarities = (t.repeat_interleave(repeats, 0) if repeats > 1 else t for t in (gates, similarities))
        stats = None
        if with_stats:
            chosen = (gates > 0).to(dtype)
            stats = self.statistics(similarities.softmax(1), gates, chosen, tokens.mask, gates.new_zeros(0))
        return Routing(gates, None, stats, True)
