"""Verdicts, each with a case for yes and for no."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from posttrain.errors import UserError
from posttrain.evaluation import checks


def test_exact_ignores_white_space_at_the_ends_alone() -> None:
    assert checks.exact("París", " París\n")
    assert not checks.exact("París", "Paris")
    assert not checks.exact("París", "París.")
    assert not checks.exact("a b", "a  b")


def test_any_of_wants_a_whole_answer() -> None:
    assert checks.any_of(["una lengua", "hizkuntza bat"], "hizkuntza bat ")
    assert not checks.any_of(["una lengua"], "es una lengua")
    assert not checks.any_of([], "una lengua")


def test_contains_never_holds_for_nothing() -> None:
    assert checks.contains("lengua", "es una lengua.")
    assert not checks.contains("Lengua", "es una lengua.")
    assert not checks.contains(" ", "es una lengua.")


def test_regex_searches_the_stripped_answer() -> None:
    assert checks.regex(r"^\d+ %$", "\n74 % ")
    assert not checks.regex(r"^\d+ %$", "about 74 %")


IBERIAN = ("ca", "en", "es", "eu", "gl")


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("ca", "El català és una llengua romànica que es parla a Catalunya i a altres llocs."),
        ("eu", "Euskara Euskal Herrian hitz egiten den hizkuntza da."),
        ("gl", "O galego é unha lingua que se fala en Galicia e noutros lugares."),
        ("es", "El español es una lengua que se habla en España y en otros países."),
        ("en", "Basque is a language spoken in the north of the peninsula."),
    ],
)
def test_language_is_told_from_its_neighbours(code: str, text: str) -> None:
    assert checks.language(code, text, IBERIAN) is True
    other = next(one for one in IBERIAN if one != code)
    assert checks.language(other, text, IBERIAN) is False


def test_language_abstains_where_it_cannot_know() -> None:
    assert checks.language("es", "", IBERIAN) is None
    assert checks.language("es", " \n", IBERIAN) is None
    assert checks.language("es", "0", IBERIAN) is None


def test_unknown_code_is_a_users_error() -> None:
    with pytest.raises(UserError, match="does not know zz"):
        checks.language("zz", "hello there", ("en", "zz"))


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    checks._identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(UserError, match=r"posttrain\[lang\]"):
        checks.language("es", "hola", IBERIAN)


def test_language_accuracy_on_parallel_news(shared_dir: Path) -> None:
    """Where it is sure it is right: at least 99.5 % of 500 sentences in each of five languages."""
    files = {"ca": "ref.cat", "en": "src.eng", "es": "ref.spa", "eu": "ref.eus", "gl": "ref.glg"}
    for code, name in files.items():
        path = shared_dir / "data" / "ntrex" / f"newstest2019-{name}.txt"
        lines = path.read_text(encoding="utf-8").splitlines()[:500]
        verdicts = [checks.language(code, line, IBERIAN) for line in lines]
        decided = [verdict for verdict in verdicts if verdict is not None]
        assert len(decided) > 0.85 * len(lines)
        assert sum(decided) >= 0.995 * len(decided), code
