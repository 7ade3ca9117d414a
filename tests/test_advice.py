"""What a report advises to do next."""

from __future__ import annotations

import pytest

from nybble.report.advice import advice
from nybble.report.data import NOT_TIMED, LayerReport, Rounded
from nybble.testing.reports import left, report, speeds, swapped


def advised(*layers: LayerReport, **changes: object) -> str:
    found = advice(report(*layers, **changes))
    return "" if found is None else "\n".join(text for _, text in found.items)


SLOW = {"reason": "slower here", "speeds": speeds({1: 0.5, 16: 1.5}), "after": "float32", "nbytes_before": 4096}
W4 = {"after": "w4a8", "kernel": "w4a8_avx512vnni", "speeds": speeds({1: 1.5, 16: 2.0}), "shape": (64, 512)}


@pytest.mark.parametrize(
    ("layers", "changes", "line"),
    [
        (
            [left(reason="excluded by 'x'"), left(reason="excluded by 'x'"), left()],
            {},
            "nothing was swapped: 2 x excluded by 'x'; 1 x not a kind of module that nybble replaces",
        ),
        ([left(), left(name="b")], {}, "nothing found in this model that nybble replaces: print(model)"),
        ([], {}, "nothing found in this model"),
        (
            [left(**SLOW), swapped()],
            {},
            (
                "1 layer (4.0 KiB) left alone: slower than the dense layer here, on the mean over M=1, 16; to save memory anyway: "
                'nybble.quantize(model, "w8a8", goal="memory")'
            ),
        ),
        (
            [left(**{**SLOW, "reason": "no difference here", "speeds": speeds({1: 1.0, 16: 1.05})}), swapped()],
            {},
            (
                "1 layer (4.0 KiB) left alone: no difference to the dense layer's speed on the mean over M=1, 16; to save "
                'memory where that is so: nybble.quantize(model, "w8a8", goal="no_slower"); to measure longer: '
                'nybble.quantize(model, "w8a8", timing_s=60)'
            ),
        ),
        (
            [left(**SLOW)],
            {},
            (
                "at M=16 those layers are 1.50 times as fast as dense; if you run only these M: "
                'nybble.quantize(model, "w8a8", m=16)'
            ),
        ),
        (
            [left(**SLOW)],
            {"scheme": "sp50 w8a8"},
            'to save memory anyway: nybble.sparsify(model, "50%", scheme="w8a8", goal="memory")',
        ),
        (
            [left(**SLOW)],
            {"scheme": "sp32of128 floats"},
            'nybble.sparsify(model, "32:128", scheme=None, goal="memory")',
        ),
        ([left(**SLOW)], {"scheme": "w8a8, w4a8", "merged": True}, 'the same recipe with goal="memory"'),
        ([left(**SLOW)], {"scheme": "dense", "merged": True}, 'the same recipe with goal="memory"'),
        ([left(**SLOW)], {"scheme": "w8a8, w8a7"}, 'nybble.quantize(model, ("w8a8", "w8a7"), goal="memory")'),
        (
            [left(reason=NOT_TIMED, nbytes_before=4096), swapped()],
            {},
            (
                "1 layer (4.0 KiB) left alone: no time was left to time them; to measure longer: "
                'nybble.quantize(model, "w8a8", timing_s=60)'
            ),
        ),
        (
            [swapped(), swapped(name="b")],
            {},
            (
                "2 layers slower than before at M=1 (0.50x at worst), though faster on the mean; if you run only these M, on the "
                'original model: nybble.quantize(model, "w8a8", m=1)'
            ),
        ),
        (
            [
                left(
                    name="head",
                    kind="Linear",
                    reason="shares its weight with embed.weight (untie=True quantizes a copy)",
                )
            ],
            {},
            (
                "head: shares its weight with another module; to quantize a copy of it: nybble.quantize(model, "
                '"w8a8", untie=True)'
            ),
        ),
        (
            [swapped(), left(nbytes_before=3 << 20, before="float32")],
            {"weight_bytes": 4 << 20, "weight_bytes_changed": 1 << 20},
            (
                "coverage is 25.0 %: the largest weights of modules that nybble does not replace are embed (Embedding, "
                "float32, 3.0 MiB)"
            ),
        ),
        (
            [swapped(), *(left(name=f"h.{i}.table", nbytes_before=1 << 20) for i in range(12))],
            {"weight_bytes": 12 << 20, "weight_bytes_changed": 0},
            "does not replace are h.{0..11}.table (12 x Embedding, bfloat16, 12.0 MiB);",
        ),
        (
            [swapped(**W4)],
            {"scheme": "w4a8g128"},
            (
                "method 'rtn' rounds 4-bit weights without calibration data; more accurate, on the original model: "
                'nybble.quantize(model, "w4a8g128", method="gptq", calibration=batches)'
            ),
        ),
        (
            [swapped(**W4)],
            {"scheme": "w4a8"},
            'on the original model, scheme="w4a8g128" instead of "w4a8"',
        ),
        (
            [swapped(kernel="w8a8_avx2")],
            {},
            "int8 kernels run on target avx2 because VNNI instructions are not available",
        ),
        (
            [swapped(kernel="w8a8_avx512bw")],
            {},
            "int8 kernels run on target avx512bw because VNNI instructions are not available",
        ),
        ([swapped(kernel="w8a8_reference")], {}, "1 layer in plain torch, which is slow"),
        (
            [swapped(rounded=Rounded("rtn", 0.2, 0.2, notes=("not gptq: no usable Hessian",)))],
            {"method": "gptq"},
            "1 layer got a simpler method than 'gptq', for the reasons in the notes",
        ),
        (
            [swapped(rounded=Rounded("rtn", 0.2, 0.25)), swapped(name="b", rounded=Rounded("rtn", 0.2, 0.125))],
            {},
            "the largest output error is 25.0 %, of encoder.0.fc: on the original model, exclude='encoder.0.fc'",
        ),
        ([swapped()], {}, "nybble.evaluate(model, original, batches) compares"),
        ([swapped()], {}, 'nybble.save(model, "directory") writes the model'),
    ],
)
def test_the_report_says_what_to_do_next(layers: list[LayerReport], changes: dict[str, object], line: str) -> None:
    assert line in advised(*layers, **changes)
    good = swapped(kernel="w8a8_avx512vnni", speeds=speeds({1: 1.5, 16: 2.0}))
    assert line not in advised(good) or line.startswith("nybble."), "said where there is nothing to say"
    assert line.split(":")[0] in " ".join(str(report(*layers, **changes)).split("what to do next:")[1].split())


def test_a_good_report_advises_to_evaluate_and_save_only() -> None:
    good = swapped(kernel="w8a8_avx512vnni", speeds=speeds({1: 1.5, 16: 2.0}))
    assert [line.split("(")[0] for line in advised(good).splitlines()] == ["nybble.evaluate", "nybble.save"]
