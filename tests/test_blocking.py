"""How products are cut for the caches: csrc/caches.h, csrc/blocking.h, and that no cut changes a bit."""

import json
import math
import os
import subprocess
import sys
import textwrap

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nybble import native
from nybble.dispatch import targets
from nybble.weights.scheme import Scheme

KB = 1 << 10
ROWS = {row["name"]: row for row in native.kernel_table() if row["op"] == "linear" and row["built"]}
DENSE = sorted(name for name, row in ROWS.items() if row["layout"] in ("n16k4", "n16k8") and "k" not in row["scheme"])
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
    """Weights of two levels have groups of 32 alone."""
    if "w4k" in kernel:
        return f"{kernel.split('_')[0]}g32"
    has_groups = "w4" in kernel or "w3" in kernel or kernel.endswith("amx_groups")
    return kernel.split("_")[0] + (f"g{group}" if group and has_groups else "")


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


WRONG = [
    "32K,512K",
    "32K,512K,32M,",
    "32K,512K,32M,1G",
    "32K,512K,32M,one-stream,1G",
    "one-stream,32K,512K,32M",
    "512K,32K,32M",
    "0,0,0",
    "a,b,c",
    "-1K,2K,3K",
]
REFUSED = """
    import os, sys
    import nybble, nybble.native, nybble.dispatch.targets

    for value in sys.argv[2:]:
        os.environ["NYBBLE_CACHE"] = value
        try:
            eval(sys.argv[1])
        except ValueError as error:
            print(error)
"""


@pytest.mark.parametrize("script", ["nybble.dispatch.targets.detect()", "nybble.native.caches()"])
def test_a_wrong_variable_is_refused_by_name(script):
    errors = python(REFUSED, script, *WRONG).splitlines()
    assert len(errors) == len(WRONG), errors
    for value, error in zip(WRONG, errors, strict=True):
        assert f'NYBBLE_CACHE="{value}": must be the bytes of L1, L2 and L3' in error


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
    "group": st.sampled_from([0, 16, 32, 64, 128]),
    "n": st.integers(1, 20_000),
    "k": st.integers(1, 20_000),
    "rows": st.integers(1, 5_000),
    "caches": st.sampled_from([*MACHINES.values(), TINY, "1,1,1"]),
}


def k_padded_of(kernel, group, k):
    if "w8" in kernel:
        return -(-k // 4) * 4
    return -(-k // (group or 8)) * (group or 8)


def k_step_of(kernel, group, k):
    """K blocks are multiples of it. Kernels of float activations scale codes before they sum them, so that they may cut
    a group of all K."""
    k_padded = k_padded_of(kernel, group, k)
    group = group or k_padded
    floats = native.PANEL_DTYPES[ROWS[kernel]["panel"]].itemsize == 4
    return 64 if "w8" in kernel or (floats and group == k_padded) else math.lcm(64, group)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(**PROBLEMS, threads=st.integers(1, 64))
def test_cuts_keep_the_rules_of_kernels(kernel, group, n, k, rows, threads, caches):
    found = cut(kernel, scheme_of(kernel, group), (n, k), rows, threads, caches)
    columns, k_padded = -(-n // 16) * 16, k_padded_of(kernel, group, k)
    assert 1 <= found["block_rows"] <= ROWS[kernel]["block_rows"]
    assert found["block_rows"] <= found["chunk_rows"] <= rows
    assert found["chunk_rows"] == rows or found["chunk_rows"] % found["block_rows"] == 0
    assert 16 <= found["pass"] <= columns
    assert found["pass"] % 16 == 0
    assert found["k_block"] >= 1
    if found["k_block"] < k_padded:
        assert found["k_block"] % k_step_of(kernel, group, k) == 0
    assert 1 <= found["tile_parts"] * found["block_parts"] <= 4 * threads
    assert found["expand"] >= 16
    assert found["expand"] % 16 == 0
    assert found["decode"] is False or ROWS[kernel]["decoded"] > 0


@settings(max_examples=200, deadline=None, derandomize=True)
@given(**PROBLEMS)
def test_threads_change_no_order_of_sums(kernel, group, n, k, rows, caches):
    """Kernels of floats sum in another order for few rows; and a cut depends on nothing but its arguments."""
    several = [cut(kernel, scheme_of(kernel, group), (n, k), rows, threads, caches) for threads in (1, 2, 2, 7)]
    assert several[1] == several[2]
    assert len({(found["block_rows"], found["chunk_rows"]) for found in several}) == 1


@settings(max_examples=400, deadline=None, derandomize=True)
@given(**PROBLEMS)
def test_blocks_fit_their_caches(kernel, group, n, k, rows, caches):
    """The weights of a K block of a pass, as the kernel reads them, in half of L2; the panel of a chunk in a quarter of
    L3: unless the pass, the K block or the chunk is of the least size."""
    row = ROWS[kernel]
    assume(rows > row["block_rows"])
    found = cut(kernel, scheme_of(kernel, group), (n, k), rows, 1, caches)
    _, l2, l3 = sizes_of(caches) if caches != "1,1,1" else (1, 1, 1)
    k_padded = k_padded_of(kernel, group, k)
    k_block = min(found["k_block"], k_padded)
    bits = 8 * row["decoded"] if found["decode"] else 4 if "w4" in kernel else 8
    if found["pass"] > max(row["columns"], 16) or (k_block > 64 and k_block > k_step_of(kernel, group, k)):
        assert found["pass"] * k_block * bits // 8 <= l2 / 2
    panel = found["chunk_rows"] * k_padded * native.PANEL_DTYPES[row["panel"]].itemsize
    assert panel <= l3 / 4 or found["chunk_rows"] <= 64 + row["block_rows"]


@pytest.mark.parametrize("kernel", [name for name, row in ROWS.items() if row["layout"] == "gather8"])
@pytest.mark.parametrize("caches", MACHINES.values(), ids=list(MACHINES))
def test_the_window_of_gathering_kernels_is_in_l1(kernel, caches):
    """Their activations of a K block: half of L1."""
    row = ROWS[kernel]
    found = cut(kernel, "sp50w8a8", (4096, 11008), 64, 2, caches)
    half = sizes_of(caches)[0] // 2
    assert found["k_block"] * row["block_rows"] <= half < (found["k_block"] + 64) * row["block_rows"]


@pytest.mark.parametrize("kernel", [name for name in DENSE if ROWS[name]["target"] != "amx"])
@pytest.mark.parametrize("caches", MACHINES.values(), ids=list(MACHINES))
def test_one_row_is_not_cut_along_k(kernel, caches):
    """Its weights are read once, and sums between K blocks would only add work. AMX multiplies no less than 16 rows."""
    found = cut(kernel, scheme_of(kernel, 128), (4096, 11008), 1, 2, caches)
    assert found["k_block"] >= 11008
    assert found["decode"] is False


AMX = [name for name, row in ROWS.items() if row["target"] == "amx"]


@pytest.mark.parametrize("kernel", AMX)
def test_tiles_of_rows_are_few_and_nearly_equal(kernel):
    """A block is two tiles of up to 16 rows: 33 rows are 22 and 11, not 32 and 1."""
    scheme = scheme_of(kernel, 128).replace("bs", "bs32x32")
    for rows in range(1, 200):
        most = cut(kernel, scheme, (4096, 4096), rows, 2)["block_rows"]
        blocks = [min(most, rows - row) for row in range(0, rows, most)]
        tiles = [min(16, block - row) for block in blocks for row in range(0, block, 16)]
        assert most <= 32
        assert len(tiles) == -(-rows // 16), blocks
        assert len(blocks) == -(-rows // 32), blocks
        if len(blocks) > 1:
            assert blocks[-1] > most // 2 - 2 * len(blocks), blocks
    found = cut(kernel, scheme, (4096, 4096), 33, 2)
    assert found["block_rows"] == 22


@pytest.mark.parametrize("kernel", AMX)
@pytest.mark.parametrize("rows", [16, 1024])
def test_tiles_of_weights_are_decoded_in_memory(kernel, rows):
    """For few rows too, in half of the L2 cache."""
    row, l2 = ROWS[kernel], sizes_of(MACHINES["Sapphire Rapids"])[1]
    scheme = scheme_of(kernel, 128).replace("bs", "bs32x32")
    found = cut(kernel, scheme, (4096, 20000), rows, 2, MACHINES["Sapphire Rapids"])
    assert found["decode"] is (row["decoded"] > 0)
    if found["decode"]:
        assert row["columns"] * min(found["k_block"], 20096) * row["decoded"] <= l2 / 2
        assert found["pass"] >= row["columns"]


@pytest.mark.parametrize("kernel", [name for name in AMX if "w4" in name])
@pytest.mark.parametrize("caches", MACHINES.values(), ids=list(MACHINES))
def test_four_bits_for_one_tile_of_rows_are_decoded_into_l1(kernel, caches):
    """A column tile and a K block at a time, in two thirds of L1; for more rows, more at a time."""
    row, l1 = ROWS[kernel], sizes_of(caches)[0]
    few, more = (cut(kernel, scheme_of(kernel, 128), (4096, 20000), rows, 2, caches) for rows in (16, 17))
    assert few["pass"] == row["columns"]
    most = max(l1 * 2 // 3 // (row["columns"] * row["decoded"]), 128)
    assert most - 128 < few["k_block"] <= most
    assert more["pass"] * more["k_block"] > few["pass"] * few["k_block"]
    if "w4k" not in kernel:
        whole = cut(kernel, scheme_of(kernel, 0), (4096, 20000), 16, 2, caches)
        assert whole["k_block"] >= 20000, "a group is never cut"


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
    from nybble.native.weights import GROUPED
    from nybble.testing.checks import activations
    from nybble.testing.oracle import random_weight, run_into, schemes_of

    found = {}
    for spec in specs():
        if spec.device == "cuda" or spec.target == "torch" or spec.from_plugin:
            continue
        for scheme in schemes_of(spec.scheme):
            if scheme.group_size in ((None, 32, 64) if spec.layout in GROUPED else (32, 64)):
                continue  # as groups of 16 and 128; 8 bits are cut as 4 bits are
            for m, n, k in ((1, 65, 700), (1, 33, 1300), (37, 129, 1300), (61, 70, 333), (73, 40, 1300), (64, 49, 700)):
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


@pytest.mark.full
def test_no_cut_changes_a_bit():
    """Caches so small that every product is cut often, and those of servers, for 1, 2 and 5 threads."""
    bits = {
        caches: json.loads(python(BITS, NYBBLE_CACHE=caches)) for caches in (TINY, "1K,2K,1M,one-stream", "48K,1M,32M")
    }
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


@pytest.mark.parametrize("kernel", DENSE)
def test_where_one_stream_is_fastest_one_row_reads_large_weights_in_order(kernel):
    """So test_no_cut_changes_a_bit compares both ways."""
    scheme = scheme_of(kernel, 0)
    found = {
        (rows, caches): cut(kernel, scheme, (33, 1300), rows, 1, caches)["in_order"]
        for rows in (1, 2)
        for caches in ("1K,2K,1M,one-stream", "1K,2K,1M", "48K,1M,32M,one-stream")
    }
    assert [key for key, in_order in found.items() if in_order] == [(1, "1K,2K,1M,one-stream")]


RIGHT = """
    import json, torch
    from nybble import native
    from nybble.dispatch.registry import specs
    from nybble.dispatch.spec import Problem
    from nybble.testing.checks import Subject, activations
    from nybble.testing.oracle import random_weight, schemes_of

    table = {row["name"]: row for row in native.kernel_table() if row["op"] == "linear"}
    caches = ",".join(map(str, native.caches()))
    wrong, cut = [], {"rows": set(), "k": set()}
    for spec in specs():
        if spec.device == "cuda" or spec.target == "torch" or spec.from_plugin:
            continue
        for scheme in schemes_of(spec.scheme):
            for m, n, k, threads in ((200, 17, 700, 1), (150, 33, 130, 3), (64, 20, 1300, 3), (16, 20, 3000, 7)):
                dtype = spec.act_dtypes[0]
                if spec.why_not(Problem(scheme, m=m, n=n, k=k, dtype=dtype, layout=spec.layout)) is not None:
                    continue
                torch.set_num_threads(threads)
                name = f"{spec.name} {scheme} {m}x{n}x{k} {threads}"
                if spec.name in table:
                    size = {"layout": spec.layout, "rows": m, "threads": threads, "caches": caches}
                    blocks = native.blocks(spec.name, scheme, (n, k), **size)
                    cut["rows"] |= {name} if blocks["chunk_rows"] < m else set()
                    cut["k"] |= {name} if blocks["k_block"] < k else set()
                try:
                    weight, bias = random_weight(scheme, n, k), torch.randn(n, generator=torch.manual_seed(1))
                    Subject(spec, scheme).compare(name, weight, activations(m, k, dtype, 5), bias.to(dtype))
                except AssertionError as error:
                    wrong.append(str(error))
    print(json.dumps({"wrong": wrong, "rows": sorted(cut["rows"]), "k": sorted(cut["k"])}))
"""


@pytest.mark.full
def test_products_cut_everywhere_agree_with_the_oracle():
    """Rows in chunks, K in blocks, and more threads than columns to share: some then have no sums to keep."""
    found = json.loads(python(RIGHT, NYBBLE_CACHE=TINY))
    assert found["wrong"] == []
    here = set(targets.detect().targets)
    for name, row in ROWS.items():
        if row["target"] not in here:
            continue
        assert any(case.startswith(f"{name} ") for case in found["rows"]), f"{name}: no rows are in chunks"
        if not row["layout"].startswith("mask"):  # all of K at a time
            assert any(case.startswith(f"{name} ") and "x20x" in case for case in found["k"]), f"{name}: K is not cut"
