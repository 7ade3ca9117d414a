"""Time of the first call of a layer in a new process with an empty Triton cache.

    python -m nybble.bench.gpu_first SCHEME M N K

The CUDA context exists before the call, as in a process that has loaded a model. The time includes the kernels'
self-check (nybble.dispatch.selfcheck).
"""

from __future__ import annotations

import os
import subprocess
import sys
from tempfile import TemporaryDirectory

_LIMIT_S = 60


def measure(scheme: str, m: int, n: int, k: int) -> float:
    """Seconds, measured in a new process.

    Raises:
        RuntimeError: the process failed; the message has the last line of its output.
    """
    command = [sys.executable, "-m", __name__, scheme, str(m), str(n), str(k)]
    with TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        try:
            done = subprocess.run(  # noqa: S603
                command, env=environment, capture_output=True, text=True, timeout=_LIMIT_S, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"first call: more than {_LIMIT_S} s") from error
    if done.returncode != 0:
        raise RuntimeError(f"first call: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    return float(done.stdout)


def first_call(scheme: str, m: int, n: int, k: int, device: str = "cuda") -> float:
    """Seconds, measured in this process."""
    import torch

    from ..nn import Linear
    from .gpu_timing import first

    layer = Linear.from_dense(torch.nn.Linear(k, n, dtype=torch.bfloat16), scheme).to(device)
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        layer.pack()
        return first(lambda: layer(x)) / 1e6


def main() -> None:
    scheme, *sizes = sys.argv[1:]
    m, n, k = map(int, sizes)
    print(first_call(scheme, m, n, k))


if __name__ == "__main__":
    main()
