"""Token ids to text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase


class TextStream:
    """The text of one answer.

    Args:
        stops: strings that end the answer and do not belong to it.

    Attributes:
        stopped: whether one of them came; what follows is dropped.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], stops: Sequence[str] = ()
    ) -> None:
        self._tokenizer, self.stops = tokenizer.backend_tokenizer, [stop for stop in stops if stop]
        # The last tokens of the prompt decide how the first of the answer reads (a space, the rest of a character).
        self._decoder = DecodeStream(ids=list(prompt_ids[-8:]), skip_special_tokens=True)
        self._held = ""
        self.stopped = False

    def push(self, tokens: Sequence[int]) -> str:
        """The text that is certain now: what may be the beginning of a stop string is held back."""
        if self.stopped:
            return ""
        for token in tokens:
            self._held += self._decoder.step(self._tokenizer, token) or ""
            found = [at for stop in self.stops if (at := self._held.find(stop)) >= 0]
            if found:
                self.stopped = True
                text, self._held = self._held[: min(found)], ""
                return text
        keep = max((_overlap(self._held, stop) for stop in self.stops), default=0)
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        return text

    def finish(self) -> str:
        """What was held back, when the answer is over."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """The longest end of text that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
