"""Values that autograd's threads take over: kept as long as they are set, and no longer."""

import sys
import threading

from tile_mhc import _inherited

NAME = "tile_mhc_test"


def test_a_value_is_held_until_another_takes_its_place():
    value = object()
    before = sys.getrefcount(value)
    for _ in range(3):
        _inherited.keep(NAME, value)
        assert _inherited.get(NAME) is value
        assert sys.getrefcount(value) == before + 1
        _inherited.keep(NAME, None)
        assert _inherited.get(NAME) is None
        assert sys.getrefcount(value) == before


def test_it_is_of_the_thread():
    value, seen = object(), []

    def other():
        seen.append(_inherited.get(NAME))
        _inherited.keep(NAME, value)
        seen.append(_inherited.get(NAME))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [None, value]
    assert _inherited.get(NAME) is None
