"""Token ids to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class TextStream:
    """The text of one answer, token by token.

    The texts of tokens that are given out add up to the answer. A token that is a part of a character has "", and the
    one that completes it has the character.

    Args:
        stops: strings that end the answer and do not belong to it.

    Attributes:
        stopped: whether one of them came; what follows is dropped.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self.stops = tokenizer.backend_tokenizer, [stop for stop in stops if stop]
        # The last tokens of the prompt decide how the first of the answer reads (a space). They must end with a whole
        # character: what is left of a broken one the decoder would give out with the answer.
        before = list(prompt_ids[-8:])
        while before and self._tokenizer.decode(before, skip_special_tokens=True).endswith("\ufffd"):
            before.pop()
        self._decoder = DecodeStream(ids=before, skip_special_tokens=True)
        self._held: list[str] = []
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> list[str]:
        """The texts of the next tokens that are certain now, of these or of earlier ones.

        A token in which a stop string may begin is held back with those behind it. When one has come, all that were
        held are given out, cut where it began.
        """
        for token in tokens:
            self._held.append("" if self.stopped else self._decoder.step(self._tokenizer, token) or "")
            text = "".join(self._held)
            found = [at for stop in self.stops if (at := text.find(stop)) >= 0]
            if found:
                self.stopped = True
                self._held = _cut(self._held, min(found))
        if self.stopped:
            return self.finish()
        text = "".join(self._held)
        left = len(text) - max((_overlap(text, stop) for stop in self.stops), default=0)
        texts: list[str] = []
        while self._held and len(self._held[0]) <= left:
            left -= len(self._held[0])
            texts.append(self._held.pop(0))
        return texts

    def finish(self) -> list[str]:
        """The texts that were held back, when the answer is over."""
        texts, self._held = self._held, []
        return texts


def _cut(texts: Sequence[str], length: int) -> list[str]:
    """As many texts, of which only so many characters are left."""
    kept = []
    for text in texts:
        kept.append(text[:length])
        length -= len(kept[-1])
    return kept


def _overlap(text: str, stop: str) -> int:
    """The longest end of text that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
