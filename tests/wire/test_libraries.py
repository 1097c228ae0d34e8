import pytest

from fedllm.errors import OtherVersionError
from fedllm.wire import libraries
from fedllm.wire.joining import new_nonce, write_question
from fedllm.wire.libraries import check_libraries, library_versions


def test_a_server_of_the_same_libraries_is_joined() -> None:
    check_libraries(write_question(new_nonce()).config_records["libraries"])
    check_libraries({})


@pytest.mark.parametrize(("ours", "theirs"), [("2.13.0", "3.0.1"), ("4.57.1", "5.0.0"), ("2.1", "x" * 500)])
def test_another_major_version_is_refused_by_name(
    ours: str, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "version", lambda name: ours)
    with pytest.raises(OtherVersionError, match=f"transformers {ours}, and the server") as caught:
        check_libraries({"transformers": theirs})
    assert len(str(caught.value)) < 150


def test_another_minor_version_computes_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = library_versions()
    monkeypatch.setattr(libraries, "version", lambda name: f"{theirs[name].split('.')[0]}.999")
    check_libraries(theirs)
