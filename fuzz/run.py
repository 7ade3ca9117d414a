"""Coverage-guided fuzzing of what reads files: `python fuzz/run.py READER SECONDS [DIRECTORY]`.

READER is a row of nybble.stress.readers. Needs atheris (pip install atheris), which is no dependency of nybble. It begins with
the sample of the reader and the files of nybble.stress.hostile_files, and stops at anything but a refusal, at 5 seconds for a file,
and at 2 GB of memory. What it finds is kept in DIRECTORY, a temporary one if none is named. Never commit a file that stops
other software than nybble.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["nybble.checkpoint", "nybble.foreign", "nybble.recipe", "yaml", "json"]):
    from nybble.stress import hostile_files, readers
    from nybble.stress.children import in_memory


def main() -> None:
    """Run libFuzzer."""
    if len(sys.argv) not in (3, 4):
        sys.exit(
            f"usage: python fuzz/run.py READER SECONDS [DIRECTORY]; READER: {', '.join(row.name for row in readers.READERS)}"
        )
    row = next(row for row in readers.READERS if row.name == sys.argv[1])
    place = tempfile.mkdtemp(dir=in_memory())
    corpus = Path(sys.argv[3] if len(sys.argv) == 4 else tempfile.mkdtemp())
    corpus.mkdir(parents=True, exist_ok=True)
    path = Path(place, row.file)
    (corpus / "sample").write_bytes(row.sample())
    for number, case in enumerate(hostile_files.CASES):
        if case.reader is row:
            path.unlink(missing_ok=True)
            case.write(path)
            if not path.is_symlink() and path.stat().st_size < 1 << 16:
                (corpus / f"hostile-{number}").write_bytes(path.read_bytes())
    path.unlink(missing_ok=True)

    def once(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(row.refuses):
            row.read(path)

    limits = [
        f"-max_total_time={sys.argv[2]}",
        "-timeout=5",
        "-rss_limit_mb=2048",
        "-max_len=65536",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={corpus}/found-", *limits], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
