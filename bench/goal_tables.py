"""The targets of the presets: one table each. What a cell means is in goals.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from .goals import Measure, Row, Table, Value, faster_than, line, over
from .peers.torch_dense import BF16, FP32
from .shapes import SETS
from .weights import WeightKind

PEER, DENSE = "over the best peer of its width", "over nybble's dense kernel"
INT8_PEER, INT4_PEER, ONEDNN = "over the best int8 peer", "over the best 4-bit peer", "over torch dynamic onednn"
OVER_BF16, OVER_FP32 = "over torch bf16", "over torch fp32"
OVER_Q4_K, OVER_4_BITS, OVER_4_BITS_FLOAT = "over ggml q4_K", "over w4a8g128", "over w4a16g64"
OF_PEAK, OF_BYTE_BOUND, OF_BYTES, GOPS = "of the multiply peak", "time over the byte bound", "of its bytes", "GOP/s"
# The peers that count as the best int8 peer, and others of 8 bits that are shown beside it.
_INT8_PEERS = ("torch dynamic x86", "torch dynamic onednn", "onnxruntime dynamic int8")
_MORE_INT8 = ("onnxruntime q8 *", "openvino int8", "ggml q8_0")
# The libraries besides torch without which no peer is called the best of its width.
_LIBRARIES = ("onnxruntime *", "openvino *")


def _over(glob: str) -> str:
    return f"over {glob.rstrip('* ')}"


def _of_width(mine: Row, other: Row) -> bool:
    same = mine["pattern"] is not None or other["weight_bits"] == mine["weight_bits"]
    return other["peer"] and other["pattern"] == mine["pattern"] and same


def _over_scheme(scheme: str) -> Measure:
    """The speed over nybble's own layer of a scheme."""
    return Measure(faster_than(lambda _, other: not other["peer"] and other["scheme"] == scheme))


def _dense(mine: Row, other: Row) -> bool:
    return not other["peer"] and other["scheme"] == str(WeightKind.parse(mine["scheme"]).scheme.dense)


def _of_bytes(mine: Row, cell: Sequence[Row]) -> Value | None:
    found = faster_than(_dense)(mine, cell)
    return None if found is None else replace(found, value=found.value / mine["bytes_vs_dense"])


MEASURES: dict[str, Measure] = {
    PEER: Measure(faster_than(_of_width, _LIBRARIES), peers=("*",)),
    INT8_PEER: over(*_INT8_PEERS),
    **{_over(glob): over(glob) for glob in _MORE_INT8},
    INT4_PEER: over("ggml q4_*", "onnxruntime q4 *", "openvino int4 *"),
    ONEDNN: over("torch dynamic onednn"),
    OVER_BF16: over(BF16),
    OVER_FP32: over(FP32),
    OVER_Q4_K: over("ggml q4_K"),
    OVER_4_BITS: _over_scheme("w4a8g128"),
    OVER_4_BITS_FLOAT: _over_scheme("w4a16g64"),
    DENSE: Measure(faster_than(_dense)),
    OF_PEAK: Measure(lambda row, _: Value(row["gops"] / row["peak"]), "{:.0%}"),
    OF_BYTE_BOUND: Measure(lambda row, _: Value(1 / row["roofline"]), "{:.2f}", at_most=True),
    OF_BYTES: Measure(_of_bytes, "{:.0%}", unit=" of its bytes"),
    GOPS: Measure(lambda row, _: Value(row["gops"]), "{:.0f}"),
}
# Over bf16 in a line whose other cells are over a peer.
STARRED = {**MEASURES, OVER_BF16: over(BF16, mark="*")}
_WORST = "geometric mean of the shapes (worst shape) / target; met if the worst shape reaches it"

_CPU_MS = (1, 4, 16, 64, 256)


def _by_m(ms: Sequence[int], bounds: Sequence[float | None]) -> dict[int, float | None]:
    return dict(zip(ms, bounds, strict=True))


CPU = Table(
    legend=f"speed over the baseline: {_WORST}; *: over torch bf16, else over the best peer of the same "
    "weight width, for which onnxruntime and openvino must have run",
    ms=_CPU_MS,
    shapes=SETS["targets"],
    measures=STARRED,
    goals=(
        *line("w4a8g128", PEER, _by_m(_CPU_MS, (1.15, 1.3, 2.2, 1.8, 1.8))),
        *line("w4a16g128", PEER, _by_m(_CPU_MS[:4], (1.0, 1.2, 1.3, 1.1))),
        *line("w4a16g128", OVER_BF16, {256: 0.9}),
        *line("w8a8", PEER, _by_m(_CPU_MS, (1.0, 1.1, 1.3, 1.2, 1.08))),
        *line("w8a16", PEER, {1: 1.0, 4: 1.1}),
        *line("w8a16", OVER_BF16, {16: 1.2, 64: 1.0, 256: 0.9}),
        *line("w4a8g128, time over the byte bound", OF_BYTE_BOUND, {1: 1.15}, schemes=("w4a8g128",)),
        *line("w8a8, GOP/s", GOPS, {256: 1800}, schemes=("w8a8",)),
    ),
)

AVX2_MS = (1, 4, 16, 128, 1024)
# The int8 schemes of which the fastest counts where the accuracy of MiniLM allows it.
INT8_SCHEMES, LEAST_COSINE = ("w8a8", "w8a7"), 0.996
AVX2 = Table(
    legend="geometric mean of the shapes (worst shape) / target; met if the mean reaches it; over: times as fast. "
    f"The best int8 peer is the fastest of {', '.join(_INT8_PEERS)}; other 8-bit peers are shown without a target",
    ms=AVX2_MS,
    shapes=SETS["avx2"],
    measures=MEASURES,
    by_mean=True,
    goals=(
        *line(f"w8a8 {INT8_PEER}", INT8_PEER, _by_m(AVX2_MS, (1.15, 1.0, 0.95, 0.95, 0.95)), schemes=("w8a8",)),
        *line(
            f"fastest int8 {INT8_PEER}",
            INT8_PEER,
            _by_m(AVX2_MS, (1.15, 1.15, 1.15, 1.1, 1.1)),
            schemes=INT8_SCHEMES,
            least_cosine=LEAST_COSINE,
        ),
        *(
            goal
            for measure in map(_over, _MORE_INT8)
            for goal in line(f"w8a8 {measure}", measure, dict.fromkeys(AVX2_MS), schemes=("w8a8",))
        ),
        *line(f"w4a8g128 {INT4_PEER}", INT4_PEER, _by_m(AVX2_MS, (1.05, 1.7, 2, 2.5, 2.5)), schemes=("w4a8g128",)),
        *line(f"w4a8g128 {INT8_PEER}", INT8_PEER, _by_m(AVX2_MS, (1.5, 1.2, 1.2, 1.35, 1.4)), schemes=("w4a8g128",)),
        *line(f"w4a8g128 {OF_PEAK}", OF_PEAK, {128: 0.75, 1024: 0.75}, schemes=("w4a8g128",)),
        *line(f"w4a16g128 {OVER_FP32}", OVER_FP32, _by_m(AVX2_MS, (5, 5, 2, 1.05, 1.0)), schemes=("w4a16g128",)),
        *line(f"w8a16 {OVER_FP32}", OVER_FP32, _by_m(AVX2_MS, (5, 5, 2, 1.05, 1.0)), schemes=("w8a16",)),
    ),
)

AMX_MS = (1, 4, 16, 64, 256, 1024)
AMX = Table(
    legend=f"{_WORST}; over: times as fast",
    ms=AMX_MS,
    shapes=SETS["targets"],
    measures=MEASURES,
    goals=(
        *line(f"w8a8 {OVER_BF16}", OVER_BF16, _by_m(AMX_MS, (1.0, 1.0, 1.0, 1.3, 1.3, 1.3)), schemes=("w8a8",)),
        *line(f"w8a8 {ONEDNN}", ONEDNN, {64: 1.5, 256: 1.5, 1024: 1.5}, schemes=("w8a8",)),
        *line(f"w8a8 {OF_PEAK}", OF_PEAK, {1024: 0.5}, schemes=("w8a8",)),
    ),
)

_SPARSE_MS = (1, 16, 256)
# Kind of weight (see WeightKind.parse) -> smallest speed over dense for each M; None: no target.
_SPARSE: dict[str, tuple[float | None, float | None, float | None]] = {
    "sp50w8a8": (1.4, 1.0, 0.9),
    "sp70w8a8": (1.4, 1.1, 1.2),
    "sp80w8a8": (1.9, 1.4, 1.6),
    "sp90w8a8": (3.2, 2.0, 2.4),
    "sp95w8a8": (5.0, 3.2, 3.2),
    "sp32of128w8a8": (1.8, 1.6, 1.8),
    "sp16of128w8a8": (3.6, 3.0, 3.2),
    "sp8of128w8a8": (6.0, 6.0, 5.0),
    "sp24w8a8": (1.4, 1.0, 0.9),
    "sp50w4a8g128": (1.25, None, None),
    "sp32of128w4a8g128": (1.3, None, None),
    "bs32x32w8a8:50%": (None, None, 1.8),
    "bs32x32w8a8:75%": (None, None, 3.3),
    "bs32x32w8a8:90%": (None, None, 7.0),
}
# For block sparsity at M = 1: smallest speed over dense, as a share of the ratio of bytes read.
_LEAST_OF_BYTES = 0.85
SPARSE = Table(
    legend=f"speed {DENSE} of the same width: {_WORST}; then the worst speed {OVER_BF16}. "
    "of its bytes: that speed over the ratio of bytes read",
    ms=_SPARSE_MS,
    shapes=((4096, 4096), (4096, 14336)),
    measures=MEASURES,
    beside=OVER_BF16,
    goals=(
        *(goal for kind, bounds in _SPARSE.items() for goal in line(kind, DENSE, _by_m(_SPARSE_MS, bounds))),
        *(goal for kind in _SPARSE if kind.startswith("bs") for goal in line(kind, OF_BYTES, {1: _LEAST_OF_BYTES})),
    ),
)

_FORM_MS = (1, 16)
# Weights as the checkpoints of other libraries have them.
FORMS = Table(
    legend=f"{_WORST}; over: times as fast. Without a target: what the others are compared with",
    ms=_FORM_MS,
    shapes=((4096, 4096),),
    measures=MEASURES,
    goals=(
        *line(f"w4ka8g32 {OVER_Q4_K}", OVER_Q4_K, _by_m(_FORM_MS, (1.0, 1.5)), schemes=("w4ka8g32",)),
        *line(f"w4ka16g32 {OVER_Q4_K}", OVER_Q4_K, dict.fromkeys(_FORM_MS), schemes=("w4ka16g32",)),
        *line(f"w3a8g128 {OVER_4_BITS}", OVER_4_BITS, _by_m(_FORM_MS, (1.15, None)), schemes=("w3a8g128",)),
        *line(f"w3a16g128 {OVER_4_BITS}", OVER_4_BITS, dict.fromkeys(_FORM_MS), schemes=("w3a16g128",)),
        *line(
            f"w4nfa16g64 {OVER_4_BITS_FLOAT}", OVER_4_BITS_FLOAT, _by_m(_FORM_MS, (1.0, 1.0)), schemes=("w4nfa16g64",)
        ),
        *line(f"w4a8g128 {OVER_Q4_K}", OVER_Q4_K, dict.fromkeys(_FORM_MS), schemes=("w4a8g128",)),
        *line(f"w4a16g64 {OVER_Q4_K}", OVER_Q4_K, dict.fromkeys(_FORM_MS), schemes=("w4a16g64",)),
    ),
)

# By the name of the preset.
TABLES: dict[str, Table] = {
    "cpu-targets": CPU,
    "avx2-targets": AVX2,
    "amx-targets": AMX,
    "sparse-targets": SPARSE,
    "form-targets": FORMS,
}


def of_rows(rows: Sequence[Row]) -> Table | None:
    """The table of the preset that wrote these results; None if none did."""
    run = next((row for row in rows if row["kind"] == "run"), {})
    if "preset" in run:
        return TABLES.get(run["preset"])
    # Files of before 2026-11-29 do not name their preset.
    return CPU if any(row["kind"] == "target" for row in rows) else None
