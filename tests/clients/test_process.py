"""What a process keeps stays in it."""

import pickle

from clients.process import PROCESS


def test_process_that_is_pickled_is_that_of_its_reader() -> None:
    """Ray copies the app with every message: a copy of its content would be loaded anew every time."""
    assert pickle.loads(pickle.dumps(PROCESS)) is PROCESS
