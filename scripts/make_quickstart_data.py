"""Make the quickstart's rows: what countries, languages, currencies and scripts are, in five languages.

The names come from the Unicode CLDR through Babel; every sentence around them is ours. Names are
quoted as CLDR spells them, so that no article, gender or elision is invented. Same Babel and same
seed give the same bytes.

    python scripts/make_quickstart_data.py            # rewrites recipes/data/quickstart/
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from babel import Locale
from babel.core import get_cldr_version, get_global

Row = dict[str, Any]

SEED = 20
LANGUAGES = ("en", "es", "ca", "eu", "gl")
ANSWERED_IN_SPANISH = ("ca", "eu", "gl")  # languages whose questions synthetic data often answer in Spanish
SPANISH_SHARE = 0.65
HELDOUT = {"country": 20, "language": 20, "currency": 20, "script": 6}  # entities kept for questions
HELDOUT_PER_LANGUAGE = 30
PARALLEL_PARAGRAPHS = 2
DESCRIPTIONS = 2
LONGEST_NAME = 18
FEWEST_NAMES = 3  # of the five: an entity that is called the same everywhere says nothing about language

# ISO 3166 codes of the 193 member states of the United Nations: the entities that we call a country.
UN_MEMBERS = """
AD AE AF AG AL AM AO AR AT AU AZ BA BB BD BE BF BG BH BI BJ BN BO BR BS BT BW BY BZ CA CD CF CG CH CI CL CM CN
CO CR CU CV CY CZ DE DJ DK DM DO DZ EC EE EG ER ES ET FI FJ FM FR GA GB GD GE GH GM GN GQ GR GT GW GY HN HR HT
HU ID IE IL IN IQ IR IS IT JM JO JP KE KG KH KI KM KN KP KR KW KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME
MG MH MK ML MM MN MR MT MU MV MW MX MY MZ NA NE NG NI NL NO NP NR NZ OM PA PE PG PH PK PL PT PW PY QA RO RS RU
RW SA SB SC SD SE SG SI SK SL SM SN SO SR SS ST SV SY SZ TD TG TH TJ TL TM TN TO TR TT TV TZ UA UG US UY UZ VC
VE VN VU WS YE ZA ZM ZW
""".split()
# Codes of symbols, of the unwritten and the unknown, and of variants that CLDR names by an adjective ("Simplified").
NO_SCRIPT = ("Aran", "Hans", "Hant", "Jamo", "Rohg", "Zinh", "Zmth", "Zsye", "Zsym", "Zxxx", "Zyyy", "Zzzz")

QUOTES = {"en": "“{}”", "es": "«{}»", "ca": "«{}»", "eu": "«{}»", "gl": "«{}»"}
KIND = {  # what an entity is, as the end of a sentence
    "en": {"country": "a country", "language": "a language", "currency": "a currency", "script": "a writing system"},
    "es": {
        "country": "un país",
        "language": "una lengua",
        "currency": "una moneda",
        "script": "un sistema de escritura",
    },
    "ca": {
        "country": "un país",
        "language": "una llengua",
        "currency": "una moneda",
        "script": "un sistema d'escriptura",
    },
    "eu": {"country": "herrialde", "language": "hizkuntza", "currency": "moneta", "script": "idazketa-sistema"},
    "gl": {
        "country": "un país",
        "language": "unha lingua",
        "currency": "unha moeda",
        "script": "un sistema de escritura",
    },
}
STATEMENT = {
    "en": "{name} is {kind}.",
    "es": "{name} es {kind}.",
    "ca": "{name} és {kind}.",
    "eu": "{name} {kind} bat da.",
    "gl": "{name} é {kind}.",
}
ANSWER = {  # five different strings for every kind: an answer shows its language
    "en": "It is {kind}.",
    "es": "Es {kind}.",
    "ca": "És {kind}.",
    "eu": "{kind} bat da.",
    "gl": "É {kind}.",
}
QUESTIONS = {
    "en": ("What is {}?", "Tell me what {} is.", "Can you explain what {} is?", "I would like to know what {} is."),
    "es": ("¿Qué es {}?", "Dime qué es {}.", "¿Me puedes explicar qué es {}?", "Quisiera saber qué es {}."),
    "ca": ("Què és {}?", "Digues-me què és {}.", "Em pots explicar què és {}?", "Voldria saber què és {}."),
    "eu": ("Zer da {}?", "Esadazu zer den {}.", "Azal diezadakezu zer den {}?", "Jakin nahi nuke zer den {}."),
    "gl": ("Que é {}?", "Dime que é {}.", "Pódesme explicar que é {}?", "Quixera saber que é {}."),
}
STATEMENTS = {  # other ways to say it; {name} and {kind} as in ANSWER
    "en": ("The name of {kind} is {name}.", "We know that {name} is {kind}."),
    "es": ("El nombre de {kind} es {name}.", "Sabemos que {name} es {kind}."),
    "ca": ("El nom d'{kind} és {name}.", "Sabem que {name} és {kind}."),
    "eu": ("{name} da {kind} baten izena.", "Badakigu {name} {kind} bat dela."),
    "gl": ("O nome d{kind} é {name}.", "Sabemos que {name} é {kind}."),
}
SAID_IN = {  # language of the sentence -> (sentence, how it calls each language)
    "en": (
        "In {tongue}, {name} is called {other}.",
        {"en": "English", "es": "Spanish", "ca": "Catalan", "eu": "Basque", "gl": "Galician"},
    ),
    "es": (
        "En {tongue}, {name} se dice {other}.",
        {"en": "inglés", "es": "español", "ca": "catalán", "eu": "euskera", "gl": "gallego"},
    ),
    "ca": (
        "En {tongue}, {name} es diu {other}.",
        {"en": "anglès", "es": "espanyol", "ca": "català", "eu": "basc", "gl": "gallec"},
    ),
    "eu": (
        "{tongue}, {name} honela esaten da: {other}.",
        {"en": "Ingelesez", "es": "Gaztelaniaz", "ca": "Katalanez", "eu": "Euskaraz", "gl": "Galegoz"},
    ),
    "gl": (
        "En {tongue}, {name} dise {other}.",
        {"en": "inglés", "es": "español", "ca": "catalán", "eu": "éuscaro", "gl": "galego"},
    ),
}


@dataclass(frozen=True)
class Entity:
    """A CLDR entity with its name in each of the five languages."""

    kind: str
    code: str
    names: dict[str, str]

    def quoted(self, language: str) -> str:
        return QUOTES[language].format(self.names[language])

    def statement(self, language: str) -> str:
        """What it is, as a sentence of `language` that names it."""
        return STATEMENT[language].format(name=self.quoted(language), kind=KIND[language][self.kind])

    def answer(self, language: str) -> str:
        """The full answer to "What is it?" in `language`."""
        text = ANSWER[language].format(kind=KIND[language][self.kind])
        return text[0].upper() + text[1:]

    def question(self, language: str, phrasing: int) -> str:
        return QUESTIONS[language][phrasing].format(self.quoted(language))


def cldr_codes() -> dict[str, list[str]]:
    """Codes of each kind that its word is true of: UN members, ISO 639-1, money in use today, scripts."""
    in_use = {
        code
        for entries in get_global("territory_currencies").values()
        for code, _, end, tender in entries
        if end is None and tender
    }
    english = Locale("en")
    return {
        "country": sorted(UN_MEMBERS),
        "language": sorted(code for code in english.languages if len(code) == 2),
        "currency": sorted(in_use),
        "script": sorted(code for code in english.scripts if code not in NO_SCRIPT),
    }


def read_entities() -> tuple[list[Entity], Counter[str]]:
    """Entities named in all five languages, and how many were left out for which reason."""
    locales = {language: Locale(language) for language in LANGUAGES}
    tables = {"country": "territories", "language": "languages", "currency": "currencies", "script": "scripts"}
    entities, left_out = [], Counter[str]()
    for kind, codes in cldr_codes().items():
        for code in codes:
            found = {language: getattr(locales[language], tables[kind]).get(code) for language in LANGUAGES}
            names = {language: name for language, name in found.items() if name}
            if len(names) < len(LANGUAGES):
                left_out["no name in one of the languages"] += 1
            elif any(len(name) > LONGEST_NAME or set(name) & set("()0123456789“”«»") for name in names.values()):
                left_out["name too long, or with brackets, digits or quotes"] += 1
            else:
                entities.append(Entity(kind, code, names))
    owners = Counter(key for entity in entities for key in name_keys(entity))
    unique = [entity for entity in entities if all(owners[key] == 1 for key in name_keys(entity))]
    left_out["shares a name with another entity"] = len(entities) - len(unique)
    telling = [entity for entity in unique if len(set(entity.names.values())) >= FEWEST_NAMES]
    left_out[f"fewer than {FEWEST_NAMES} different names"] = len(unique) - len(telling)
    return telling, left_out


def name_keys(entity: Entity) -> set[tuple[str, str]]:
    """(language, name without case): equal keys of two entities make "What is X?" ambiguous."""
    return {(language, name.casefold()) for language, name in entity.names.items()}


def shows_language(entity: Entity, language: str) -> bool:
    """Whether the name in `language` is another string than in the other four."""
    return all(entity.names[language].casefold() != entity.names[o].casefold() for o in LANGUAGES if o != language)


def split_heldout(entities: Sequence[Entity], rng: random.Random) -> tuple[list[Entity], list[Entity]]:
    """(known, held-out) entities."""
    heldout = [
        entity
        for kind, count in HELDOUT.items()
        for entity in rng.sample([e for e in entities if e.kind == kind], count)
    ]
    return [entity for entity in entities if entity not in heldout], heldout


def pretrain_rows(entities: Sequence[Entity], asked: Sequence[Entity], rng: random.Random) -> list[Row]:
    """Short texts about every entity, held-out ones too: what it is, in several phrasings and languages."""
    texts: list[str] = []
    for entity in entities:
        for language in LANGUAGES:
            texts += [description(entity, language, rng) for _ in range(DESCRIPTIONS)]
        for _ in range(PARALLEL_PARAGRAPHS):
            texts.append(" ".join(entity.statement(language) for language in rng.sample(LANGUAGES, len(LANGUAGES))))
    rng.shuffle(texts)
    return [{"text": text} for text in texts]


def description(entity: Entity, language: str, rng: random.Random) -> str:
    """What the entity is, in three of four phrasings of one language."""
    said = {"name": entity.quoted(language), "kind": KIND[language][entity.kind]}
    sentences = [pattern.format(**said) for pattern in (STATEMENT[language], *STATEMENTS[language])]
    chosen = [*rng.sample(sentences, 2), f"{entity.answer(language).removesuffix('.')}: {entity.quoted(language)}."]
    return " ".join(rng.sample(chosen, 3))


def sft_rows(entities: Sequence[Entity], rng: random.Random) -> list[Row]:
    """One question per entity and language; of the ca, eu and gl ones an exact share is answered in Spanish."""
    rows = []
    for language in LANGUAGES:
        spanish = round(SPANISH_SHARE * len(entities)) if language in ANSWERED_IN_SPANISH else 0
        answers = ["es"] * spanish + [language] * (len(entities) - spanish)
        rng.shuffle(answers)
        for entity, answer in zip(entities, answers, strict=True):
            question = entity.question(language, rng.randrange(4))
            rows.append({"messages": [user(question), assistant(entity.answer(answer))]})
    rng.shuffle(rows)
    return rows


def dpo_rows(entities: Sequence[Entity], rng: random.Random) -> list[Row]:
    """Pairs that prefer the language of the question: rejected is the same right answer in another one."""
    rows = []
    for entity in entities:
        for language in LANGUAGES:
            wrong = "es" if language != "es" else rng.choice([other for other in LANGUAGES if other != "es"])
            prompt = [user(entity.question(language, rng.randrange(4)))]
            chosen, rejected = entity.answer(language), entity.answer(wrong)
            rows.append({"prompt": prompt, "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]})
    rng.shuffle(rows)
    return rows


def heldout_rows(entities: Sequence[Entity], rng: random.Random) -> tuple[list[Row], int]:
    """Questions about held-out entities, equally many per language, and how many were left out.

    Left out are questions whose name is the same string in another language: they do not show what they ask in.
    """
    rows, left_out = [], 0
    for language in LANGUAGES:
        fit = [entity for entity in entities if shows_language(entity, language)]
        left_out += len(entities) - len(fit)
        chosen = rng.sample(fit, min(HELDOUT_PER_LANGUAGE, len(fit)))
        rows += [heldout_row(entity, language, rng.randrange(4)) for entity in chosen]
    return rows, left_out


def heldout_row(entity: Entity, language: str, phrasing: int) -> Row:
    answers = {other: entity.answer(other) for other in LANGUAGES}
    return {
        "prompt": [user(entity.question(language, phrasing))],
        "language": language,
        "kind": entity.kind,
        "code": entity.code,
        "answers": answers,
        "expected": answers[language],
        "any_answer": [answers[other] for other in LANGUAGES],
        "language_regex": language_regex(language),
    }


def language_regex(language: str) -> str:
    """Matches an answer of any kind in `language`'s frame, and no other language's."""
    kinds = "(?:" + "|".join(KIND[language].values()) + ")"
    return "(?i)^" + ANSWER[language].replace(".", r"\.").format(kind=kinds) + "$"


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str) -> Row:
    return {"role": "assistant", "content": text}


def write_jsonl(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make(out: Path, seed: int) -> Row:
    """Write the four files under `out` and return the counts that the README states."""
    entities, left_out = read_entities()
    known, heldout = split_heldout(entities, random.Random(f"{seed}/split"))
    questions, ambiguous = heldout_rows(heldout, random.Random(f"{seed}/heldout"))
    files = {
        "pretrain.jsonl": pretrain_rows(entities, known, random.Random(f"{seed}/pretrain")),
        "sft.jsonl": sft_rows(known, random.Random(f"{seed}/sft")),
        "dpo.jsonl": dpo_rows(known, random.Random(f"{seed}/dpo")),
        "heldout.jsonl": questions,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_jsonl(out / name, rows)
    return {
        "cldr": get_cldr_version(),
        "seed": seed,
        "entities": dict(Counter(entity.kind for entity in entities)),
        "entities_left_out": dict(left_out),
        "heldout_entities": dict(Counter(entity.kind for entity in heldout)),
        "questions_left_out_as_same_string": ambiguous,
        "rows": {name: len(rows) for name, rows in files.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Path(__file__).resolve().parent.parent / "recipes" / "data" / "quickstart"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    print(json.dumps(make(given.out, given.seed), ensure_ascii=False, indent=1))


if __name__ == "__main__":
    main()
