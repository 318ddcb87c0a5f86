"""The console of a launch: what it makes of what the ranks write, piece by piece."""

from __future__ import annotations

import os
import time

from allranks.launch import console, keyboard
from allranks.launch.console import STDERR, STDOUT, Console


def test_a_progress_bar_of_rank_0_does_not_hold_the_lines_of_others_for_ever(monkeypatch):
    """An ordinary bar never ends its line. Others wait for HOLD_S in all, not anew at each piece."""
    monkeypatch.setattr(console, "HOLD_S", 0.2)
    written: list[tuple[int, bytes]] = []
    shown = Console(lambda fd, data: written.append((fd, data)))
    shown.show(0, "n0", "out", b"\r  0 %")
    shown.show(1, "n1", "err", b"a warning\n")
    ends_at = time.monotonic() + console.HOLD_S
    while time.monotonic() < ends_at:
        time.sleep(0.02)
        shown.show(0, "n0", "out", b"\r 50 %")
    shown.show(0, "n0", "out", b"\r100 %")
    bar = [data for fd, data in written if fd == STDOUT]
    assert (STDERR, b"[rank 1 on n1] a warning\n") in written
    assert bar.count(b"\n") == 1  # the warning stands in a line of its own
    assert not shown.is_holding


def test_an_input_that_has_nothing_just_now_has_not_ended(monkeypatch):
    """As where another process on the same terminal has set it to non-blocking, and reads it as well."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    monkeypatch.setattr(keyboard, "STDIN", reading)
    assert keyboard._read() is None
    os.write(writing, b"line\n")
    assert keyboard._read() == b"line\n"
    os.close(writing)
    assert keyboard._read() == b""
    os.close(reading)
