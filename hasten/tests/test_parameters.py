"""Declared parameters: what is accepted, what is refused with which words, how texts are read and written."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest

import hasten
from hasten import registry
from hasten.errors import ConfigError, UnknownNameError
from hasten.parameters import Declared, Names, Range, from_text, parameters, write

hasten.methods()  # registers all of them


@dataclass(frozen=True, kw_only=True)
class Example(Declared):
    """One parameter of every kind."""

    whole: Annotated[int, Range(1), "how many"] = 5
    share: Annotated[float, Range(above=0, most=1), "how much"] = 0.5
    flag: Annotated[bool, "whether"] = False
    kind: Annotated[Literal["left", "right"], "which side"] = "left"
    steps: Annotated[tuple[int, ...] | None, Range(0), "a list"] = None
    pair: Annotated[tuple[int, int], Range(least=0, below=9), "two"] = (1, 2)
    pairs: Annotated[tuple[tuple[float, float], ...] | None, Range(0, 1), "twos"] = None
    named: Annotated[str | tuple[float, ...], Names(["flux", "wan"]), "a name or numbers"] = "flux"
    names: Annotated[tuple[str, ...] | None, Names(["a", "b"]), "some names"] = None
    size: Annotated[float | Literal["plan"], Range(above=0), "a number or a word"] = "plan"
    file: Annotated[str | None, "a file"] = None


@dataclass(frozen=True, kw_only=True)
class Narrower(Example):
    """Other defaults, and fewer choices."""

    whole: int = 7
    kind: Literal["right"] = "right"


ACCEPTED = [
    ("whole", np.int64(3), 3),
    ("share", 1, 1.0),
    ("share", np.float32(0.25), 0.25),
    ("steps", [0, 3], (0, 3)),
    ("steps", range(3), (0, 1, 2)),
    ("pairs", [[0, 1], [1, 1]], ((0.0, 1.0), (1.0, 1.0))),
    ("named", "wan", "wan"),
    ("named", [1, 0.5], (1.0, 0.5)),
    ("names", ["b", "a"], ("b", "a")),
    ("size", 0.5, 0.5),
    ("file", Path("a/b.json"), "a/b.json"),
]


@pytest.mark.parametrize(("name", "given", "kept"), ACCEPTED)
def test_values_are_kept_in_their_declared_type(name, given, kept):
    value = getattr(Example(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


REFUSED = [
    ("whole", 0, "a whole number of 1 or more, got 0; leave it out for 5"),
    ("whole", True, "a whole number of 1 or more, got True"),
    ("whole", 2.0, "a whole number of 1 or more, got 2.0"),
    ("whole", "2", "a whole number of 1 or more, got '2'"),
    ("share", 0, "a number above 0 to 1, got 0"),
    ("share", math.nan, "a number above 0 to 1, got nan"),
    ("share", 1.01, "a number above 0 to 1, got 1.01"),
    ("flag", 1, "True or False, got 1"),
    ("kind", "rihgt", "'left' or 'right', got 'rihgt'; did you mean 'right'?"),
    ("steps", 3, "one or more whole numbers of 0 or more or None, got 3"),
    ("steps", (), "one or more whole numbers of 0 or more or None, got ()"),
    ("steps", "0/1", "one or more whole numbers of 0 or more or None, got '0/1'"),
    ("pair", (1, 2, 3), "2 whole numbers from 0 below 9, got (1, 2, 3)"),
    ("pair", (1, 9), "2 whole numbers from 0 below 9, got (1, 9)"),
    ("pairs", [(0, 2)], "one or more groups of 2 numbers from 0 to 1 or None, got [(0, 2)]"),
    ("named", "flix", "'flux', 'wan' or one or more numbers, got 'flix'; did you mean 'flux'?"),
    ("names", "a", "one or more 'a' or 'b' or None, got 'a'; did you mean ('a',)?"),
    ("names", ("a", "c"), "one or more 'a' or 'b' or None, got ('a', 'c')"),
    ("size", 0, "a number above 0 or 'plan', got 0"),
    ("file", "", "the path of a file or None, got ''"),
]


@pytest.mark.parametrize(("name", "given", "message"), REFUSED)
def test_a_refusal_says_what_was_wrong_what_is_expected_and_what_to_do(name, given, message):
    with pytest.raises(ConfigError) as error:
        Example(**{name: given})
    assert str(error.value).startswith(f"Example: {name} must be {message}")
    assert "leave it out" in str(error.value) or "did you mean" in str(error.value)


TEXTS = [
    ("whole", "12", 12),
    ("share", "1e-3", 1e-3),
    ("share", "1", 1.0),
    ("flag", "true", True),
    ("steps", "0/1/4", (0, 1, 4)),
    ("steps", "3", (3,)),
    ("steps", "none", None),
    ("pairs", "0.5x0.25/1x1", ((0.5, 0.25), (1.0, 1.0))),
    ("named", "0.5/1.0", (0.5, 1.0)),
    ("names", "a/b", ("a", "b")),
    ("size", "plan", "plan"),
    ("size", "0.5", 0.5),
    ("file", "runs/a+b/x.json", "runs/a+b/x.json"),
]


@pytest.mark.parametrize(("name", "text", "value"), TEXTS)
def test_texts_are_read_as_declared(name, text, value):
    read = from_text(Example, {name: text})
    assert read == {name: value}
    assert getattr(Example(**read), name) == value
    assert from_text(Example, {name: write(value)}) == {name: value}


@pytest.mark.parametrize(
    ("name", "text"),
    [("whole", "2.5"), ("flag", "1"), ("kind", "up"), ("steps", "0/a"), ("share", "two"), ("pair", "1")],
)
def test_texts_of_another_type_are_refused_by_name(name, text):
    with pytest.raises(ConfigError, match=f"^Example: {name} must be .*, got '{text}'"):
        from_text(Example, {name: text})


def test_a_subclass_keeps_what_its_base_declares():
    assert Narrower().whole == 7
    assert parameters(Narrower)["whole"].meaning == "how many"
    with pytest.raises(ConfigError, match="whole must be a whole number of 1 or more, got 0; leave it out for 7"):
        Narrower(whole=0)
    with pytest.raises(ConfigError, match="kind must be 'right', got 'left'"):
        Narrower(kind="left")
    assert replace(Narrower(), whole=2).whole == 2


def test_functions_declare_their_options_too():
    def fit(trace: object, clusters: Annotated[int, Range(1), "how many"] = 2) -> None: ...

    assert from_text(fit, {"clusters": "3"}) == {"clusters": 3}
    with pytest.raises(ConfigError, match="hyca: clusters must be a whole number of 1 or more, got '0'"):
        from_text(fit, {"clusters": "0"}, "hyca")
    with pytest.raises(UnknownNameError, match="parameter of hyca 'cluster'"):
        from_text(fit, {"cluster": "3"}, "hyca")


# --- expressions


EXPRESSIONS = [
    "hicache:order=1:sigma=0.7",
    "dvg:budget=0.4:stages=0.5x0.25/0.5x1.0/1.0x1.0/1.0x1.0+foca:steps=0/1/3",
    "spectrum:ridge=1e-05+dvg",
    "fbcache:per_sample=true",
    "dummy-forcing:history=none",
]


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expressions_are_read_and_written(text):
    methods = registry.parse(text)
    assert registry.format(*methods) == text
    assert [registry.info(name).config for name, _ in registry.split(text)] == [type(method) for method in methods]
    assert registry.parse(registry.format(*methods)) == methods


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hicach", "unknown method 'hicach'. Did you mean 'hicache'"),
        ("foca:intervall=3", "unknown parameter of foca 'intervall'. Did you mean 'interval'"),
        ("foca:interval", "'interval' in 'foca:interval' is not parameter=value"),
        ("foca:interval=2.5", "foca: interval must be a whole number"),
        ("dvg+foca:form=anchord", "foca: form must be"),
    ],
)
def test_a_wrong_expression_is_one_clear_error(text, message):
    with pytest.raises((ConfigError, UnknownNameError)) as error:
        registry.parse(text)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_plus_in_a_number_or_a_path_does_not_split():
    assert registry.split("foca:sigma=1e+3+dvg") == [("foca", {"sigma": "1e+3"}), ("dvg", {})]
    assert registry.split("leap:calibration=a+b/c.safetensors") == [("leap", {"calibration": "a+b/c.safetensors"})]


def test_what_has_no_text_is_refused():
    with pytest.raises(ConfigError, match="no registered method"):
        registry.format(object())
