"""What an engine tells of steps that end together, and how it goes on after a model left or a request was given up."""

from apportion.core.config import LaneConfig

from .house import House, group


class Recorder:
    """An OutputProcessor that keeps what it is told, and says that a stop string is complete at `stop_at` tokens."""

    def __init__(self, stop_at=None):
        self.stop_at, self.told, self.count = stop_at, [], 0

    def append(self, request, token_ids, logprobs, prompt_logprobs):
        self.told.append((list(token_ids), request.finish_reason))
        self.count += len(token_ids)
        return "stop!" if self.count == self.stop_at else None


def late_house(recorder):
    """Steps are seen to have ended only when as many as the lane's depth have."""
    house = House({"m": (group(),)}, lanes=(LaneConfig(depth=2),))
    house.engine._output_processor = recorder
    executor = house.executors[0][1]
    poll = executor.poll
    executor.poll = lambda timeout_s: [ended for _ in range(len(executor.queue)) for ended in poll(timeout_s)]
    return house


def test_steps_that_ended_together_are_told_one_by_one():
    house = late_house(Recorder())
    tokens = house.expected(house.add("plain", range(9), 4))
    house.run()
    house.engine._output_processor = recorder = Recorder()
    house.add("r", range(9), 12, sampling={"stop_token_ids": [tokens[3]]})
    house.run()
    assert recorder.told == [*(([token], None) for token in tokens[:3]), ([tokens[3]], "stop")]


def test_a_stop_string_drops_what_ended_together_with_it():
    house = late_house(recorder := Recorder(stop_at=3))
    request = house.add("r", range(9), 12)
    house.run()
    assert (request.num_output_tokens, request.finish_reason, request.stop_reason) == (3, "stop", "stop!")
    assert recorder.count == 3


def test_a_model_leaves_with_moves_to_do():
    house = House({"m": (group(),)}, num_slabs=4)
    house.add("first", range(9), 30)
    short = [house.add(f"short{i}", [i] * 4, 2) for i in range(12)]
    house.add("last", range(100, 109), 30)
    while not all(request.is_finished for request in short):
        house.engine.step(0.0)
    house.engine.reclaim("m", house.arena.num_bytes)
    assert house.engine.models["m"].scheduler.kv.num_draining, "nothing had to move: this test tests nothing"
    house.engine.remove_model("m")
    assert house.arena.num_free_slabs == house.arena.num_slabs


def test_an_engine_outlives_requests_that_kill_its_lane():
    house = House({"m": (group(),)}, die_at={"main": [{0}] * 6}, max_num_seqs=1)
    killers = [house.add(f"killer{i}", range(9)) for i in range(2)]
    waiting = house.add("waiting", range(9))
    house.run()
    assert [request.finish_reason for request in killers] == ["error", "error"]
    late = house.add("late", range(9))
    house.run()
    assert waiting.output_token_ids == late.output_token_ids == house.expected(late)


def test_a_lane_that_dies_with_nobody_to_blame_is_given_up():
    house = House({"m": (group(),)})
    for _ in range(3):
        house.executors[-1][1].is_alive = False
        house.engine.step(0.0)
    assert not house.engine.lanes and len(house.executors) == 3
