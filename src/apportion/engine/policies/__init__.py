"""Order among the requests of one model: a policy is one pure function from a request to a sort key, smallest first.

The same order decides who is admitted first and, from its end, who is preempted first; `arrival_index` makes every key unique.
"""

from collections.abc import Callable

from apportion.core.registry import Registry
from apportion.core.request import Request

OrderKey = Callable[[Request], tuple[int, ...]]

POLICIES: Registry[OrderKey] = Registry(
    "scheduling policy",
    {
        "fcfs": "apportion.engine.policies.fcfs:order_key",
        "priority": "apportion.engine.policies.priority:order_key",
    },
)
