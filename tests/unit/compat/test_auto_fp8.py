"""AutoFP8's README, with only the import line and the path changed."""

from __future__ import annotations

import pytest
import torch

from apportion.compat.auto_fp8 import AutoFP8ForCausalLM, BaseQuantizeConfig
from apportion.core.errors import InvalidParameter
from tests.unit.quant import packers
from tests.unit.quant.test_checkpoints import load


def test_static_scales_and_cache(tmp_path):
    source = packers.write(tmp_path / "source", packers.floats())
    config = BaseQuantizeConfig(
        quant_method="fp8", activation_scheme="static", ignore_patterns=["re:.*lm_head"], kv_cache_quant_targets=("k_proj", "v_proj")
    )
    model = AutoFP8ForCausalLM.from_pretrained(str(source), config)
    with pytest.raises(InvalidParameter, match=r"call quantize\(\) before"):
        model.save_quantized(tmp_path / "early")
    ids = torch.randint(0, 101, (3, 20), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 12:] = 0
    model.quantize({"input_ids": ids, "attention_mask": mask})
    model.save_quantized(tmp_path / "out")
    attention = load(tmp_path / "out").model.layers[0].self_attn
    assert attention.attention.kv_scales.calibrated
    assert {spec.scheme for spec in attention.qkv_proj.specs} == {"e4m3_channel@e4m3_static"}

    model.quantize([row[: int(shown.sum())].tolist() for row, shown in zip(ids, mask, strict=True)])
    model.save_quantized(tmp_path / "unpadded")
    names = [file.name for file in (tmp_path / "out").glob("*.safetensors")]
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "unpadded" / name).read_bytes() for name in names), "padding counts"


def test_dynamic_needs_no_tokens(tmp_path):
    source = packers.write(tmp_path / "source", packers.floats())
    model = AutoFP8ForCausalLM.from_pretrained(str(source), BaseQuantizeConfig(activation_scheme="dynamic"))
    model.quantize()
    model.save_quantized(tmp_path / "out")
    load(tmp_path / "out")
    with pytest.raises(InvalidParameter, match="static scales need calibration tokens"):
        AutoFP8ForCausalLM.from_pretrained(str(source), BaseQuantizeConfig()).quantize()
