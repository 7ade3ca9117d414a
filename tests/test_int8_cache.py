"""`nybble.Int8Cache`: what it holds, that it follows transformers' caches, and its loss on a language model."""

import copy
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("transformers.cache_utils", exc_type=ImportError)

from transformers import DynamicCache, Qwen3NextConfig

import nybble
from nybble.demo.accuracy import language
from nybble.fusion.block import fused_modules

from .fusion_zoo import ids, make, run

LM = Path(__file__).parent / "data" / "lm"


def states(tokens, batch=3, width=16, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 2, tokens, width, generator=generator).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_gives_what_was_put_in_within_half_a_step(dtype):
    cache = nybble.Int8Cache()
    parts = [states(tokens, dtype=dtype, seed=tokens) for tokens in (5, 1, 3)]
    for part in parts:
        found = cache.update(*part, 0)
    for side, held in enumerate(found):
        whole = torch.cat([part[side] for part in parts], 2)
        assert held.dtype == dtype
        step = whole.float().abs().amax(-1, keepdim=True) / 127
        rounding = whole.float().abs() * (0 if dtype == torch.float32 else 2.0**-8)
        assert ((held.float() - whole.float()).abs() <= step / 2 * 1.001 + rounding).all()
        assert (held.float() - whole.float()).abs().max() > 0
    assert cache.get_seq_length() == 9
    layer = cache.layers[0]
    assert layer.keys.dtype == layer.values.dtype == torch.int8
    assert layer.key_scales.shape == (3, 2, 9, 1)
    assert layer.keys.abs().amax(-1).eq(127).all()


def test_rows_of_zeros_and_of_tiny_numbers_stay_finite():
    cache = nybble.Int8Cache()
    keys = torch.zeros(1, 1, 3, 8)
    keys[0, 0, 1] = 1e-42
    keys[0, 0, 2] = torch.tensor([3e38, -3e38, 1, 0, 0, 0, 0, 0])
    found, _ = cache.update(keys, keys, 0)
    assert (found[0, 0, :2].abs() <= 1e-37).all()
    assert_close(found[0, 0, 2], keys[0, 0, 2], rtol=0.01, atol=2e36)


def test_what_is_not_finite_stays_so():
    cache = nybble.Int8Cache()
    keys = torch.ones(1, 1, 3, 8)
    keys[0, 0, 0, 3], keys[0, 0, 1, 3] = torch.nan, torch.inf
    found, _ = cache.update(keys, keys, 0)
    assert not found[0, 0, :2, 3].isfinite().any()
    assert (found[0, 0, 2] == 1).all()


CHANGES = {
    "reorder_cache": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])),
    "crop": lambda cache: cache.crop(-2),
    "crop nothing": lambda cache: cache.crop(0),
    "batch_repeat_interleave": lambda cache: cache.batch_repeat_interleave(2),
    "batch_select_indices": lambda cache: cache.batch_select_indices(torch.tensor([1])),
    "reset": lambda cache: cache.reset(),
    "copy": lambda cache: copy.deepcopy(cache),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_it_changes_as_a_float_cache(change):
    ours, theirs = nybble.Int8Cache(), DynamicCache()
    first = states(5)
    for layer in range(2):
        held = ours.update(*first, layer)
        theirs.update(*held, layer)
    for cache in (ours, theirs):
        change(cache)
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_mask_sizes(2, 0) == theirs.get_mask_sizes(2, 0)
    batch = 3 if theirs.layers[0].keys is None else len(theirs.layers[0].keys)
    new = states(1, batch, seed=1)
    one = nybble.Int8Cache().update(*new, 0)
    for ours_held, theirs_held in zip(ours.update(*new, 1), theirs.update(*one, 1), strict=True):
        assert torch.equal(ours_held, theirs_held)


def test_codes_and_update_agree():
    ours, theirs = nybble.Int8Cache(), nybble.Int8Cache()
    for tokens in (4, 1):
        keys, values, key_scales, value_scales = ours.update_codes(*states(tokens), 1)
        found = theirs.update(*states(tokens), 1)
        assert torch.equal(keys * key_scales, found[0])
        assert torch.equal(values * value_scales, found[1])
    assert len(ours) == len(theirs) == 2


def test_cropping_by_a_length_is_refused():
    cache = nybble.Int8Cache()
    cache.update(*states(4), 0)
    with pytest.raises(ValueError, match="tokens_to_remove=2"):
        cache.crop(2)


def test_other_kinds_of_layers_are_refused():
    with pytest.raises(ValueError, match="linear_attention"):
        nybble.Int8Cache(config=Qwen3NextConfig(num_hidden_layers=4))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("scheme", [None, "w8a16"])
def test_generate(name, beams, scheme):
    """Fused blocks read the codes; blocks of their own get floats: both generate the same tokens."""
    model = make(name)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    prompts = {"input_ids": ids(2, 7), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}
    prompts["attention_mask"][0, :3] = 0
    if scheme:
        nybble.quantize(model, scheme, goal="memory")
    before = model.generate(**prompts, **options, past_key_values=nybble.Int8Cache(config=model.config))
    assert before.shape[1] > 8
    nybble.fuse(model, [{"input_ids": ids(2, 7)}], goal="always")
    assert bool(fused_modules(model))
    cache = nybble.Int8Cache(config=model.config)
    after = model.generate(**prompts, **options, past_key_values=cache)
    assert torch.equal(before, after)
    assert cache.get_seq_length() == after.shape[1] - 1


def test_fused_blocks_read_the_codes(monkeypatch):
    model = make("llama")
    nybble.quantize(model, "w8a16", goal="memory")
    nybble.fuse(model, [{"input_ids": ids(2, 7)}], goal="always")
    outputs = []
    for _ in range(2):  # the first calls are watched and proved
        cache = nybble.Int8Cache(config=model.config)
        with torch.no_grad():
            outputs.append([model(ids(2, n), past_key_values=cache).logits for n in (7, 1, 1)])
        monkeypatch.setattr(nybble.Int8Cache, "update", None)
    for first, second in zip(*outputs, strict=True):
        assert_close(first, second, rtol=1e-3, atol=1e-4)
    monkeypatch.undo()
    model.eval()
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        floats = [model(ids(2, n), past_key_values=cache).logits for n in (7, 1, 1)]
    for first, second in zip(floats, outputs[1], strict=True):
        assert 0 < (first - second).norm() < 0.03 * first.norm()
    assert run(model, {"input_ids": ids(2, 7)}).isfinite().all()


def test_the_loss_on_a_language_model_is_small():
    try:
        lm = language.load(LM)
    except nybble.demo.DemoUnavailable as missing:
        pytest.skip(str(missing))
    tokens = lm.held_out_batches(8)[0]
    found = []
    for cache in (DynamicCache(config=lm.model.config), nybble.Int8Cache(config=lm.model.config)):
        with torch.no_grad():
            logits = torch.cat([lm.model(part, past_key_values=cache).logits for part in tokens.split(64, 1)], 1)
        found.append(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item())
    assert abs(found[1] - found[0]) < 2e-3
    assert found[0] != found[1]
