"""What a prediction is worth: exact match, the last number, ROUGE-L; and the interval of a mean."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

Z95 = 1.959963984540054
"""Standard deviations on either side that hold 95 % of a normal distribution."""
NUMBER = re.compile(r"(?:(?<![\w.])-)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


def exact_match(prediction: str, answer: str) -> float:
    """1 if the texts are equal but for runs of white space, else 0."""
    return float(prediction.split() == answer.split())


def last_number(text: str) -> Decimal | None:
    """The last number of a text, commas removed; ``None`` without one. ``10-5`` ends in 5, ``x = -5`` in -5."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def number(prediction: str, answer: str) -> float:
    """1 if the last numbers of both texts are the same number, else 0.

    Source: the scoring of GSM8K, github.com/openai/grade-school-math, which reads the answer behind ``####``.
    """
    found = last_number(prediction)
    return float(found is not None and found == last_number(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L: the F-measure of the longest common subsequence of lower-cased words ``[a-z0-9]+``, in [0, 1].

    F = 2 P R / (P + R) with P = LCS / words of the prediction and R = LCS / words of the answer.

    Source: C.-Y. Lin, ROUGE: a package for automatic evaluation of summaries (2004), section 3, with beta = 1.
    """
    words, reference = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, answer))
    lengths = [0] * (len(reference) + 1)
    for word in words:
        diagonal = 0
        for i, other in enumerate(reference, start=1):
            diagonal, lengths[i] = lengths[i], diagonal + 1 if word == other else max(lengths[i], lengths[i - 1])
    # P + R = LCS (m + n) / (m n), so F = 2 LCS / (m + n).
    return 2 * lengths[-1] / (len(words) + len(reference)) if lengths[-1] else 0.0


METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "number": number,
    "rouge_l": rouge_l,
}
"""Metrics of generated text: from a prediction and its reference to a score in [0, 1]."""


def majority(metric: str, answers: Sequence[str]) -> float:
    """The score of always giving the commonest answer (for ``number``: the commonest last number)."""
    if metric == "rouge_l":
        commonest = Counter(answers).most_common(1)[0][0]
        return sum(rouge_l(commonest, answer) for answer in answers) / len(answers)
    keys = [last_number(answer) for answer in answers] if metric == "number" else answers
    return Counter(keys).most_common(1)[0][1] / len(answers)


def mean_interval(scores: Sequence[float]) -> list[float]:
    """The 95 % interval of a mean by the normal approximation, mean +- 1.96 sd / sqrt(n), clipped to [0, 1].

    ``[0, 1]`` below two scores, whose spread is unknown.
    """
    n = len(scores)
    if n < 2:
        return [0.0, 1.0]
    mean = sum(scores) / n
    half = Z95 * math.sqrt(sum((score - mean) ** 2 for score in scores) / (n - 1) / n)
    return [max(0.0, mean - half), min(1.0, mean + half)]
