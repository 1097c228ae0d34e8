from collections.abc import Callable

import pytest

from fedllm.data.rows import read_rows
from fedllm.errors import DataError
from tests.data.builders import SECRET


@pytest.fixture
def assert_refused() -> Callable[..., None]:
    """Check that reading a source fails with one line that holds the expected parts and no text of a row."""

    def refuse(source: str, *expected: str) -> None:
        with pytest.raises(DataError) as caught:
            read_rows(source, on_bad_row="stop")
        message = str(caught.value)
        assert all(part in message for part in expected), message
        assert SECRET not in message
        assert "\n" not in message
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__ or caught.value.__context__ is None

    return refuse
