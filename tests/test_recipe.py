"""nybble.Recipe: what a file may say, which line a wrong one is on, and that what is saved is what is loaded."""

from __future__ import annotations

import builtins
import json
import os
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from nybble import Recipe
from nybble.recipe.recipe import Stage, data_sha256
from nybble.recipe.schema import FieldError, Plain, fit


def test_a_directory_is_refused_and_left_closed(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").mkdir()
    before = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    for _ in range(3):
        with pytest.raises(ValueError, match=r"recipe\.yaml: must be a regular file"):
            Recipe.load(tmp_path / "recipe.yaml")
    assert not before or len(os.listdir("/proc/self/fd")) == before


FULL = Recipe(
    stages=(
        Stage("sparsify", {"pattern": "2:4", "method": "sparsegpt", "scheme": None, "permute": (("up", "down"),)}),
        Stage("quantize", {"layers": {"*.0.*": "w4a16g128", "head": "dense", "*": "w8a8"}, "m": (1, 16)}),
        Stage("quantize", {"scheme": "w8a8", "include": "head", "strict": True, "goal": "memory"}),
    ),
    seed=7,
    versions={"nybble": "0.1.0", "torch": "2.13.0"},
    data_sha256="0f" * 32,
)

YAML = """\
schema: nybble.recipe/1
seed: 7                # a remark
data_sha256: {sha}
versions: {{nybble: 0.1.0, torch: "2.13.0"}}
stages:
  - pass: sparsify
    pattern: 2:4       # in YAML 1.1 an integer of base 60
    method: sparsegpt
    scheme: null
    permute: [[up, down]]
  - pass: quantize
    layers:
      "*.0.*": w4a16g128
      head: dense
      "*": w8a8
    m: [1, 16]
  - pass: quantize
    scheme: w8a8
    include: head
    strict: true
    goal: memory
""".format(sha="0f" * 32)


def written(folder: Path, text: str, suffix: str = ".yaml") -> Path:
    path = folder / f"recipe{suffix}"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


class TestFiles:
    def test_yaml_by_hand(self, tmp_path: Path) -> None:
        assert Recipe.load(written(tmp_path, YAML)) == FULL

    @pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
    def test_round_trip(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"r{suffix}"
        FULL.save(path)
        loaded = Recipe.load(path)
        assert loaded == FULL
        assert list(loaded.stages[1].arguments["layers"]) == ["*.0.*", "head", "*"], "the order of patterns counts"
        assert os.listdir(tmp_path) == [path.name]

    def test_what_looks_like_another_type_keeps_its_own(self, tmp_path: Path) -> None:
        recipe = Recipe(
            (Stage("quantize", {"layers": {"null": "w8a8", "1": "dense", "true": "dense"}}),),
            versions={"a": "1.0", "b": "null", "c": "2:4"},
        )
        for suffix in (".yaml", ".json"):
            recipe.save(tmp_path / f"r{suffix}")
            assert Recipe.load(tmp_path / f"r{suffix}") == recipe

    def test_json_needs_no_yaml(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def without(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == "yaml":
                raise ImportError("No module named 'yaml'")
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)
        FULL.save(tmp_path / "r.json")
        assert Recipe.load(tmp_path / "r.json") == FULL
        with pytest.raises(ImportError, match=r"nybble\[recipe\]"):
            Recipe.load(written(tmp_path, YAML))

    def test_a_save_that_fails_leaves_the_old_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "r.json"
        FULL.save(path)

        def refuse(*_: Any) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="disk full"):
            Recipe((Stage("quantize"),)).save(path)
        assert Recipe.load(path) == FULL
        assert os.listdir(tmp_path) == ["r.json"]


HEAD = "schema: nybble.recipe/1\nstages:\n"
WRONG_YAML = {
    "no schema": ("seed: 1\n", 1, "schema: must be nybble.recipe/1"),
    "other schema": ("seed: 1\nschema: other/2\n", 2, "schema: must be"),
    "no stages": ("schema: nybble.recipe/1\n", 1, "stages: must be a list"),
    "empty stages": (
        "schema: nybble.recipe/1\nseed: 0\nstages: []\n",
        3,
        "stages: must be a list of at least one stage",
    ),
    "unknown field": ("schema: nybble.recipe/1\nstagess: []\n", 2, "stagess: is not a field"),
    "seed is text": (
        "schema: nybble.recipe/1\nseed: many\nstages: [{pass: quantize}]\n",
        2,
        "'many' must be an integer",
    ),
    "hash": ("schema: nybble.recipe/1\ndata_sha256: abc\nstages: [{pass: quantize}]\n", 2, "64 hexadecimal"),
    "versions": ("schema: nybble.recipe/1\nversions: [1]\nstages: [{pass: quantize}]\n", 2, "a mapping to text"),
    "no pass": (HEAD + "  - scheme: w8a8\n", 3, r"stages\[0\]: must be a mapping with pass"),
    "unknown pass": (HEAD + "  - pass: quantise\n", 3, r"stages\[0\].pass: 'quantise' must be one of quantize"),
    "unknown argument": (
        HEAD + "  - pass: quantize\n    skheme: w8a8\n",
        4,
        r"stages\[0\].skheme: is not an argument of quantize",
    ),
    "scheme": (HEAD + "  - pass: quantize\n    m: 1\n    scheme: w9a9\n", 5, r"stages\[0\].scheme: .*not a scheme"),
    "pattern": (HEAD + "  - pass: sparsify\n    pattern: 5:4\n", 4, r"stages\[0\].pattern: .*n=5"),
    "missing argument": (HEAD + "  - pass: quantize\n  - pass: sparsify\n", 4, r"stages\[1\]: sparsify needs pattern"),
    "method": (HEAD + "  - pass: quantize\n    method: best\n", 4, r"method: 'best' must be one of rtn"),
    "goal": (HEAD + "  - pass: quantize\n    goal: fun\n", 4, "goal: 'fun' must be one of speed"),
    "flag": (HEAD + "  - pass: quantize\n    strict: 1\n", 4, "strict: '1' must be true or false"),
    "list": (HEAD + "  - pass: quantize\n    m: [1, x]\n", 4, "m: .* must be an integer or a list"),
    "layer scheme": (
        HEAD + '  - pass: quantize\n    layers:\n      a: w8a8\n      "*.b": w3\n',
        6,
        r"layers\['\*.b'\]",
    ),
    "sparse layer": (
        HEAD + "  - pass: quantize\n    layers:\n      a: sp24w8a8\n",
        5,
        "must be a dense scheme for quantize",
    ),
    "full layer": (
        HEAD + "  - pass: sparsify\n    layers:\n      a: w8a8\n",
        5,
        "must be a sparse scheme for sparsify",
    ),
    "block layer": (
        HEAD + "  - pass: sparsify\n    layers:\n      a: bs32x32w8a8\n",
        5,
        "does not give the share of zero blocks",
    ),
    "two ways": (
        HEAD + "  - pass: quantize\n    include: a\n    layers: {a: w8a8}\n",
        5,
        "cannot be combined with include or exclude",
    ),
    "given": (
        HEAD + "  - pass: sparsify\n    pattern: 2:4\n    calibration: [1]\n",
        5,
        "calibration: is not an argument of sparsify",
    ),
    "twice": ("schema: nybble.recipe/1\nseed: 1\nseed: 2\n", 3, "'seed' is a duplicate, first given on line 2"),
    "alias": ("schema: &x nybble.recipe/1\nseed: *x\n", 2, "aliases are not allowed"),
    "object": ("schema: !!python/object/apply:os.getcwd []\n", 1, "tag .*python/object.* is not allowed"),
    "syntax": ("schema: nybble.recipe/1\nstages: [\n", 3, ""),
    "not a mapping": ("- 1\n", 1, "the recipe: must be a mapping"),
}


class TestWrongFiles:
    @pytest.mark.parametrize(("text", "line", "why"), WRONG_YAML.values(), ids=WRONG_YAML)
    def test_yaml_names_line_and_field(self, tmp_path: Path, text: str, line: int, why: str) -> None:
        with pytest.raises(ValueError, match=f"recipe.yaml: line {line}: .*{why}") as caught:
            Recipe.load(written(tmp_path, text))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("text", "line", "why"),
        [
            (
                '{"schema": "nybble.recipe/1",\n "seed": "x",\n "stages": [{"pass": "quantize"}]}',
                2,
                "seed: 'x' must be an int",
            ),
            (
                '{"schema": "nybble.recipe/1",\n "seed": true,\n "stages": [{"pass": "quantize"}]}',
                2,
                "seed: True must be an int",
            ),
            (
                '{"schema": "nybble.recipe/1", "stages": [\n{"pass": "quantize"},\n{"pass": "quantize",\n"m": [0.5]}]}',
                4,
                "m: ",
            ),
            (
                '{"schema": "nybble.recipe/1",\n "stages": [{"pass": "quantize", "goal": 1}]}',
                2,
                "goal: '1' must be one of",
            ),
            ('{"schema": 1,\n"schema": 2}', 2, "'schema' is a duplicate"),
            ('{"a": 1,\n}', 2, ""),
            ('{"a": [1,\n2,]}', 2, ""),
            ('{"a" 1}', 1, "':' is missing"),
            ('{"a": 1 "b": 2}', 1, "',' or '}' is missing"),
            ('{"a": [1 2]}', 1, "',' or ']' is missing"),
            ("{1: 2}", 1, "a name in double quotes is missing"),
            ('{"a": 1}\n{}', 2, "unexpected text after"),
            ('{"a":\n', 2, "a value is missing"),
            ("", 1, "a value is missing"),
            ("[" * 100_000, 1, "nested more than 8 deep"),
        ],
    )
    def test_json_names_line_and_field(self, tmp_path: Path, text: str, line: int, why: str) -> None:
        with pytest.raises(ValueError, match=f"recipe.json: line {line}: .*{why}"):
            Recipe.load(written(tmp_path, text, ".json"))

    @pytest.mark.parametrize(
        ("name", "data", "why"),
        [
            ("r.toml", b"", "must end in .yaml, .yml, .json"),
            ("r.yaml", b"", "is empty"),
            ("r.yaml", b"\xff\xfe\x00", "utf-8"),
            ("r.yaml", b"a: " + b"x" * (1 << 20), "must have at most 1048576 bytes"),
            ("r.yaml", b"[" * 100_000, "nested more than 8 deep"),
            ("r.yaml", b"a: \x00", "special characters"),
            ("r.yaml", b"? [a]\n: 1\n", "a key must be a scalar"),
        ],
    )
    def test_what_is_no_recipe_at_all(self, tmp_path: Path, name: str, data: bytes, why: str) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=why) as caught:
            Recipe.load(tmp_path / name)
        assert "\n" not in str(caught.value)

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            Recipe.load(tmp_path / "r.json")


class TestMade:
    def test_of_schemes_separates_what_is_sparse(self) -> None:
        recipe = Recipe.of_schemes(
            {"a": "w8a8", "b": "sp24w4a16g128", "c": "dense"},
            quantize={"goal": "memory"},
            sparsify={"method": "magnitude"},
        )
        assert recipe.stages == (
            Stage("sparsify", {"layers": {"a": "dense", "b": "sp24w4a16g128", "c": "dense"}, "method": "magnitude"}),
            Stage("quantize", {"layers": {"a": "w8a8", "b": "dense", "c": "dense"}, "goal": "memory"}),
        )
        assert [stage.name for stage in Recipe.of_schemes({"a": "w8a8", "b": "dense"}).stages] == ["quantize"]
        assert [stage.name for stage in Recipe.of_schemes({"a": "sp24w8a8"}).stages] == ["sparsify"]

    @pytest.mark.parametrize(
        ("make", "why"),
        [
            (lambda: Stage("quantize", {"scheme": 8}), "scheme: 8 must be text"),
            (lambda: Stage("quantize", {"m": True}), "m: True must be an integer or a list"),
            (lambda: Stage("sparsify"), "sparsify needs pattern"),
            (lambda: Recipe(()), "stages: must be a list of at least one stage"),
            (lambda: Recipe(("quantize",)), "stages: must be a list of at least one stage"),  # type: ignore[arg-type]
            (lambda: Recipe((Stage("quantize"),), seed=1.5), "seed: 1.5 must be an integer"),  # type: ignore[arg-type]
            (lambda: Recipe.from_dict([]), "must be a mapping"),  # type: ignore[arg-type]
        ],
    )
    def test_a_wrong_argument_is_named(self, make: Any, why: str) -> None:
        with pytest.raises(ValueError, match=why):
            make()

    def test_to_dict_is_plain(self) -> None:
        data = FULL.to_dict()
        assert json.loads(json.dumps(data)) == data
        assert Recipe.from_dict(data) == FULL


@pytest.mark.parametrize(
    ("value", "hint", "found"),
    [
        (Plain("1e-4"), float, 1e-4),
        (Plain(".5"), float, 0.5),
        (Plain("3"), float | None, 3.0),
        (Plain("null"), float | None, None),
        (Plain("null"), str, "null"),
        ("null", str | None, "null"),
        (Plain("2:4"), str, "2:4"),
        (Plain("12"), int | str, 12),
        ("12", int | str, "12"),
        (2, float, 2.0),
    ],
)
def test_a_scalar_is_what_its_place_asks_for(value: Any, hint: Any, found: Any) -> None:
    got = fit(value, hint, ())
    assert got == found
    assert type(got) is type(found)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("1", int),
        (Plain("1.5"), int),
        (True, int),
        (1, bool),
        (float("inf"), float),
        (Plain("nan"), float),
        (None, str),
    ],
)
def test_a_misfit_is_refused(value: Any, hint: Any) -> None:
    with pytest.raises(FieldError):
        fit(value, hint, ("x",))


class TestDataHash:
    DATA = [{"ids": torch.arange(4), "mask": torch.ones(4)}, (torch.zeros(2, 2, dtype=torch.bfloat16),)]  # noqa: RUF012

    def test_the_same_data_has_the_same_hash(self) -> None:
        assert data_sha256(self.DATA) == data_sha256(iter(self.DATA))

    @pytest.mark.parametrize(
        "other",
        [
            DATA[:1],
            DATA[::-1],
            [{"ids": torch.arange(4).int(), "mask": torch.ones(4)}, DATA[1]],
            [{"ids": torch.arange(4), "mask": torch.ones(2, 2)}, DATA[1]],
            [{"ids": torch.arange(1, 5), "mask": torch.ones(4)}, DATA[1]],
        ],
    )
    def test_other_data_has_another(self, other: Any) -> None:
        assert data_sha256(other) != data_sha256(self.DATA)


def test_old_names_of_arguments_load_with_a_warning(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """\
        schema: nybble.recipe/1
        stages:
          - {pass: recover, rate: 0.01, end_to_end: 3}
        """,
    )
    with pytest.warns(DeprecationWarning, match=r"recover\(\w+=\) is now") as warned:
        recipe = Recipe.load(path)
    assert recipe.stages == (Stage("recover", {"learning_rate": 0.01, "end_to_end_epochs": 3}),)
    assert {one.filename for one in warned} == {__file__}
    assert "end_to_end_epochs" in recipe.stages[0].to_dict()
    with pytest.raises(FieldError, match="rate is the old name of learning_rate"):
        Stage("recover", {"rate": 0.01, "learning_rate": 0.01})


@pytest.mark.parametrize(
    "text",
    [
        '{"schema": "nybble.recipe/1", "stages": [{"pass": "LONG"}]}',
        '{"schema": "nybble.recipe/1", "stages": [{"pass": "quantize", "method": "LONG"}]}',
        '{"LONG": 1, "LONG": 2}',
        '{"LONG": 1}',
    ],
    ids=["pass", "method", "twice", "name"],
)
def test_a_message_does_not_quote_everything(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(text.replace("LONG", "x" * 9000))
    with pytest.raises(ValueError, match="xxx") as caught:
        Recipe.load(path)
    assert len(str(caught.value)) < 2000
