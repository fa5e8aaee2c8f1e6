"""Text in, text out: every file below ``filetests/``."""

from pathlib import Path

import pytest

from tests.filetests.runner import CASES, OUTPUT, Case, diagnose, expectations, read_cases

FOLDER = Path(__file__).parent / "filetests"


def files(folder: str) -> list[object]:
    return [pytest.param(path, id=path.stem) for path in sorted((FOLDER / folder).glob("*.tw"))]


@pytest.mark.parametrize("path", files("passes"))
def test_pass(path: Path, bless: bool) -> None:
    cases = list(map(Case.read, read_cases(path)))
    found = [case.actual() for case in cases]
    if bless:
        path.write_text(CASES.join(case.input + OUTPUT + text for case, text in zip(cases, found)))
        return
    for number, (case, text) in enumerate(zip(cases, found), 1):
        assert text == case.expected, f"{path.name}, case {number}; --bless rewrites it"


@pytest.mark.parametrize("path", files("errors"))
def test_diagnostics(path: Path) -> None:
    for number, text in enumerate(read_cases(path), 1):
        [(at, part)] = expectations(text)
        line, message = diagnose(text)
        assert (line, part in message) == (at, True), f"{path.name}, case {number}: line {line}: {message}"
