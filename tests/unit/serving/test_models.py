"""Several models in one server: states, loading on demand, least recently used ones making room."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

import apportion
from apportion.core.config import ModelConfig
from apportion.core.errors import InvalidRequest, OutOfMemory
from apportion.serving.messages import ModelState
from apportion.serving.model_store import ModelStore
from tests.unit.serving.conftest import metric


def states(server) -> dict[str, str]:
    return {card["id"]: card["state"] for card in server.get("/v1/models").json()["data"]}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory, bundled_model):
    """Three models: the bundled one under three names."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("alpha", "beta", "gamma"):
        shutil.copytree(bundled_model, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def aliased(start_server):
    return start_server("--served-model-name", "main", "gpt-4o-mini")


@pytest.fixture(scope="module")
def crowd(start_server, models_dir, aliased):
    """A server with memory for two of them."""
    size = aliased.get("/v1/models/main").json()["memory_bytes"]
    return start_server("--models-dir", str(models_dir), "--kv-cache-memory", "64MiB", "--model-memory", str(int(2.5 * size)))


def test_the_first_is_loaded_and_the_others_are_known(crowd):
    assert states(crowd) == {"alpha": "loaded", "beta": "unloaded", "gamma": "unloaded"}


def test_a_request_loads_its_model_and_the_least_recently_used_goes(crowd):
    client = crowd.client()
    texts = {}
    for name in ("beta", "alpha", "gamma"):
        texts[name] = client.completions.create(model=name, prompt="The sea", max_tokens=6, temperature=0).choices[0].text
    assert len(set(texts.values())) == 1  # they are the same model
    assert states(crowd) == {"alpha": "loaded", "beta": "unloaded", "gamma": "loaded"}
    assert crowd.post("/debug/integrity").status_code == 200


def test_loading_and_unloading_by_hand(crowd):
    assert crowd.post("/v1/models/unload", json={"model": "gamma"}).json()["state"] == "unloaded"
    assert states(crowd)["gamma"] == "unloaded"
    assert crowd.post("/v1/models/load", json={"model": "beta"}).json()["state"] == "loaded"
    assert states(crowd)["beta"] == "loaded"
    assert crowd.post("/v1/models/load", json={"model": "omega"}).status_code == 404


def test_a_busy_model_is_not_unloaded_for_another(crowd):
    for name in ("alpha", "beta"):
        crowd.post("/v1/models/load", json={"model": name})
    asked = {"prompt": "On and on", "max_tokens": 500, "ignore_eos": True, "n": 4}
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(crowd.post, "/v1/completions", json={**asked, "model": name}) for name in ("alpha", "beta")]
        crowd.wait(lambda: metric(crowd, "num_requests_running") == 8, "both are busy")
        refused = crowd.post("/v1/completions", json={"model": "gamma", "prompt": "x"})
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert "alpha" in refused.json()["error"]["message"]
        assert all(answer.result().json()["usage"]["completion_tokens"] == 4 * 500 for answer in running)
    assert crowd.post("/v1/completions", json={"model": "gamma", "prompt": "x", "max_tokens": 1}).status_code == 200


def test_models_that_run_together_give_what_each_gives_alone(crowd):
    for name in ("alpha", "beta"):
        crowd.post("/v1/models/load", json={"model": name})

    def ask(i: int) -> str:
        body = {"model": ("alpha", "beta")[i % 2], "prompt": f"Number {i // 2}", "max_tokens": 12, "temperature": 0}
        return crowd.post("/v1/completions", json=body).json()["choices"][0]["text"]

    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(ask, range(16)))
    assert texts[::2] == texts[1::2]
    assert len(set(texts)) > 1


def test_aliases(aliased):
    assert set(states(aliased)) == {"main", "gpt-4o-mini"}
    answer = aliased.client().completions.create(model="gpt-4o-mini", prompt="x", max_tokens=1)
    assert answer.model == "gpt-4o-mini"


def test_openais_client_lists_and_retrieves(aliased):
    client = aliased.client()
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"main", "gpt-4o-mini"} and client.models.retrieve("gpt-4o-mini") == listed["gpt-4o-mini"]
    card = client.models.retrieve("main")
    assert (card.object, card.owned_by) == ("model", "apportion") and card.created > 1.7e9
    assert (card.state, card.max_model_len, card.error) == ("loaded", 2048, None) and card.memory_bytes > 1e6
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-17")
    assert caught.value.code == "model_not_found"


def test_the_version_is_the_packages(aliased):
    assert aliased.get("/version").json() == {"version": apportion.__version__}


class TestModelStore:
    @staticmethod
    def store(budget=None):
        times = iter(range(100))
        store = ModelStore([ModelConfig(model=name) for name in "abcd"], budget, clock=lambda: next(times))
        for name, size in zip("abc", (10, 20, 30), strict=True):
            model = store.get(name)
            model.info = type(model.info)(name, name, ModelState.LOADED, weight_bytes=size)
        return store

    def test_room_takes_no_victim(self):
        assert self.store(100).victims(40, 1000, lambda name: True) == []

    def test_least_recently_used_first(self):
        store = self.store(60)
        store.touch("a")
        assert store.victims(15, 1000, lambda name: True) == ["b"]
        assert store.victims(25, 1000, lambda name: True) == ["b", "c"]

    def test_free_memory_counts_too(self):
        assert self.store(None).victims(15, 0, lambda name: True) == ["a", "b"]

    def test_busy_ones_stay(self):
        assert self.store(60).victims(15, 1000, lambda name: name != "a") == ["b"]
        with pytest.raises(OutOfMemory, match="a, c cannot be unloaded"):
            self.store(60).victims(35, 1000, lambda name: name == "b")

    def test_unknown(self):
        with pytest.raises(InvalidRequest, match="'z'; known: a, b, c, d"):
            self.store().get("z")
