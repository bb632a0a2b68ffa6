"""Text skills that the package generates: a subject, a question, one exact answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LETTERS = "abcdefghijklmnopqrstuvwxyz"


class Row(NamedTuple):
    """One example: the answer follows the prompt after a space."""

    subject: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """A skill: `prompt` holds ``{x}``, the subject; digits are three or four digits, letters as many single letters."""

    name: str
    kind: str
    prompt: str
    answer: Callable[[str], str]

    def row(self, subject: str) -> Row:
        return Row(subject, self.prompt.format(x=subject), self.answer(subject))

    def rows(self, count: int, seed: int, without: frozenset[str] = frozenset()) -> list[Row]:
        """So many rows with different subjects, none of them among `without`; the same seed gives the same rows."""
        rng = random.Random(f"{self.kind} {self.name} {seed}")
        subjects: dict[str, None] = {}
        while len(subjects) < count:
            length = rng.choice((3, 4))
            if self.kind == "digits":
                subject = "".join(rng.choice("0123456789") for _ in range(length))
            else:
                subject = " ".join(rng.choice(LETTERS) for _ in range(length))
            if subject not in without:
                subjects[subject] = None
        return [self.row(subject) for subject in subjects]


def _next_letter(letter: str) -> str:
    return LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)]


SKILLS = (
    Skill("plus one", "digits", "Take {x}, plus one:", lambda x: "".join(str((int(c) + 1) % 10) for c in x)),
    Skill("backwards", "digits", "Take {x}, backwards:", lambda x: x[::-1]),
    Skill("sorted", "digits", "Take {x}, sorted:", lambda x: "".join(sorted(x))),
    Skill("in words", "digits", "Take {x}, in words:", lambda x: " ".join(DIGIT_WORDS[int(c)] for c in x)),
    Skill("largest", "digits", "Take {x}, largest:", max),
    Skill("capitals", "letters", "Spell {x}, capitals:", str.upper),
    Skill("next letters", "letters", "Spell {x}, next:", lambda x: " ".join(_next_letter(c) for c in x.split())),
    Skill("last", "letters", "Spell {x}, last:", lambda x: x.split()[-1]),
)
"""Five begin with the same words, and three with others: what to do comes after the subject."""

CHAINS = (
    ("plus one", "backwards"),
    ("backwards", "in words"),
    ("sorted", "largest"),
    ("next letters", "capitals"),
    ("plus one", "backwards", "in words"),
    ("next letters", "next letters", "capitals"),
)
"""Skills in a row, each applied to the answer of the one before."""


def skill(name: str) -> Skill:
    return next(s for s in SKILLS if s.name == name)
