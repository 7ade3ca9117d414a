from typing import TypeAlias

version: str
F32: int
BF16: int
F16: int
S32: int

_Memory: TypeAlias = tuple[int, int]

def kernel_table() -> list[dict[str, object]]: ...
def cpu() -> tuple[str, list[str]]: ...
def probes() -> list[tuple[str, str, str]]: ...
def probe(
    name: str, *, threads: int, amount: int, passes: int = 1, runs: int = 1, huge_pages: bool = False
) -> tuple[float, int]: ...

class WeightShape:
    def __init__(self, *, bits: int, n: int, k: int, group_size: int, symmetric: bool) -> None: ...
    @property
    def packed_bytes(self) -> int: ...

def pack(
    shape: WeightShape, qweight: _Memory, scale: _Memory, zero_point: _Memory, packed: _Memory, threads: int
) -> None: ...
def unpack(
    shape: WeightShape, packed: _Memory, qweight: _Memory, scale: _Memory, zero_point: _Memory, threads: int
) -> None: ...
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
) -> None: ...

class LinearPlan:
    def __init__(self, kernel: str, prepare: str, shape: WeightShape) -> None: ...
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
