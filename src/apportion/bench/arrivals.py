"""When requests are meant to be sent: seconds after the start of a run, in ascending order, drawn before it begins.

Open loop only: users who come whether or not the server keeps up. A closed loop (so many users, each sending when the last answer
has come) has no times of its own; `serve.offer_load` makes one by a limit on requests in flight.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from apportion.core.errors import InvalidParameter


def gamma_arrivals(num: int, request_rate: float, burstiness: float = 1.0, *, seed: int = 0) -> list[float]:
    """`num` times whose gaps are gamma distributed with shape `burstiness` and mean 1 / request_rate (requests per second).

    burstiness 1 is a Poisson process, below 1 comes in bursts, infinity is a metronome; a request_rate of infinity sends all at
    once. The gaps are scaled so that the last request comes at num / request_rate whatever the seed, as vLLM's bench does:
    two seeds then offer the same load. Errors: InvalidParameter.
    """
    if not request_rate > 0:
        raise InvalidParameter(f"request_rate must be above 0, got {request_rate}")
    if not burstiness > 0:
        raise InvalidParameter(f"burstiness must be above 0, got {burstiness}")
    if math.isinf(request_rate):
        return [0.0] * num
    if math.isinf(burstiness):
        return [(i + 1) / request_rate for i in range(num)]
    numbers = random.Random(seed)
    times, now = [], 0.0
    for _ in range(num):
        now += numbers.gammavariate(burstiness, 1 / (request_rate * burstiness))
        times.append(now)
    scale = num / request_rate / now if now > 0 else 1.0
    return [time * scale for time in times]


def trace_arrivals(times: Sequence[float], *, speedup: float = 1.0) -> list[float]:
    """A trace's own times from zero, `speedup` times as fast. Errors: InvalidParameter."""
    if not 0 < speedup < math.inf:
        raise InvalidParameter(f"speedup must be a number above 0, got {speedup}")
    return [(time - times[0]) / speedup for time in times]
