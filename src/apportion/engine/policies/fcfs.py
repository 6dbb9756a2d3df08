"""First come, first served."""

from apportion.core.request import Request


def order_key(request: Request) -> tuple[int, ...]:
    return (request.arrival_index,)
