"""Retrieval routing: the experts whose example prompts are most like this prompt, for the whole of its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from molora.checks import check_choice, check_int
from molora.routers.base import RouterConfig, Routing, Tokens
from molora.routers.centroid import check_embedder, cosine_similarities
from molora.routers.fixed_vectors import FixedVectorRouter


@dataclass(frozen=True, kw_only=True)
class Retrieval(RouterConfig):
    """The `top_k` experts whose embeddings are most similar to that of the prompt, each with gate 1 / k; nothing is
    trained.

    An expert's embedding is the mean of those of its example prompts (`model.set_centroids`; LoraRetriever: 20 each),
    and similarity is the cosine. The prompt is embedded once, by `model.generate`, or for other forwards by
    `with model.prompts(input_ids, attention_mask)`; the choice then holds for every token and every mixture.
    Source: LoraRetriever, arXiv 2402.09997, Sherry805139/LoraRetriever.

    Attributes:
        composition: "mixture" averages the experts' outputs, ``sum_i 1/k B_i A_i x``; "fusion" averages their matrices,
            ``(sum_i 1/k B_i) (sum_i 1/k A_i) x``, which adds the cross terms B_j A_i. With top_k=1 both are the
            paper's "selection".
        top_k: experts for a prompt; a pool of fewer experts uses all (released: 3 for compositions, 1 for selection).
        embedder: "base": the mean over the prompt's tokens of the hidden state that enters decoder layer `layer`, by
            the base without adapters; or a sentence-transformers model (hub id with a slash, or a directory), which
            `generate(..., tokenizer=tokenizer)` needs the tokenizer for.
        layer: with embedder "base", the decoder layer; None: the middle one.
    """

    name: ClassVar[str] = "retrieval"

    composition: str = "mixture"
    top_k: int = 3
    embedder: str = "base"
    layer: int | None = None

    def __post_init__(self) -> None:
        check_choice("composition", self.composition, ("mixture", "fusion"))
        check_int("top_k", self.top_k)
        check_embedder(self.embedder, self.layer)

    @property
    def reads_text(self) -> bool:
        return "/" in self.embedder

    @property
    def reads_embedding(self) -> bool:
        return True

    @property
    def has_centroids(self) -> bool:
        return True

    def check(self, num_experts: int, r: int, placement: str) -> None:
        if self.composition == "fusion" and placement in ("ffn", "ffn_linear"):
            raise ValueError(
                f"composition='fusion' averages the matrices of single linears, not of placement={placement!r}; use "
                "placement='linear', or composition='mixture'"
            )

    def num_chosen(self, num_experts: int, r: int) -> int:
        return min(self.top_k, num_experts)

    def build(self, in_features: int, num_experts: int, r: int = 0) -> RetrievalRouter:
        return RetrievalRouter(self, in_features, num_experts)


class RetrievalRouter(FixedVectorRouter):
    """The router of `Retrieval`. centroid_bits: (E, D') int32, the bits of fp32."""

    config: Retrieval
    bits = "centroid_bits"
    advice = (
        "this retrieval router has no embeddings of its experts yet; give example prompts for each expert with "
        "model.set_centroids({'expert': [prompts]}, tokenizer)"
    )

    @property
    def reads_by_itself(self) -> bool:
        return True

    def route(self, x: Tensor, tokens: Tokens, with_stats: bool) -> Routing:
        self.check_set()
        if tokens.embedding is None:
            raise ValueError(
                "a retrieval router chooses by the prompt, which this forward does not know; use model.generate(...) "
                "of a PeftModel, or put the forward into `with model.prompts(input_ids, attention_mask):`"
            )
        query = tokens.embedding.detach()
        if tokens.rows % query.shape[0] and query.shape[0] != x.shape[0]:
            raise ValueError(
                f"this forward has {tokens.rows} rows for {query.shape[0]} prompts; give one row for each prompt, or "
                "as many for each, those of one prompt next to each other"
            )
        absent = self.absent()
        similarities = cosine_similarities(query, self.vectors).masked_fill(absent, float("-inf"))
        topk_ids = similarities.topk(self.config.num_chosen(self.num_gates, 0), dim=1).indices
        chosen = torch.zeros_like(similarities).scatter(1, topk_ids, 1.0).masked_fill(absent, 0.0)
        gates = chosen / chosen.sum(1, keepdim=True)
        gates = gates.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        repeats = x.shape[0] // query.shape[0]
        gates, topk_ids, similarities = (t.repeat_interleave(repeats, 0) for t in (gates, topk_ids, similarities))
        stats = None
        if with_stats:
            probs = similarities.to(gates.dtype).softmax(1)
            stats = self.statistics(probs, gates, (gates > 0).to(gates.dtype), tokens.mask, gates.new_zeros(0))
        return Routing(gates, topk_ids, stats, True, fuses=self.config.composition == "fusion")
