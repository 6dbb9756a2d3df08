"""Max-min fair bandwidths by progressive filling. Knows flows and the links they cross."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def fair_share(flows: Sequence[tuple[float, Mapping[int, float]]], capacity: Sequence[float]) -> list[float]:
    """Bytes/s of each flow. flows: (its own limit, link -> how often a byte of it crosses the link); capacity: bytes/s per link.

    All flows grow alike until a link is full or a limit is reached; whoever is bound by it stays there and the others go on.
    """
    if len(flows) == 1:
        limit, links = flows[0]
        return [min([limit, *(capacity[link] / times for link, times in links.items())])]
    rates = [0.0] * len(flows)
    growing = set(range(len(flows)))
    room = {link: capacity[link] for _, links in flows for link in links}
    while growing:
        load: dict[int, float] = dict.fromkeys(room, 0.0)
        for i in growing:
            for link, times in flows[i][1].items():
                load[link] += times
        steps = [(room[link] / times, link) for link, times in load.items() if times > 0]
        limits = [(flows[i][0] - rates[i], i) for i in growing]
        grow = max(0.0, min([s for s, _ in steps] + [s for s, _ in limits]))
        full = {link for s, link in steps if s <= grow * (1 + 1e-12)}
        bound = {i for s, i in limits if s <= grow * (1 + 1e-12)} | {i for i in growing if full & flows[i][1].keys()}
        for i in growing:
            rates[i] += grow
        for link, times in load.items():
            room[link] = max(0.0, room[link] - grow * times)
        growing -= bound
    return rates
