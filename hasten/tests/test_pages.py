"""README and docs hold what they say: figures are those of the JSON files, links lead somewhere, names are documented,
commands parse, and every block of Python runs as it stands."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import runpy
import sys
import tomllib

import pytest
import typer
from pages import DOCS, ROOT, anchors, commands, links, pages

import hasten
from hasten.cli.main import app
from hasten.errors import ConfigError

FIGURES = runpy.run_path(str(ROOT / "benchmarks" / "figures.py"))
# What users call; the other packages are what these are made of.
PUBLIC = (
    "hasten",
    *(f"hasten.{name}" for name in ("caching", "models", "resolution", "solvers", "streaming", "tokens")),
)
PROJECTS = ("hasten", "zoo", "drape")
named = pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))


@pytest.mark.parametrize("page", FIGURES["pages"](), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_figure_is_in_a_json_file(page):
    found = FIGURES["unknown_figures"](page)
    assert not found, f"{page}: {found}: mark them, or say in benchmarks/stated.json where they come from"


@pytest.mark.parametrize("page", FIGURES["pages"](), ids=lambda page: str(page.relative_to(ROOT)))
def test_no_line_begins_with_a_mark(page):
    """A comment at the beginning of a line ends the paragraph or list that it stands in."""
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.lstrip().startswith("<!-- = ")] == []


def test_no_figure_of_the_readme_is_stated_by_hand():
    assert FIGURES["figures"]((ROOT / "README.md").read_text(encoding="utf-8")) == []
    assert "README.md" not in FIGURES["stated"]()


def test_what_is_stated_is_on_its_page_and_says_where_it_comes_from():
    for name, sources in FIGURES["stated"]().items():
        there = FIGURES["unsourced"](ROOT / name)
        for source, numbers in sources.items():
            assert re.match(r"(?:paper|definition): \w", source), f"{name}: {source}: what is measured has a JSON file"
            assert not set(numbers) - set(there), f"{name}: python benchmarks/figures.py --state"


def test_a_figure_that_comes_from_nowhere_is_found(tmp_path):
    text = "It is 61.7 dB and 23 times faster, at 3.1 ms. FLUX.2 of Wan 2.2 needs `sigma=0.5`; see [more](a/2.5.md).\n"
    assert FIGURES["figures"](text) == ["61.7", "23", "3.1"]
    marked = "".join(f"<!-- = emoji-flux leap 9 {what} -->0.0<!-- / --> dB" for what in ("psnr", "psnr over unipc"))
    assert FIGURES["figures"](marked) == []
    first, second = re.findall(r"-->([\d.]+)<", FIGURES["fill_figures"](marked))
    assert 0 < float(second) < float(first)
    with pytest.raises(LookupError, match="no psnr of leap at 10"):
        FIGURES["fill_figures"](marked.replace("leap 9", "leap 10"))


def test_a_figure_is_not_known_because_some_file_happens_to_hold_it(tmp_path):
    page = tmp_path / "hicache.md"
    psnr = FIGURES["value_of"]("emoji-flux leap 9 psnr")
    page.write_text(f"<!-- table emoji-flux -->\n<!-- end -->\nIt has {psnr:.1f} dB, and `sigma` is 0.5 by default.\n")
    assert FIGURES["unsourced"](page) == [f"{psnr:.1f}"]  # the default is declared by the method of the page


def test_figures_are_looked_up_by_path():
    value = FIGURES["value_of"]
    rows = 'sprites-stream.json "rows/method=full history'
    assert value(f'{rows}/psnr_curve/count"') == 96
    assert value(f'{rows}/psnr_curve/median"') == value(f'{rows}/psnr_curve/0"')
    peaks = [value(f'sprites-stream.json "rows/method={name}/peak_bytes"') for name in ("full history", "forcing-kv")]
    both = 'sprites-stream.json "rows/method=full history/peak_bytes" {} "rows/method=forcing-kv/peak_bytes"'
    assert value(both.format("over")) == peaks[0] - peaks[1]
    assert value(both.format("per")) == peaks[0] / peaks[1]
    with pytest.raises(LookupError, match="0 entries with method=nobody, expected one"):
        value("resolution-truth.json emoji-flux/rows/method=nobody/flops_ratio")


@named
def test_links_lead_somewhere(page):
    dead = []
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            dead.append(target)
    assert not dead


@named
def test_commands_are_those_there_are(page):
    group = typer.main.get_command(app)
    for words in commands(page.read_text(encoding="utf-8")):
        command, context, rest = group, group.make_context("hasten", [], resilient_parsing=True), words
        while hasattr(command, "commands"):
            assert rest, f"hasten {' '.join(words)}: which command?"
            assert rest[0] in command.commands, f"hasten {' '.join(words)}: no command {rest[0]}"
            command, rest = command.commands[rest[0]], rest[1:]
            context = type(context)(command, parent=context)
        command.make_parser(context).parse_args(args=list(rest))  # says which option there is not


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert not [page for page in DOCS.rglob("*.md") if f"{page.relative_to(DOCS)}\n" not in f"{navigation}\n"]


@pytest.mark.parametrize("project", PROJECTS)
def test_a_package_page_stands_by_itself(project):
    described = tomllib.loads((ROOT / project / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert described["description"]
    assert described["license"] == "Apache-2.0"
    page = ROOT / project / described["readme"]
    assert links(page) == [], "an index shows this page without the files around it"
    assert "REPOSITORY" not in page.read_text(encoding="utf-8")


def test_what_pages_tell_to_install_can_be_installed():
    found = set()
    for page in [*pages(), *(ROOT / "drape").rglob("*.md")]:
        for line in re.findall(r"pip install ([^`\n#]+)", page.read_text(encoding="utf-8")):
            for name, extras in re.findall(r"([\w./-]+)(?:\[([\w,]+)\])?", line.replace('"', "").replace("'", "")):
                assert name not in ("hasten", "hasten-zoo", "drape"), f"{page}: {name} is no name of ours in an index"
                if name.startswith("./"):
                    described = tomllib.loads((ROOT / name / "pyproject.toml").read_text(encoding="utf-8"))["project"]
                    assert not set(filter(None, extras.split(","))) - {*described.get("optional-dependencies", ())}
                    found.add(name)
    assert found == {f"./{project}" for project in PROJECTS}


def test_the_site_says_which_version_it_is_of():
    hook = runpy.run_path(str(ROOT / "benchmarks" / "site_version.py"))
    config = hook["on_config"]({"site_name": "hasten"})
    assert hasten.__version__ in config["site_name"]
    assert hasten.__version__ in config["copyright"]
    assert "benchmarks/site_version.py" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")


def _documented() -> set[str]:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").rglob("*.md"))
    return set(re.findall(r"^::: ([\w.]+)", text, flags=re.MULTILINE))


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_in_the_reference(package):
    module, documented = importlib.import_module(package), _documented()
    for name in module.__all__:
        thing = getattr(module, name)
        home = getattr(thing, "__module__", package)
        places = (
            {package, f"{package}.{name}", f"{home}.{name}"}
            | {home[:i] for i in range(len(home)) if home[i] == "."}
            | {home}
        )
        assert documented & (places - {"hasten"}), f"{package}.{name} is in no reference page"


def _names(package):
    module = importlib.import_module(package)
    return [(name, getattr(module, name)) for name in module.__all__]


def _public():
    for info in pkgutil.walk_packages(hasten.__path__, "hasten."):
        if info.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(info.name)
        except (ModuleNotFoundError, ConfigError):
            continue  # what it is for is not installed
        for name in getattr(module, "__all__", ()):
            thing = inspect.unwrap(getattr(module, name)) if callable(getattr(module, name)) else getattr(module, name)
            if getattr(thing, "__module__", None) == info.name and (
                inspect.isclass(thing) or inspect.isfunction(thing)
            ):
                yield f"{info.name}.{name}", thing


def test_every_public_class_function_and_method_says_what_it_is():
    bare = []
    shown = {f"{getattr(thing, '__module__', '')}.{name}" for package in PUBLIC for name, thing in _names(package)}
    for name, thing in _public():
        if not (thing.__doc__ or "").strip():
            bare.append(name)
        if inspect.isclass(thing) and name in shown:
            for key, member in vars(thing).items():
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if (
                    key.startswith("_")
                    or not inspect.isfunction(function)
                    or key not in function.__name__
                    or function.__module__ != thing.__module__
                ):
                    continue
                protocols = [
                    k for k in vars(sys.modules[thing.__module__]).values() if getattr(k, "_is_protocol", False)
                ]
                if not any(
                    inspect.getdoc(getattr(kind, key, None)) for kind in (thing, *protocols) if hasattr(kind, key)
                ):
                    bare.append(f"{name}.{key}")
    assert not bare


def test_the_check_of_names_is_no_empty_loop():
    assert len(list(_public())) > 150
    assert "hasten.models" in sys.modules


def test_the_notebook_is_the_page_of_the_tutorial():
    script = runpy.run_path(str(ROOT / "benchmarks" / "notebook.py"))
    assert script["NOTEBOOK"].read_text(encoding="utf-8") == script["text"]()
    kinds = [cell["cell_type"] for cell in script["notebook"](script["PAGE"].read_text(encoding="utf-8"))["cells"]]
    assert kinds.count("code") > 6
