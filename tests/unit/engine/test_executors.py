"""Executors in threads and processes: calls, steps, deaths and orphans, on the bundled model."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from apportion.core.config import EngineConfig, LaneConfig, ModelConfig, ParallelConfig
from apportion.core.errors import CheckpointError, ExecutorDied, InvalidParameter, Unsupported
from apportion.core.model_spec import ModelSpec
from apportion.core.sampling_params import SamplingParams
from apportion.core.schedule import CachedRequest, NewRequest, SchedulerOutput
from apportion.engine.executor.factory import ExecutorFactory

ROOT = Path(__file__).resolve().parents[3]
PROMPT = [5, 9, 700, 31, 8]


class Bench:
    """One executor and what it takes to talk to it."""

    def __init__(self, folder, kind, lanes=("main",), size=1, kernels="reference"):
        self.model = ModelConfig(model=str(folder), name="m", dtype="float32")
        self.config = EngineConfig(
            models=(self.model,),
            kernels=kernels,
            num_threads=max(size, len(lanes)),
            parallel=ParallelConfig(tensor_parallel_size=size),
            lanes=tuple(LaneConfig(name=name, executor=kind) for name in lanes),
        )
        self.spec = ModelSpec.from_hf(json.loads((folder / "config.json").read_text()))
        self.groups = self.spec.kv_groups("float32", 32, size)
        self.factory = ExecutorFactory(self.config, 8 * self.groups[0].block_bytes)
        self.executors = [self.factory(lane) for lane in self.config.lanes]

    def load(self, executor, weights=None):
        return executor.load_model(self.model, self.spec, self.groups, weights)

    def generate(self, executor, count, first_block=0):
        """Greedy tokens of PROMPT, one step at a time."""
        table = [(first_block + i) * self.groups[0].block_bytes // 256 for i in range(2)]
        new = NewRequest("r", PROMPT, len(PROMPT), 0, SamplingParams(temperature=0.0), (table,))
        tokens, step = [], SchedulerOutput(0, "m", {"r": len(PROMPT)}, [new])
        for i in range(count):
            ticket = executor.submit(step)
            ((done, output),) = executor.poll(30.0)
            assert done == ticket
            tokens += output.token_ids["r"]
            step = SchedulerOutput(i + 1, "m", {"r": 1}, cached_requests=[CachedRequest("r", len(PROMPT) + i)])
        executor.submit(SchedulerOutput(99, "m", {}, finished_ids=["r"]))
        assert executor.poll(30.0)[0][1].token_ids == {}
        return tokens

    def close(self):
        for executor in self.executors:
            executor.shutdown()
        self.factory.close()


@contextmanager
def bench(*args, **kwargs):
    made = Bench(*args, **kwargs)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def expected(bundled_model):
    with bench(bundled_model, "uniproc") as b:
        b.load(b.executors[0])
        return b.generate(b.executors[0], 6)


def test_two_processes_share_weights_and_agree_with_a_thread(bundled_model, expected):
    with bench(bundled_model, "multiproc", lanes=("a", "b")) as b:
        first, second = b.executors
        weights = b.load(first)
        assert b.load(second, weights) is weights
        assert b.generate(first, 6) == b.generate(second, 6, first_block=3) == expected

        # weights and KV memory outlive a worker that is killed; a new one attaches and loads nothing
        (victim,) = first.pids
        os.kill(victim, signal.SIGKILL)
        start = time.monotonic()
        while first.is_alive:
            assert time.monotonic() - start < 1.0
            time.sleep(0.01)
        for call in (lambda: first.poll(1.0), lambda: first.submit(SchedulerOutput(0, "m", {})), lambda: b.load(first)):
            with pytest.raises(ExecutorDied, match=f"'a' died: worker process {victim} was killed by SIGKILL"):
                call()
        first.shutdown()
        b.executors.append(b.factory(b.config.lanes[0]))
        b.load(b.executors[-1], weights)
        assert b.generate(b.executors[-1], 6) == expected


@pytest.mark.parametrize("kind", ["uniproc", "multiproc"])
def test_a_refused_model_leaves_the_worker_usable_and_a_defect_ends_it(bundled_model, expected, kind, tmp_path):
    (tmp_path / "config.json").write_text((bundled_model / "config.json").read_text())
    with bench(bundled_model, kind) as b:
        (executor,) = b.executors
        absent = ModelConfig(model=str(tmp_path), name="absent", dtype="float32")
        with pytest.raises(CheckpointError, match=tmp_path.name):
            executor.load_model(absent, b.spec, b.groups)
        b.load(executor)
        assert b.generate(executor, 6) == expected

        executor.submit(SchedulerOutput(0, "nobody", {"r": 1}))
        with pytest.raises(ExecutorDied, match="InternalError: a step of model 'nobody'") as death:
            while True:
                executor.poll(5.0)
        assert "worker.py" in death.value.cause and "in launch" in death.value.cause
        assert not executor.is_alive


@pytest.mark.parametrize("kind", ["uniproc", "multiproc"])
def test_a_worker_that_cannot_start_says_why(bundled_model, kind):
    with bench(bundled_model, kind, kernels="abacus") as b:
        with pytest.raises(Unsupported, match="unknown kernels 'abacus'"):
            b.load(b.executors[0])
        assert not b.executors[0].is_alive


def test_uniproc_is_one_rank(bundled_model):
    with pytest.raises(InvalidParameter, match="'uniproc' runs one rank, tensor_parallel_size is 2"):
        Bench(bundled_model, "uniproc", size=2)


OWNER = """
import sys, time
from tests.unit.engine.test_executors import Bench
from pathlib import Path
b = Bench(Path(sys.argv[1]), "multiproc")
b.load(b.executors[0])
try:
    print(b.executors[0].pids[0], flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    pass
"""


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_no_worker_outlives_its_owner(bundled_model, blow):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(bundled_model)], stdout=subprocess.PIPE, start_new_session=True, cwd=ROOT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    worker = int(owner.stdout.readline())
    os.killpg(owner.pid, blow)  # as a terminal does with Ctrl-C: to the whole group
    code = owner.wait(timeout=20)
    assert code == (0 if blow is signal.SIGINT else -signal.SIGKILL)
    deadline = time.monotonic() + 2
    while _runs(worker):
        assert time.monotonic() < deadline, f"worker {worker} outlived its owner"
        time.sleep(0.02)


def _runs(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_two_ranks_give_the_tokens_of_one(bundled_model, expected):
    with bench(bundled_model, "multiproc", size=2) as b:
        (executor,) = b.executors
        weights = b.load(executor)
        assert len(weights.arena) == 2
        assert b.generate(executor, 6) == expected
        os.kill(executor.pids[1], signal.SIGKILL)
        with pytest.raises(ExecutorDied, match=r"rank 1 died: .* was killed by SIGKILL"):
            b.generate(executor, 6)
