"""The order of samples depends on the seed alone, and a saved position continues with the very next batch."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stackwise.data.corpus import TokenSplit
from stackwise.data.errors import DataError
from stackwise.data.loader import EvalLoader, TokenLoader, permutation
from stackwise.data.prepare import prepare
from stackwise.data.settings import DataSettings

# Python 3.12 and later warn about every fork of a process with threads; torch's workers are forks.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

SPLIT = TokenSplit.from_arrays(np.arange(200) % 97, [0, 13, 57, 58, 120, 160])


def loader(**options):
    return TokenLoader(SPLIT, **({"seq_len": 8, "batch_size": 4, "seed": 3} | options))


def take(stream, n):
    return [next(stream) for _ in range(n)]


def ids(batches):
    return [i for batch in batches for i in batch["sample_ids"].tolist()]


def assert_equal(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@given(st.integers(1, 300), st.integers(-(2**70), 2**70), st.integers(0, 50))
def test_an_order_is_a_permutation(n, seed, epoch):
    assert sorted(permutation(n, seed, epoch).tolist()) == list(range(n))


def test_an_order_is_fixed_for_all_time():
    assert permutation(10, 42, 0).tolist() == [2, 6, 3, 1, 5, 0, 4, 7, 9, 8]


def test_orders_differ_by_seed_and_epoch():
    orders = {tuple(permutation(50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_every_epoch_holds_every_row_once_in_a_new_order_and_batches_run_over_its_end():
    stream = loader(batch_size=5)
    assert stream.rows == stream.rows_per_epoch == 24
    assert stream.steps_per_epoch == 5
    seen = ids(take(stream, 15))
    epochs = [seen[i : i + 24] for i in (0, 24, 48)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_without_shuffle_rows_come_in_order():
    assert ids(take(loader(shuffle=False), 7)) == [*range(24), 0, 1, 2, 3]


def test_a_batch_may_be_larger_than_the_split():
    seen = ids(take(loader(batch_size=60), 2))
    assert all(sorted(seen[i : i + 24]) == list(range(24)) for i in range(0, 120, 24))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_disjoint_and_together_see_what_one_process_sees(world_size):
    ranks = [loader(batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    whole = loader(batch_size=2 * world_size)
    for _ in range(20):
        parts = [next(rank) for rank in ranks]
        assert ids(parts) == ids([next(whole)])
    assert {json.dumps(rank.state_dict()) for rank in ranks} == {json.dumps(whole.state_dict())}


@pytest.mark.parametrize(
    "options",
    [{}, {"packing": False, "pad_id": 1}, {"packing": False, "bucketing": True}, {"doc_mask": False}],
)
def test_workers_change_nothing(options):
    plain, ahead = loader(**options), loader(num_workers=2, **options)
    assert_equal(take(plain, 15), take(ahead, 15))
    assert plain.state_dict() == ahead.state_dict()
    ahead.close()


@given(st.integers(0, 40), st.integers(1, 30), st.booleans())
def test_a_saved_position_continues_with_the_very_next_batch(before, after, shuffle):
    first = loader(shuffle=shuffle)
    take(first, before)
    state = json.loads(json.dumps(first.state_dict()))
    again = loader(shuffle=shuffle)
    take(again, 3)
    again.load_state_dict(state)
    assert_equal(take(first, after), take(again, after))


@pytest.mark.parametrize(("workers_before", "workers_after"), [(0, 2), (2, 0), (2, 1)])
def test_a_saved_position_continues_with_any_number_of_workers(workers_before, workers_after):
    expected = take(loader(), 20)
    for stop in (1, 7):
        first = loader(num_workers=workers_before)
        take(first, stop)
        again = loader(num_workers=workers_after)
        again.load_state_dict(first.state_dict())
        assert_equal(take(again, 20 - stop), expected[stop:])
        # going back while workers hold later batches drops those
        again.load_state_dict(first.state_dict())
        assert_equal(take(again, 2), expected[stop : stop + 2])
        first.close()
        again.close()


def test_a_saved_position_continues_with_another_batch_size_and_world():
    first = loader(batch_size=4)
    take(first, 5)
    first_state = first.state_dict()
    rest = ids(take(first, 6))
    for options in ({"batch_size": 8}, {"batch_size": 4, "world_size": 2}):
        again = loader(**options)
        again.load_state_dict(first_state)
        assert ids([next(again)])[:4] == rest[:4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 4}, "seed was 3 and is 4"),
        ({"seq_len": 4}, "rows was 24 and is 49, seq_len was 8 and is 4"),
        ({"shuffle": False}, "shuffle was True and is False"),
        ({"packing": False}, "packing was True and is False"),
        ({"packing": False, "bucketing": True}, "bucketing was None and is True"),
    ],
)
def test_a_position_of_another_order_is_refused(options, message):
    with pytest.raises(DataError, match=message):
        loader(**options).load_state_dict(loader().state_dict())


def test_loading_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    for workers in (0, 1):
        stream = loader(num_workers=workers)
        take(stream, 2)
        stream.close()
    assert torch.equal(before, torch.get_rng_state())


def test_signals_to_the_process_group_leave_the_workers_at_work():
    stream = loader(num_workers=2)
    batches = take(stream, 1)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker.pid, number)
    assert_equal(batches + take(stream, 19), take(loader(), 20))
    stream.close()
    assert multiprocessing.active_children() == []


PROGRAM = """\
import os, signal, sys
import numpy as np
from stackwise.data.corpus import TokenSplit
from stackwise.data.loader import TokenLoader
split = TokenSplit.from_arrays(np.arange(100))
stream = TokenLoader(split, seq_len=4, batch_size=2, seed=0, num_workers=2)
"""


def run_program(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", PROGRAM + code], capture_output=True, text=True, timeout=60)


def test_a_signal_to_a_worker_that_has_just_been_started_is_ignored():
    code = """\
def signal_myself():
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
os.register_at_fork(after_in_child=signal_myself)
print(len([next(stream) for _ in range(4)]))
stream.close()
"""
    done = run_program(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")


def test_a_program_that_forgets_its_workers_ends_all_the_same():
    done = run_program("next(stream)\nraise RuntimeError('some mistake')\n")
    assert done.returncode == 1
    assert done.stderr.endswith("RuntimeError: some mistake\n")


def test_a_program_whose_worker_was_killed_ends_all_the_same():
    code = """\
import multiprocessing
next(stream)
try:
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    for batch in stream:
        pass
except (RuntimeError, OSError) as error:
    kept = error  # and with it the frames that hold the workers
"""
    done = run_program(
        code
    )  # which must not wait for ever; the news of the death may also come after all this
    assert done.returncode == 0 or "DataLoader worker" in done.stderr


def test_iterating_again_continues():
    stream = loader()
    seen = [batch for batch, _ in zip(stream, range(3), strict=False)]
    assert_equal(seen, take(loader(), 3))
    assert ids([next(iter(stream))]) == ids(take(loader(), 5))[16:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2, outside 0 to 1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"seq_len": 200}, "has 200 tokens and a row needs 201"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        loader(**options)


def test_a_split_on_disk_travels_to_a_worker_as_its_path(tmp_path):
    corpus = prepare(DataSettings(max_bytes=100_000), tmp_path)
    data = pickle.dumps(corpus.train)
    assert len(data) < 1000
    again = pickle.loads(data)
    assert np.array_equal(again.tokens, corpus.train.tokens)
    assert np.array_equal(again.doc_starts, corpus.train.doc_starts)
    assert (again.n_bytes, again.max_id, again.name) == (corpus.train.n_bytes, corpus.train.max_id, "train")
    memory = pickle.loads(pickle.dumps(SPLIT))
    assert np.array_equal(memory.tokens, SPLIT.tokens)


def test_an_evaluation_pass_is_finite_in_order_and_repeatable():
    stream = EvalLoader(SPLIT, seq_len=8, batch_size=5)
    batches = list(stream)
    assert ids(batches) == list(range(24))
    assert [len(batch["sample_ids"]) for batch in batches] == [5, 5, 5, 5, 4]
    assert len(stream) == 5
    assert_equal(batches, list(stream))


def test_some_batches_of_an_evaluation_are_spread_over_the_split():
    stream = EvalLoader(SPLIT, seq_len=8, batch_size=4, batches=2)
    assert ids(list(stream)) == [0, 3, 6, 9, 12, 15, 18, 21]
    assert len(stream) == 2
    assert stream.rows == 8
    assert ids(list(EvalLoader(SPLIT, seq_len=8, batch_size=2, batches=4))) == ids(list(stream))
    assert EvalLoader(SPLIT, seq_len=8, batch_size=4, batches=100).rows == 24
    for options in ({"batches": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="is 0"):
            EvalLoader(SPLIT, **({"seq_len": 8, "batch_size": 4} | options))


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 1}, {"rank": 1, "world_size": 2}, {"shuffle": False}]
)
def test_what_comes_next_is_known_before_it_is_built(options):
    stream = loader(**options)
    for _ in range(12):  # past the end of a pass
        coming = stream.upcoming()
        assert_equal([coming], [stream.upcoming()])
        batch = next(stream)
        assert_equal([coming], [{key: batch[key] for key in ("sample_ids", "draws", "places")}])
    stream.close()
