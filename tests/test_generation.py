"""Generation and evaluation: cached equals uncached, a row alone equals the row in a batch, twice gives the same bits.

A router is a step function: where two experts are nearly tied, the last bit of a hidden state decides, and no two ways
of computing that state agree on it. Tokens whose k-th and (k+1)-th logit are closer than TAU are exempt, with what
follows them in their row, and counted.
"""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tiny_models import CELLS, PLACEMENTS, VOCAB, logits, trained
from torch import Tensor

from molora.layers import MoloraLayer

TAU = 1e-5


class Margins:
    """Watches all routers of a model: the smallest gap at the edge of the top k, for each token of each forward."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seen: list[Tensor] = []
        for module in model.modules():
            if isinstance(module, MoloraLayer) and "default" in module.molora_router:
                router = module.molora_router.default
                router.register_forward_hook(self._watch)

    def _watch(self, router: torch.nn.Module, args: tuple[Tensor, ...], _: object) -> None:
        top = router.logits(args[0]).topk(router.config.top_k + 1).values
        self.seen.append(top[:, -2] - top[:, -1])

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """The smallest margin of each token over all routers since the last call."""
        margins = torch.stack([m.view(shape) for m in self.seen]).amin(0)
        self.seen.clear()
        return margins


def safe_positions(margins: Tensor) -> Tensor:
    """(B, T) bool: no token up to here in this row was nearly tied."""
    return (margins > TAU).int().cummin(1).values > 0


@pytest.mark.parametrize(("family", "placement"), CELLS)
@torch.no_grad()
def test_cached_equals_uncached(family: str, placement: str, record_property: pytest.RecordProperty):
    model: PeftModel = trained(family, placement)
    margins = Margins(model)
    ids = torch.randint(3, VOCAB, (2, 12))
    whole = model(input_ids=ids).logits
    safe = safe_positions(margins.take((2, 12)))
    cache, steps = None, []
    for chunk in ids.split([5, 1, 1, 2, 3], dim=1):
        out = model(input_ids=chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    record_property("exempt", int((~safe).sum()))
    assert safe.float().mean() > 0.5
    torch.testing.assert_close(torch.cat(steps, 1)[safe], whole[safe], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "placement"), CELLS)
@torch.no_grad()
def test_a_left_padded_row_equals_the_row_alone(family: str, placement: str, record_property: pytest.RecordProperty):
    model = trained(family, placement)
    margins = Margins(model)
    lengths = (12, 9, 4)
    rows = [torch.randint(3, VOCAB, (n,)) for n in lengths]
    ids = torch.zeros(3, 12, dtype=torch.long)
    mask = torch.zeros(3, 12, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, -len(row) :] = row
        mask[i, -len(row) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    # OPT counts its positions from the mask itself.
    extra = {} if family == "opt" else {"position_ids": positions}
    batched = model(input_ids=ids, attention_mask=mask, **extra).logits
    margins.take((3, 12))
    exempt = 0
    for i, row in enumerate(rows):
        alone = model(input_ids=row[None]).logits
        safe = safe_positions(margins.take((1, len(row))))
        exempt += int((~safe).sum())
        torch.testing.assert_close(batched[i, -len(row) :][safe[0]], alone[safe], rtol=1e-5, atol=1e-5)
    record_property("exempt", exempt)
    assert exempt < sum(lengths) / 2


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_generate_is_the_same_with_and_without_cache(placement: str):
    model = trained(placement=placement)
    ids = torch.randint(3, VOCAB, (2, 6))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    with_cache = model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **options)
    assert torch.equal(with_cache, model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options))
    beams = model.generate(input_ids=ids, attention_mask=mask, num_beams=2, **options)
    assert beams.shape[0] == 2


@pytest.mark.parametrize(("family", "placement"), CELLS)
def test_two_evaluations_are_bitwise_equal_and_change_no_state(family: str, placement: str):
    model = trained(family, placement, lora_dropout=0.3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = logits(model)
    assert torch.equal(first, logits(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
