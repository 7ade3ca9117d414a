from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

version: str
F32: int
BF16: int
F16: int
S32: int
BOOL: int
S8: int
U8: int

_Memory: TypeAlias = tuple[int, int]
_Vector: TypeAlias = tuple[int, int, int] | None  # address, bytes, dtype
_Norm: TypeAlias = tuple[str, _Vector, _Vector, float, float]  # kind, weight, bias, eps, weight_offset
# address, bytes, dtype, 4 sizes, 4 strides
_Table: TypeAlias = tuple[int, int, int, int, int, int, int, int, int, int, int] | None

def kernel_table() -> list[dict[str, Any]]: ...
def cuda_kernel_table() -> list[dict[str, Any]]: ...
def cpu(tiles: bool, /) -> tuple[str, list[str], dict[str, str]]: ...
def cpu_features_of(
    *,
    one_c: int,
    seven_b: int,
    seven_c: int,
    seven_d: int,
    seven1_a: int,
    saved_state: int,
    ask_for_tiles: Callable[[], int],
) -> tuple[list[str], dict[str, str]]: ...
def cpu_features_of_arm(*, hwcap: int, hwcap2: int) -> list[str]: ...
def arm_cores(cpuinfo: str) -> str: ...
def listed_caches(cpus: str) -> list[int]: ...
def caches() -> tuple[int, int, int]: ...
def dense_layouts() -> list[tuple[str, int, bool, bool]]: ...
def probes() -> list[tuple[str, str, str]]: ...
def probe(
    name: str,
    *,
    threads: int,
    amount: int,
    passes: int = 1,
    runs: int = 1,
    huge_pages: bool = False,
) -> tuple[float, int]: ...

class WeightShape:
    def __init__(
        self,
        *,
        bits: int,
        n: int,
        k: int,
        group_size: int,
        symmetric: bool,
        layout: str,
        block_n: int,
        block_k: int,
        ordered: bool,
        group_scale: int = ...,
        minimum: bool = ...,
        book: bool = ...,
        levels: bool = ...,
    ) -> None: ...
    @property
    def packed_bytes(self) -> int: ...

def blocks(
    kernel: str,
    shape: WeightShape,
    *,
    rows: int,
    threads: int,
    caches: str | None = None,
) -> dict[str, int]: ...

class SparsePack:
    def __init__(self, shape: WeightShape, qweight: _Memory, scale: _Memory, threads: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def write(self, packed: _Memory) -> None: ...

def check_packed(shape: WeightShape, packed: _Memory) -> None: ...
def unpack_sparse(shape: WeightShape, packed: _Memory, qweight: _Memory, scale: _Memory, threads: int) -> None: ...
def count_kept(shape: WeightShape, qweight: _Memory) -> int: ...
def to_bitmask(shape: WeightShape, qweight: _Memory, mask: _Memory, values: _Memory) -> None: ...
def from_bitmask(
    shape: WeightShape,
    mask: _Memory,
    values: _Memory,
    most: int,
    of: int,
    qweight: _Memory,
) -> None: ...
def check_blocks(start: _Memory, index: _Memory, width: int) -> None: ...
def pack(
    shape: WeightShape,
    qweight: _Memory,
    scale: _Memory,
    zero_point: _Memory,
    minimum: _Memory,
    order: _Memory,
    book: _Memory,
    levels: _Memory,
    packed: _Memory,
    threads: int,
) -> None: ...
def unpack_bits(
    from_: _Memory, rows: int, row_bytes: int, bits: int, count: int, to: _Memory, threads: int, /
) -> None: ...
def select_nibbles(
    from_: _Memory, rows: int, row_bytes: int, order: _Memory, count: int, to: _Memory, threads: int, /
) -> None: ...
def transpose_nibbles(from_: _Memory, k: int, words: int, places: _Memory, to: _Memory, threads: int, /) -> None: ...
def use_huge_pages(memory: list[_Memory]) -> None: ...
def unpack(
    shape: WeightShape,
    packed: _Memory,
    qweight: _Memory,
    scale: _Memory,
    zero_point: _Memory,
    minimum: _Memory,
    order: _Memory,
    book: _Memory,
    levels: _Memory,
    threads: int,
) -> None: ...
def all_finite(weight: _Memory, dtype: int, n: int, k: int, stride: int, threads: int) -> bool: ...
def round_weight(
    shape: WeightShape,
    weight: _Memory,
    dtype: int,
    stride: int,
    qweight: _Memory,
    scale: _Memory,
    zero_point: _Memory,
    threads: int,
) -> bool: ...
def squared_sums(
    shape: WeightShape,
    weight: _Memory,
    dtype: int,
    stride: int,
    qweight: _Memory,
    scale: _Memory,
    zero_point: _Memory,
    minimum: _Memory,
    threads: int,
) -> tuple[float, float]: ...
def choose_smallest(scores: _Memory, counts: _Memory, n: int, k: int, chosen: _Memory, threads: int) -> None: ...
def keep_only(from_: _Memory, keep: _Memory, count: int, size: int, to: _Memory, threads: int, /) -> None: ...
def check_kept(shape: WeightShape, qweight: _Memory, most: int, of: int, threads: int) -> None: ...
def prepare(
    *,
    kernel: str,
    panel_format: int,
    dtype: int,
    x: _Memory,
    rows: int,
    stride: int,
    k: int,
    k_padded: int,
    block_rows: int,
    group: int,
    panel: _Memory,
    scale: _Memory,
    zero: _Memory,
    sums: _Memory,
    given_scale: float = 0.0,
    given_zero: int = 0,
    act_steps: int = 255,
    order: _Memory = (0, 0),
) -> None: ...
def attention(
    kernel: str,
    dtype: int,
    sizes: tuple[int, int, int, int, int, int, int],
    at: tuple[tuple[_Memory, tuple[int, ...]], ...],
    mask: tuple[_Memory, int, tuple[int, ...]] | None,
    slopes: _Memory,
    scale: float,
    causal: bool,
    window: int,
    scales: tuple[tuple[_Memory, tuple[int, ...]], ...] | None,
    kernel8: str,
    threads: int,
) -> None: ...

class LinearPlan:
    def __init__(
        self,
        kernel: str,
        prepare: str,
        expand: str,
        few: str,
        shape: WeightShape,
        static_activations: bool,
        act_steps: int,
        first_row: int = 0,
        all_rows: int = 0,
    ) -> None: ...
    def run(
        self,
        x: _Memory,
        x_dtype: int,
        rows: int,
        stride: int,
        packed: _Memory,
        bias: _Memory,
        bias_dtype: int,
        y: _Memory,
        y_dtype: int,
        threads: int,
        /,
    ) -> None: ...

class Lookup:
    def __init__(self, kernel: str, shape: WeightShape, tiled: bool) -> None: ...
    def run(
        self,
        packed: int,
        packed_bytes: int,
        ids: int,
        id_bytes: int,
        count: int,
        y: int,
        y_bytes: int,
        dtype: int,
        threads: int,
        /,
    ) -> None: ...
    def bag(
        self,
        packed: _Memory,
        ids: _Memory,
        id_bytes: int,
        count: int,
        y: _Memory,
        dtype: int,
        mode: str,
        start: _Memory,
        bags: int,
        weights: _Memory,
        left_out: int,
        threads: int,
    ) -> None: ...

_Code: TypeAlias = tuple[float, int, int, int] | None

class ConvCall:
    def __init__(
        self,
        plan: LinearPlan,
        kernel: str,
        sizes: tuple[int, ...],
        x: tuple[_Memory, int, bool],
        packed: _Memory,
        scale: _Memory,
        bias: _Memory,
        bias_dtype: int,
        y: tuple[_Memory, int, bool],
        residual: tuple[_Memory, int],
        act: str,
        most: float,
        x_range: _Memory,
        y_range: _Memory,
        codes: tuple[_Code, _Code, _Code],
    ) -> None: ...
    def add(self, more: ConvCall) -> None: ...
    @property
    def runs_direct(self) -> bool: ...

def pool_call(
    kernel: str,
    sizes: tuple[int, ...],
    pool: str,
    x: tuple[_Memory, int, bool],
    y: _Memory,
    x_range: _Memory,
    y_range: _Memory,
    codes: tuple[tuple[float, int, int, int] | None, tuple[float, int, int, int] | None] = ...,
) -> ConvCall: ...
def run_convs(calls: list[ConvCall], threads: int, /) -> None: ...

class ChainWeight:
    def __init__(
        self,
        plan: LinearPlan,
        packed: _Memory,
        bias: _Vector,
        y: int,
        act: str = "",
        other: int = -1,
        residual: int = -1,
    ) -> None: ...

_Side: TypeAlias = tuple[Sequence[tuple[int, LinearPlan]], Sequence[_Memory], Sequence[_Vector]]

class Experts:
    def __init__(
        self, dtype: int, rows: str, up: _Side, down: _Side, gate: tuple[str, bool, bool, float, float]
    ) -> None: ...
    def run(
        self, sizes: tuple[int, int, int], x: _Memory, index: _Memory, weight: _Memory, y: _Memory, threads: int
    ) -> None: ...

class Chain:
    def __init__(
        self,
        dtype: int,
        widths: list[int],
        externals: int,
        *,
        rows: str,
        attention: str,
    ) -> None: ...
    def add_norm(
        self,
        x: int,
        y: int,
        kind: str,
        weight: _Vector,
        bias: _Vector,
        eps: float,
        *,
        residual: int = -1,
        sum: int = -1,
        weight_offset: float = 0.0,
    ) -> None: ...
    def add_linears(
        self,
        x: int,
        weights: list[ChainWeight],
        *,
        norm: _Norm | None = None,
        residual: int = -1,
        sum: int = -1,
        normed: int = -1,
    ) -> None: ...
    def add_activate(self, x: int, y: int, act: str, *, other: int = -1) -> None: ...
    def add_rotate(
        self,
        x: int,
        y: int,
        heads: int,
        *,
        head_dim: int = 0,
        offset: int = 0,
        cos: int,
        sin: int,
        interleaved: bool,
        norm: tuple[_Vector, float, float] | None = None,
    ) -> None: ...
    def add_attention(
        self,
        q: int,
        k: int,
        v: int,
        y: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        *,
        q_offset: int = 0,
        k_offset: int = 0,
        v_offset: int = 0,
        causal: bool,
        window: int = 0,
        mask: int = -1,
        cached: bool = False,
        k_scale: int = -1,
        v_scale: int = -1,
        int8: str = "",
    ) -> None: ...
    def run(
        self,
        batch: int,
        length: int,
        external: list[tuple[int, int, int]],
        tables: list[_Table],
        threads: int,
    ) -> None: ...

_RecurrentWeight: TypeAlias = tuple[LinearPlan, _Memory, _Vector]

def recurrent(
    rows: str,
    cell: str,
    *,
    dtype: int,
    directions: list[tuple[_RecurrentWeight | None, _RecurrentWeight]],
    sizes: list[int],
    x: _Memory,
    stride: int,
    y: _Memory,
    h: _Memory,
    c: _Memory,
    threads: int,
) -> None: ...
