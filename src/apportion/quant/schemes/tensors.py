"""What every family of files checks in the tensors it reads. Errors: CheckpointError naming the tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from apportion.core.errors import CheckpointError

# (mask, value): NaN of e4m3; infinity and NaN of e5m2; the one NaN of e4m3fnuz
NAN_CODES = {torch.float8_e4m3fn: (0x7F, 0x7F), torch.float8_e5m2: (0x7C, 0x7C), torch.float8_e4m3fnuz: (0xFF, 0x80)}
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def typed(name: str, tensor: Tensor, *dtypes: torch.dtype) -> Tensor:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(f"tensor {name} is {str(tensor.dtype).removeprefix('torch.')} and must be {wanted}")
    return tensor


def scales(name: str, tensor: Tensor, signed: bool = False) -> Tensor:
    """float32 scales, none of them zero, infinite or NaN; negative ones only where the family writes such."""
    scale = typed(name, tensor, *FLOATS).float()
    if not scale.isfinite().all():
        raise CheckpointError(f"tensor {name} holds a scale that is NaN or infinite")
    if not (scale.abs() if signed else scale).gt(0).all():
        raise CheckpointError(f"tensor {name} holds a scale that is zero{'' if signed else ' or negative'}")
    return scale


def float8_codes(name: str, tensor: Tensor) -> Tensor:
    """uint8 codes of a float8 tensor that holds finite numbers only."""
    mask, value = NAN_CODES[typed(name, tensor, *NAN_CODES).dtype]
    codes = tensor.view(torch.uint8)
    if ((codes & mask) == value).any() and not tensor.float().isfinite().all():
        raise CheckpointError(f"tensor {name} holds NaN or infinity")
    return codes


def regrouped(name: str, codes: Tensor, groups: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Columns sorted by their group, and the input of each (order int32 [C]). groups: int [C], of `size` columns each but the last."""
    group = typed(name, groups, torch.int32, torch.int64).long()
    order = group.argsort(stable=True)
    if not torch.equal(group[order], torch.arange(len(group)) // size):
        raise CheckpointError(f"tensor {name} does not give each group {size} inputs")
    return codes.index_select(1, order), order.int()
