"""What nybble reads of a machine with Arm's cores: trees like /sys and files like /proc/cpuinfo, of the sizes and numbers
in the manuals of these machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble import native

KB, MB = 1 << 10, 1 << 20

# Caches of a core: level, type, size.
A55 = ((1, "Data", "32K"), (1, "Instruction", "32K"), (2, "Unified", "128K"), (3, "Unified", "3072K"))
A76 = ((1, "Data", "64K"), (1, "Instruction", "64K"), (2, "Unified", "512K"), (3, "Unified", "3072K"))
NEOVERSE_V1 = ((1, "Data", "64K"), (1, "Instruction", "64K"), (2, "Unified", "1024K"), (3, "Unified", "32768K"))
A72 = ((1, "Data", "32K"), (1, "Instruction", "48K"), (2, "Unified", "1024K"))


def tree(folder: Path, *cores: tuple[int | None, tuple[tuple[int, str, str], ...]]) -> str:
    """A tree of cores, each with its capacity, unless the cores do not differ, and its caches."""
    for number, (capacity, caches) in enumerate(cores):
        for index, (level, kind, size) in enumerate(caches):
            path = folder / f"cpu{number}" / "cache" / f"index{index}"
            path.mkdir(parents=True)
            for name, text in (("level", str(level)), ("type", kind), ("size", size)):
                (path / name).write_text(f"{text}\n")
        (folder / f"cpu{number}").mkdir(exist_ok=True)
        if capacity is not None:
            (folder / f"cpu{number}" / "cpu_capacity").write_text(f"{capacity}\n")
    return str(folder)


@pytest.mark.parametrize(
    ("cores", "found"),
    [
        pytest.param([(None, NEOVERSE_V1)] * 4, [64 * KB, MB, 32 * MB], id="Graviton3: cores alike"),
        pytest.param([(530, A55)] * 4 + [(1024, A76)] * 4, [64 * KB, 512 * KB, 3 * MB], id="RK3588: fast cores last"),
        pytest.param([(1024, A76)] * 2 + [(530, A55)] * 6, [64 * KB, 512 * KB, 3 * MB], id="fast cores first"),
        pytest.param([(None, A72)] * 4, [32 * KB, MB, MB], id="Raspberry Pi 4: no L3"),
        pytest.param([(None, ())], [0, 0, 0], id="a virtual machine that lists none"),
        pytest.param(
            [(530, A55), (None, ()), (530, A55), (1024, A76)], [64 * KB, 512 * KB, 3 * MB], id="a core switched off"
        ),
        pytest.param(
            [(None, ()), (None, NEOVERSE_V1)], [64 * KB, MB, 32 * MB], id="cores alike, the first switched off"
        ),
        pytest.param([(530, A55)] * 10 + [(1024, A76)] * 2, [64 * KB, 512 * KB, 3 * MB], id="more than ten cores"),
        pytest.param([(None, ((1, "Data", "64K"), (2, "Unified", "1024K"), (3, "Unified", "9T")))], [64 * KB, MB, 0]),
        pytest.param([], [0, 0, 0], id="no tree"),
    ],
)
def test_caches_are_those_of_the_fastest_core(
    tmp_path: Path, cores: list[tuple[int | None, tuple[tuple[int, str, str], ...]]], found: list[int]
) -> None:
    assert native._C.listed_caches(tree(tmp_path, *cores)) == found


def cpuinfo(*cores: tuple[str, str]) -> str:
    return "\n".join(
        f"processor\t: {i}\nBogoMIPS\t: 48.00\nFeatures\t: fp asimd asimddp\nCPU implementer\t: {implementer}\n"
        f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {part}\nCPU revision\t: 1\n"
        for i, (implementer, part) in enumerate(cores)
    )


@pytest.mark.parametrize(
    ("cores", "name"),
    [
        ([("0x41", "0xd4f")] * 2, "Neoverse-V2"),
        ([("0x41", "0xd05")] * 4 + [("0x41", "0xd0b")] * 4, "4 Cortex-A55, 4 Cortex-A76"),
        ([("0xc0", "0xac3")] * 80, "Ampere-1"),
        ([("0x7f", "0x123")] * 2, "Arm core of implementer 0x7f, part 0x123"),
        ([], "unknown"),
    ],
)
def test_cores_have_names(cores: list[tuple[str, str]], name: str) -> None:
    assert native._C.arm_cores(cpuinfo(*cores)) == name


def test_a_file_of_another_kind_of_cpu_names_none() -> None:
    assert native._C.arm_cores("processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: a name\n") == "unknown"
