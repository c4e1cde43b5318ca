"""Blocks come back when the last tensor on them is gone, and no two tensors that live share memory."""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorafit import slabs
from lorafit.engine import workspace


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(workspace, "_pool", workspace._Pool())
    monkeypatch.setattr(workspace, "_largest", 0)
    yield


LIKE = torch.zeros(0, dtype=torch.bfloat16)


def take(count: int = 600) -> Tensor:
    return workspace.rows(LIKE, count, 8, 64)


def test_a_block_is_used_again_once_every_view_of_it_is_gone() -> None:
    first = take()
    where, view = first.data_ptr(), first[5:, 0]
    del first
    assert take().data_ptr() != where  # its view still lies there
    del view
    assert take().data_ptr() == where


def test_what_autograd_saved_is_not_taken_away() -> None:
    x = take().fill_(3.0).requires_grad_()
    where, y = x.data_ptr(), (x.detach().requires_grad_() * 2)
    leaf = x.detach().requires_grad_()
    product = leaf * leaf
    del x, y
    assert all(take().data_ptr() != where for _ in range(3))
    product.sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad == 6).all()


def test_shorter_batches_use_the_blocks_of_the_longest() -> None:
    first = take(600)
    where = first.data_ptr()
    del first
    shorter = take(500)
    assert shorter.shape == (500, 8, 64)
    assert shorter.data_ptr() == where
    assert shorter.is_contiguous()


def test_tensors_that_live_do_not_overlap() -> None:
    live = [take(600).fill_(number) for number in range(40)] + [workspace.block(LIKE, 256, 1000).fill_(40)]
    assert all((x == number).all() for number, x in enumerate(live))
    assert all(x.data_ptr() % slabs.ALIGNMENT == 0 for x in live)


def test_an_idle_pool_is_given_up_and_one_in_use_is_not() -> None:
    kept = take().fill_(7.0)
    pool = workspace._pool
    workspace.release()
    assert workspace._pool is pool
    del kept
    workspace.release()
    assert workspace._pool is not pool


def test_small_and_empty_tensors_and_other_devices_are_torchs_own() -> None:
    assert workspace.rows(LIKE, 2, 3).shape == (2, 3)
    assert workspace.rows(LIKE, 0, 4096).shape == (0, 4096)
    assert workspace.rows(torch.empty(0, device="meta"), 600, 512).device.type == "meta"


def test_memory_in_slabs_takes_any_size() -> None:
    for shape in ((0,), (3,), (300, 1000), (2, 3, 50_000), (slabs.SLAB_BYTES // 2 + 1,)):
        x = slabs.empty(shape, torch.bfloat16)
        assert x.shape == shape and x.dtype == torch.bfloat16 and x.is_contiguous()
        assert x.fill_(1).eq(1).all()


def test_what_a_tensor_leaves_is_given_to_the_next_joined_with_its_neighbours() -> None:
    own = slabs.Slabs()
    parts = [own.take(100_000) for _ in range(4)]
    where = [part.ctypes.data for part in parts]
    del parts[1], parts[1]
    assert own.take(200_000).ctypes.data == where[1]
    again = own.take(60_000)  # the last one is gone already; this fits best where two were
    assert again.ctypes.data == where[1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40 << 20)), max_size=40))
def test_pieces_never_overlap_and_all_comes_back(steps: list[tuple[int, int]]) -> None:
    own = slabs.Slabs()
    live: dict[int, slabs.Piece] = {}
    for number, size in steps:
        live.pop(number, None)
        live[number] = own.take(size)
        spans = sorted((piece.ctypes.data, piece.ctypes.data + len(piece)) for piece in live.values())
        assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
        assert all(begin % slabs.ALIGNMENT == 0 for begin, _ in spans)
    live.clear()
    own.release()
    assert own._slabs == []


def resident(memory: slabs.Piece, size: int) -> int:
    """Bytes of the `size` from a piece on that the system holds in memory."""
    first = memory.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    pages = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(first), ctypes.c_size_t(size), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which pages are there")
def test_release_hands_free_pages_back_to_the_system_and_keeps_what_lives() -> None:
    own = slabs.Slabs()
    kept, large = own.take(4096), own.take(40 << 20)
    kept[:], large[:] = 7, 1
    assert resident(kept, 40 << 20) == 40 << 20
    del large
    own.release()
    assert resident(kept, 40 << 20) <= 4 << 20  # a huge page may stay whole
    assert (kept == 7).all()


@pytest.mark.skipif(
    sys.platform != "linux" or tuple(map(int, platform.release().split(".")[:2])) < (5, 14),
    reason="Linux fetches pages ahead since 5.14",
)
def test_reserved_memory_is_there_before_it_is_written_to_and_is_what_is_taken_next() -> None:
    own = slabs.Slabs()
    own.reserve(40 << 20)
    first = own.take(10 << 20)
    first[:] = 5
    for filling in own._filling:
        filling.join()
    assert resident(first, 40 << 20) == 40 << 20
    following = own.take(10 << 20)
    assert following.ctypes.data == first.ctypes.data + (10 << 20)
    own.release()
    assert resident(first, 40 << 20) <= 24 << 20
    assert (first == 5).all()


def test_scratch_is_kept_until_more_is_asked_for() -> None:
    first = workspace.scratch("test", 1000)
    assert workspace.scratch("test", 500) == first
    assert workspace.scratch("another", 500) != first
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(workspace.scratch("test", 1000)))
    thread.start()
    thread.join()
    assert elsewhere != [first]


def test_what_a_rate_was_measured_on_does_not_make_later_blocks_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_largest", 0)
    monkeypatch.setattr(workspace, "_pool", workspace._Pool())
    like = torch.empty(0)
    large = workspace.rows(like, 4096, 64)
    del large
    workspace.forget()
    small = workspace.rows(like, 512, 64)
    assert small.untyped_storage().nbytes() == 512 * 64 * 4
    assert list(workspace._pool.made) == [512 * 64 * 4]
