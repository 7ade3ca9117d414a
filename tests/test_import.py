"""Importing nybble computes nothing. Other libraries import some of its modules when they are imported themselves, which may be
on the meta device, within a transform of torch.func or among fake tensors: a tensor would be no real one there."""

import subprocess
import sys

import pytest

EVERY_MODULE = """
import importlib, pkgutil, traceback, torch
from importlib.util import find_spec
from pathlib import Path
from torch.utils._python_dispatch import TorchDispatchMode

class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        last = [Path(frame.filename) for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename][-1]
        if last.is_relative_to(folder) and not last.is_relative_to(folder / "testing"):
            print(func, last)  # but for the tables of testing, which hold inputs
        return func(*args, **(kwargs or {}))

folder = Path(find_spec("nybble").origin).parent
with Seen():
    import nybble
    names = [module.name for module in pkgutil.walk_packages(nybble.__path__, "nybble.") if "_aot" not in module.name]
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # an extra
            assert not error.name.startswith("nybble"), error
print("computed nothing above" if len(names) > 100 else names)
"""

WITHIN = {
    "a gradient": "torch.func.grad(lambda x: (import_module(name), x.sum())[1])(torch.ones(3))",
    "vmap": "torch.func.vmap(lambda x: (import_module(name), x)[1])(torch.ones(3))",
    "the meta device": "with torch.device('meta'): import_module(name)",
    "fake tensors": "with torch._subclasses.FakeTensorMode(): import_module(name)",
}


def printed(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout


def test_no_module_computes_when_it_is_imported() -> None:
    assert printed(EVERY_MODULE) == "computed nothing above\n"


@pytest.mark.parametrize("where", WITHIN)
def test_modules_are_imported_within(where: str) -> None:
    """Chains of fused layers keep memory, whose first look at an array was once a tensor."""
    code = f"""
import nybble, torch
from importlib import import_module
name = "nybble.parallel"
{WITHIN[where]}
print(nybble.parallel.__name__)
"""
    assert printed(code) == "nybble.parallel\n"
