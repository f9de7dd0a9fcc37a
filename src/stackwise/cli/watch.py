"""`stackwise watch`."""

from __future__ import annotations

import errno
import os
import sys
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stackwise.cli.errors import UsageError
from stackwise.cli.options import RUNS, Run, run_names
from stackwise.cli.output import note

if TYPE_CHECKING:
    from stackwise.tracking.live import LiveRun
    from stackwise.tracking.watch import WatchServer

PORT = 8765
"""Asked for first, so that the address stays the same from day to day."""


def watch(
    run: Run,
    port: Annotated[
        int | None,
        typer.Option(
            min=0, max=65535, metavar="N", help=f"Port; by default {PORT}, or a free one where that is taken."
        ),
    ] = None,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="Address to listen at; any but this machine's own shows the run to others.",
        ),
    ] = "127.0.0.1",
    no_open: Annotated[bool, typer.Option("--no-open", help="Open no browser.")] = False,
) -> None:
    """Show a run in the browser while it trains: its report, which follows the training.

    A page of this machine alone, without network: the report of `stackwise report` and above it the figures of the
    moment, which are also at /state.json. The run may not have begun yet. Nothing is written. Ctrl-C ends it, with
    exit code 130.

    \b
    Examples:
      stackwise watch demo
      stackwise watch runs/demo --port 9000 --no-open
    """
    path = _path(run)
    from stackwise.tracking.live import LiveRun

    with _listen(LiveRun(path), host, port) as server:
        print(f"{path} is shown at {server.url}  (Ctrl-C ends it)", flush=True)
        if host not in ("127.0.0.1", "::1", "localhost"):
            note(f"whoever reaches {host} can read the run, its settings and its samples there")
        if not no_open and _has_screen():
            webbrowser.open(server.url)
        server.serve_forever(poll_interval=0.2)


def _path(run: str) -> Path:
    """Where the run is, or will be."""
    path = Path(os.path.expanduser(run))
    if not path.exists() and path.name == run:
        path = RUNS / run
    if path.exists() and not path.is_dir():
        raise UsageError(f"RUN must be a run folder, {run!r} is a file")
    if not path.exists():
        from stackwise.config.errors import did_you_mean

        hint = did_you_mean(path.name, run_names())
        note(f"there is no run in {path} yet; it is shown once it begins" + (f" ({hint})" if hint else ""))
    return path


def _listen(run: LiveRun, host: str, port: int | None) -> WatchServer:
    import socket

    from stackwise.tracking.watch import WatchServer

    try:
        return WatchServer(run, host, PORT if port is None else port)
    except socket.gaierror:
        raise UsageError(f"--host {host}: no such address; 127.0.0.1 is this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            if port is None:
                return WatchServer(run, host, 0)
            raise UsageError(f"--port {port} is taken; leave it out, or choose another one") from None
        if error.errno == errno.EADDRNOTAVAIL:
            raise UsageError(
                f"--host {host} is no address of this machine; 127.0.0.1 is, and 0.0.0.0 all of them"
            ) from None
        if error.errno == errno.EACCES:
            raise UsageError(f"--port {port} needs more rights; choose one above 1023") from None
        raise


def _has_screen() -> bool:
    """Whether a browser would have a window: one in the terminal would be in the way."""
    return sys.platform in ("darwin", "win32") or bool(
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
