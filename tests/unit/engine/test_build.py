"""A blueprint has every choice made before anything is loaded."""

import pytest

from apportion.assets import DEFAULT_MODEL
from apportion.core.config import CacheConfig, EngineConfig, LaneConfig, ModelConfig
from apportion.core.errors import InvalidParameter
from apportion.engine.build import plan_engine


def plan(num_threads, *lanes):
    model = ModelConfig(model=str(DEFAULT_MODEL), max_model_len=128)
    config = EngineConfig(models=(model,), cache=CacheConfig(kv_cache_memory=8 << 20), lanes=lanes, num_threads=num_threads)
    return plan_engine(config).config.lanes


def test_every_lane_knows_its_threads():
    assert [lane.num_threads for lane in plan(1, LaneConfig())] == [1]
    lanes = plan(None, LaneConfig())
    assert lanes[0].num_threads >= 1
    with pytest.raises(InvalidParameter, match="2 lanes need more than the 1 threads"):
        plan(1, LaneConfig(name="p", phases=frozenset({"prefill"})), LaneConfig(name="d", phases=frozenset({"decode"})))
