"""Triton's interpreter on the CPU: chosen before the kernels' modules are imported, for processes without a GPU."""

import os
from importlib.util import find_spec


def choose() -> None:
    """Interpret every kernel decorated from now on, if Triton is installed and there is no GPU to run them."""
    import torch

    if not find_spec("triton") or torch.cuda.is_available():
        return
    os.environ["TRITON_INTERPRET"] = "1"  # what a process of pytest-xdist finds set already: each has to mend its own interpreter
    mend()


def mend() -> None:
    """Defects of the interpreter of 3.6: it indexes as NumPy no longer does from 2.4, rounds to bfloat16 towards zero, and its dot
    multiplies the bits of bfloat16."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    patch, dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl

    def patch_and_index(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_to_nearest(self, source, dst_type):
        if source.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return cast(self, source, dst_type)
        bits = source.data.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return interpreter.TensorHandle(np.where(np.isnan(source.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)

    interpreter._patch_lang_tensor = patch_and_index
    builder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    builder.cast_impl = cast_to_nearest
