"""Which model a lane should run next: a share policy sees the models a lane serves and puts them in order, most deserving first."""

from collections.abc import Sequence
from typing import Protocol

from apportion.core.registry import Registry


class SharePolicy(Protocol):
    def order(self, lane: str, models: Sequence[str]) -> Sequence[str]:
        """The models in the order in which to ask them for a step."""

    def ran(self, lane: str, model: str, num_tokens: int) -> None:
        """A step of `model` was submitted on `lane`."""


SHARE_POLICIES: Registry[type[SharePolicy]] = Registry(
    "share policy", {"round_robin": "apportion.engine.share_policies.round_robin:RoundRobin"}
)
