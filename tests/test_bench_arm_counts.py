"""What bench/arm_counts.py reads off a disassembly."""

import pytest

from nybble.bench import arm_counts

# A tile of 4 rows by 8 columns: two lines of nibbles, and a group's scale after the loop.
LISTING = """
0000000000000000 <_ZN12_GLOBAL__N_18run_tileINS_8PairTileEELi8ELi4ELi2EEEvPK4Args>:
   0:\tmov\tx0, #0x0
   4:\tldr\tq0, [x1]
   8:\tand\tv1.16b, v0.16b, v2.16b
   c:\tsmmla\tv3.4s, v4.16b, v1.16b
  10:\tsmmla\tv5.4s, v6.16b, v1.16b
  14:\tadd\tx1, x1, #0x10
  18:\tcmp\tx1, x2
  1c:\tb.ne\t4 <_ZN12_GLOBAL__N_18run_tileINS_8PairTileEELi8ELi4ELi2EEEvPK4Args+0x4>  // b.any
  20:\tfmla\tv7.4s, v8.4s, v9.4s
  24:\tcbnz\tx3, 0 <_ZN12_GLOBAL__N_18run_tileINS_8PairTileEELi8ELi4ELi2EEEvPK4Args>
  28:\tret

0000000000000030 <other>:
  30:\tret
"""


def test_the_innermost_loop_that_multiplies_is_counted():
    found = arm_counts.functions(LISTING)
    body = arm_counts.busiest(arm_counts.tile(found, 8, 4, decoded=False), "tile")
    assert [line.split("\t")[0] for line in body] == ["ldr", "and", "smmla", "smmla", "add", "cmp", "b.ne"]
    loop = arm_counts.Loop(body, 4, 4)
    assert loop.products == 64  # two smmla of 32
    assert loop.weight_bytes == 8  # 16 weights of 4 bits, each for 4 rows
    assert loop.per_line() == 56


@pytest.mark.parametrize(("rows", "products"), [(3, 48), (1, 32)])
def test_the_row_beside_an_odd_last_one_makes_no_products(rows, products):
    body = arm_counts.busiest(next(iter(arm_counts.functions(LISTING).values())), "tile")
    assert arm_counts.Loop(body, rows, 4).products == products


def test_floats_count_only_alone():
    assert arm_counts.products_of(("sdot\tv0", "fmla\tv1")) == 16
    assert arm_counts.products_of(("fmla\tv0", "fmla\tv1")) == 8


def test_what_is_missing_is_named():
    with pytest.raises(arm_counts.CountError, match="no tile of 5 rows"):
        arm_counts.tile(arm_counts.functions(LISTING), 8, 5, decoded=False)
    with pytest.raises(arm_counts.CountError, match="other: no loop that multiplies"):
        arm_counts.busiest(arm_counts.functions(LISTING)["other"], "other")


def test_a_cpu_that_lacks_an_instruction_gets_a_dash(monkeypatch):
    loop = arm_counts.Loop(("ldr\tq0, [x1]", "smmla\tv3.4s, v4.16b, v1.16b"), 2, 8)

    def run(*command, text):
        if "-mcpu=old" in command:
            raise arm_counts.CountError("error: instruction requires: i8mm")
        if "-mcpu=unknown" in command:
            raise arm_counts.CountError("unable to get target")
        return f"Total Cycles:      {2 * arm_counts.ROUNDS}"

    monkeypatch.setattr(arm_counts, "run", run)
    assert arm_counts.cell_of(loop, ["new"]) == "8 / 16"
    assert arm_counts.cell_of(loop, ["old", "new"]) == "- / 16"
    with pytest.raises(arm_counts.CountError, match="unable"):
        arm_counts.cell_of(loop, ["unknown"])


@pytest.mark.skipif(not (arm_counts.ROOT / "CMakeLists.txt").is_file(), reason="needs the C++ sources")
def test_flags_are_those_of_the_build():
    assert arm_counts.target_flags() == {
        "neon": [],
        "neondot": ["-march=armv8.2-a+dotprod"],
        "i8mm": ["-march=armv8.2-a+dotprod+i8mm"],
        "neonbf16": ["-march=armv8.2-a+bf16"],
    }
