"""README, CONTRIBUTING and the pages of docs/: what they show runs, what they name exists, and tables are what they are made of."""

from __future__ import annotations

import argparse
import importlib.util
import re
import shlex
import shutil
from pathlib import Path

import pytest

import nybble
from nybble import Recipe, plugins
from nybble.__main__ import _parser
from nybble.bench import docs
from nybble.bench.__main__ import parser as bench_parser
from nybble.passes.measure import Timer
from nybble.report.speed import Speed
from nybble.stress.__main__ import parser as stress_parser

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "mkdocs.yml").is_file():
    pytest.skip("the pages are not beside the tests", allow_module_level=True)

PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "CONTRIBUTING.md", *docs.pages(ROOT))}
TEXTS = {name: path.read_text(encoding="utf-8") for name, path in PAGES.items()}
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>[^\n]*)\n(?P<code>.*?)^ *```$", re.MULTILINE | re.DOTALL)
# Languages whose blocks are run, parsed or looked at here; text is for what cannot be.
LANGUAGES = {"python", "bash", "yaml", "toml", "mermaid", "text"}


def blocks(text, language):
    """The code of each block of a language."""
    return [found["code"] for found in BLOCK.finditer(text) if found["language"] == language]


def pages_with(language):
    return [name for name, text in TEXTS.items() if blocks(text, language)]


@pytest.mark.parametrize("name", TEXTS)
def test_every_block_has_a_language_that_is_tested(name):
    found = list(BLOCK.finditer(TEXTS[name]))
    assert TEXTS[name].count("```") == 2 * len(found), "a fence is not closed, or is within a line"
    for block in found:
        assert block["language"] in LANGUAGES, block[0]
        assert not block["indent"], f"indented, so that it is not run: {block[0]}"


# --- python


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the blocks of a page one after another, in one namespace, which it gives back, and an empty folder."""
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    faster = Speed(2.0, 1.9, 2.1, 9)  # a busy machine may measure otherwise
    monkeypatch.setattr(Timer, "speeds", lambda timer, old, new, ms, left: dict.fromkeys(ms, faster))

    def run(name):
        for module in re.findall(r"<!-- needs: ([\w.]+) -->", TEXTS[name]):
            pytest.importorskip(module)
        names: dict[str, object] = {"__name__": "page"}
        for i, code in enumerate(blocks(TEXTS[name], "python")):
            exec(compile(code, f"{name}, block {i}", "exec"), names)  # noqa: S102
        return names

    return run


@pytest.mark.parametrize("name", [name for name in pages_with("python") if name != "README.md"])
def test_python_runs(name, run):
    run(name)


def test_the_readmes_example_does_what_it_says(run, tmp_path):
    names = run("README.md")
    assert (tmp_path / "quantized").is_dir()
    assert repr(names["fresh"]) == repr(names["model"])
    assert repr(names["dense"]).count("scheme=sp24w8a8") == 2


# --- command lines


def commands(code):
    """The words of each command of a bash block, without variables set before it; comments left out."""
    for line in re.sub(r"\\\n", " ", code).splitlines():
        words: list[str] = []
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;><")
        lexer.whitespace_split = True
        for word in [*lexer, "&&"]:
            if word in ("&&", ";", "|"):
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words.pop(0)
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def extras():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\n", text, re.DOTALL)
    assert section
    return set(re.findall(r"^([\w-]+) =", section[1], re.MULTILINE))


def check_pip(words, config):
    assert words[0] == "install"
    wanted = [name for word in words for name in re.findall(r"\[([\w,-]+)\]", word)]
    assert {name for names in wanted for name in names.split(",")} <= extras()
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    for option in words:
        if option.startswith("-Ccmake.define."):
            name = option.removeprefix("-Ccmake.define.").partition("=")[0]
            assert name in (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"), name


def check_parser(parser):
    def check(words, config):
        if ">" in words:
            words = words[: words.index(">")]
        try:
            parser().parse_args(words)
        except (SystemExit, argparse.ArgumentError) as error:
            raise AssertionError(f"{' '.join(words)}: wrong usage") from error

    return check


def check_pytest(words, config):
    for word in words:
        if word.startswith("--"):
            config.getoption(word.partition("=")[0].removeprefix("--").replace("-", "_"))
        elif not word.startswith("-") and "/" in word:
            assert (ROOT / word.partition("::")[0]).exists(), word


def check_options(source):
    def check(words, config):
        text = source.read_text(encoding="utf-8")
        for word in words:
            if word.startswith("--"):
                assert word.partition("=")[0] in text, f"{source.name} has no {word}"

    return check


def check_script(words, config):
    script = ROOT / words[0]
    assert script.is_file(), words[0]
    check_options(script)(words[1:], config)


def check_python(words, config):
    if words[0] != "-m":
        check_script(words, config)
        return
    module = words[1]
    known = {
        "nybble": check_parser(_parser),
        "nybble.bench": check_parser(bench_parser),
        "nybble.stress": check_parser(stress_parser),
        "pytest": check_pytest,
    }
    spec = importlib.util.find_spec(module)
    assert spec is not None, module
    assert spec.origin is not None
    (known.get(module) or check_options(Path(spec.origin)))(words[2:], config)


# The file that a tool reads, and the options that pages may give to each of its subcommands.
TOOLS = {
    "mkdocs": ("mkdocs.yml", {"build": {"--strict"}, "serve": set()}),
    "pre-commit": (".pre-commit-config.yaml", {"install": set(), "run": {"--all-files"}}),
    "ruff": ("pyproject.toml", {"check": {"--fix"}, "format": {"--check"}}),
}


def check_tool(name):
    file, subcommands = TOOLS[name]

    def check(words, config):
        assert (ROOT / file).is_file(), file
        assert words, f"{name}: no subcommand"
        assert words[0] in subcommands, f"{name} {words[0]}: not one of {sorted(subcommands)}"
        options = {word for word in words[1:] if word.startswith("-")}
        assert options <= subcommands[words[0]], f"{name} {words[0]}: unknown options {sorted(options)}"

    return check


CHECKS = {
    "nybble": check_parser(_parser),
    "python": check_python,
    "pip": check_pip,
    "bash": check_script,
    **{name: check_tool(name) for name in TOOLS},
}


@pytest.mark.parametrize("name", pages_with("bash"))
def test_commands_exist(name, pytestconfig):
    for code in blocks(TEXTS[name], "bash"):
        for words in commands(code):
            assert words[0] in CHECKS, f"{words[0]}: an unknown command; make it a block of text"
            CHECKS[words[0]](words[1:], pytestconfig)


@pytest.mark.parametrize(
    "line",
    [
        "nybble demo --fast",
        "nybble nothing",
        "python -m nybble.bench --preset none",
        "python -m nybble.stress --share none",
        "python bench/none.py",
        "python bench/arm_counts.py --none",
        "python -m nybble.bench.gpu_run --speed",
        "python -m pytest tests/test_none.py",
        "python -m pytest --no-such-option",
        "pip install '.[none]'",
        "pip install -Ccmake.define.NYBBLE_NONE=1 .",
        "bash bench/none.sh",
        "bash bench/gpu_run.sh --none",
        "mkdocs",
        "mkdocs biuld",
        "mkdocs build --none",
        "ruff chekc .",
        "pre-commit instal",
    ],
)
def test_a_wrong_command_is_found(line, pytestconfig):
    (words,) = commands(line)
    with pytest.raises((AssertionError, ValueError, ModuleNotFoundError)):
        CHECKS[words[0]](words[1:], pytestconfig)


# --- what else pages hold


@pytest.mark.parametrize("name", pages_with("yaml"))
def test_yaml_is_a_recipe(name, tmp_path):
    pytest.importorskip("yaml")
    for code in blocks(TEXTS[name], "yaml"):
        (tmp_path / "recipe.yaml").write_text(code, encoding="utf-8")
        assert Recipe.load(tmp_path / "recipe.yaml").stages


# The type of the rows of each group.
ROWS = {
    "nybble.kernels": "KernelSpec",
    "nybble.targets": "Target",
    "nybble.layouts": "Layout",
    "nybble.schemes": "WeightType",
    "nybble.formats": "Format",
    "nybble.foreign": "ForeignFormat",
    "nybble.writers": "ForeignWriter",
    "nybble.modules": "ModuleKind",
}


def check_entry_points(code, names):
    """A toml block: known groups, and rows of their types: the page's own, or the toy plug-in's."""
    group = None
    for line in filter(None, code.splitlines()):
        if line.startswith("["):
            (group,) = re.findall(r'^\[project\.entry-points\."([\w.]+)"\]$', line)
            continue
        ((module, attribute),) = re.findall(r'^\w+ = "([\w.]+):(\w+)"$', line)
        if module.startswith("toy_plugin."):
            path = ROOT / "tests" / "toy_plugin" / f"{module.replace('.', '/')}.py"
            names = {"__name__": module}
            exec(compile(path.read_text(encoding="utf-8"), path, "exec"), names)  # noqa: S102
        assert attribute in names, f"{attribute}: no row of this name on the page"
        assert type(names[attribute]).__name__ == ROWS[group]
    assert group is not None


@pytest.mark.parametrize("name", pages_with("toml"))
def test_entry_points_name_rows_of_their_page(name, run):
    names = run(name)
    for code in blocks(TEXTS[name], "toml"):
        check_entry_points(code, names)


@pytest.mark.parametrize(
    ("group", "value"),
    [("nybble.none", "rows:ROW"), ("nybble.kernels", "rows:NONE"), ("nybble.targets", "rows:ROW"), ("x", "rows")],
)
def test_a_wrong_entry_point_is_found(group, value):
    names = {"ROW": type("KernelSpec", (), {})()}
    check_entry_points('[project.entry-points."nybble.kernels"]\nmine = "rows:ROW"\n', names)
    with pytest.raises((AssertionError, KeyError, ValueError)):
        check_entry_points(f'[project.entry-points."{group}"]\nmine = "{value}"\n', names)


def test_every_group_of_plugins_has_a_page():
    assert set(ROWS) == set(plugins.GROUPS)
    assert all(f'[project.entry-points."{group}"]' in "\n".join(TEXTS.values()) for group in plugins.GROUPS)


def anchors(text):
    """The ids of a page's headings, as both GitHub and the site make them."""
    heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_images_lead_somewhere(name):
    text = BLOCK.sub("", TEXTS[name])
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        page = (PAGES[name].parent / path).resolve() if path else PAGES[name]
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", TEXTS)
def test_paths_in_code_exist(name):
    """`csrc/kernels.def` and its like, within the text."""
    text = BLOCK.sub("", TEXTS[name])
    folders = "|".join(sorted(path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] not in "."))
    for path in re.findall(rf"`((?:{folders})/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"([\w/-]+\.md)$", text, re.MULTILINE)
    there = [str(path.relative_to(ROOT / "docs")) for path in docs.pages(ROOT)[1:]]
    assert sorted(listed) == sorted(there)


def test_every_public_name_is_in_the_api_reference():
    shown = set(re.findall(r"^::: nybble\.([\w.]+)$", TEXTS["docs/api.md"], re.MULTILINE))
    assert {name for name in nybble.__all__ if name != "nn"} <= shown | {name.rpartition(".")[2] for name in shown}


def test_the_readme_is_one_page():
    written = re.sub(r"<!-- generated: .*?<!-- /generated -->", "", TEXTS["README.md"], flags=re.DOTALL)
    assert len(written.splitlines()) <= 120, "besides the tables that grow with the machines"


# --- generated parts


def test_generated_parts_are_what_they_are_made_of():
    changed = [str(path.relative_to(ROOT)) for path in docs.update(ROOT, check=True)]
    assert not changed, "run `python -m nybble.bench docs`"


def test_each_generated_part_has_a_page():
    assert set(re.findall(r"^<!-- generated: ([\w-]+) -->$", "\n".join(TEXTS.values()), re.MULTILINE)) == set(
        docs.PARTS
    )


# --- the site


@pytest.mark.full
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="needs the extra `docs`",
)
def test_the_site_builds_without_a_warning(tmp_path):
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert 'id="nybble.quantize"' in page
    assert "in place and report on every layer" in page
    shutil.rmtree(tmp_path / "site")
