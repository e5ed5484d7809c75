"""Signals end a run after the step that it is in."""

from __future__ import annotations

import os
import signal

import pytest

from qlora_tune.lifecycle import stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_asks_to_stop_once_and_the_third_interrupts(number: signal.Signals) -> None:
    asked: list[None] = []
    before = signal.getsignal(number)
    signal.signal(number, signal.default_int_handler)  # the tests themselves may run under nohup
    with stop_on_signal(lambda: asked.append(None)) as stop:
        assert not stop.asked
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert len(asked) == 1
    assert signal.getsignal(number) == signal.default_int_handler
    signal.signal(number, before)


def test_a_closed_terminal_stays_ignored_under_nohup() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal(lambda: None) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)
