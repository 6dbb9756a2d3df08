"""Every error a user can meet, as one tree.

ApportionError
├── InvalidInput          the caller asked for something that cannot be done; other requests go on
│   ├── InvalidRequest        a prompt or a request: too long, empty, a token id outside the vocabulary
│   ├── InvalidParameter      a sampling or engine parameter: unknown, contradictory, out of range
│   └── Unsupported           known, but not by this build, device or model; names the capability
├── CheckpointError       a model folder: unknown architecture; missing, extra, misshapen or truncated tensors
├── OutOfMemory           what was asked for does not fit; says what would
├── NumericalError        NaN or infinite logits; fails one request
├── BenchmarkFailed       nothing could be measured: the server is not ready, or no request succeeded
├── ExecutorDied          a worker process ended; carries the child's type, message and last frames
└── InternalError         an invariant does not hold: a defect of ours

A message is one sentence that names the thing and the limit. The CLI prints it and exits with code 2.
"""


class ApportionError(Exception):
    """The root: catch this to catch all that the library raises on purpose."""


class InvalidInput(ApportionError, ValueError):
    pass


class InvalidRequest(InvalidInput):
    pass


class InvalidParameter(InvalidInput):
    pass


class Unsupported(InvalidInput):
    pass


class CheckpointError(ApportionError):
    pass


class OutOfMemory(ApportionError):
    pass


class NumericalError(ApportionError):
    pass


class BenchmarkFailed(ApportionError):
    pass


class ExecutorDied(ApportionError):
    """A worker ended. `cause` holds the child's own report (type, message, last frames) where it could send one."""

    def __init__(self, message: str, cause: str | None = None) -> None:
        super().__init__(message)
        self.cause = cause


class InternalError(ApportionError):
    pass
