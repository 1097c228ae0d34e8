"""What a SuperNode prints at its end becomes one line; real ones: test_exposed_ports.py."""

from scripts.deploying.refusals import why_a_node_ended
from scripts.runtimes.site import last_words

START = "INFO :      Starting Flower SuperNode\n"
LIVED = f"{START}INFO :      SuperNode ID: 7\nINFO :      SuperNode terminated gracefully.\n"
REFUSED = f"{START}\x1b[91mERROR \x1b[0m:     Exit Code: 305\n[code: 2004] Failed to activate SuperNode.\n"


def test_of_a_log_of_several_starts_the_last_counts():
    assert "not registered" in why_a_node_ended(LIVED + REFUSED)
    assert why_a_node_ended(REFUSED + LIVED) == ""


def test_a_node_that_lived_and_was_ended_has_no_wrong_clock():
    assert why_a_node_ended(LIVED) == ""
    assert "clocks" in why_a_node_ended(f"{START}INFO :      SuperNode terminated gracefully.\n")


def test_what_is_unknown_is_quoted(tmp_path):
    log = tmp_path / "node.log"
    assert last_words(log) == "without a word"
    log.write_text("ERROR :     Exit Code: 999\n\nINFO:     Finished server process [1]\n")
    assert last_words(log) == "Exit Code: 999"
    log.write_text("Killed\n-----\n")
    assert last_words(log) == "Killed"
