from typing import Any

version: str

def instances(device: int) -> list[dict[str, Any]]: ...

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
        offsets: list[int],
    ) -> None: ...
    def scratch(self, m: int) -> int: ...
    def run(
        self,
        x: int,
        x_bytes: int,
        x_dtype: int,
        m: int,
        ldx: int,
        packed: int,
        packed_bytes: int,
        bias: int,
        bias_bytes: int,
        bias_dtype: int,
        y: int,
        y_bytes: int,
        y_dtype: int,
        scratch: int,
        scratch_bytes: int,
        stream: int,
    ) -> None: ...
