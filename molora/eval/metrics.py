"""What a prediction is worth: exact match, the last number, ROUGE-L; and the interval of a mean."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation

Z95 = 1.959963984540054
"""Standard deviations on either side that hold 95 % of a normal distribution."""
NUMBER = re.compile(
    r"(?:(?<![\w.])[-\u2212])?"
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+\u2212]?[0-9]+)?"
)
"""A sign (hyphen or U+2212), digits whose commas stand between groups of three, a fraction, an exponent."""


def exact_match(prediction: str, answer: str) -> float:
    """1 if the texts are equal but for runs of white space, else 0."""
    return float(prediction.split() == answer.split())


def last_number(text: str) -> Decimal | None:
    """The last number of a text; ``None`` without one. ``10-5`` ends in 5, ``x = -5`` in -5, ``1,234`` in 1234,
    ``3,4`` in 4, ``2e3`` in 2000.
    """
    found = NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", "").replace("\u2212", "-"))
    except InvalidOperation:
        # An exponent beyond what Decimal holds: no reference has it.
        return Decimal("NaN")


def number(prediction: str, answer: str) -> float:
    """1 if the last numbers of both texts are the same number, else 0.

    GSM8K's own scoring (github.com/openai/grade-school-math) reads the number behind ``####``, where its answers end.
    """
    found = last_number(prediction)
    return float(found is not None and found == last_number(answer))


def rouge_l(prediction: str, answer: str) -> float:
    """ROUGE-L: the F-measure of the longest common subsequence of words, in [0, 1].

    F = 2 P R / (P + R) with P = LCS / words of the prediction and R = LCS / words of the answer. A word is a run of
    letters and digits of any script, casefolded; on ASCII text these are the words of rouge-score without its stemmer.

    Source: C.-Y. Lin, ROUGE: a package for automatic evaluation of summaries (2004), section 3, with beta = 1.
    """
    words, reference = map(_words, (prediction, answer))
    lengths = [0] * (len(reference) + 1)
    for word in words:
        diagonal = 0
        for i, other in enumerate(reference, start=1):
            diagonal, lengths[i] = lengths[i], diagonal + 1 if word == other else max(lengths[i], lengths[i - 1])
    # P + R = LCS (m + n) / (m n), so F = 2 LCS / (m + n).
    return 2 * lengths[-1] / (len(words) + len(reference)) if lengths[-1] else 0.0


def _words(text: str) -> list[str]:
    # Composed, for an accent written as its own character would split a word.
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFC", text.casefold()))


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
