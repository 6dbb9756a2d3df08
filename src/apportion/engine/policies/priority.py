"""Smallest `priority` first, then first come, first served."""

from apportion.core.request import Request


def order_key(request: Request) -> tuple[int, ...]:
    return (request.priority, request.arrival_index)
