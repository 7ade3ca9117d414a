"""`nybble.fuse`: which modules run fused, and that they compute what they did."""

import copy
import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import nybble
from nybble.fusion import fuse
from nybble.fusion.block import fused_modules, unfuse
from nybble.fusion.recognize import norm_of
from nybble.recipe.recipe import Stage

from .fusion_zoo import LANGUAGE_MODELS, MAKERS, described, ids, make, run

pytest.importorskip("transformers")
PAGE = Path(__file__).parents[1] / "docs" / "fusion.md"


def quantized(name, scheme="w8a16", dtype=torch.float32):
    model = make(name, dtype)
    if scheme is not None:
        nybble.quantize(model, scheme, goal="memory")
    return model


def fused(name, scheme="w8a16", dtype=torch.float32):
    model = quantized(name, scheme, dtype)
    report = fuse(model, MAKERS[name][1], goal="always")
    return model, report


@pytest.mark.parametrize("name", MAKERS)
def test_architectures(name):
    model, examples, expected = quantized(name), *MAKERS[name][1:]
    before = [run(model, example) for example in examples]
    keys = list(model.state_dict())
    report = fuse(model, examples, goal="always")
    assert expected <= {chain.name for chain in report.chains}, str(report)
    assert all(chain.compiled >= 2 for chain in report.chains)
    for example, expected_output in zip(examples, before, strict=True):
        assert_close(run(model, example), expected_output, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys
    json.loads(report.to_json())
    if PAGE.is_file():
        assert [f"| {name} | | |", *described(report)] == _of_page(name)
    report.undo()
    assert not fused_modules(model)
    assert torch.equal(run(model, examples[0]), before[0])


def _of_page(name):
    """The rows of an architecture in the table of the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = lines.index(f"| {name} | | |")
    more = next((i for i, line in enumerate(lines[first + 1 :]) if not line.startswith("| | ")), len(lines))
    return lines[first : first + 1 + more]


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8g32", "w4a16g32", "w8a7", "sp50w8a8"])
def test_schemes(scheme):
    model = make("llama")
    if scheme.startswith("sp"):
        nybble.sparsify(model, "50%", goal="memory", calibration=[{"input_ids": ids(4, 16)}])
    else:
        nybble.quantize(model, scheme, goal="memory")
    before = run(model, {"input_ids": ids(3, 11)})
    report = fuse(model, [{"input_ids": ids(2, 7)}], goal="always")
    assert len(report.chains) == 2
    after = run(model, {"input_ids": ids(3, 11)})
    assert (after - before).norm() <= 0.02 * before.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_dtypes(name, dtype):
    model = quantized(name, dtype=dtype)
    example = MAKERS[name][1][0]
    before = run(model, example).float()
    assert fuse(model, [example], goal="always").chains
    after = run(model, example)
    assert after.dtype == dtype
    assert (after.float() - before).norm() <= 0.03 * before.norm()


@pytest.mark.parametrize("shape", [(1, 1), (1, 12), (5, 1), (3, 40)])
def test_other_sizes(shape):
    model, _ = fused("bert")
    example = {"input_ids": ids(*shape)}
    after = run(model, example)
    unfuse(model)
    assert_close(after, run(model, example), rtol=1e-4, atol=1e-5)


def test_no_tokens():
    model, _ = fused("torch")
    assert run(model, (torch.empty(0, 7, 64),)).shape == (0, 7, 64)


@pytest.mark.sampled(every=4)
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_generate(name, cache, beams):
    model, _ = fused(name)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "cache_implementation": cache}
    prompts = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    prompts["attention_mask"][0, :3] = 0
    options["disable_compile"] = True
    after = model.generate(**prompts, **options)
    unfuse(model)
    assert torch.equal(after, model.generate(**prompts, **options))


def test_masks_are_learned_one_by_one():
    model, _ = fused("llama")
    layer = fused_modules(model)["model.layers.0"]
    assert len(layer.kinds) == 1
    example = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    example["attention_mask"][1, :3] = 0
    first, second = run(model, example), run(model, example)
    assert len(layer.kinds) == 2
    assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_gradients_run_unfused():
    model, _ = fused("bert")
    x = torch.randn(2, 5, 64, requires_grad=True)
    model.encoder(x).last_hidden_state.sum().backward()
    assert x.grad is not None
    assert x.grad.norm() > 0
    assert "encoder" in fused_modules(model)


@pytest.mark.parametrize("mode", ["autocast", "compile", "inference", "train"])
def test_modes(mode):
    model, _ = fused("bert")
    example, unfused = MAKERS["bert"][1][0], copy.deepcopy(model)
    unfuse(unfused)
    if mode == "train":
        model.train()
        model.encoder.config.hidden_dropout_prob = 0.0
        for module in (*model.modules(), *unfused.modules()):
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    if mode == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(run(model, example), run(unfused, example))
        return
    if mode == "inference":
        with torch.inference_mode():
            assert_close(run(model, example), run(unfused, example), rtol=1e-4, atol=1e-5)
        return
    runs = torch.compile(model, backend="eager") if mode == "compile" else model
    assert_close(run(runs, example), run(unfused, example), rtol=1e-4, atol=1e-5)


def test_a_hook_undoes_the_chain():
    model, _ = fused("bert")
    seen = []
    handle = model.encoder.layer[0].output.dense.register_forward_hook(lambda *_: seen.append(1))
    run(model, MAKERS["bert"][1][0])
    assert seen == [1]
    assert "hooks" in fused_modules(model)["encoder"].undone
    handle.remove()
    run(model, MAKERS["bert"][1][0])
    assert fused_modules(model)["encoder"].undone is None


class _Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(64, 2, bias=False), nn.Linear(2, 64, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_a_replaced_member_undoes_the_chain():
    model, _ = fused("llama")
    example = MAKERS["llama"][1][0]
    before = run(model, example)
    attention = model.model.layers[0].self_attn
    attention.o_proj = _Lora(attention.o_proj)
    assert (run(model, example) - before).norm() > 1e-3
    found = fused_modules(model)
    assert "o_proj" in found["model.layers.0"].undone
    assert found["model.layers.1"].undone is None


def test_output_hidden_states():
    model, _ = fused("bert")
    with torch.no_grad():
        hidden = model(input_ids=ids(2, 5), output_hidden_states=True).hidden_states
        assert len(hidden) == 3


def test_new_weights_count():
    model, _ = fused("bert")
    example, other = MAKERS["bert"][1][0], make("bert")
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    nybble.quantize(other, "w8a16", goal="memory")
    model.load_state_dict(other.state_dict())
    assert_close(run(model, example), run(other, example), rtol=1e-4, atol=1e-5)
    model.to(torch.bfloat16)
    other.to(torch.bfloat16)
    assert_close(run(model, example), run(other, example), rtol=0.05, atol=0.05)


def test_deepcopy_runs_its_own_weights():
    model, _ = fused("bert")
    example = MAKERS["bert"][1][0]
    new = copy.deepcopy(model)
    assert set(fused_modules(new)) == {"encoder"}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data.zero_()
    expected = run(new, example)
    unfuse(new)
    assert_close(expected, run(new, example), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads(threads):
    model, _ = fused("bert", "w8a8")
    example, before = MAKERS["bert"][1][0], torch.get_num_threads()
    expected = run(model, example)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(run(model, example), expected)
    finally:
        torch.set_num_threads(before)


def test_bad_arguments():
    model = quantized("torch")
    with pytest.raises(TypeError, match=r"model=dict: must be a torch.nn.Module"):
        fuse({}, [])
    with pytest.raises(ValueError, match=r"goal='fast'"):
        fuse(model, [(torch.randn(1, 3, 64),)], goal="fast")
    with pytest.raises(ValueError, match=r"include='nothing\*': 'nothing\*' matches no module"):
        fuse(model, [(torch.randn(1, 3, 64),)], include="nothing*")
    with pytest.raises(ValueError, match=r"query: \(1, 3, 5\), must have"):
        fuse(model, [(torch.randn(1, 3, 5),)])
    assert not fused_modules(model)


def test_signature():
    model, _ = fused("bert")
    assert inspect.signature(model.encoder.forward) == inspect.signature(
        type(model.encoder).forward.__get__(model.encoder)
    )


def test_include_and_exclude():
    model = quantized("bert")
    report = fuse(model, MAKERS["bert"][1], include="encoder.layer.*", exclude="encoder.layer.0*", goal="always")
    assert {chain.name for chain in report.chains} == {"encoder.layer.1"}


def test_report():
    _, report = fused("deberta")
    text = str(report)
    assert "encoder.layer.{0,1}.intermediate" in text
    assert "bmm" in text
    assert max(map(len, text.splitlines())) <= 120
    assert "<table>" in report._repr_html_()


def test_first_calls_are_the_examples():
    model, example = quantized("bert"), MAKERS["bert"][1][0]
    before = run(model, example)
    report = fuse(model, goal="always")
    assert report.pending
    assert "first calls" in str(report)
    for _ in range(4):
        assert_close(run(model, example), before, rtol=1e-4, atol=1e-5)
    assert not report.pending
    assert {chain.name for chain in report.chains} == {"encoder"}
    assert not model._forward_hooks


def test_first_calls_that_fail_do_no_harm():
    model, example = quantized("bert"), MAKERS["bert"][1][0]
    report = fuse(model, goal="always")
    with pytest.raises(IndexError), torch.no_grad():
        model(input_ids=torch.full((1, 3), 10**6))
    for _ in range(4):
        run(model, example)
    assert {chain.name for chain in report.chains} == {"encoder"}


@pytest.mark.parametrize("calibrated", [False, True])
def test_quantize_fuses(calibrated):
    model, example = make("bert"), MAKERS["bert"][1][0]
    report = nybble.quantize(model, "w8a8", goal="memory", fuse=True, calibration=[example] if calibrated else None)
    assert report.fusion.pending is not calibrated
    for _ in range(4):
        run(model, example)
    assert "fused" in str(report)
    assert json.loads(report.to_json())["fusion"]["pending"] is False
    assert nybble.quantize(make("bert"), "w8a8", goal="memory").fusion is None


def test_recipe():
    model, example = make("bert"), MAKERS["bert"][1][0]
    stages = [
        Stage("quantize", {"scheme": "w8a16", "goal": "memory"}),
        Stage("fuse", {"goal": "always"}),
    ]
    result = nybble.optimize(model, nybble.Recipe(stages), calibration=[example])
    assert [chain.name for chain in result.reports[1].chains] == ["encoder"]
    found = fused_modules(model)["encoder"]
    after = run(model, example)
    assert found.first is not None
    unfuse(model)
    assert_close(after, run(model, example), rtol=1e-4, atol=1e-5)


def test_layers_with_equal_weights():
    model = make("llama")
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.data.copy_(layer.mlp.gate_proj.weight)
        layer.self_attn.v_proj.weight.data.copy_(layer.self_attn.k_proj.weight)
        layer.self_attn.q_proj.weight.data[:32].copy_(layer.self_attn.k_proj.weight)
    nybble.quantize(model, "w8a16", goal="memory")
    before = run(model, {"input_ids": ids(2, 7)})
    assert len(fuse(model, [{"input_ids": ids(2, 7)}], goal="always").chains) == 2
    assert_close(run(model, {"input_ids": ids(2, 7)}), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 2048])
def test_norms_are_told_apart(dtype, width):
    x = torch.randn(3, width, dtype=dtype)
    made = {"layer": nn.LayerNorm(width, eps=1e-5), "rms": nn.RMSNorm(width, eps=1e-6)}
    for kind, module in made.items():
        found = norm_of(module.to(dtype), x)
        assert (found.kind, found.eps) == (kind, module.eps)
    assert norm_of(nn.BatchNorm1d(width).to(dtype).eval(), x) is None


@pytest.mark.parametrize(("name", "where"), [("bert", "encoder"), ("bert with types", "")])
def test_save_and_load(tmp_path, name, where):
    pytest.importorskip("safetensors")
    model, _ = fused(name)
    example = MAKERS[name][1][0]
    expected = run(model, example)
    nybble.save(model, tmp_path)
    new = make(name)
    nybble.load(new, tmp_path)
    found = fused_modules(new)[where]
    first, second = run(new, example), run(new, example)
    assert found.first is not None
    assert torch.equal(second, expected)
    assert_close(first, expected, rtol=1e-4, atol=1e-5)


def test_watched_values_are_freed():
    model, _ = fused("llama")
    lowered = fused_modules(model)["model.layers.0"].first
    assert all(node.rows.is_meta for node in lowered.program.explanation.nodes)


def test_saving_before_the_first_calls(tmp_path):
    pytest.importorskip("safetensors")
    model = quantized("bert")
    fuse(model, goal="always")
    nybble.save(model, tmp_path)
    new = make("bert")
    nybble.load(new, tmp_path)
    assert not fused_modules(new)


# --- attention in 8 bits


def _long():
    """A model, and an example with enough tokens."""
    model = quantized("bert")
    return model, {"input_ids": torch.randint(1, 100, (2, 120), generator=torch.Generator().manual_seed(0))}


def test_attention_in_int8_and_its_error():
    model, example = _long()
    fuse(model, [example], goal="always")
    exact = run(model, example)
    report = fuse(model, [example], goal="always", attention="int8")
    rounded = run(model, example)
    error = ((rounded - exact).norm() / exact.norm()).item()
    told = report.chains[0].int8
    assert 0 < error < 0.05
    assert error <= told.error * 1.01 < 0.05
    assert 0.998 < told.cosine < 1
    assert told.left is None
    assert "attention in floats" in str(report)
    assert json.loads(report.to_json())["chains"][0]["int8"]["error"] == told.error
    fuse(model, [example], goal="always")
    assert torch.equal(run(model, example), exact)


def test_an_error_above_the_bound_is_said_and_floats_stay(monkeypatch):
    model, example = _long()
    fuse(model, [example], goal="always")
    exact = run(model, example)
    monkeypatch.setattr("nybble.fusion.prove.MOST_INT8", 1e-6)
    report = fuse(model, [example], goal="always", attention="int8")
    assert torch.equal(run(model, example), exact)
    assert "changes its results by" in report.chains[0].int8.left
    assert report.chains[0].int8.left in str(report)


def test_without_attention_there_is_nothing_to_tell():
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16)).eval()
    nybble.quantize(model, "w8a8", goal="memory")
    report = fuse(model, [torch.randn(3, 5, 16)], goal="always", attention="int8")
    assert report.chains
    assert report.chains[0].int8 is None


def test_the_option_is_saved_and_copied(tmp_path):
    model, example = _long()
    fuse(model, [example], goal="always", attention="int8")
    expected = run(model, example)
    nybble.save(model, tmp_path)
    new = nybble.load(make("bert"), tmp_path)
    for again in (new, copy.deepcopy(model)):
        run(again, example)
        assert torch.equal(run(again, example), expected)
    index = json.loads((tmp_path / "nybble.json").read_text())
    assert index["fused_int8"] == index["fused"]


def test_a_stage_with_the_option():
    assert Stage("fuse", {"attention": "int8"}).arguments == {"attention": "int8"}
    with pytest.raises(ValueError, match="attention"):
        Stage("fuse", {"attention": "int4"})
    with pytest.raises(ValueError, match="attention='fp8'"):
        fuse(nn.Linear(2, 2), attention="fp8")
