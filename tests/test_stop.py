"""The first signal asks, the second ends the process at once."""

import multiprocessing
import os
import signal
import threading

import pytest

from dmd_dar.stop import SIGNALS, StopRequest, leaving

FORK = multiprocessing.get_context("fork")


def exit_code(work) -> int:
    process = FORK.Process(target=work)
    process.start()
    process.join(60)
    return process.exitcode


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_handlers_are_put_back(number):
    before = [signal.getsignal(each) for each in SIGNALS]
    with StopRequest() as stop:
        assert not stop.asked
        kill(number)
        assert stop.asked
    assert [signal.getsignal(each) for each in SIGNALS] == before


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_a_second_signal_of_either_kind_ends_it_at_once(first, second):
    def work() -> None:
        with StopRequest():
            kill(first)
            kill(second)
            os._exit(7)

    assert exit_code(work) == -second


@pytest.mark.parametrize("number", SIGNALS)
def test_where_nothing_can_be_finished_a_signal_leaves_with_the_exit_code(number, capfd):
    def work() -> None:
        with leaving():
            kill(number)
            os._exit(7)

    assert exit_code(work) == 143
    assert capfd.readouterr().err == "stopped\n"


def test_a_request_inside_is_no_leaving_and_after_it_a_signal_leaves_again():
    def work() -> None:
        with leaving():
            with StopRequest() as stop:
                kill(signal.SIGTERM)
                assert stop.asked
            kill(signal.SIGTERM)
            os._exit(7)

    assert exit_code(work) == 143


def test_other_threads_get_no_signals_and_none_is_handled_for_them():
    seen = []

    def work() -> None:
        with StopRequest() as stop:
            seen.append((stop.asked, signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
