"""Expect an error by its code and the things that it names, whatever its words are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from gn_detect.errors import Code, UserError


@contextmanager
def refusal(code: Code, *names: str) -> Iterator[pytest.ExceptionInfo[UserError]]:
    """Expect a UserError with a code, whose message has all ``names``."""
    with pytest.raises(UserError) as caught:
        yield caught
    assert caught.value.code == code, caught.value.line
    assert [name for name in names if name not in str(caught.value)] == [], caught.value.line
