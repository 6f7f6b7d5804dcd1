"""Layers as vLLM has them on CPUs: they compute with what was packed from their weights."""

from __future__ import annotations

from collections.abc import Callable

import torch

from checkpoint_engine.loading.vllm.on_cpu import CpuRepairs


class Packing:
    """A quantisation method that packs, which is to say copies."""

    def __init__(self) -> None:
        self.packed = 0

    def process_weights_after_loading(self, layer: Layer) -> None:
        self.packed += 1
        packed = layer.weight.clone()
        layer.cpu_linear = lambda x: x @ packed.t()


class Layer(torch.nn.Module):
    cpu_linear: Callable[[torch.Tensor], torch.Tensor]

    def __init__(self, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None
        self.quant_method = Packing()


def test_a_tied_head_computes_with_the_new_weights() -> None:
    """vLLM loads and packs the embedding alone."""
    embedding = Layer(torch.nn.Parameter(torch.zeros(2, 2), requires_grad=False))
    head, other = Layer(embedding.weight), Layer(torch.nn.Parameter(torch.ones(2, 2)))
    model = torch.nn.ModuleList([embedding, head, other])
    for layer in (embedding, head, other):
        layer.quant_method.process_weights_after_loading(layer)
    repairs = CpuRepairs(model.modules())
    repairs.begin()
    embedding.weight.fill_(3.0)
    embedding.quant_method.process_weights_after_loading(embedding)
    repairs.pack_tied()
    repairs.end()
    assert head.cpu_linear(torch.eye(2)).tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert [layer.quant_method.packed for layer in (embedding, head, other)] == [2, 2, 1]
