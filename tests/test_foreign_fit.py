"""Which foreign weights nybble's schemes hold exactly, and `nybble inspect`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import nybble
from nybble.__main__ import main
from nybble.compiled.rounding import sqnr_db
from nybble.foreign import ForeignWeight, open_foreign
from nybble.foreign.fit import fit, keep_codes
from nybble.weights.rounding import dequantize_weight

DATA = Path(__file__).parent / "data" / "foreign"


def weight_of(name: str) -> ForeignWeight:
    (layer,) = open_foreign(DATA / name)[1].layers.values()
    return layer.read()


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("ct-w4a16-g128", "w4a16g128"),
        ("ct-w4a16-asym-g32-edge", "w4a16g32asym"),
        ("ct-w3a16-g32", "w3a16g32"),
        ("ct-w4a8-g128", "w4a16g128"),
        ("autoround-gptq-w4-g128", "w4a16g128asym"),  # negative scales
        ("ct-old-w4a16-g128-actorder-group", "w4a16g128order"),
        ("gptq-w4-g128", "w4a16g128"),  # float16 scales
        ("gptq-w3-g32", "w3a16g32"),
        ("gguf-q4-1", "w4a16g32asym"),  # float minimums
        ("gguf-q4-k-m", "w4ka16g32"),  # scales and minimums of two levels
        ("gptq-w4-g32-asym-edge", "w4a16g32asym"),
        ("ct-w8a8-dynamic", "w8a16"),  # the code -128
        ("gptq-w8-g128", "w8a16g128"),
        ("gguf-q6-k", "w8a16g16"),  # 6 bits, and scales of scales
        ("gguf-q8-0", "w8a16g32"),
        ("gptq-w4-g128-desc-act", "w4a16g128order"),
        ("bnb-nf4-double", "w4nfa16g64"),
        ("gguf-iq4-nl", "w4nfa16g32"),
        ("bnb-nf4-flat", "w4nfa16g16"),  # blocks of 64 that cross rows of 80
        ("bnb-fp4-flat", "w4nfa16g16"),
    ],
)
def test_what_a_scheme_holds_is_equal_bit_for_bit(name: str, scheme: str) -> None:
    weight = weight_of(name)
    found = fit(weight)
    assert (str(found.scheme), found.why) == (scheme, None)
    assert found.scheme is not None
    assert found.quantized is not None
    assert torch.equal(dequantize_weight(found.quantized, found.scheme, weight.shape[1]), weight.dequantize())
    module = nybble.nn.Linear.from_quantized(found.quantized, weight.shape[1], None, scheme, torch.float32)
    assert torch.equal(module.dequantized_weight(), weight.dequantize())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("bnb-int8", "the library rounds twice in float32, so that last bits differ"),
        ("quanto-qint4", "the library rounds twice in bfloat16, so that last bits differ"),
    ],
)
def test_what_none_holds_says_why(name: str, why: str) -> None:
    found = fit(weight_of(name))
    assert found.scheme is None
    assert found.why is not None
    assert why in found.why


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("bnb-int8", 120),
    ],
)
def test_codes_are_kept_where_only_last_bits_differ(name: str, least: float) -> None:
    weight = weight_of(name)
    found = keep_codes(weight)
    assert found.scheme is not None
    assert found.quantized is not None
    assert sqnr_db(weight.dequantize(), found.quantized, found.scheme) > least


def eight_bits(codes: torch.Tensor, **more: object) -> ForeignWeight:
    weight = ForeignWeight(codes, 8, torch.full((codes.shape[0], 1), 0.5), 0, codes.shape[1])
    return replace(weight, **more)  # type: ignore[arg-type]


def test_eight_bits_of_a_row() -> None:
    codes = torch.randint(-128, 128, (8, 64), dtype=torch.int8)
    codes[0, 0] = -128
    assert str(fit(eight_bits(codes)).scheme) == "w8a16"
    unsigned = (codes.to(torch.int16) + 128).to(torch.uint8)
    assert str(fit(eight_bits(unsigned, zero=128)).scheme) == "w8a16"
    zero = torch.full((8, 1), 128, dtype=torch.int16)
    assert str(fit(eight_bits(unsigned, zero=zero)).scheme) == "w8a16"
    negative = torch.full((8, 1), -0.5)
    mirrored = fit(eight_bits(codes, scale=negative))  # 128 is no code
    assert str(mirrored.scheme) == "w8a16asym"
    assert mirrored.scheme is not None
    assert mirrored.quantized is not None
    assert torch.equal(dequantize_weight(mirrored.quantized, mirrored.scheme, 64), codes * -0.5)
    turned = fit(eight_bits(codes.clamp(min=-127), scale=negative))
    assert turned.quantized is not None
    assert torch.equal(turned.quantized.qweight, -codes.clamp(min=-127))


@pytest.mark.parametrize("bits", [5, 6, 8])
@pytest.mark.parametrize("kind", ["symmetric", "signed", "zeros", "signed zeros", "minimum", "silent", "ordered"])
@pytest.mark.parametrize(("size", "dtype"), [(16, torch.float32), (32, torch.float16), (128, torch.bfloat16)])
def test_groups_of_more_than_four_bits(bits: int, kind: str, size: int, dtype: torch.dtype) -> None:
    top, n, k = 1 << bits, 12, 256
    codes = torch.randint(0, top, (n, k), dtype=torch.uint8)
    codes[0, :2] = torch.tensor([0, top - 1])
    shape = (n, k // size)
    scale = torch.randn(shape).to(dtype)
    zeros = torch.randint(0, top, shape, dtype=torch.int16)
    less = top // 2
    change: dict[str, object] = {
        "symmetric": {"zero": less},
        "signed": {"codes": (codes.to(torch.int16) - less).to(torch.int8), "scale": scale.abs()},
        "zeros": {"zero": zeros},
        "signed zeros": {"codes": (codes.to(torch.int16) - less).to(torch.int8), "zero": zeros - less},
        "minimum": {"codes": codes.clamp(max=127), "scale": scale.abs(), "minimum": torch.randn(shape).to(dtype)},
        "silent": {"zero": less, "scale": torch.where(scale < 0, 0, scale)},
        "ordered": {"zero": less, "groups": (torch.arange(k, dtype=torch.int32) // size)[torch.randperm(k)]},
    }[kind]
    weight = replace(ForeignWeight(codes, bits, scale, 0, size), **change)  # type: ignore[arg-type]
    found = fit(weight)
    assert found.why is None
    assert found.scheme is not None
    assert found.quantized is not None
    assert (found.scheme.weight_bits, found.scheme.group_size) == (8, size)
    assert torch.equal(dequantize_weight(found.quantized, found.scheme, k), weight.dequantize())
    assert found.quantized.scale.dtype == dtype, "the smallest that has all scales"
    module = nybble.nn.Linear.from_quantized(found.quantized, k, None, found.scheme, torch.float32)
    assert torch.equal(module.dequantized_weight(), weight.dequantize())
    x = torch.randn(3, k)
    wanted = x.double() @ weight.dequantize().double().t()
    assert (module(x) - wanted).norm() <= 1e-5 * wanted.norm()


def test_four_bits_whose_scales_need_float32() -> None:
    weight = weight_of("ct-w4a16-g128")
    found = fit(replace(weight, scale=weight.scale.float() * 1.001))
    assert found.quantized is not None
    assert found.quantized.scale.dtype == torch.float32
    assert str(fit(replace(weight, scale=torch.ones(128, 16), group_size=16)).scheme) == "w4a16g16"
    assert "groups of 8" in str(fit(replace(weight, scale=torch.ones(128, 32), group_size=8)).why)


@pytest.mark.parametrize(("size", "held"), [(48, 16), (96, 32), (192, 64), (256, 128)])
@pytest.mark.parametrize("kind", ["symmetric", "zeros", "minimum", "book", "ordered", "eight"])
def test_other_groups_become_smaller_ones_of_the_same_scales(kind: str, size: int, held: int) -> None:
    columns = 600  # the last group is not whole
    codes, shape = torch.randint(0, 16, (6, columns), dtype=torch.uint8), (6, -(-columns // size))
    scale, zeros = torch.randn(shape).half(), torch.randint(0, 16, shape, dtype=torch.int16)
    change: dict[str, object] = {
        "symmetric": {},
        "zeros": {"zero": zeros},
        "minimum": {"zero": 0, "scale": scale.abs(), "minimum": torch.randn(shape)},
        "book": {"zero": 0, "book": torch.randn(16)},
        "ordered": {"groups": (torch.arange(columns, dtype=torch.int32) // size)[torch.randperm(columns)]},
        "eight": {"bits": 8, "zero": 128, "codes": torch.randint(0, 256, (6, columns), dtype=torch.uint8)},
    }[kind]
    weight = replace(ForeignWeight(codes, 4, scale, 8, size), **change)  # type: ignore[arg-type]
    found = fit(weight)
    assert found.why is None
    assert found.scheme is not None
    assert found.quantized is not None
    assert found.scheme.group_size == held
    assert torch.equal(dequantize_weight(found.quantized, found.scheme, columns), weight.dequantize())


@pytest.mark.parametrize(("columns", "held"), [(96, 32), (80, 16), (192, 64), (72, None), (128, 64)])
@pytest.mark.parametrize("kind", ["zeros", "minimum", "book", "pairs"])
def test_groups_over_the_flattened_matrix(kind: str, columns: int, held: int | None) -> None:
    """They are held where the largest number that divides both a group and a row is a group of a scheme."""
    codes, groups = torch.randint(0, 16, (1, 24 * columns), dtype=torch.uint8), -(-24 * columns // 64)
    scale = torch.rand(1, groups) + 0.5
    change: dict[str, object] = {
        "zeros": {"zero": torch.randint(0, 16, (1, groups), dtype=torch.int16)},
        "minimum": {"zero": 0, "minimum": torch.randn(1, groups)},
        "book": {"zero": 0, "book": torch.randn(16)},
        "pairs": {"codes": codes[:, ::2] | codes[:, 1::2] << 4, "per_byte": 2},
    }[kind]
    weight = replace(ForeignWeight(codes, 4, scale, 8, 64, flat_shape=(24, columns)), **change)  # type: ignore[arg-type]
    found = fit(weight)
    if held is None:
        assert found.why == "groups that run over the flattened matrix"
        return
    assert found.scheme is not None
    assert found.quantized is not None
    assert found.scheme.group_size == held
    assert torch.equal(dequantize_weight(found.quantized, found.scheme, columns), weight.dequantize())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float_zero_points(bits: int, dtype: torch.dtype) -> None:
    """Whole ones are zero points of a scheme; others become a minimum, which is exact where no difference is rounded."""
    codes = torch.randint(0, 1 << bits, (8, 128), dtype=torch.uint8)
    scale, whole = torch.rand(8, 4).add(0.5).to(dtype), torch.randint(0, 1 << bits, (8, 4)).to(dtype)
    weight = ForeignWeight(codes, bits, scale, whole, 32, arithmetic=dtype)
    assert "float zero points" in weight.describe()
    found = fit(weight)
    assert found.quantized is not None
    assert found.scheme is not None
    assert found.quantized.minimum is None
    rounded = dequantize_weight(found.quantized, found.scheme, 128).to(dtype).float()
    assert torch.equal(rounded, weight.dequantize())

    if bits < 8 and dtype != torch.float32:  # differences of 9 bits are rounded in bfloat16, products in float32
        weight = replace(weight, zero=whole + 0.5)
        half = fit(weight)
        assert half.quantized is not None
        assert half.scheme is not None
        assert half.quantized.minimum is not None
        rounded = dequantize_weight(half.quantized, half.scheme, 128).to(dtype).float()
        assert torch.equal(rounded, weight.dequantize())
    odd = replace(weight, zero=torch.rand(8, 4).add(0.3).to(dtype))
    kept = keep_codes(odd)
    assert kept.scheme is not None
    assert kept.quantized is not None
    least = {torch.float16: 60, torch.bfloat16: 40, torch.float32: 120}[dtype]
    assert sqnr_db(odd.dequantize(), kept.quantized, kept.scheme) > least
    assert fit(odd).why == f"the library rounds twice in {str(dtype)[6:]}, so that last bits differ"


@pytest.mark.parametrize("columns", [128, 80, 64])
@pytest.mark.parametrize("kind", ["symmetric", "middle 5", "zeros", "minimum", "minimum and zero", "book", "ordered"])
@pytest.mark.parametrize("size", [32, 128])
def test_codes_two_a_byte_are_held_as_those_in_bytes_of_their_own(kind: str, columns: int, size: int) -> None:
    codes = torch.randint(0, 16, (24, columns), dtype=torch.uint8)
    shape = (24, -(-columns // size))
    scale, zeros = torch.randn(shape).half(), torch.randint(0, 16, shape, dtype=torch.int16)
    groups = (torch.arange(columns, dtype=torch.int32) // size)[torch.randperm(columns)]
    change: dict[str, object] = {
        "symmetric": {},
        "middle 5": {"zero": 5},
        "zeros": {"zero": zeros},
        "minimum": {"zero": 0, "scale": scale.abs(), "minimum": torch.randn(shape)},
        "minimum and zero": {"scale": scale.abs(), "minimum": torch.randn(shape)},
        "book": {"zero": 0, "book": torch.randn(16)},
        "ordered": {"groups": groups},
    }[kind]
    plain = replace(ForeignWeight(codes, 4, scale, 8, size), **change)  # type: ignore[arg-type]
    pairs = replace(plain, codes=codes[:, ::2] | codes[:, 1::2] << 4, per_byte=2)
    assert (pairs.shape, pairs.describe()) == (plain.shape, plain.describe())
    assert torch.equal(pairs.dequantize(), plain.dequantize())
    found, expected = fit(pairs), fit(plain)
    assert (found.scheme, found.why) == (expected.scheme, expected.why)
    if found.quantized is None or expected.quantized is None:
        assert kind in ("middle 5", "minimum and zero")
        return
    assert found.quantized.tensors().keys() == expected.quantized.tensors().keys()
    for name, tensor in found.quantized.tensors().items():
        assert torch.equal(tensor, expected.quantized.tensors()[name]), name
    assert found.scheme is not None
    assert torch.equal(dequantize_weight(found.quantized, found.scheme, columns), plain.dequantize())


# --- nybble inspect


def test_inspect_tells_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(DATA / "ct-w4a16-g128")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("format compressed-tensors, ")
    assert "4 bits, groups of 128, symmetric, bfloat16 scales      1" in out
    assert "1 of 1 quantized layers are held exactly" in out
    assert main(["inspect", str(DATA / "gguf-q4-k-m" / "model.gguf")]) == 0
    out, _ = capsys.readouterr()
    assert "1 of 1 quantized layers are held exactly" in out
    assert max(map(len, out.splitlines())) <= 120


def test_inspect_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    name = DATA / "gptq-w4-g64-gpt2" / "model.safetensors"
    assert main(["inspect", str(name), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (layer,) = found["layers"]
    assert (found["schema"], found["format"], found["exact"]) == ("nybble.inspect/1", "gptq", 1)
    assert (layer["name"], layer["shape"]) == ("transformer.h.1.mlp.c_proj", [128, 512])
    assert layer["why"] is None
    assert found["other"] == {"tensors": 1, "nbytes": 256}
    assert found["nbytes"] == layer["nbytes"] + 256


def test_inspect_reads_nybbles_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32))
    nybble.quantize(model, "w8a8", goal="memory")
    nybble.save(model, tmp_path)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (layer,) = found["layers"]
    assert (found["format"], layer["scheme"], layer["shape"]) == ("nybble", "w8a8", [32, 64])
    assert found["nbytes"] == 64 * 32 + 32 * 4 + 32 * 4 + 2 * 32 * 4


@pytest.mark.parametrize("path", ["none", "."])
def test_inspect_fails_with_one_line(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nybble: ")
    assert err.count("\n") == 1


def test_the_example_of_the_help_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["inspect", "--help"])
    assert done.value.code == 0
    (words,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("example: ")]
    words = [str(DATA / "awq-gemm-w4-g32-edge") if word == "DIR" else word for word in words[2:]]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "awq"
