"""The suite checks the shapes that signatures promise."""

import pytest
import torch
from jaxtyping import TypeCheckError

from vqcore.diffusion import x_0


def test_a_wrong_shape_is_an_error_here():
    with pytest.raises(TypeCheckError):
        x_0(None, torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2))
