"""nybble.sparsify: which layers see what, in which order, and what is held meanwhile."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nybble.passes.prune.masks import keep_mask, wanda_scores
from nybble.testing.models import Stack
from nybble.testing.models import sparsify_small as small
from nybble.testing.models import token_batches as ids
from nybble.weights.sparsity import Pattern


@pytest.fixture(autouse=True)
def _one_thread(threads) -> None:
    threads(1)


def inputs_of(model: nn.Module, names: list[str], data: Tensor) -> dict[str, Tensor]:
    """The rows that the named layers multiply when the model runs."""
    seen: dict[str, Tensor] = {}
    layers = {model.get_submodule(name): name for name in names}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.update({layers[layer]: args[0].flatten(0, -2)}))
        for layer in layers
    ]
    with torch.no_grad():
        model(data)
    for hook in hooks:
        hook.remove()
    return seen


class TestOrder:
    def test_wanda_sees_what_the_pruned_layers_before_put_out(self) -> None:
        model = Stack(depth=2)
        original, data = copy.deepcopy(model), ids(1)
        small(model, "50%", scheme=None, calibration=data)
        manual = copy.deepcopy(original)
        for stage in (["first"], ["blocks.0.up", "blocks.0.down"], ["blocks.1.up", "blocks.1.down"], ["head"]):
            seen = inputs_of(manual, stage, data[0])
            for name in stage:
                rows_used = [i for i in range(len(seen[name])) if i % 8 != 7]  # one in eight is held out
                layer = manual.get_submodule(name)
                scores = wanda_scores(layer.weight, seen[name][rows_used].double().norm(dim=0))
                with torch.no_grad():
                    layer.weight.mul_(keep_mask(scores, Pattern.parse("50%")))
        for name, tensor in manual.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), name

    def test_sparsegpt_sees_the_dense_models_inputs_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from nybble.model.inputs import Inputs

        model, data = Stack(depth=3), ids(1)
        wanted = inputs_of(model, ["blocks.0.up", "blocks.2.down"], data[0])
        seen: list[Tensor | None] = []
        original = Inputs.add

        def watching(self: Inputs, x: Tensor, dense: Tensor | None = None) -> None:
            seen.append(dense)
            original(self, x, dense)

        monkeypatch.setattr(Inputs, "add", watching)
        small(model, method="sparsegpt", scheme=None, calibration=data)
        # first; up and down of each block; head, whose dense inputs are gone by then.
        assert [dense is not None for dense in seen] == [False, True, True, True, True, True, True, False]
        assert seen[1] is not None
        assert seen[6] is not None
        assert torch.equal(seen[1], wanted["blocks.0.up"])
        assert torch.equal(seen[6], wanted["blocks.2.down"])

    def test_padding_does_not_count(self) -> None:
        tokens = ids(1)[0]
        padded = torch.cat((tokens, torch.zeros_like(tokens)), dim=1)
        mask = torch.cat((torch.ones_like(tokens), torch.zeros_like(tokens)), dim=1)
        a, b, c = Stack(), Stack(), Stack()
        b.load_state_dict(a.state_dict())
        c.load_state_dict(a.state_dict())
        small(a, scheme=None, calibration=[tokens])
        small(b, scheme=None, calibration=[{"ids": padded, "attention_mask": mask}])
        small(c, scheme=None, calibration=[{"ids": padded}])
        for name, tensor in a.state_dict().items():
            assert torch.equal(tensor, b.state_dict()[name]), name
        assert any(not torch.equal(tensor, c.state_dict()[name]) for name, tensor in a.state_dict().items())

    @pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"ids": x}])
    def test_kinds_of_batches(self, wrap: Any) -> None:
        model, plain = Stack(), Stack()
        plain.load_state_dict(model.state_dict())
        small(model, scheme=None, calibration=(wrap(x) for x in ids()))
        small(plain, scheme=None)
        assert all(torch.equal(t, plain.state_dict()[name]) for name, t in model.state_dict().items())

    def test_blocks_that_are_no_chain_are_pruned_with_the_rest(self) -> None:
        class Parallel(Stack):
            def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
                x = self.first(self.embed(ids))
                return self.head(sum(block(x)[0] for block in self.blocks))

        model = Parallel()
        assert len(small(model, method="sparsegpt").swapped) == 8

    def test_a_layer_that_no_data_reaches_gets_magnitude(self) -> None:
        model = Stack()
        model.idle = nn.Linear(8, 8)
        report = small(model)
        (pruned,) = (row.pruned for row in report.layers if row.name == "idle")
        assert pruned is not None
        assert pruned.method == "magnitude"
        assert "no calibration data" in pruned.notes[0]
        assert "no calibration data" in str(report)

    @pytest.mark.parametrize(("method", "times"), [("wanda", 1), ("sparsegpt", 4)])
    def test_only_one_blocks_activations_are_held(self, method: str, times: int) -> None:
        alive: list[weakref.ref[Tensor]] = []
        most = [0]

        def watch(_: nn.Module, __: Any, output: tuple[Tensor, None]) -> None:
            alive.append(weakref.ref(output[0]))
            gc.collect()
            most[0] = max(most[0], sum(ref() is not None for ref in alive))

        model = Stack(depth=8)
        originals = list(model.blocks)
        for block in originals:
            block.register_forward_hook(watch)
        gc.freeze()  # collecting looks at what comes from now on
        try:
            small(model, method=method, calibration=ids(3))
        finally:
            gc.unfreeze()
        # Three batches between two blocks, one on its way, and one in the hands of the model.
        assert len(alive) > 8 * 3
        assert most[0] <= times * 3 + 2

    def test_the_model_is_in_eval_mode_meanwhile_and_as_it_was_after(self) -> None:
        model = Stack()
        model.blocks[1].eval()
        modes: list[bool] = []
        model.embed.register_forward_hook(lambda *_: modes.append(model.training))
        small(model)
        assert modes
        assert not any(modes)
        assert model.training
        assert model.head.training
        assert not model.blocks[1].up.training
