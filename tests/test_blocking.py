"""How products are cut for the caches: csrc/caches.h, csrc/blocking.h, and that no cut changes a bit."""

import json
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nybble import native
from nybble.weights.scheme import Scheme

KB = 1 << 10
ROWS = {row["name"]: row for row in native.kernel_table() if row["op"] == "linear" and row["built"]}
DENSE = sorted(name for name, row in ROWS.items() if row["layout"] in ("n16k4", "n16k8"))
TINY = "4K,16K,64K"
# L1, L2, L3 of one core.
MACHINES = {
    "Zen 3": "32K,512K,32M",
    "Zen 5": "48K,1M,32M",
    "Skylake-SP": "32K,1M,27M",
    "Sapphire Rapids": "48K,2M,105M",
}


def cut(kernel, scheme, size, rows, threads=1, caches=MACHINES["Zen 3"]):
    layout = ROWS[kernel]["layout"]
    return native.blocks(kernel, Scheme.parse(scheme), size, layout=layout, rows=rows, threads=threads, caches=caches)


def sizes_of(caches):
    factors = {"K": KB, "M": KB * KB}
    return [int(part[:-1]) * factors[part[-1]] for part in caches.split(",")]


def scheme_of(kernel, group):
    return kernel.split("_")[0] + (f"g{group}" if group and "w4" in kernel else "")


# --- the caches


def python(script, *arguments, **environment):
    """Runs a script in a new interpreter; its standard output, or where it fails, its standard error."""
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    return done.stdout if done.returncode == 0 else done.stderr


def test_the_variable_sets_the_caches():
    assert python("from nybble import native; print(*native.caches())", NYBBLE_CACHE="4K,1M,2000000") == (
        "4096 1048576 2000000\n"
    )


def test_caches_are_found_without_the_variable():
    l1, l2, l3 = map(int, python("from nybble import native; print(*native.caches())", NYBBLE_CACHE="").split())
    assert 8 * KB <= l1 <= l2 <= l3


@pytest.mark.parametrize(
    "value", ["32K,512K", "32K,512K,32M,", "32K,512K,32M,1G", "512K,32K,32M", "0,0,0", "a,b,c", "-1K,2K,3K"]
)
@pytest.mark.parametrize("script", ["nybble.dispatch.targets.detect()", "nybble.native.caches()"])
def test_a_wrong_variable_is_refused_by_name(value, script):
    error = python(f"import nybble, nybble.native, nybble.dispatch.targets; {script}", NYBBLE_CACHE=value)
    assert f'ValueError: NYBBLE_CACHE="{value}": must be the bytes of L1, L2 and L3' in error


def test_info_shows_the_caches():
    script = "import sys; from nybble.__main__ import main; sys.exit(main(sys.argv[1:]))"
    shown = python(script, "info", NYBBLE_CACHE="32K,512K,32M")
    assert "L1 32 KB, L2 512 KB, L3 32,768 KB (NYBBLE_CACHE=32K,512K,32M)" in shown
    info = json.loads(python(script, "info", "--json", NYBBLE_CACHE="32K,512K,32M"))
    assert info["caches"] == {"l1": 32 * KB, "l2": 512 * KB, "l3": 32 * KB * KB}
    assert "NYBBLE_CACHE" in python(script, "info", NYBBLE_CACHE="1")


# --- the cuts

PROBLEMS = {
    "kernel": st.sampled_from(DENSE),
    "group": st.sampled_from([0, 32, 64, 128]),
    "n": st.integers(1, 20_000),
    "k": st.integers(1, 20_000),
    "rows": st.integers(1, 5_000),
    "caches": st.sampled_from([*MACHINES.values(), TINY, "1,1,1"]),
}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(**PROBLEMS, threads=st.integers(1, 64))
def test_cuts_cover_the_product(kernel, group, n, k, rows, threads, caches):
    found = cut(kernel, scheme_of(kernel, group), (n, k), rows, threads, caches)
    columns, k_padded = -(-n // 16) * 16, -(-k // (group or 1)) * (group or 1) if "w4" in kernel else k
    assert 1 <= found["block_rows"] <= ROWS[kernel]["block_rows"]
    assert found["block_rows"] <= found["chunk_rows"] <= rows
    assert found["chunk_rows"] == rows or found["chunk_rows"] % found["block_rows"] == 0
    assert 16 <= found["pass"] <= columns
    assert found["pass"] % 16 == 0
    assert found["k_block"] >= 1
    if found["k_block"] < k_padded:
        assert found["k_block"] % 64 == 0
        assert "w4" not in kernel or found["k_block"] % group == 0, "a group is cut"
    assert found["tile_parts"] >= 1
    assert found["block_parts"] >= 1
    assert found["expand"] % 16 == 0
    assert found["decode"] is False or ROWS[kernel]["decoded"] > 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(**PROBLEMS)
def test_threads_change_the_pieces_alone(kernel, group, n, k, rows, caches):
    """And a cut depends on nothing but its arguments."""
    several = [cut(kernel, scheme_of(kernel, group), (n, k), rows, threads, caches) for threads in (1, 2, 2, 7)]
    assert several[1] == several[2]
    for found in several:
        del found["tile_parts"], found["block_parts"]
    assert all(found == several[0] for found in several)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(**PROBLEMS)
def test_blocks_fit_their_caches(kernel, group, n, k, rows, caches):
    """The weights of a K block of a pass, in half of L2, unless the pass or the K block is of the least size."""
    assume(rows > ROWS[kernel]["block_rows"])
    found = cut(kernel, scheme_of(kernel, group), (n, k), rows, 1, caches)
    _, l2, l3 = sizes_of(caches) if caches != "1,1,1" else (1, 1, 1)
    row = ROWS[kernel]
    bits = 4 if "w4" in kernel else 8
    step = max(64, group) if bits == 4 else 64
    k_block = min(found["k_block"], -(-k // (group or 1)) * (group or 1))
    weights = found["pass"] * k_block * bits // 8
    if found["pass"] > max(row["columns"], 16) and k_block > step and group:
        assert weights <= l2 / 2 + 4096
    panel = found["chunk_rows"] * k * native.PANEL_DTYPES[row["panel"]].itemsize
    assert panel <= l3 / 4 or found["chunk_rows"] <= 64 + row["block_rows"]


@pytest.mark.parametrize("kernel", [name for name in DENSE if ROWS[name]["target"] != "amx"])
@pytest.mark.parametrize("caches", MACHINES.values(), ids=list(MACHINES))
def test_one_row_is_not_cut_along_k(kernel, caches):
    """Its weights are read once, and sums between K blocks would only add work. AMX multiplies no less than 16 rows."""
    found = cut(kernel, scheme_of(kernel, 128), (4096, 11008), 1, 2, caches)
    assert found["k_block"] >= 11008
    assert found["decode"] is False


# (k_block, pass) of 4096 x 4096 at 1024 rows; weights that are decoded once take an eighth of L2.
EXAMPLES = {
    "w8a8_avx2": {"Zen 3": (512, 64), "Zen 5": (1024, 64), "Skylake-SP": (1024, 64), "Sapphire Rapids": (2048, 64)},
    "w4a8_avx2": {"Zen 3": (1024, 64), "Zen 5": (2048, 64), "Skylake-SP": (2048, 64), "Sapphire Rapids": (4096, 64)},
    "w4a16_avx2": {"Zen 3": (256, 64), "Zen 5": (512, 64), "Skylake-SP": (512, 64), "Sapphire Rapids": (1024, 64)},
    "w8a8_avx512vnni": {"Zen 5": (4096, 64), "Sapphire Rapids": (4096, 128)},
}


@pytest.mark.parametrize(
    ("kernel", "machine"), [(kernel, machine) for kernel, machines in EXAMPLES.items() for machine in machines]
)
def test_examples(kernel, machine):
    if kernel not in ROWS:
        pytest.skip(f"{kernel} is not built")
    found = cut(kernel, scheme_of(kernel, 128), (4096, 4096), 1024, 2, MACHINES[machine])
    assert (found["k_block"], found["pass"]) == EXAMPLES[kernel][machine]
    assert found["decode"] is (ROWS[kernel]["decoded"] > 0)


# --- the bits

BITS = """
    import hashlib, json, sys, torch
    from nybble.dispatch.registry import specs
    from nybble.dispatch.spec import Problem
    from nybble.testing.checks import activations
    from nybble.testing.oracle import random_weight, run_into, schemes_of

    found = {}
    for spec in specs():
        if spec.device == "cuda" or spec.target == "torch" or spec.from_plugin:
            continue
        for scheme in schemes_of(spec.scheme):
            for m, n, k in ((1, 65, 700), (37, 129, 1300), (61, 70, 333), (73, 40, 1300), (64, 49, 700)):
                dtype = spec.act_dtypes[0]
                if spec.why_not(Problem(scheme, m=m, n=n, k=k, dtype=dtype, layout=spec.layout)) is not None:
                    continue
                weight, x = random_weight(scheme, n, k), activations(m, k, dtype, 11)
                for threads in (1, 2, 5):
                    torch.set_num_threads(threads)
                    y = torch.full((m, n), torch.nan)  # float32: bfloat16 would hide another order of sums
                    run_into(spec, weight, scheme, x, torch.randn(n, generator=torch.manual_seed(1)), y)
                    bits = y.view(torch.uint8).numpy().tobytes()
                    found[f"{spec.name} {scheme} {m}x{n}x{k} {threads}"] = hashlib.sha256(bits).hexdigest()
    print(json.dumps(found))
"""


def test_no_cut_changes_a_bit():
    """Caches so small that every product is cut often, and those of servers, for 1, 2 and 5 threads."""
    bits = {caches: json.loads(python(BITS, NYBBLE_CACHE=caches)) for caches in (TINY, "1K,2K,1M", "48K,1M,32M")}
    first = bits.pop("48K,1M,32M")
    assert len({name.split()[0] for name in first}) >= 8
    for name, digest in first.items():
        alone = f"{name.rsplit(' ', 1)[0]} 1"
        assert digest == first[alone], f"{name} differs from one thread"
        assert all(other[name] == digest for other in bits.values()), f"{name} differs when cut"


@pytest.mark.parametrize("kernel", DENSE)
def test_tiny_caches_cut_k(kernel):
    """Else the test above would compare nothing."""
    found = cut(kernel, scheme_of(kernel, 32), (129, 1300), 37, 1, TINY)
    assert found["k_block"] * 2 < 1300
    assert found["pass"] < 129
