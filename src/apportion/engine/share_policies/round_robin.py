"""Every model in turn: on each lane, the one that ran last is asked last."""

from collections.abc import Sequence


class RoundRobin:
    def __init__(self) -> None:
        self._last: dict[str, str] = {}

    def order(self, lane: str, models: Sequence[str]) -> Sequence[str]:
        last = self._last.get(lane)
        if last not in models:
            return models
        after = models.index(last) + 1
        return [*models[after:], *models[:after]]

    def ran(self, lane: str, model: str, num_tokens: int) -> None:
        self._last[lane] = model
