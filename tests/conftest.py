"""Which tests run, in which order, and fixtures that several files share.

fast     the default, and what README's command and .ci/run run: minutes on two cores
full     also tests that compile, emulate a GPU, or sweep every case of a product; before a release: .ci/run full
nightly  also what repeats `full` in another way and takes hours

`--tests full` and `--tests nightly` choose. Without `--tests`, files and tests that the
command line names run at the level `full`; a folder does not count as named.
"""

from __future__ import annotations

import os
from itertools import count

import pytest

# Read when torch loads libgomp: threads that wait sleep, so two runs side by side don't take each other's cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if not torch.cuda.is_available():
    # Read when a module with Triton kernels is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

LEVELS = ("fast", "full", "nightly")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tests", choices=LEVELS, help="fast (the default, as CI), full or nightly (all)")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "full: left out of the fast tests",
        "nightly: left out of the fast and the full tests",
        "sampled(every, full=1): of this test's cases, the fast tests run each `every`-th, the full tests each `full`-th",
    ):
        config.addinivalue_line("markers", line)


def level_of(config: pytest.Config) -> str:
    """The option, else ``full`` where the command line names only files and tests, else ``fast``."""
    named = config.args_source is pytest.Config.ArgsSource.ARGS and not any(
        (config.invocation_params.dir / argument).is_dir() for argument in config.args
    )
    return config.getoption("--tests") or ("full" if named else "fast")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what is left out of samples, leaves out what the level leaves out, puts the slowest files first."""
    cases: dict[object, count[int]] = {}
    for item in items:
        sampled = item.get_closest_marker("sampled")
        if sampled is not None:
            number = next(cases.setdefault(item.function, count()))  # type: ignore[attr-defined]
            if number % sampled.kwargs.get("full", 1):
                item.add_marker(pytest.mark.nightly)
            elif number % sampled.kwargs["every"]:
                item.add_marker(pytest.mark.full)
    most = LEVELS.index(level_of(config))
    chosen = [item for item in items if _level(item) <= most]
    config.hook.pytest_deselected(items=[item for item in items if _level(item) > most])
    items[:] = sorted(chosen, key=_level, reverse=True)


def _level(item: pytest.Item) -> int:
    return next((LEVELS.index(name) for name in reversed(LEVELS) if item.get_closest_marker(name)), 0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _short_peaks(request, monkeypatch):
    """The bench measures the peak of the multiplies with each cell, half a second that no test of it looks at."""
    if request.path.name.startswith("test_bench") and request.path.name != "test_bench_ceilings.py":
        monkeypatch.setattr("nybble.bench.ceilings._MULTIPLY_RUNS", 1)
        monkeypatch.setattr("nybble.bench.ceilings._MULTIPLY_ROUNDS", 100)


@pytest.fixture
def threads():
    """Sets torch's thread count, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def narrow_llama():
    """A language model in Llama form of two narrow blocks and 64 tokens, untrained."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**shape, vocab_size=64, tie_word_embeddings=True)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture
def x86_kernels():
    """Leaves out a test of the choice between kernels of x86 where others are built."""
    from nybble.dispatch.registry import all_specs

    if not any(spec.built and spec.target == "avx2" for spec in all_specs()):
        pytest.skip("kernels of x86 are not built here")


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine another one: machine("avx2") has no faster target."""
    from nybble.dispatch import selection, targets

    def become(best):
        usable = targets.names()[: targets.names().index(best) + 1]
        missing = {name: f"no {name} in this test" for name in targets.names() if name not in usable}
        other = targets.Machine("a CPU", (), usable, missing, None)
        monkeypatch.setattr(targets, "detect", lambda: other)
        selection.plan_for.cache_clear()

    yield become
    monkeypatch.undo()
    selection.plan_for.cache_clear()
