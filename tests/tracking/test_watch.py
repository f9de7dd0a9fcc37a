"""The live page: what it says at every moment of a run, to whom, and that it changes nothing."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import threading
import time
from contextlib import contextmanager

import pytest

from stackwise.tracking.events import Tracker
from stackwise.tracking.folder import RunFolder
from stackwise.tracking.follow import Follower
from stackwise.tracking.history import RunHistory
from stackwise.tracking.live import LiveRun
from stackwise.tracking.metrics import MetricsFile, read_metrics
from stackwise.tracking.watch import WatchServer


class Clock:
    def __init__(self, now=1_700_000_000.0):
        self.now = now

    def __call__(self):
        return self.now


@contextmanager
def served(path, host="127.0.0.1"):
    server = WatchServer(LiveRun(path), host, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(server, path="/", *, method="GET", host=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=30)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def files_of(path):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in path.rglob("*")}


# --- reading a file that grows --------------------------------------------------------------------------------------


def test_a_growing_file_is_read_as_if_it_were_read_whole(tmp_path, run_events):
    events = run_events(n_stacks=2, stage_steps=20)
    folder = RunFolder.create(tmp_path / "run")
    follower = Follower(folder.metrics)
    assert not follower.update()
    with Tracker([MetricsFile(folder.path)]) as tracker:
        for i, event in enumerate(events):
            tracker.emit(event)
            if i % 7 == 0:
                assert follower.update()
                assert not follower.update()
                assert follower.log.events == read_metrics(folder.metrics).events
    follower.update()
    assert follower.log.events == events


def test_a_line_that_is_being_written_is_left_for_the_next_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"event": "note", "time": 1.0 + i, "message": f"ä{i}"}) for i in range(3)]
    follower = Follower(path)
    path.write_text(lines[0] + "\n" + lines[1][:9])
    assert follower.update()
    assert [event["message"] for event in follower.log.events] == ["ä0"]
    path.write_text(lines[0] + "\n" + lines[1] + "\n" + "not json\n" + lines[2] + "\n")
    follower.update()
    assert [event["message"] for event in follower.log.events] == ["ä0", "ä1", "ä2"]
    assert follower.log.problems[0].startswith("metrics.jsonl line 3: not JSON")


@pytest.mark.parametrize("grown_back", [False, True])
def test_a_file_that_was_cut_is_read_anew(tmp_path, grown_back):
    path = tmp_path / "metrics.jsonl"

    def note(text):
        return json.dumps({"event": "note", "time": 1.0, "message": text}) + "\n"

    path.write_text(note("a") + note("b") + note("c"))
    follower = Follower(path)
    follower.update()
    path.write_text(note("a") + note("d") + (note("e") + note("f") if grown_back else ""))
    follower.update()
    expected = ["a", "d", "e", "f"] if grown_back else ["a", "d"]
    assert [event["message"] for event in follower.log.events] == expected
    path.unlink()
    assert follower.update()
    assert (follower.log.events, follower.version) == ([], "")


# --- what is said when ----------------------------------------------------------------------------------------------


def test_a_run_is_followed_from_before_its_start_to_after_its_end(tmp_path, run_events):
    events, clock = run_events(n_stacks=2, stage_steps=20), Clock()
    live = LiveRun(tmp_path / "run", clock)
    assert live.state()["status"] == "waiting"
    assert live.state()["figures"] == []
    assert "no run in" in live.page()[1]
    folder = RunFolder.create(tmp_path / "run")
    middle = next(i for i, e in enumerate(events) if e["event"] == "step" and e["stage"] == 1)
    with Tracker([MetricsFile(folder.path)]) as tracker:
        for event in events[: middle + 1]:
            tracker.emit(event)
        clock.now = events[middle]["time"] + 3.0
        state = live.state()
        assert (state["status"], state["step"], state["stage"]) == ("unfinished", 30, 2)
        assert state["loss"] == events[middle]["loss"]
        assert state["quiet"] == pytest.approx(3.0)
        assert state["seconds_left"] is not None
        assert "step 30 of 60" in state["figures"]
        version, body = live.page()
        assert version == state["version"]
        assert "not finished" in body
        for event in events[middle + 1 :]:
            tracker.emit(event)
    state = live.state()
    assert (state["status"], state["seconds_left"]) == ("done", None)
    assert state["version"] != version
    clock.now += 1000
    assert '<span class="pill done">' in live.page()[1]
    shutil.rmtree(folder.path)
    assert live.state()["status"] == "gone"
    assert "was deleted" in live.page()[1]


def test_drawing_takes_a_small_share_of_the_time_while_the_run_writes(tmp_path, run_events, monkeypatch):
    events, clock, drawn = run_events(n_stacks=1, stage_steps=20, joint=False), Clock(), []
    monkeypatch.setattr(
        "stackwise.tracking.live.render", lambda reported: drawn.append(1) or "<main>page</main>"
    )
    ticks = iter(range(0, 1000, 2))
    monkeypatch.setattr("stackwise.tracking.live.time.perf_counter", lambda: next(ticks))  # 2 s a page
    folder = RunFolder.create(tmp_path / "run")
    live = LiveRun(folder.path, clock)
    with Tracker([MetricsFile(folder.path)]) as tracker:
        for event in events[:-1]:
            tracker.emit(event)
            live.page()
            clock.now += 1.0
        assert len(drawn) == -(-(len(events) - 1) // 20)
        tracker.emit(events[-1])
        live.page()
        live.page()
    assert len(drawn) == -(-(len(events) - 1) // 20) + 1, "the end is shown at once, and once"


def test_the_page_is_the_report_and_nothing_is_written(tmp_path, make_run, run_events):
    folder = make_run(tmp_path / "run", run_events(n_stacks=2, stage_steps=20))
    before = files_of(folder.path)
    live = LiveRun(folder.path)
    body = live.page()[1]
    assert "Validation around each growth" in body
    assert "<svg" in body
    assert files_of(folder.path) == before
    page = live.whole_page("abc")
    assert page.count(body) == 1
    assert '<script nonce="abc">' in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_what_is_not_finite_is_null_in_json(tmp_path, make_run, run_events):
    events = run_events(n_stacks=1, stage_steps=20, joint=False)
    events = [{**e, "loss": float("nan")} if e["event"] in ("step", "eval") else e for e in events]
    state = LiveRun(make_run(tmp_path / "run", events).path).state()
    assert (state["loss"], state["eval_loss"]) == (None, None)
    json.loads(json.dumps(state, allow_nan=False))


# --- the server -----------------------------------------------------------------------------------------------------


def test_several_viewers_get_the_page_its_body_and_the_figures(tmp_path, make_run, run_events):
    folder = make_run(tmp_path / "run", run_events(n_stacks=1, stage_steps=20, joint=False))
    with served(folder.path) as server:
        status, page, headers = ask(server)
        assert status == 200
        assert "demo · StackWise" in page or "run · StackWise" in page
        assert f"script-src 'nonce-{server.nonce}'" in headers["Content-Security-Policy"]
        found: list[tuple] = []
        viewers = [threading.Thread(target=lambda: found.append(ask(server, "/report"))) for _ in range(5)]
        for viewer in viewers:
            viewer.start()
        for viewer in viewers:
            viewer.join()
        state = json.loads(ask(server, "/state.json")[1])
        assert {(status, headers["X-Version"]) for status, _, headers in found} == {(200, state["version"])}
        assert len({body for _, body, _ in found}) == 1
        assert state["status"] == RunHistory.from_events(read_metrics(folder.metrics).events).status
        status, body, headers = ask(server, "/report", method="HEAD")
        assert (status, body) == (200, "")
        assert int(headers["Content-Length"]) > 1000


def test_a_page_that_is_being_drawn_is_finished_before_the_end(tmp_path, make_run, run_events, monkeypatch):
    folder = make_run(tmp_path / "run", run_events(n_stacks=1, stage_steps=20, joint=False))
    begun, drawn = threading.Event(), []
    original = LiveRun._body

    def slow(self):
        begun.set()
        time.sleep(0.2)
        drawn.append(original(self))
        return drawn[-1]

    monkeypatch.setattr(LiveRun, "_body", slow)
    with served(folder.path) as server:
        viewer = threading.Thread(target=lambda: ask(server, "/report"))
        viewer.start()
        assert begun.wait(30)
    assert len(drawn) == 1
    viewer.join()
    (folder.path / "metrics.jsonl").unlink()
    server.run.page()
    assert len(drawn) == 1, "and none is drawn after it"


@pytest.mark.parametrize("path", ["/config.yaml", "/../run/metrics.jsonl", "/report/", "/%2e%2e/"])
def test_nothing_else_is_served(tmp_path, path):
    with served(tmp_path / "run") as server:
        assert ask(server, path)[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_there_is_nothing_to_change(tmp_path, method):
    with served(tmp_path / "run") as server:
        assert ask(server, "/", method=method)[0] == 501


def test_a_foreign_name_that_points_here_is_refused(tmp_path):
    with served(tmp_path / "run") as server:
        port = server.server_address[1]
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "",
        ):
            assert ask(server, "/state.json", host=host)[0] == 403, host
        for host in (
            "127.0.0.1",
            f"localhost:{port}",
            f"LOCALHOST:{port}",
            f"[::1]:{port}",
            "192.168.1.7:80",
        ):
            assert ask(server, "/state.json", host=host)[0] == 200, host


def test_only_this_machine_is_listened_to_and_the_address_is_told(tmp_path):
    with served(tmp_path / "run") as server:
        assert server.server_address[0] == "127.0.0.1"
        assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"
