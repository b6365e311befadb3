"""The reaction to Ctrl-C: one line at once, even while the program computes or waits for other processes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import typer

_LINES = {
    "run": "finished work is saved; continue with the same command and --resume",
    "sweep": "finished work is saved; continue with the same command and --resume",
    "train": "the same command continues after the last saved epoch",
    "nulls": "measured models are saved; the same command continues",
    "calibrate": "finished measurements are saved; the same command continues",
    "steal": "answers and finished substitutes are saved; the same command continues and pays for no query twice",
    "verify": "no verdict was written; the same command starts again",
    "serve": "requests in flight are answered first",
}
_OTHERS = "finished work is not lost"
_STOPS = (signal.SIGINT, signal.SIGTERM)


def line_of(command: str | None) -> str:
    """Return the line that is printed when a command is interrupted.

    Args:
        command: Name of the command, or None.
    """
    return f"interrupted, ending: {_LINES.get(command or '', _OTHERS)}"


@contextlib.contextmanager
def answered(line: str, say: Callable[[str], None] | None = None) -> Iterator[Callable[[], None]]:
    """Print a line as soon as SIGINT or SIGTERM arrives, whichever handler acts on it, until the block ends.

    Python runs handlers only between bytecode instructions, and Ray Tune's handler prints nothing. So a thread waits
    for the signal's number, which the C-level handler writes to a pipe.

    Args:
        line: The line, printed once.
        say: Prints it; None prints on stderr.

    Yields:
        A function that prints the line if it was not printed yet.
    """
    once = _Once(line, say or _on_stderr)
    if threading.current_thread() is not threading.main_thread():
        yield once
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_wait, args=(reading, once), name="ctrl-c", daemon=True)
    thread.start()
    try:
        yield once
    finally:
        signal.set_wakeup_fd(before)
        os.write(writing, b"\0")  # ends the thread
        thread.join(1.0)
        os.close(writing)
        os.close(reading)


class _Once:
    def __init__(self, line: str, say: Callable[[str], None]) -> None:
        self._line, self._say, self._turn = line, say, threading.Lock()

    def __call__(self) -> None:
        with self._turn:
            if self._line:
                self._say(self._line)
            self._line = ""


def _wait(reading: int, once: Callable[[], None]) -> None:
    while number := os.read(reading, 1):
        if number[0] in _STOPS:
            once()
        elif number == b"\0":
            return


def _on_stderr(line: str) -> None:
    typer.echo(f"\n{line}", err=True)
