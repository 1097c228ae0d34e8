import pytest
from flwr.app import ConfigRecord, RecordDict

from fedllm.errors import OtherVersionError
from fedllm.wire import libraries
from fedllm.wire.joining import new_nonce, write_question
from fedllm.wire.libraries import check_libraries


def test_a_server_of_the_same_libraries_is_joined() -> None:
    check_libraries(write_question(new_nonce()))
    check_libraries(RecordDict())


@pytest.mark.parametrize(("ours", "theirs"), [("2.13.0", "3.0.1"), ("4.57.1", "5.0.0"), ("2.1", "x" * 500)])
def test_another_major_version_is_refused_by_name(
    ours: str, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "version", lambda name: ours)
    question = RecordDict({"libraries": ConfigRecord({"transformers": theirs})})
    with pytest.raises(OtherVersionError, match=f"transformers {ours}, and the server") as caught:
        check_libraries(question)
    assert len(str(caught.value)) < 150


def test_another_minor_version_computes_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    question = write_question(new_nonce())
    monkeypatch.setattr(libraries, "version", lambda name: f"{question['libraries'][name].split('.')[0]}.999")
    check_libraries(question)
