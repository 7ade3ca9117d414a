"""What every kind of module that nybble replaces must be able to do: one suite over the table of testing/contract.py."""

import copy
import multiprocessing
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import nybble
from nybble.checkpoint.files import CheckpointError
from nybble.nn.composite import CompositeModule
from nybble.testing.contract import CONTRACTS, Holder

CASES = [pytest.param(row, scheme, id=f"{row.name} {scheme}") for row in CONTRACTS for scheme in row.schemes]
ROWS = [pytest.param(row, row.schemes[0], id=row.name) for row in CONTRACTS]


def make(row, scheme=None, seed=0):
    torch.manual_seed(seed)
    model = Holder(row.dense()).eval()
    if scheme is not None:
        nybble.quantize(model, scheme, goal="memory", fuse=False)
    return model


def inputs_of(row):
    torch.manual_seed(5)
    return row.inputs()


def floats(output):
    return [leaf.detach().clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


@torch.no_grad()
def run(model, args):
    return floats(model(*args))


def assert_same(found, wanted):
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def assert_close(found, wanted, most):
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.is_floating_point():
            assert (a.double() - b.double()).norm() <= most * b.double().norm() + 1e-30


def as_dtype(args, dtype):
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, args)


@pytest.mark.parametrize(("row", "scheme"), CASES)
def test_quantized_and_told(row, scheme):
    model, args = make(row), inputs_of(row)
    wanted = run(model, args)
    report = nybble.quantize(model, scheme, goal="memory", fuse=False)
    assert report.coverage >= row.least_coverage
    assert all(layer.kernel for layer in report.swapped)
    assert "layer" in str(report)
    assert_close(run(model, args), wanted, row.error_of(scheme))


@pytest.mark.parametrize(("row", "scheme"), CASES)
def test_dequantized_is_what_was_computed(row, scheme):
    model, args = make(row, scheme), inputs_of(row)
    layer = model.layer
    dense = layer.close() if isinstance(layer, CompositeModule) else layer.dequantize()
    assert type(dense) is type(make(row).layer)
    assert_close(run(model, args), run(Holder(dense).eval(), args), 0.05 if "a8" in scheme else 1e-4)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "portable"])
@pytest.mark.parametrize(("row", "scheme"), CASES)
def test_state_dict(row, scheme, packed):
    model, other, args = make(row, scheme), make(row, scheme, seed=1), inputs_of(row)
    wanted = run(model, args)
    assert any(not torch.equal(a, b) for a, b in zip(run(other, args), wanted, strict=True))
    if not packed:
        for module in (*model.modules(), *other.modules()):
            if isinstance(module, nybble.nn.QuantizedModule):
                module.unpack()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    other.load_state_dict(state, strict=True)
    assert_same(run(other, args), wanted)
    assert list(other.state_dict()) == list(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])  # noqa: S301
@pytest.mark.parametrize(("row", "scheme"), CASES)
def test_copies(row, scheme, copied):
    model, args = make(row, scheme), inputs_of(row)
    wanted = run(model, args)
    other = copied(model)
    assert_same(run(other, args), wanted)
    assert list(other.state_dict()) == list(model.state_dict())
    other.load_state_dict(make(row, scheme, seed=1).state_dict())
    assert_same(run(model, args), wanted)


@pytest.mark.parametrize(("row", "scheme"), ROWS)
def test_sent_to_another_process(row, scheme):
    model, args = make(row, scheme), inputs_of(row)
    received = pickle.loads(ForkingPickler.dumps(model))  # noqa: S301 its own bytes
    assert_same(run(received, args), run(model, args))


def _in_child(model, args, queue):
    queue.put([x.tolist() for x in run(model, args)])


@pytest.mark.parametrize(("row", "scheme"), ROWS)
def test_after_a_fork(row, scheme):
    if not row.forks:
        pytest.skip("calls functions of torch that wait for ever for threads of the parent")
    model, args = make(row, scheme), inputs_of(row)
    wanted = run(model, args)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_in_child, args=(model, args, queue))
    child.start()
    found = queue.get()
    child.join()
    assert found == [x.tolist() for x in wanted]


@pytest.mark.parametrize(("row", "scheme"), CASES)
def test_save_and_load(row, scheme, tmp_path):
    model, args = make(row, scheme), inputs_of(row)
    nybble.save(model, tmp_path / "model")
    wanted = run(model, args)
    for target in (make(row, seed=1), make(row, scheme, seed=1)):
        nybble.load(target, tmp_path / "model")
        assert_same(run(target, args), wanted)
    with nybble.skeleton():
        empty = Holder(row.dense()).eval()
    nybble.load(empty, tmp_path / "model")
    assert_same(run(empty, args), wanted)


@pytest.mark.parametrize(("row", "scheme"), ROWS)
def test_a_damaged_file_changes_nothing(row, scheme, tmp_path):
    model, args = make(row, scheme), inputs_of(row)
    nybble.save(model, tmp_path / "model")
    file = next(path for path in (tmp_path / "model").iterdir() if path.suffix == ".safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    target = make(row, seed=1)
    before, layer = run(target, args), target.layer
    with pytest.raises(CheckpointError):
        nybble.load(target, tmp_path / "model")
    assert target.layer is layer
    assert_same(run(target, args), before)


@pytest.mark.parametrize(("row", "scheme"), ROWS)
def test_a_damaged_state_is_refused(row, scheme):
    model, args = make(row, scheme), inputs_of(row)
    wanted = run(model, args)
    state = model.state_dict()
    name = next(name for name in state if name.endswith("scale") and "act" not in name)
    for wrong in (state[name] * torch.nan, state[name][:0]):
        with pytest.raises(RuntimeError, match=name.removesuffix(".scale")):
            model.load_state_dict({**state, name: wrong})
    with pytest.raises(RuntimeError):
        model.load_state_dict({key: value for key, value in state.items() if key != name})
    assert_same(run(model, args), wanted)


@pytest.mark.parametrize(("row", "scheme"), CASES)
def test_threads_change_no_bit(row, scheme):
    model, args = make(row, scheme), inputs_of(row)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(run(model, args))
    finally:
        torch.set_num_threads(threads)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.sampled(every=3)
@pytest.mark.parametrize(("row", "scheme"), CASES)
def test_compile(row, scheme):
    model, args = make(row, scheme), inputs_of(row)
    wanted = run(model, args)
    torch.compiler.reset()  # torch limits how often one function is compiled, and all models share theirs
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(run(compiled, args), wanted)


@pytest.mark.parametrize(("row", "scheme"), ROWS)
def test_export(row, scheme):
    model, args = make(row, scheme), inputs_of(row)
    wanted = run(model, args)
    with torch.no_grad():
        exported = torch.export.export(model, args, strict=False)
    assert_same(run(exported.module(), args), wanted)


@pytest.mark.parametrize(("row", "scheme"), ROWS)
def test_inference_mode_and_grad_mode(row, scheme):
    model, args = make(row, scheme), inputs_of(row)
    wanted = run(model, args)
    with torch.inference_mode():
        assert_same(floats(model(*args)), wanted)
    assert_close(floats(model(*args)), wanted, 1e-5)


@pytest.mark.parametrize(("row", "scheme"), ROWS)
def test_autocast(row, scheme):
    model, args, dense = make(row, scheme), inputs_of(row), make(row)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, wanted = model(*args), dense(*args)
    assert [x.dtype for x in floats(found)] == [x.dtype for x in floats(wanted)]
    assert_close(floats(found), floats(wanted), 0.08)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize(("row", "scheme"), ROWS)
def test_other_float_dtypes(row, scheme, dtype):
    model = make(row).to(dtype)
    args = as_dtype(inputs_of(row), dtype)
    wanted = run(make(row), as_dtype(args, torch.float32))
    nybble.quantize(model, scheme, goal="memory", fuse=False)
    found = run(model, args)
    assert all(x.dtype in (dtype, torch.int64) for x in found)
    assert_close([x.float() for x in found], wanted, 0.08)


@pytest.mark.parametrize(("row", "scheme"), ROWS)
def test_training_flag_is_kept(row, scheme):
    model = Holder(row.dense()).train()
    nybble.quantize(model, scheme, goal="memory", fuse=False)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("row", "args", "match"),
    [pytest.param(row, *bad, id=f"{row.name} {i}") for row in CONTRACTS for i, bad in enumerate(row.bad)],
)
def test_bad_input_is_refused(row, args, match):
    model = make(row, row.schemes[0])
    wanted = run(model, inputs_of(row))
    with pytest.raises((ValueError, TypeError, RuntimeError, IndexError), match=match):
        run(model, args)
    assert_same(run(model, inputs_of(row)), wanted)


def test_each_kind_has_a_row():
    from nybble.nn.kinds import BUILT_IN, find_composite, find_kind

    known = {kind.name for row in CONTRACTS for kind in (find_kind(row.dense()), find_composite(row.dense())) if kind}
    missing = {kind.name for kind in BUILT_IN} - known - {"Conv1D"}
    assert not missing, f"no row of testing/contract.py for {sorted(missing)}"
    assert all(isinstance(row.dense(), nn.Module) for row in CONTRACTS)
