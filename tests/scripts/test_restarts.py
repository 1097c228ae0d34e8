"""How often what dies is started again."""

from scripts.runtimes.restarts import Restarts


def pauses(*rounds: int, most: int = 3) -> list[float]:
    """Return the pause before each restart of a run that had done so many rounds by then."""
    restarts, found = Restarts(most), []
    for round_num in rounds:
        restarts = restarts.another(round_num)
        found.append(restarts.pause)
    return found


def test_pauses_grow_while_no_round_is_done() -> None:
    assert pauses(0, 0, 0, 0) == [0, 1, 2, 4]
    assert max(pauses(*[0] * 20)) == 60


def test_a_new_round_begins_the_count_anew() -> None:
    assert pauses(0, 0, 1, 1, 4, 3) == [0, 1, 0, 1, 0, 1]  # an older checkpoint is no new round


def test_a_run_that_gets_nowhere_is_given_up() -> None:
    restarts = Restarts(2)
    given_up = []
    for _ in range(3):
        restarts = restarts.another(0)
        given_up.append(restarts.are_too_many)
    assert given_up == [False, False, True]
    assert not restarts.another(1).are_too_many
    assert Restarts(0).another(0).are_too_many
