"""Driver version and current clocks of a GPU from nvidia-smi; "unknown", with the reason, if that fails."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping

# nvidia-smi field -> key in a result.
QUERY = {
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.sm": "sm_mhz_most",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
}
UNKNOWN = "unknown"


def state(index: int = 0) -> dict[str, str]:
    """The values by key. On failure all are UNKNOWN, and "why" is the reason."""
    reason = ""
    if shutil.which("nvidia-smi") is None:
        reason = "nvidia-smi is not on PATH"
    else:
        command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits", f"--id={index}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)  # noqa: S603
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = f"nvidia-smi: {type(error).__name__}"
        else:
            values = [value.strip() for value in done.stdout.strip().split(",")]
            if done.returncode == 0 and len(values) == len(QUERY):
                return dict(zip(QUERY.values(), values, strict=True))
            reason = f"nvidia-smi: {(done.stdout + done.stderr).strip().splitlines()[:1] or 'no output'}"
    return {**dict.fromkeys(QUERY.values(), UNKNOWN), "why": reason}


def state_text(found: Mapping[str, str]) -> str:
    """The state as one line of text."""
    why = f" ({found['why']})" if "why" in found else ""
    return (
        f"driver {found['driver']}  SM {found['sm_mhz']} of {found['sm_mhz_most']} MHz  memory {found['memory_mhz']} MHz  "
        f"{found['celsius']} C  {found['watts']} W{why}"
    )
