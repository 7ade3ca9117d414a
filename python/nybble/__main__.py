"""The command line: `nybble` or `python -m nybble`.

Exit codes: 0 success, 1 failure (one line on stderr), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .text import Items, wrap

if TYPE_CHECKING:
    from .dispatch.targets import Target

_LIBRARIES = ("torch", "numpy", "transformers", "triton", "safetensors")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, list[str]]:
    """Each optional extra of the installed distribution -> its packages that are not installed."""
    try:
        requirements = metadata.requires("nybble") or []
    except metadata.PackageNotFoundError:
        return {}
    missing: dict[str, list[str]] = {}
    for requirement in requirements:
        found = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if found:
            name, extra = found.groups()
            absent = missing.setdefault(extra, [])
            if _version(name) is None:
                absent.append(name)
    return missing


def _openmp() -> dict[str, Any]:
    """The OpenMP version that torch reports and, on Linux, the OpenMP libraries that this process has mapped."""
    import torch

    version = re.search(r"^OpenMP .*$", torch.__config__.parallel_info(), re.MULTILINE)
    maps = Path("/proc/self/maps")
    text = maps.read_text(encoding="utf-8", errors="replace") if maps.exists() else ""
    libraries = sorted(set(re.findall(r"/\S*/lib(?:g|i)?omp[^/\s]*\.so\S*", text)))
    return {"version": version.group() if version else None, "libraries": libraries}


def _info() -> dict[str, Any]:
    import torch

    from . import __version__, kernels
    from .dispatch import targets

    table = kernels()  # loads the extension, so that its OpenMP library is listed too
    machine = targets.detect()
    return {
        "versions": {
            "nybble": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in _LIBRARIES},
        },
        "extras": _extras(),
        "cpu": machine.cpu,
        "features": list(machine.features),
        "caches": machine.caches,
        "targets": list(machine.targets),
        "missing": dict(machine.missing),
        "cap": machine.cap,
        "cuda_kernels": any(row["built"] for row in table if row["target"].startswith("sm")),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "openmp": _openmp(),
    }


def _sizes(caches: dict[str, int]) -> str:
    """The sizes of the caches in words."""
    told = ", ".join(f"{name.upper()} {size >> 10:,} KB" for name, size in caches.items())
    given = os.environ.get("NYBBLE_CACHE")
    return f"{told} (NYBBLE_CACHE={given})" if given else told


def _show_info(info: dict[str, Any]) -> None:
    rows = [(name, version or "not installed") for name, version in info["versions"].items()]
    rows += [
        ("cpu", info["cpu"]),
        ("features", " ".join(info["features"])),
        ("caches", _sizes(info["caches"])),
        ("threads", f"{info['threads']} of {info['cores']} cores"),
        ("OpenMP", info["openmp"]["version"] or "none"),
        *(("", library) for library in info["openmp"]["libraries"]),
        ("targets", " ".join(info["targets"]) + (f" (NYBBLE_TARGET={info['cap']})" if info["cap"] else "")),
    ]
    rows += [(f"  no {target}", reason) for target, reason in info["missing"].items()]
    rows.append(
        ("CUDA kernels", "built" if info["cuda_kernels"] else "not built (no nvcc, or NYBBLE_CUDA=OFF, at build time)")
    )
    for extra, absent in info["extras"].items():
        lacks = f"lacks {', '.join(absent)}: pip install 'nybble[{extra}]'"
        rows.append((f"extra {extra}", lacks if absent else "installed"))
    width = max(len(name) for name, _ in rows)
    print("\n".join(line for name, value in rows for line in wrap(value, f"{name:{width}}  ")))


def _run_info(args: argparse.Namespace) -> None:
    info = _info()
    if args.json:
        print(json.dumps(info, indent=2))
    else:
        _show_info(info)


_HELPS = {
    "prepare": "activations to codes",
    "attention": "softmax(q k^T) v",
    "attention8": "softmax(q k^T) v with products of 8 bits",
    "expand": "masks and values to dense lines",
    "rows": "norms, activations, rotary positions and recurrent cells",
    "conv": "rounding, patches and outputs of convolutions, and depthwise ones",
    "quantize": "activations to codes",
    "dequantize": "weights to floats",
}


def _capability(target: Target) -> str:
    """The GPUs that a target supports, in words."""
    return "a GPU of compute capability {}.{}{}".format(*target.capability, "" if target.exact else " or more")


def kernel_markdown() -> str:
    """The kernel table of docs/kernels.md: the same on every machine, so that a test can compare the page with it."""
    from .dispatch import targets
    from .dispatch.registry import all_specs

    needs = {
        target.name: f"{_capability(target)}; not measured on a GPU yet"
        if target.gpu
        else (", ".join(target.needs) or "any CPU")
        for target in targets.table()
    }
    rows = [("kernel", "computes", "target", "needs", "weight layout"), ("---",) * 5]
    for spec in all_specs():
        computes = spec.scheme or _HELPS[spec.op]
        rows.append((f"`{spec.name}`", computes, spec.target, needs[spec.target], spec.layout or "-"))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _run_kernels(args: argparse.Namespace) -> None:
    from . import kernels
    from .demo.table import show_table

    if args.markdown:
        print(kernel_markdown())
        return
    table = kernels()
    if args.json:
        print(json.dumps(table, indent=2))
        return
    headers = ("kernel", "op", "scheme", "target", "layout", "built", "usable")
    notes: dict[str, str] = {}
    rows = []
    for kernel in table:
        why_not = kernel["why_not"]
        usable = "yes" if why_not is None else f"no {notes.setdefault(why_not, f'[{len(notes) + 1}]')}"
        cells = (str(kernel[name]) for name in ("name", "op", "scheme", "target", "layout"))
        rows.append((*cells, "yes" if kernel["built"] else "no", usable))
    show_table(headers, rows)
    if notes:
        print("\n".join(["", *Items("", [(f"{mark} ", text) for text, mark in notes.items()]).lines()]))


def _run_demo(args: argparse.Namespace) -> None:
    if args.accuracy:
        from .demo.accuracy import run as accuracy

        accuracy.main(args.quick, args.json, args.html)
        return
    from .demo.model import model_dir

    model_dir()  # fails early if something is not installed, before the slow imports
    from .demo import run
    from .demo.measure import FULL, FULL_SPARSE, QUICK, QUICK_SPARSE

    quick, full = (QUICK_SPARSE, FULL_SPARSE) if args.sparse else (QUICK, FULL)
    run.main(quick if args.quick else full, args.json, args.sparse)


def _parser() -> argparse.ArgumentParser:
    from .commands import export, importing, inspect, quantize, reporting

    parser = argparse.ArgumentParser(prog="nybble", description="int8 and int4 linear layers for torch")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(run=run)
        return sub

    command("info", _run_info, "versions, CPU, targets, threads, and what is missing and why")
    kernels = command("kernels", _run_kernels, "all kernels: which are built and usable here, and if not, why")
    kernels.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    demo = command("demo", _run_demo, "compare torch and nybble on a trained sentence encoder, on this machine")
    demo.add_argument("--quick", action="store_true", help="fewer sentences, less than a minute")
    demo.add_argument("--sparse", action="store_true", help="compare sparsity patterns (about ten minutes)")
    demo.add_argument("--accuracy", action="store_true", help="accuracy of a language model with 4-bit weights")
    demo.add_argument(
        "--html",
        type=Path,
        default=Path("nybble-accuracy.html"),
        help="page that --accuracy writes (default: %(default)s)",
    )
    quantize.add_arguments(command("quantize", quantize.run, "quantize a model by a scheme or a recipe, and save it"))
    inspect.add_arguments(command("inspect", inspect.run, "what a checkpoint holds, of nybble or of another library"))
    importing.add_arguments(command("import", importing.run, "make nybble's checkpoint of another library's"))
    export.add_arguments(command("export", export.run, "write nybble's checkpoint in another library's format"))
    reporting.add_arguments(
        command("report", reporting.run, "what the making of a directory reported, or what it holds")
    )
    return parser


def _fail(error: Exception) -> int:
    print(f"nybble: {error}", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = _parser().parse_args(argv)
    from .commands import CommandFailed
    from .demo import DemoUnavailable
    from .dispatch import targets
    from .plugins import PluginError

    try:
        targets.detect()
    except (
        ValueError,
        PluginError,
    ) as error:  # a wrong NYBBLE_TARGET, NYBBLE_CACHE or NYBBLE_PLUGINS, or a broken plug-in
        return _fail(error)
    try:
        args.run(args)
        sys.stdout.flush()
    except (DemoUnavailable, CommandFailed, PluginError) as error:
        return _fail(error)
    except BrokenPipeError:
        # The reader, such as `head`, has closed the pipe; redirect stdout so that the final flush does not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
