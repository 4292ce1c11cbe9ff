import pytest
import torch


@pytest.fixture
def all_double(monkeypatch):
    """Modelling code takes norms, softmax and losses in float32 whatever the model's type: here in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
