"""Counts the instructions of the inner loops of the kernels of Arm's CPUs, and what a model of a core makes of them.

    python bench/arm_counts.py --cpu neoverse-v2              # a Markdown table of the kernels in ../csrc
    python bench/arm_counts.py --cpu neoverse-n1 neoverse-v1  # of what several models say
    python bench/arm_counts.py --peer FILE ROWS BITS          # of another library's object file

Nothing is measured: a kernel is compiled for AArch64, the innermost loop that multiplies is read off its disassembly,
and llvm-mca, LLVM's model of the core, says how many cycles it takes if all its data is in the first cache. Scales and
sums of groups lie outside of that loop, and so does the decoding of weights that is done once for many rows. Needs
aarch64-linux-gnu-g++, aarch64-linux-gnu-objdump and llvm-mca (19 knows Neoverse V2), and the sources.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"
# The targets of Arm's CPUs in CMakeLists.txt, and their flags.
TARGET_FLAGS = re.compile(r"^set\(NYBBLE_FLAGS_(neon|neondot|i8mm|neonbf16) (.+)\)$", re.MULTILINE)
# Products of an instruction, and the rows that it multiplies.
PRODUCTS = {
    "sdot": (16, 1),
    "udot": (16, 1),
    "usdot": (16, 1),
    "smmla": (32, 2),
    "usmmla": (32, 2),
    "bfdot": (8, 1),
    "bfmmla": (16, 2),
    "fmla": (4, 1),
    "smull": (8, 1),
    "smull2": (8, 1),
    "sadalp": (0, 1),
}
BRANCH = re.compile(r"\tb\.\w+\t([0-9a-f]+) |\tcbn?z\t\w+, ([0-9a-f]+) |\ttbn?z\t\w+, #\w+, ([0-9a-f]+) ")
JUMP = re.compile(BRANCH.pattern + r"|\tb\t[0-9a-f]+ ")
LINE = re.compile(r"^ *([0-9a-f]+):\t")
TABLE = re.compile(r"^NYBBLE_LINEAR\((\w+), (\w+), (\w+), (\w+), \w+, (\d+), \d+, \d+, (\d+), ")
BATCHES = (1, 4, 16, 64)


class CountError(Exception):
    """A tool or a loop was not found."""


class LackingError(CountError):
    """The CPU lacks an instruction."""


@dataclass(frozen=True)
class Loop:
    """The innermost loop that multiplies: its instructions, and `rows` and the `bits` of a weight."""

    body: tuple[str, ...]
    rows: int
    bits: int

    @property
    def products(self) -> int:
        """Products of an iteration, of rows that are there."""
        pairs = max(PRODUCTS[name][1] for name in map(mnemonic, self.body) if name in PRODUCTS)
        return products_of(self.body) * self.rows // (-(-self.rows // pairs) * pairs)

    @property
    def weight_bytes(self) -> float:
        """Bytes of packed weights that an iteration uses."""
        return self.products / self.rows * self.bits / 8

    def per_line(self) -> float:
        """Instructions for 64 bytes of weights."""
        return len(self.body) * 64 / self.weight_bytes

    def products_per_cycle(self, cpu: str) -> float:
        """By llvm-mca's model of the core."""
        return self.products * ROUNDS / cycles_of(self.body, cpu)


ROUNDS = 1000


def mnemonic(line: str) -> str:
    """The instruction of a line of disassembly."""
    return line.split("\t")[0]


def run(*command: str | Path, text: str | None = None) -> str:
    """What a command prints.

    Raises:
        CountError: it is not installed, or failed.
    """
    if shutil.which(str(command[0])) is None:
        raise CountError(f"{command[0]}: not found on PATH")
    words = [str(part) for part in command]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise CountError(f"{' '.join(words)}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def cycles_of(body: tuple[str, ...], cpu: str) -> int:
    """Cycles that llvm-mca gives ROUNDS iterations of a loop.

    Raises:
        LackingError: the CPU has not all of its instructions.
    """
    tool = next((name for name in ("llvm-mca-19", "llvm-mca") if shutil.which(name)), "llvm-mca")
    plain = (re.sub(r" <.*|\t?// .*", "", line) for line in body)
    code = "\n".join(re.sub(r"\b([0-9a-f]+)$", "0", line) if JUMP.search(f"\t{line} ") else line for line in plain)
    try:
        said = run(tool, "-mtriple=aarch64", f"-mcpu={cpu}", f"-iterations={ROUNDS}", text=code)
    except CountError as error:
        raise (LackingError if "instruction requires" in str(error) else CountError)(str(error)) from error
    match = re.search(r"Total Cycles: +(\d+)", said)
    if match is None:
        raise CountError(f"{tool} printed no cycles")
    return int(match[1])


def functions(listing: str) -> dict[str, list[str]]:
    """The lines of each function of a disassembly."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in listing.splitlines():
        start = re.match(r"^[0-9a-f]+ <(\S+)>:$", line)
        if start:
            lines = found.setdefault(start[1], [])
        elif LINE.match(line):
            lines.append(line)
    return found


def loops(lines: list[str]) -> list[tuple[str, ...]]:
    """The innermost loops of a function: code from a target to the branch that goes back to it."""
    place = {int(match[1], 16): i for i, line in enumerate(lines) if (match := LINE.match(line))}
    spans = []
    for end, line in enumerate(lines):
        match = BRANCH.search(line)
        target = next((int(group, 16) for group in match.groups() if group), -1) if match else -1
        if place.get(target, end) < end:
            spans.append((place[target], end))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [tuple(line.split("\t", 1)[1] for line in lines[a : b + 1]) for a, b in inner]


def products_of(body: tuple[str, ...]) -> int:
    """Products of a loop, of full rows; those of floats count only if there are no others."""
    made = Counter(map(mnemonic, body))
    scales = any(made[name] for name in PRODUCTS if name != "fmla")
    return sum(each * made[name] for name, (each, _) in PRODUCTS.items() if name != "fmla" or not scales)


def busiest(lines: list[str], what: str) -> tuple[str, ...]:
    """The innermost loop with the most products.

    Raises:
        CountError: none multiplies.
    """
    best = max(loops(lines), key=products_of, default=())
    if not products_of(best):
        raise CountError(f"{what}: no loop that multiplies")
    return best


def listing_of(source: Path, flags: list[str], folder: Path) -> str:
    """The disassembly of a kernel, whose tiles are functions of their own."""
    built = folder / f"{source.stem}.o"
    common = ["-O2", "-std=c++17", "-ffp-contract=off", "-fno-inline-functions-called-once", "-fno-ipa-sra"]
    run("aarch64-linux-gnu-g++", *common, *flags, "-c", source, "-o", built)
    return run("aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", built)


def tile(found: dict[str, list[str]], block: int, rows: int, decoded: bool) -> list[str]:
    """The function of a register tile of so many rows: that with the most columns."""
    fits = {}
    for name, lines in found.items():
        match = re.search(rf"run_tile.*Li{block}ELi{rows}ELi(\d+)E", name)
        if match and ("Decoded" in name) == decoded:
            fits[int(match[1])] = lines
    if not fits:
        raise CountError(f"no tile of {rows} rows")
    return fits[max(fits)]


def target_flags() -> dict[str, list[str]]:
    """The compiler's flags for each target of Arm's CPUs."""
    found = TARGET_FLAGS.findall((ROOT / "CMakeLists.txt").read_text())
    return {target: [flag for flag in flags.split() if flag != '""'] for target, flags in found}


def cell_of(loop: Loop, cpus: list[str]) -> str:
    """Instructions and products a cycle; of several CPUs, only their products; a dash where one lacks the instructions."""
    made = []
    for cpu in cpus:
        try:
            made.append(f"{loop.products_per_cycle(cpu):.0f}")
        except LackingError:
            made.append("-")
    return " / ".join(made if len(cpus) > 1 else [f"{loop.per_line():.0f}", *made])


def rows_of_table(cpus: list[str], chosen: str) -> list[str]:
    """A line of the table for each dense kernel of Arm's CPUs whose name matches, with a cell for each batch.

    Raises:
        CountError: there are no sources beside this file, as in a wheel.
    """
    if not (SOURCES / "kernels.def").is_file():
        raise CountError(f"{SOURCES}: no kernels.def: run bench/arm_counts.py of a clone of the sources")
    lines, flags = [], target_flags()
    with tempfile.TemporaryDirectory() as folder:
        for line in (SOURCES / "kernels.def").read_text().splitlines():
            match = TABLE.match(line)
            if not match or match[3] not in flags or not match[2].startswith("w") or not re.search(chosen, match[1]):
                continue
            name, scheme, target, block = match[1], match[2], match[3], int(match[5])
            decode_rows = int(match[6])  # 0: never
            bits = int(scheme[1])
            found = functions(listing_of(SOURCES / "cpu" / f"{name}.cpp", flags[target], Path(folder)))
            cells = []
            for m in BATCHES:
                lines_of_tile = tile(found, block, min(m, block), decoded=0 < decode_rows <= m)
                loop = Loop(busiest(lines_of_tile, name), min(m, block), 4 if bits == 3 else bits)
                cells.append(cell_of(loop, cpus))
            lines.append(f"| `{name}` | {scheme} | {' | '.join(cells)} |")
    return lines


def peer_row(file: Path, rows: int, bits: int, cpus: list[str], only: str) -> str:
    """The same for the busiest loop of an object file, which multiplies so many rows by weights of so many bits."""
    found = functions(run("aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", file))
    chosen = [line for name, lines in found.items() if re.search(only, name) for line in lines]
    loop = Loop(busiest(chosen, f"{file} {only}"), rows, bits)
    return f"| `{only or file.stem}` | {rows} rows | {cell_of(loop, cpus)} |"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description="Instructions for 64 bytes of weights / products a cycle.")
    parser.add_argument("--cpu", nargs="+", default=["neoverse-v2"], help="CPUs that llvm-mca has a model of")
    parser.add_argument(
        "--only", default="", help="a regular expression that the names of kernels or functions must match"
    )
    parser.add_argument("--peer", nargs=3, metavar=("FILE", "ROWS", "BITS"), help="another library's object")
    chosen = parser.parse_args(arguments)
    try:
        if chosen.peer:
            file, rows, bits = chosen.peer
            print(peer_row(Path(file), int(rows), int(bits), chosen.cpu, chosen.only))
        else:
            print("| kernel | scheme | " + " | ".join(f"M = {m}" for m in BATCHES) + " |")
            print("|---" * (2 + len(BATCHES)) + "|")
            print("\n".join(rows_of_table(chosen.cpu, chosen.only)))
    except CountError as error:
        print(f"arm_counts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
