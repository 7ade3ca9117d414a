"""Features of a CPU from the words of CPUID, XCR0 and the answer to the request for tile registers."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from nybble import native
from nybble.dispatch import targets
from nybble.dispatch.targets import Target

AMX = ("amx_tile", "amx_int8", "amx_bf16")
TILES = Target("tiles", needs=("avx512f", *AMX))

# Words of a CPU with AMX: bits of AVX, FMA and F16C; AVX2 and AVX-512 F, DQ, BW, VL; VBMI, VBMI2 and VNNI; AMX; BF16.
SAPPHIRE_RAPIDS = {
    "one_c": 1 << 28 | 1 << 29 | 1 << 12,
    "seven_b": 1 << 5 | 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31,
    "seven_c": 1 << 1 | 1 << 6 | 1 << 11,
    "seven_d": 1 << 22 | 1 << 24 | 1 << 25,
    "seven1_a": 1 << 4 | 1 << 5,
    "saved_state": 0x602E7,
}


def granted() -> int:
    return 0


def never() -> int:
    raise AssertionError("asked for tile registers")


def features(ask: Callable[[], int], **changes: int) -> tuple[list[str], dict[str, str]]:
    return native._C.cpu_features_of(**{**SAPPHIRE_RAPIDS, **changes}, ask_for_tiles=ask)


def test_every_feature_of_the_words_is_found() -> None:
    found, refused = features(granted)
    assert found == [
        *("avx", "f16c", "fma", "avx2", "avxvnni", "avx512f", "avx512dq", "avx512bw", "avx512vl"),
        *("avx512vnni", "avx512vbmi", "avx512vbmi2", "avx512bf16", *AMX),
    ]
    assert not refused
    assert TILES.missing(tuple(found), refused) is None


def test_a_refusal_is_the_reason_that_is_shown() -> None:
    found, refused = features(lambda: errno.ENOSPC)
    assert not set(AMX) & set(found)
    assert "avx512bf16" in found, "the rest stays"
    reason = f"the operating system refused the tile registers: {os.strerror(errno.ENOSPC)}"
    assert refused == {"amx_tile": reason}
    lacks = f"this CPU or operating system lacks {', '.join(AMX)}"
    assert TILES.missing(tuple(found), refused) == f"{lacks}; {reason}"


@pytest.mark.parametrize(
    "changes",
    [{"seven_d": 1 << 22 | 1 << 25}, {"saved_state": 0x2E7}, {"saved_state": 0x202E7}, {"saved_state": 0x402E7}],
    ids=["no tiles", "the system saves no tiles", "only their configuration", "only their data"],
)
def test_without_tile_registers_nobody_asks(changes: dict[str, int]) -> None:
    found, refused = features(never, **changes)
    assert not set(AMX) & set(found)
    assert not refused


def test_registers_that_the_system_does_not_save_are_not_used() -> None:
    assert features(granted, saved_state=0)[0] == []
    found, _ = features(granted, saved_state=0x7)
    assert found == ["avx", "f16c", "fma", "avx2", "avxvnni"]


@pytest.mark.parametrize(("bit", "name"), [(22, "amx_bf16"), (25, "amx_int8")])
def test_each_multiply_of_tiles_has_its_own_bit(bit: int, name: str) -> None:
    found, _ = features(granted, seven_d=SAPPHIRE_RAPIDS["seven_d"] & ~(1 << bit))
    assert set(AMX) - set(found) == {name}


# Words of a Neoverse V1 as Linux gives them: ASIMD, ASIMDDP; I8MM, BF16. The other bits mean nothing here.
NEOVERSE_V1 = {"hwcap": 1 << 1 | 1 << 20, "hwcap2": 1 << 13 | 1 << 14}


@pytest.mark.parametrize(
    ("changes", "found", "missing"),
    [
        ({}, ["neon", "dotprod", "i8mm", "bf16"], None),
        ({"hwcap": ~(1 << 20) & (1 << 64) - 1, "hwcap2": 0}, ["neon"], "this CPU or operating system lacks dotprod"),
        (
            {"hwcap": 1 << 20, "hwcap2": ~(1 << 13) & (1 << 64) - 1},
            ["dotprod", "bf16"],
            "this CPU or operating system lacks neon",
        ),
        ({"hwcap": 0, "hwcap2": 0}, [], "this CPU or operating system lacks neon, dotprod"),
    ],
)
def test_features_of_arm_are_bits_of_the_words_of_linux(
    changes: dict[str, int], found: list[str], missing: str | None
) -> None:
    features_here = native._C.cpu_features_of_arm(**{**NEOVERSE_V1, **changes})
    assert features_here == found
    assert targets.find("neondot").missing(tuple(features_here)) == missing


def test_bfloat16_of_arm_needs_its_own_bit() -> None:
    words = {**NEOVERSE_V1, "hwcap2": 1 << 13}
    assert targets.find("neonbf16").missing(tuple(native._C.cpu_features_of_arm(**NEOVERSE_V1))) is None
    without = targets.find("neonbf16").missing(tuple(native._C.cpu_features_of_arm(**words)))
    assert without == "this CPU or operating system lacks bf16"


def test_detection_carries_refusals_to_info(monkeypatch: pytest.MonkeyPatch) -> None:
    brand, found, _ = native.cpu()
    without = tuple(feature for feature in found if not feature.startswith("amx"))
    monkeypatch.setattr(native, "cpu", lambda _: (brand, without, {"amx_tile": "refused for a test"}))
    monkeypatch.setattr(targets, "table", lambda: (Target("scalar"), Target("tiles", needs=("amx_tile",))))
    monkeypatch.delenv(targets.CAP_VARIABLE, raising=False)
    monkeypatch.setattr(targets, "names", lambda: ("scalar", "tiles"))
    missing = targets.detect.__wrapped__().missing
    assert missing == {"tiles": "this CPU or operating system lacks amx_tile; refused for a test"}


@pytest.mark.parametrize(("cap", "asked"), [("", True), ("amx", True), ("avx512bf16", False), ("scalar", False)])
def test_tile_registers_are_asked_for_only_where_targets_may_use_them(
    cap: str, asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def cpu(tiles: bool) -> tuple[str, tuple[str, ...], dict[str, str]]:
        seen.append(tiles)
        return "a CPU", targets.find("amx").needs, {}

    monkeypatch.setattr(native, "cpu", cpu)
    monkeypatch.setenv(targets.CAP_VARIABLE, cap)
    missing = targets.detect.__wrapped__().missing
    assert seen == [asked]
    assert ("amx" in missing) is not asked
    if not asked:
        assert missing["amx"] == f"above {targets.CAP_VARIABLE}={cap}"
