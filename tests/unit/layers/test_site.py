"""The buffers of a step are reused, and grow without keeping the old ones."""

from __future__ import annotations

import torch

from apportion.layers.site import MAX_VIEWS, Activations


def test_a_slot_is_one_buffer():
    activations = Activations()
    large, small = activations.take("a", 5, 3), activations.take("a", 2, 3)
    assert large.shape == (5, 3) and small.shape == (2, 3) and small.data_ptr() == large.data_ptr()
    assert activations.take("a", 5, 3) is large
    assert activations.take("b", 5, 3).data_ptr() != large.data_ptr()


def test_growth_replaces_every_view():
    activations = Activations()
    first = activations.take("a", 2, 4)
    grown = activations.take("a", 9, 4)
    assert activations.take("a", 2, 4).data_ptr() == grown.data_ptr() != first.data_ptr()
    assert activations.take("a", 16, 4).data_ptr() == grown.data_ptr()  # room for the next power of two


def test_views_are_bounded():
    activations = Activations()
    first = activations.take("a", MAX_VIEWS + 10, 1)
    for count in range(1, MAX_VIEWS + 10):
        assert activations.take("a", count, 1).data_ptr() == first.data_ptr()
    assert len(activations._views) <= MAX_VIEWS
    assert activations.take("empty", 0, 4).shape == (0, 4)
    assert activations.take("a", 3, 1).dtype == torch.float32
