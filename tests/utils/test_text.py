"""Messages show nothing that a terminal would obey."""

import pytest

from distill.utils.text import print_error


def test_an_error_is_one_line_without_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_error("a 'name\nof\x1b[31m a\u202e file', λ × 3.")
    assert capsys.readouterr().err == "error: a 'name of\\x1b[31m a\\u202e file', λ × 3.\n"
