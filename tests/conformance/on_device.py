"""Operators of a GPU called with tensors of the host: uploaded before each call, and downloaded after it, what it changed in place too."""

from torch import Tensor


class OnDevice:
    """target: an Ops, or what an Ops made. held: pairs (host, device) of memory that it keeps, such as a bound buffer or an arena."""

    def __init__(self, target, device, held=()):
        self._target, self._device, self._held = target, device, list(held)

    def __getattr__(self, name):
        value = getattr(self._target, name)
        if not callable(value) or name == "plan":  # the host brings a step's metadata
            return value
        return lambda *args, **options: self._call(name, value, args, options)

    def __call__(self, *args, **options):
        return self._call("", self._target, args, options)

    def _call(self, name, function, args, options):
        given = []

        def up(x):
            if not isinstance(x, Tensor):
                return x
            given.append((x, x.to(self._device)))
            return given[-1][1]

        for host, device in self._held:
            device.copy_(host)
        result = function(*map(up, args), **{key: up(value) for key, value in options.items()})
        for host, device in (*self._held, *given):
            host.copy_(device)
        if name == "bind":
            self._held += given
        return self._down(result, given)

    def _down(self, result, given):
        if isinstance(result, tuple):
            return tuple(self._down(part, given) for part in result)
        if isinstance(result, Tensor):
            mine = [host for host, device in given if device is result]
            return mine[0] if mine else result.cpu()
        return OnDevice(result, self._device, given) if hasattr(result, "spec") else result
