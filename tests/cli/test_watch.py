"""`stackwise watch` from the command line."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from stackwise.cli import watch


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_serves_until_it_is_interrupted(run_folder, number, code):
    command = [sys.executable, "-m", "stackwise", "watch", "tiny", "--no-open", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        url = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert url is not None, line
        with urllib.request.urlopen(f"{url[0]}state.json", timeout=60) as answer:
            state = json.load(answer)
        assert (state["run"], state["status"]) == ("tiny", "done")
        process.send_signal(number)
        assert process.wait(60) == code
    finally:
        process.kill()
        process.communicate()


class Listening(Exception):
    pass


@pytest.fixture
def asked(monkeypatch):
    """What the server was asked to listen to; it never serves."""
    found = []

    def listen(run, host, port):
        found.append((str(run.folder.path), host, port))
        raise Listening

    monkeypatch.setattr(watch, "_listen", listen)
    return found


def test_a_run_that_has_not_begun_is_waited_for_where_it_will_be(folder, cli, asked):
    (folder / "runs" / "demo").mkdir(parents=True)
    result = cli("watch", "dmeo", "--no-open")
    assert asked == [(f"runs{os.sep}dmeo", "127.0.0.1", None)]
    assert "there is no run in runs/dmeo yet; it is shown once it begins (did you mean 'demo'?)" in result.err
    cli("watch", "elsewhere/new", "--port", "7", "--host", "::1")
    assert asked[1] == ("elsewhere/new", "::1", 7)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text.txt"], "RUN must be a run folder, 'text.txt' is a file"),
        (["x", "--port", "70000"], "less than or equal to 65535"),
        (["x", "--host", "no such name"], "--host no such name: no such address"),
        (["x", "--host", "192.0.2.1"], "is no address of this machine"),
        ([], "Missing argument 'RUN'"),
    ],
)
def test_wrong_words_are_explained(folder, cli, words, message):
    result = cli("watch", *words, "--no-open")
    assert result.code == 2
    assert message in result.err


def test_a_port_that_is_taken(folder, cli, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = cli("watch", "x", "--port", port, "--no-open")
        assert result.code == 2
        assert f"--port {port} is taken; leave it out" in result.err
        monkeypatch.setattr(watch, "PORT", port)
        from stackwise.tracking.live import LiveRun

        with watch._listen(LiveRun(folder / "x"), "127.0.0.1", None) as server:
            assert server.server_address[1] not in (0, port)
