"""Which module may import which, by reading the sources: the table below is the order of the package's layers.

Also what no source may contain: formats that run code when they are read, and exceptions swallowed unseen.
"""

import ast
import importlib.util
from pathlib import Path

import pytest

import nybble

# A room, or a module, imports only from its own row of this list and from earlier rows.
ORDER = (
    (
        "_awaited",
        "_moved",
        "callers",
        "plugins",
    ),  # old import paths; where warnings point to; rows of other packages
    ("text",),  # how reports are printed
    ("weights",),
    ("_C", "_cuda"),
    ("native",),
    ("compiled",),  # rounding and ranking of weights, by the compiled library where it can
    ("layouts",),
    ("dispatch.targets",),
    ("dispatch.spec",),  # what a kernel is
    ("kernels.table",),  # which Triton kernels there are
    ("dispatch",),
    ("kernels",),  # Triton's, and the table's public name
    ("gradients", "batching", "flops"),  # how torch's transforms and counters see an op
    ("ops", "rows"),  # the torch ops
    ("attention", "recurrent", "experts", "lookup", "conv"),  # likewise, beside those
    ("bound_conv",),  # convolutions made ready to run again
    ("int8_cache",),  # for models of transformers
    ("nn",),
    ("model",),
    ("report",),
    ("paired",),  # how much faster one function is than another
    ("fusion",),
    ("checkpoint",),
    ("foreign",),  # checkpoints of other libraries
    ("export",),  # for other runtimes
    ("lora",),  # PEFT's adapters
    ("parallel",),  # several processes, by torch's own engines
    ("evaluate",),
    ("monitor", "passes", "recipe"),
    ("hf",),  # a quantization method of transformers
    ("",),  # the package's own __init__
    ("_moved_values", "testing"),
    ("stress",),  # figures of reliability
    ("__main__", "bench", "commands", "demo"),
)
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}
# Modules of earlier rows that rooms must not import all the same.
_LOW = {
    "_C",
    "native",
    "dispatch.reference",
    "kernels",
    "dispatch.targets",
    "layouts",
    "ops",
    "attention",
    "recurrent",
    "experts",
    "lookup",
    "conv",
    "bound_conv",
}
FORBIDDEN = {
    "nn": {"_C", "native", "dispatch.targets", "dispatch.reference", "kernels"},
    "model": _LOW,
    "passes": _LOW - {"dispatch.targets"},
    "checkpoint": _LOW - {"layouts"},
    "foreign": _LOW,
    "export": _LOW - {"dispatch.reference"},
    "lora": _LOW,
    "parallel": _LOW - {"layouts"},
    "hf": _LOW - {"layouts"},
    "monitor": _LOW,
    "recipe": _LOW,
    "report": _LOW | {"nn"},
    "demo": {"_C", "native", "dispatch.reference", "layouts", "ops", "attention", "experts", "testing"},
    "__main__": {"_C", "native", "dispatch.reference", "layouts", "ops", "attention", "experts", "testing"},
    "commands": {"_C", "native", "dispatch.reference", "layouts", "ops", "attention", "experts", "testing"},
    "": _LOW - {"kernels"},
}
# Modules that only these rooms may import; any later row may import the others.
ONLY_BY = {
    "_C": {"native"},
    "_cuda": {"dispatch"},
    "testing": {"bench", "stress"},
    "stress": {"bench"},
    "bench": {"__main__"},
    "commands": {"__main__"},
    "demo": {"__main__", "bench", "commands"},
}


def folder_of(package):
    return Path(importlib.util.find_spec(package).origin).parent


def sources():
    """Dotted name without "nybble." -> path, for the package and what is installed into it from other folders."""
    found = {}
    for prefix, folder in (
        ("", folder_of("nybble")),
        ("kernels", folder_of("nybble.kernels")),
        ("bench", folder_of("nybble.bench")),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = [prefix, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part and part != "__init__")] = path
    return found


SOURCES = sources()
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in SOURCES.items()}


def unit(name):
    """The room that a module belongs to, or the module itself where the table names it."""
    return name if name in RANK else name.split(".")[0]


def is_package(name):
    return SOURCES[name].name == "__init__.py"


def imports(name, tree):
    """(line, imported module of nybble, imported name) of every import, wherever it stands."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found += [
                (node.lineno, n.removeprefix("nybble").lstrip("."), "") for n in names if n.split(".")[0] == "nybble"
            ]
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                here = name.split(".") if name else []
                up = node.level - (1 if is_package(name) else 0)
                base = here[: len(here) - up] if up else here
                module = ".".join([*base, *([module] if module else [])])
            elif module.split(".")[0] == "nybble":
                module = module.removeprefix("nybble").lstrip(".")
            else:
                continue
            for alias in node.names:
                inner = f"{module}.{alias.name}" if module else alias.name
                known = inner in SOURCES or inner in ("_C", "_cuda")
                found.append((node.lineno, inner if known else module, alias.name))
    return found


def complaints(name, tree):
    mine, found = unit(name), []
    for line, module, imported in imports(name, tree):
        other = unit(module)
        where = f"{name or '__init__'}:{line} imports {module or 'the package'}"
        if module == "" and imported == "__version__":
            continue  # a constant, set before anything is imported
        if mine == other:
            continue
        if other not in RANK:
            found.append(f"{where}: not in ORDER")
        elif RANK[other] > RANK[mine]:
            found.append(f"{where}: which is in a later row of ORDER")
        elif {other, module} & FORBIDDEN.get(mine, set()):
            found.append(f"{where}: which FORBIDDEN rules out")
        elif mine not in ONLY_BY.get(other, {mine}):
            found.append(f"{where}: which only {sorted(ONLY_BY[other])} may")
    return found


@pytest.mark.parametrize("name", SOURCES, ids=lambda name: name or "__init__")
def test_imports_follow_the_order_of_the_layers(name):
    assert unit(name) in RANK, f"{name}: give it a place in ORDER"
    assert complaints(name, TREES[name]) == []


def test_the_sources_are_the_installed_ones():
    assert {"", "weights.scheme", "native", "nn.linear", "passes", "kernels", "bench", "__main__"} <= set(SOURCES)
    assert SOURCES[""] == Path(nybble.__file__)
    assert all(tree.body for tree in TREES.values())


@pytest.mark.parametrize(
    ("name", "code", "complaint"),
    [
        (
            "weights.scheme",
            "from ..ops import linear",
            "weights.scheme:1 imports ops: which is in a later row of ORDER",
        ),
        (
            "weights.scheme",
            "def f():\n    import nybble.ops",
            "weights.scheme:2 imports ops: which is in a later row of ORDER",
        ),
        ("nn.linear", "from .. import native", "nn.linear:1 imports native: which FORBIDDEN rules out"),
        (
            "nn",
            "from ..dispatch.targets import detect",
            "nn:1 imports dispatch.targets: which FORBIDDEN rules out",
        ),
        ("ops", "from . import _C", "ops:1 imports _C: which only ['native'] may"),
        ("ops", "from nybble._C import pack", "ops:1 imports _C: which only ['native'] may"),
        (
            "native.base",
            "from .. import quantize",
            "native.base:1 imports the package: which is in a later row of ORDER",
        ),
        ("model.walk", "from ..kernels import x", "model.walk:1 imports kernels: which FORBIDDEN rules out"),
        ("model.walk", "from nybble import testing", "model.walk:1 imports testing: which is in a later row of ORDER"),
        ("demo.run", "from ..testing import x", "demo.run:1 imports testing: which FORBIDDEN rules out"),
        (
            "dispatch.registry",
            "from ..ops import linear",
            "dispatch.registry:1 imports ops: which is in a later row of ORDER",
        ),
        ("native", "from . import _C\nfrom .weights import scheme", None),
        ("dispatch.registry", "from .. import __version__", None),
        ("checkpoint.model", "from ..model.walk import swap\nfrom .files import x\nimport torch", None),
        ("bench", "from ..testing import error_bound", None),
    ],
)
def test_a_wrong_import_is_found(name, code, complaint):
    assert complaints(name, ast.parse(code)) == ([complaint] if complaint else [])


def circles(graph):
    """The sets of modules that import each other, in the end (Tarjan's strongly connected components)."""
    index, low, stack, found = {}, {}, [], []

    def visit(name):
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in graph[name]:
            if other not in index:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == index[name]:
            circle = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(circle) > 1:
                found.append(sorted(circle))

    for name in graph:
        if name not in index:
            visit(name)
    return found


def test_no_modules_import_each_other():
    """A package's own face imports its modules, which may not import the face; types alone count too."""
    graph = {name: {other for _, other, _ in imports(name, tree) if other in SOURCES} for name, tree in TREES.items()}
    graph = {name: {other for other in others if other not in ("", name)} for name, others in graph.items()}
    assert circles(graph) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


# --- what no source may contain

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
NETWORK = {"socket", "urllib", "http", "requests", "ftplib", "smtplib", "ssl", "aiohttp", "httpx"}
PROCESSES = {"subprocess", "pty"}
CALLS = {
    ("torch", "load"),
    ("torch", "save"),
    ("yaml", "load"),
    ("yaml", "full_load"),
    ("yaml", "unsafe_load"),
    ("numpy", "load"),
    ("np", "load"),
    ("os", "system"),
    ("os", "popen"),
}
# Settings of the whole process: for commands, which own theirs.
SETTINGS = {
    ("torch", name)
    for name in ("set_num_threads", "set_num_interop_threads", "set_default_dtype", "set_flush_denormal")
}
COMMANDS = {"__main__", "bench", "commands", "demo", "stress"}


def dotted(node):
    """("torch", "load") of the expression torch.load."""
    if isinstance(node, ast.Attribute):
        return (*dotted(node.value), node.attr)
    return (node.id,) if isinstance(node, ast.Name) else ("?",)


# Module -> the one of these that it is about: the bench for GPUs asks nvidia-smi, times a new process's first call, both
# without a shell, and reports whatever a library that is measured raises, which may be Exception itself. So does what counts failures.
ALLOWED = {
    "bench.against": "import subprocess",
    "bench.arm_counts": "import subprocess",
    "bench.gpu_state": "import subprocess",
    "bench.gpu_first": "import subprocess",
    "bench.gpu_sass": "import subprocess",
    "bench.gpu_smoke": "import subprocess",
    "bench.gpu_wheels": "import subprocess",
    "bench.gpu_wheels_check": "import subprocess",
    "bench.gpu_measure": "swallows Exception",
    "stress.attempt": "swallows Exception",
}


def dangers(name, tree):
    found = []
    calls = CALLS if unit(name) in COMMANDS else CALLS | SETTINGS
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        for module in modules:
            parts = tuple(module.split("."))
            if parts[0] in MODULES | NETWORK | PROCESSES or parts[-2:] in calls:
                found.append(f"{node.lineno}: import {module}")
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            if called[-2:] in calls or called in {("eval",), ("exec",), ("compile",), ("__import__",)}:
                found.append(f"{node.lineno}: {'.'.join(called)}")
            for keyword in node.keywords:
                if keyword.arg in ("allow_pickle", "trust_remote_code"):
                    found.append(f"{node.lineno}: {keyword.arg}")
                if keyword.arg == "shell" and getattr(keyword.value, "value", None) is not False:
                    found.append(f"{node.lineno}: shell")
        if isinstance(node, ast.ExceptHandler):
            caught = {dotted(kind)[-1] for kind in getattr(node.type, "elts", [node.type]) if kind is not None}
            raises = any(isinstance(inner, ast.Raise) for inner in ast.walk(node))
            if node.type is None or (caught & {"Exception", "BaseException"} and not raises):
                found.append(f"{node.lineno}: swallows {' '.join(sorted(caught)) or 'everything'}")
    return sorted(line for line in set(found) if line.partition(": ")[2] != ALLOWED.get(name))


@pytest.mark.parametrize("name", SOURCES, ids=lambda name: name or "__init__")
def test_no_source_is_dangerous(name):
    assert dangers(name, TREES[name]) == []


def test_what_is_allowed_is_used():
    for name, danger in ALLOWED.items():
        assert [line.partition(": ")[2] for line in dangers("bench", TREES[name])] == [danger]


@pytest.mark.parametrize(
    ("code", "danger"),
    [
        ("import pickle", "1: import pickle"),
        ("from torch import load", "1: import torch.load"),
        ("import urllib.request", "1: import urllib.request"),
        ("x = torch.load(p, weights_only=True)", "1: torch.load"),
        ("yaml.load(f, Loader=L)", "1: yaml.load"),
        ("eval(s)", "1: eval"),
        ("torch.set_num_threads(1)", "1: torch.set_num_threads"),
        ("np.load(f)", "1: np.load"),
        ("f(p, trust_remote_code=True)", "1: trust_remote_code"),
        ("try:\n    f()\nexcept:\n    raise", "3: swallows everything"),
        ("try:\n    f()\nexcept (OSError, Exception):\n    pass", "3: swallows Exception OSError"),
        ("model.eval(); re.compile(s); yaml.safe_load(f); checkpoint.load(f)", None),
        ("try:\n    f()\nexcept BaseException:\n    undo()\n    raise", None),
        ("try:\n    f()\nexcept OSError:\n    pass", None),
    ],
)
def test_a_danger_is_found(code, danger):
    assert dangers("ops", ast.parse(code)) == ([danger] if danger else [])
