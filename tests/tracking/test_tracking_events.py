"""The Tracker lets only well-formed events through, to every sink."""

import math

import pytest

from stackwise.tracking.events import FIELDS, EventError, Tracker, check_event


class Listing:
    def __init__(self, fails_to_close=False):
        self.events, self.closed, self.fails_to_close = [], False, fails_to_close

    def emit(self, event):
        self.events.append(event)

    def close(self):
        self.closed = True
        if self.fails_to_close:
            raise OSError("disk gone")


NOTE = {"event": "note", "message": "hello"}
SAMPLE = {"event": "sample", "time": 1.0, "step": 3, "stage": 0, "prompt": "a", "text": "b"}


def test_every_kind_occurs_in_a_run_or_is_a_note(run_events):
    seen = {event["event"] for event in run_events()}
    assert seen | {"note"} == set(FIELDS)
    for event in run_events():
        check_event(event)


def test_events_reach_every_sink_in_order_with_a_time():
    first, second = Listing(), Listing()
    with Tracker([first, second], clock=lambda: 12.5) as tracker:
        tracker.emit(NOTE)
        tracker.emit(SAMPLE)
    assert first.events == second.events == [{**NOTE, "time": 12.5}, SAMPLE]
    assert first.closed
    assert second.closed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"event": "sampel"}, "unknown event 'sampel'; did you mean 'sample'?"),
        ({"event": None}, "unknown event None"),
        ({"step": "3"}, "step is str '3', expected int"),
        ({"step": True}, "step is bool True, expected int"),
        ({"step": 3.0}, "step is float 3.0, expected int"),
        ({"text": None}, "text is NoneType None, expected str"),
        ({"prmopt": "a"}, "prmopt is not a field, did you mean 'prompt'?"),
        ({"time": "now"}, "time is str 'now', expected float"),
    ],
)
def test_a_malformed_event_is_named_and_reaches_no_sink(change, message):
    sink = Listing()
    with pytest.raises(EventError) as error:
        Tracker([sink]).emit({**SAMPLE, **change})
    assert message in str(error.value)
    assert sink.events == []


def test_all_problems_of_an_event_are_listed_at_once():
    with pytest.raises(EventError, match=r"prompt is missing \(str\).*text is missing"):
        check_event({"event": "sample", "time": 1.0, "step": 1, "stage": 0})


def test_nested_fields_are_checked(run_events):
    start = run_events()[0]
    broken = {**start, "stages": [{**start["stages"][0], "steps": 1.5}, 7]}
    with pytest.raises(EventError, match=r"stages\[0\]\.steps is float 1\.5.*stages\[1\] is int 7"):
        check_event(broken)
    end = next(event for event in run_events() if event["event"] == "stage_end")
    with pytest.raises(EventError, match=r"bytes\.total is missing"):
        check_event({**end, "bytes": {k: v for k, v in end["bytes"].items() if k != "total"}})


def test_figures_of_stored_outputs_are_checked_where_there_are_any(run_events):
    first, second, *_ = (event for event in run_events() if event["event"] == "stage_end")
    assert first["stored"] is None
    rest = {name: value for name, value in second["stored"].items() if name != "hits"}
    with pytest.raises(
        EventError, match=r"stored\.hits is missing.*stored\.hit is not a field, did you mean"
    ):
        check_event({**second, "stored": {**rest, "hit": 3}})
    with pytest.raises(EventError, match=r"stored is int 3, expected stored outputs"):
        check_event({**second, "stored": 3})


def test_a_choice_lists_what_is_allowed(run_events):
    end = run_events()[-1]
    with pytest.raises(EventError, match=r"status is str 'finished', expected done \| stopped \| failed"):
        check_event({**end, "status": "finished"})


def test_a_loss_that_is_not_finite_is_an_event_all_the_same(run_events):
    check_event({**run_events()[-1], "final_loss": math.nan})


def test_every_sink_is_closed_when_one_fails_to():
    bad, good = Listing(fails_to_close=True), Listing()
    with pytest.raises(OSError, match="disk gone"):
        Tracker([bad, good]).close()
    assert good.closed
