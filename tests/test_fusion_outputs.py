"""Memory of what chains return: used again only when nothing refers to it."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import nybble
from nybble.fusion.outputs import _KEPT, empty

ROWS, WIDTH = 256, 512  # of float32: more than the allocator keeps itself


def test_it_is_used_again_once_nothing_refers_to_it():
    first = empty(ROWS, WIDTH, torch.float32)
    assert first.shape == (ROWS, WIDTH)
    assert first.is_contiguous()
    assert first.data_ptr() % 64 == 0
    address = first.data_ptr()
    del first
    assert empty(ROWS, WIDTH - 8, torch.float32).data_ptr() == address
    assert empty(ROWS // 4, WIDTH, torch.float32).data_ptr() != address  # it would take up four times its size


@pytest.mark.parametrize("keep", [lambda y: y[3:, 5], lambda y: y.numpy(), lambda y: y.untyped_storage(), lambda y: y])
def test_it_is_kept_while_anything_refers_to_it(keep):
    y = empty(ROWS, WIDTH, torch.float32)
    address, kept = y.data_ptr(), keep(y)
    del y
    assert all(empty(ROWS, WIDTH, torch.float32).data_ptr() != address for _ in range(3))
    del kept


def test_many_outputs_at_a_time_have_memory_of_their_own():
    held = [empty(ROWS, WIDTH, torch.float32).fill_(i) for i in range(3 * _KEPT)]
    assert all((one == i).all() for i, one in enumerate(held))


def test_threads_do_not_share_it():
    y, found = empty(ROWS, WIDTH, torch.float32), []
    address = y.data_ptr()
    del y
    thread = threading.Thread(target=lambda: found.append(empty(ROWS, WIDTH, torch.float32)))
    thread.start()
    thread.join()
    assert found[0].data_ptr() != address


def test_small_ones_are_left_to_the_allocator():
    y = empty(4, 8, torch.float32)
    assert y.shape == (4, 8)
    assert not y._is_view()


def test_a_call_leaves_nothing_for_the_garbage_collection():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True).eval()
    nybble.quantize(model, "w8a8", goal="memory")
    report = nybble.fuse(model, [torch.randn(2, 8, 64)], goal="always")
    assert len(report.chains) == 1
    x = torch.randn(2, 8, 64)
    gc.disable()
    try:
        with torch.no_grad():
            y = model(x)
        refs = [weakref.ref(x), weakref.ref(y)]
        del x, y
        assert [one() for one in refs] == [None, None]
    finally:
        gc.enable()
