"""Text of one sequence while its tokens come, and its stop strings.

Whole characters only: `tokenizers.DecodeStream` keeps back bytes that do not yet make one. Text that may be the start of a
stop string is kept back too, so what has been shown never has to be taken back.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream

from apportion.core.sampling_params import SamplingParams
from apportion.processor.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
MAX_PRIME_TOKENS = 24
MAX_HALF_CHARACTER = 3  # tokens: UTF-8 has at most four bytes to a character


class Detokenizer:
    """Grows `text` by tokens; finds stop strings across token borders.

    text: all text so far; after a stop it ends before the stop string (after it, with include_stop_str_in_output).
    The stream starts from the last tokens of the prompt, so that a first word keeps its leading space.
    """

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        self.text = ""
        self._backend = tokenizer.backend
        self._skip_special = params.skip_special_tokens
        self._stop = list(params.stop or ())
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._search_from = 0  # text before this was written while below min_tokens: no stop string may begin there
        self._shown = 0
        # Adjacent special tokens are shown without the decoder's space between them when the caller asks for that.
        join_specials = not (params.skip_special_tokens or params.spaces_between_special_tokens)
        self._added_tokens = tokenizer.added_tokens if join_specials else {}
        self._last_was_added = False
        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        self._pending: list[int] = []  # tokens since the stream last gave text
        for token_id in self._prompt_tail(prompt_token_ids):
            self._step(token_id)
        self._pending.clear()

    def append(self, token_ids: Sequence[int], *, skip_last: bool = False) -> str | None:
        """Add tokens; returns the stop string that is now complete, or None.

        skip_last: the last token ended the sequence by its id and is no text of it.
        """
        before = len(self.text)
        for i, token_id in enumerate(token_ids):
            self._num_tokens += 1
            if not (skip_last and i == len(token_ids) - 1):
                self.text += self._decode(token_id)
            if self._num_tokens < self._min_tokens:
                self._search_from = len(self.text)
        return self._find_stop(before) if len(self.text) > before else None

    def take(self, finished: bool) -> str:
        """The text to show since the last call. Until `finished`, a possible start of a stop string is kept back."""
        if finished and self._pending:  # whole characters before half a one, in the same token
            self.text += self._backend.decode(self._pending, skip_special_tokens=self._skip_special).rstrip(REPLACEMENT)
            self._pending.clear()
        end = len(self.text) if finished else len(self.text) - self._held_back()
        piece = self.text[self._shown : end]
        self._shown = max(self._shown, end)
        return piece

    def _decode(self, token_id: int) -> str:
        piece = self._step(token_id)
        if self._added_tokens:
            added = self._added_tokens.get(token_id)
            if added is not None and self._last_was_added:
                piece = added
            self._last_was_added = added is not None
        return piece

    def _step(self, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._backend, token_id) or ""
        except Exception as error:
            # Byte-fallback decoders rewrite a run of bytes that turns out not to be UTF-8; what was shown stays shown.
            if "Invalid prefix" not in str(error):
                raise
            self._stream = DecodeStream(skip_special_tokens=self._skip_special)
            piece = self._stream.step(self._backend, token_id) or ""
        if piece:
            self._pending.clear()
        elif len(self._pending) > MAX_HALF_CHARACTER:
            piece = self._give_up()
        return piece

    def _give_up(self) -> str:
        """What the stream keeps back though it can no longer begin a character: without end, where bytes are no UTF-8."""
        early, self._pending = self._pending[:-MAX_HALF_CHARACTER], self._pending[-MAX_HALF_CHARACTER:]
        text = self._backend.decode(early, skip_special_tokens=self._skip_special)
        if REPLACEMENT not in text:
            return ""  # tokens without text
        self._stream = DecodeStream(skip_special_tokens=self._skip_special)
        for token_id in self._pending:
            self._stream.step(self._backend, token_id)
        return text

    def _prompt_tail(self, prompt_token_ids: Sequence[int]) -> Sequence[int]:
        """The shortest end of the prompt, of at least four tokens, that reads as whole characters."""
        for length in range(4, MAX_PRIME_TOKENS):
            tail = list(prompt_token_ids[-length:])
            if length >= len(prompt_token_ids) or REPLACEMENT not in self._backend.decode(tail, skip_special_tokens=self._skip_special):
                return tail
        return list(prompt_token_ids[-MAX_PRIME_TOKENS:])

    def _find_stop(self, before: int) -> str | None:
        """Cut `text` at the first stop string that ends in the text added since `before`."""
        found: tuple[int, str] | None = None
        for stop in self._stop:
            at = self.text.find(stop, max(self._search_from, before - len(stop) + 1, 0))
            if at >= 0 and (found is None or at < found[0]):
                found = (at, stop)
        if found is None:
            return None
        at, stop = found
        self._pending.clear()
        self.text = self.text[: at + len(stop) if self._include_stop else at]
        return stop

    def _held_back(self) -> int:
        """How many last characters are the start of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self.text) - self._search_from), longest, -1):
                if self.text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
