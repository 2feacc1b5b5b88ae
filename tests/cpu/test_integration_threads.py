"""`with patch()`: blocks within each other, one after another, and in several threads at once."""

import inspect
import sys
import threading
import time
from collections import Counter

import pytest
import torch

from tile_mhc.integrations import transformers as integration
from tile_mhc.integrations.transformers import _state

pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
from tiny_deepseek import CLASSES, FAMILY, make_connection, modeling

STREAMS = torch.ones(1, 3, 4, 64)


@pytest.fixture(autouse=True)
def restored():
    yield
    integration.unpatch()


def codes():
    return [inspect.unwrap(getattr(modeling, name).forward).__code__ for name in CLASSES]


def served(connection):
    """Whether a call goes to the operators; told by the report."""
    before = sum(integration.backend_report().get("pre", {}).values())
    connection(STREAMS)
    return sum(integration.backend_report().get("pre", {}).values()) > before


def start(*functions):
    """Run all in threads of their own, and raise what they raise."""
    raised = []

    def guard(function):
        try:
            function()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guard, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    if raised:
        raise raised[0]


def test_block_undoes_its_own_patch_and_no_other():
    before = codes()
    with integration.patch():
        with integration.patch():
            pass
        assert integration.is_patched()
    assert not integration.is_patched()
    with pytest.raises(KeyError), integration.patch():
        raise KeyError
    assert not integration.is_patched()
    assert codes() == before


def test_call_without_a_block_holds_until_unpatch():
    integration.patch()
    with integration.patch():
        pass
    assert integration.is_patched()
    integration.unpatch()
    with integration.patch():
        integration.patch()
    assert integration.is_patched()
    integration.unpatch()
    assert not integration.is_patched()


@pytest.mark.parametrize("outer", [True, False])
def test_used_up_handle_undoes_nothing(outer):
    """Neither a later patch nor one that was there before it."""
    if outer:
        integration.patch()
    with integration.patch() as old:
        pass
    assert integration.is_patched() is outer
    if not outer:
        integration.patch()
    with old:
        assert integration.is_patched()
    assert integration.is_patched()


def test_handle_from_before_an_unpatch_undoes_nothing():
    with integration.patch():
        integration.unpatch()
        assert not integration.is_patched()
        integration.patch()
    assert integration.is_patched()


def test_overlapping_blocks_of_two_threads():
    connection = make_connection()
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    seen = []

    def first():
        with integration.patch():
            first_in.set()
            second_in.wait(20)
        first_out.set()

    def second():
        first_in.wait(20)
        with integration.patch():
            second_in.set()
            first_out.wait(20)
            seen.append((integration.is_patched(), served(connection)))

    start(first, second)
    assert seen == [(True, True)]
    assert not integration.is_patched()
    assert not served(connection)


def test_one_handle_in_two_threads():
    handle = integration.patch()
    both = threading.Barrier(2)
    first_out = threading.Event()
    seen = []

    def first():
        with handle:
            both.wait(20)
        first_out.set()

    def second():
        with handle:
            both.wait(20)
            first_out.wait(20)
            seen.append(integration.is_patched())

    start(first, second)
    assert seen == [True]
    assert not integration.is_patched()


def test_patching_from_two_threads_at_once(monkeypatch):
    """Both find nothing patched; the second must not take our code for the original."""
    before = codes()
    find = FAMILY.find
    first_looked, second_called = threading.Event(), threading.Event()

    def slow(op):
        find(op)
        first_looked.set()
        second_called.wait(0.5)

    monkeypatch.setattr(FAMILY, "find", slow)
    handles = []

    def first():
        handles.append(integration.patch())

    def second():
        first_looked.wait(20)
        handles.append(integration.patch())
        second_called.set()

    start(first, second)
    for handle, patched in zip(handles, (True, False), strict=True):
        with handle:
            assert integration.is_patched()
        assert integration.is_patched() is patched
    assert codes() == before


def test_many_blocks_in_many_threads():
    before = codes()
    interval = sys.getswitchinterval()
    together = threading.Barrier(4)

    def work():
        connection = make_connection()
        together.wait(20)
        for _ in range(40):
            with integration.patch():
                assert integration.is_patched()
                connection(STREAMS)
                assert codes() != before

    sys.setswitchinterval(1e-6)
    try:
        start(*[work] * 4)
    finally:
        sys.setswitchinterval(interval)
    assert not integration.is_patched()
    assert codes() == before


class Slow(Counter):
    """Gives other threads the time to count between a look-up and what is stored for it."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        time.sleep(1e-3)
        return value


def test_counts_of_several_threads_add_up(monkeypatch):
    connection = make_connection()
    monkeypatch.setattr(_state, "_calls", Slow())
    integration.patch()

    def work():
        for _ in range(5):
            connection(STREAMS)

    start(*[work] * 4)
    assert sum(integration.backend_report()["pre"].values()) == 20
