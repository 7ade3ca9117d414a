from typing import TypeAlias

version: str

_Memory: TypeAlias = tuple[int, int]

class Plan:
    def __init__(
        self,
        *,
        kernel: str,
        device: int,
        n: int,
        k: int,
        n_padded: int,
        k_padded: int,
        group_shift: int,
        offsets: tuple[int, int, int, int, int],
    ) -> None: ...
    def scratch(self, m: int) -> int: ...
    def run(
        self,
        x: _Memory,
        x_dtype: int,
        m: int,
        ldx: int,
        packed: _Memory,
        bias: _Memory,
        bias_dtype: int,
        y: _Memory,
        y_dtype: int,
        scratch: _Memory,
        stream: int,
    ) -> None: ...
