"""What to do next, as rules: each looks for something in a report, and names the call that answers it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..dispatch.registry import specs
from ..text import Items, span
from ..weights.scheme import Scheme, activations_of
from ..weights.sparsity import NofM, Unstructured, parse_name
from .columns import error_of, method_of, size
from .data import NOT_TIMED, UNKNOWN_KIND, LayerReport, ReportData
from .fold import Row, fold_names, rows

Facts = Mapping[str, object]
_COVERED = 90.0  # percent of the weight bytes from which on coverage is not worth a line
_WORTH = 0.01  # the share of them from which on a weight is named
_LARGE_ERROR = 0.1
_GROUP = 128
_NAMED = 3  # names in one line
_NO_VNNI = {"scalar", "avx2", "avx512bw"}
_WITHOUT_DATA = {"rtn", "mse", "hqq"}
# What a layer gets where it does not allow the method that was asked for.
_SIMPLER = {"rtn", "mse", "magnitude", "wanda"}


@dataclass(frozen=True)
class Rule:
    """``finds`` gives what ``says`` has places for, or None where there is nothing to say."""

    finds: Callable[[ReportData], Facts | None]
    says: str


@dataclass(frozen=True)
class Advice(Items):
    """Lines of advice. A result of several reports shows each line once, below all of them."""


def advice(report: ReportData) -> Advice | None:
    """The lines of all rules that find something, in their order."""
    lines = [rule.says.format_map(facts) for rule in RULES if (facts := rule.finds(report)) is not None]
    return advise(lines)


def advise(lines: Iterable[str]) -> Advice | None:
    """Lines of advice under their title, each once; None where there are none."""
    different = list(dict.fromkeys(lines))
    return Advice("what to do next:", [("- ", line) for line in different]) if different else None


def call_of(report: ReportData, argument: str) -> str:
    """The call that runs the report's pass again with another argument."""
    if report.merged:
        return f"the same recipe with {argument}"
    schemes = report.scheme.split(", ")
    if len(schemes) > 1:
        several = ", ".join(f'"{one}"' for one in schemes)
        return f"nybble.quantize(model, ({several}), {argument})"
    pattern, _, numbers = report.scheme.rpartition(" ")
    if not pattern:
        return f'nybble.quantize(model, "{numbers}", {argument})'
    scheme = "None" if numbers == "floats" else f'"{numbers}"'
    return f'nybble.sparsify(model, "{_spelled(pattern)}", scheme={scheme}, {argument})'


def _spelled(pattern: str) -> str:
    """A pattern's name, such as sp50 or sp24, as ``sparsify`` takes it."""
    sparsity = parse_name(pattern) if pattern.startswith("sp") else None
    if isinstance(sparsity, Unstructured):
        return f"{sparsity.percent}%"
    return f"{sparsity.n}:{sparsity.m}" if isinstance(sparsity, NofM) else pattern


def _named(layers: Sequence[LayerReport]) -> str:
    """The first names, folded, and how many more there are."""
    names = list(fold_names(layer.name for layer in layers))
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _counted(layers: Sequence[LayerReport]) -> str:
    return f"{len(layers)} layers" if len(layers) != 1 else "1 layer"


def _nbytes(layers: Iterable[LayerReport]) -> int:
    return sum(layer.nbytes_before for layer in layers)


def _bytes(layers: Iterable[LayerReport]) -> str:
    return size(_nbytes(layers))


def _sizes(ms: Sequence[int]) -> str:
    return ", ".join(map(str, ms))


def _call_for(report: ReportData, ms: Sequence[int]) -> str:
    """The call that counts only these M."""
    return call_of(report, f"m={ms[0]}" if len(ms) == 1 else f"m=({_sizes(ms)})")


def _nothing_known(report: ReportData) -> Facts | None:
    return {} if all(layer.reason == UNKNOWN_KIND for layer in report.layers) else None


def _nothing_swapped(report: ReportData) -> Facts | None:
    if report.swapped or _nothing_known(report) is not None:
        return None
    timed = {layer.name: mean.verdict for layer in report.left if (mean := layer.mean_speed) is not None}
    words = {
        "slower": "slower than the dense layer here",
        "no difference": "no difference to the dense layer's speed here",
    }
    whys = (words.get(timed.get(layer.name, ""), layer.reason) for layer in report.left)
    reasons = Counter(whys).most_common(_NAMED)
    return {"why": "; ".join(f"{count} x {reason}" for reason, count in reasons)}


def _too_slow(report: ReportData) -> list[LayerReport]:
    """Layers that were left alone for their speed."""
    return [layer for layer in report.left if (mean := layer.mean_speed) is not None and not mean.is_faster]


def _undecided(report: ReportData) -> Facts | None:
    left = [layer for layer in _too_slow(report) if (mean := layer.mean_speed) is not None and not mean.is_slower]
    if not left:
        return None
    longer = call_of(report, f"timing_s={6 * report.timing_limit_s:g}")
    call = call_of(report, 'goal="no_slower"')
    return {"count": _counted(left), "bytes": _bytes(left), "m": _sizes(report.m), "call": call, "longer": longer}


def _not_timed(report: ReportData) -> Facts | None:
    left = [layer for layer in report.left if NOT_TIMED in (layer.reason or "")]
    if not left:
        return None
    call = call_of(report, f"timing_s={6 * report.timing_limit_s:g}")
    return {"count": _counted(left), "bytes": _bytes(left), "call": call}


def _left_for_speed(report: ReportData) -> Facts | None:
    left = [layer for layer in _too_slow(report) if (mean := layer.mean_speed) is not None and mean.is_slower]
    if not left:
        return None
    call = call_of(report, 'goal="memory"')
    return {"count": _counted(left), "bytes": _bytes(left), "m": _sizes(report.m), "call": call}


def _faster_at_some(report: ReportData) -> Facts | None:
    left = _too_slow(report)
    pays = [m for m in report.m if left and all(m in layer.speeds and layer.speeds[m].is_faster for layer in left)]
    if not pays:
        return None
    speeds = span([layer.speedup[m] for layer in left for m in pays], ".2f")
    return {"m": _sizes(pays), "speeds": speeds, "call": _call_for(report, pays)}


def _slower_at_some(report: ReportData) -> Facts | None:
    slower = [layer for layer in report.swapped if layer.slower_at]
    if not slower:
        return None
    at = sorted({m for layer in slower for m in layer.slower_at})
    worst = min(layer.speedup[m] for layer in slower for m in layer.slower_at)
    return {"count": _counted(slower), "m": _sizes(at), "worst": f"{worst:.2f}", "call": _call_for(report, at)}


def _shared_weight(report: ReportData) -> Facts | None:
    shared = [layer for layer in report.left if "untie=True" in (layer.reason or "")]
    return {"names": _named(shared), "call": call_of(report, "untie=True")} if shared else None


def _unknown_kinds(report: ReportData) -> Facts | None:
    """The largest weights that no pass of this kind changes."""
    least = report.weight_bytes * _WORTH
    left = rows(layer for layer in report.left if layer.reason == UNKNOWN_KIND)
    others = [row for row in left if _nbytes(row.layers) > least]
    if report.coverage >= _COVERED or not others or not report.swapped:
        return None
    largest = sorted(others, key=lambda row: -_nbytes(row.layers))[:_NAMED]
    return {"coverage": f"{report.coverage:.1f}", "names": ", ".join(map(_described, largest))}


def _described(row: Row) -> str:
    """ "h.{0..2}.table (3 x Embedding, float32, 9.0 MiB)"."""
    count, layer = len(row.layers), row.layers[0]
    times = f"{count} x " if count > 1 else ""
    return f"{row.name} ({times}{layer.kind}, {layer.before}, {_bytes(row.layers)})"


def _four_bits(report: ReportData) -> list[LayerReport]:
    return [layer for layer in report.swapped if layer.pruned is None and _scheme(layer).weight_bits == 4]


def _four_bits_without_data(report: ReportData) -> Facts | None:
    four = _four_bits(report)
    if not four or report.method not in _WITHOUT_DATA or any(error_of(layer) is not None for layer in four):
        return None
    return {"method": report.method, "call": call_of(report, 'method="gptq", calibration=batches')}


def _four_bits_without_groups(report: ReportData) -> Facts | None:
    whole = [layer for layer in _four_bits(report) if _scheme(layer).group_size is None and layer.shape[1] > _GROUP]
    if not whole or ", " in report.scheme:
        return None
    return {"scheme": report.scheme, "groups": replace(Scheme.parse(report.scheme), group_size=_GROUP)}


def _scheme(layer: LayerReport) -> Scheme:
    return Scheme.parse(layer.after)


def _int8_targets(report: ReportData) -> set[str]:
    """The targets of the kernels with int8 activations."""
    targets = {spec.name: spec.target for spec in specs() if activations_of(spec.scheme).quantized}
    names = {name for layer in report.swapped for name in (layer.kernel or "").split(", ")}
    return {targets[name] for name in names & targets.keys()}


def _without_vnni(report: ReportData) -> Facts | None:
    found = _int8_targets(report)
    return {"target": ", ".join(sorted(found))} if found and found <= _NO_VNNI else None


def _reference(report: ReportData) -> Facts | None:
    slow = [layer for layer in report.swapped if "_reference" in (layer.kernel or "")]
    return {"count": _counted(slow)} if slow else None


def _simpler_method(report: ReportData) -> Facts | None:
    simpler = [layer for layer in report.swapped if method_of(layer) in _SIMPLER - {report.method}]
    return {"count": _counted(simpler), "method": report.method} if simpler else None


def _large_error(report: ReportData) -> Facts | None:
    found = [(error, layer.name) for layer in report.layers if (error := error_of(layer)) is not None]
    error, name = max(found, default=(0.0, ""))
    if error <= _LARGE_ERROR:
        return None
    return {"error": f"{100 * error:.1f}", "name": name}


def _swapped(report: ReportData) -> Facts | None:
    return {} if report.swapped else None


RULES = (
    Rule(
        _nothing_known,
        "nothing found in this model that nybble replaces: print(model) shows which modules there are, and "
        "nybble.nn.module_kinds() what can be replaced; a plug-in adds other kinds (docs/adding/module.md)",
    ),
    Rule(_nothing_swapped, "nothing was swapped: {why}"),
    Rule(
        _left_for_speed,
        "{count} ({bytes}) left alone: slower than the dense layer here, on the mean over M={m}; to save memory anyway: {call}",
    ),
    Rule(
        _undecided,
        "{count} ({bytes}) left alone: no difference to the dense layer's speed on the mean over M={m}; to save memory where "
        "that is so: {call}; to measure longer: {longer}",
    ),
    Rule(_not_timed, "{count} ({bytes}) left alone: no time was left to time them; to measure longer: {call}"),
    Rule(_faster_at_some, "at M={m} those layers are {speeds} times as fast as dense; if you run only these M: {call}"),
    Rule(
        _slower_at_some,
        "{count} slower than before at M={m} ({worst}x at worst), though faster on the mean; if you run only these M, on "
        "the original model: {call}",
    ),
    Rule(_shared_weight, "{names}: shares its weight with another module; to quantize a copy of it: {call}"),
    Rule(
        _unknown_kinds,
        "coverage is {coverage} %: the largest weights of modules that nybble does not replace are {names}; "
        "model.to(torch.bfloat16) before the pass halves those in float32",
    ),
    Rule(
        _four_bits_without_data,
        "method {method!r} rounds 4-bit weights without calibration data; more accurate, on the original model: {call}",
    ),
    Rule(
        _four_bits_without_groups,
        'a scale for each 128 inputs makes 4 bits more accurate: on the original model, scheme="{groups}" instead of '
        '"{scheme}"',
    ),
    Rule(
        _without_vnni,
        "int8 kernels run on target {target} because VNNI instructions are not available (see `nybble info`): expect less "
        "speed-up than on CPUs with AVX-VNNI or AVX512-VNNI; the memory saved is the same",
    ),
    Rule(
        _reference,
        "{count} in plain torch, which is slow and saves memory only; nybble.explain(layer) says why no kernel runs them",
    ),
    Rule(
        _simpler_method,
        "{count} got a simpler method than {method!r}, for the reasons in the notes; more calibration data helps most",
    ),
    Rule(
        _large_error,
        "the largest output error is {error} %, of {name}: on the original model, exclude={name!r} leaves that layer alone",
    ),
    Rule(
        _swapped,
        "nybble.evaluate(model, original, batches) compares outputs, speed and memory with the original model",
    ),
    Rule(_swapped, 'nybble.save(model, "directory") writes the model; nybble.load(fresh, "directory") reads it back'),
)
