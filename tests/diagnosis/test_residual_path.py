"""How attention comes to the residual: what is seen of a layer, and what a part of the heads adds, by hand."""

import torch
from torch import nn

from diagnostics.diagnosis.capture.residual_path import Addition, LayerWatch, Shown


def test_gate_norm_and_multiplier_count_together_and_biases_count_for_no_part():
    torch.manual_seed(0)
    projection, multiplier = nn.Linear(6, 4, bias=True), 0.22
    heads, gate, scale = torch.randn(3, 6), torch.rand(3, 6) + 0.5, torch.rand(3, 4) + 0.5
    left = projection(heads * gate)
    addition = Addition.of(projection, multiplier, heads, Shown(entered=heads * gate, left=left, added=left * scale))
    parts = heads * (torch.arange(6) < 2), heads * (torch.arange(6) >= 2)
    for part in parts:
        expected = (part * gate) @ projection.weight.T * scale * multiplier
        torch.testing.assert_close(addition(part), expected)
    torch.testing.assert_close(sum(map(addition, parts)) + addition.constant(heads), left * scale * multiplier)


class AddsInPlace(nn.Module):
    """A layer that writes what its attention gives into the residual it was called with."""

    def __init__(self):
        super().__init__()
        self.attention, self.norm, self.mlp = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, hidden_states):
        hidden_states += self.attention(hidden_states)
        return hidden_states + self.mlp(self.norm(hidden_states))


@torch.no_grad()
def test_what_a_layer_adds_in_place_is_seen():
    torch.manual_seed(0)
    layer, shown = AddsInPlace(), []
    handles = list(LayerWatch(layer, layer.attention).hooks(lambda _, gained: shown.append(gained)))
    hidden = torch.randn(1, 3, 4)
    before = hidden.clone()
    output = layer(hidden)
    for handle in handles:
        handle.remove()
    (gained,) = shown
    torch.testing.assert_close(gained.residual, before)
    torch.testing.assert_close(gained.attention, layer.attention(before))
    torch.testing.assert_close(gained.total, output - before)
    torch.testing.assert_close(gained.attention + sum(gained.others), gained.total)
