"""Linear maps as every model here has them."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from kmixer.layers.roles import Role, linear_roles
from kmixer.ops.linear import linear_map

INITIAL_STD = 0.02


class Linear(nn.Linear):
    """torch's linear layer, on a CPU by the compiled kernel."""

    def roles(self) -> dict[str, Role]:
        return linear_roles(self)

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... m"]:
        return linear_map(x, self.weight, self.bias)


def linear(inputs: int, outputs: int, *, bias: bool = True) -> Linear:
    """A linear map with weights from N(0, 0.02^2) and bias 0."""
    layer = Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=INITIAL_STD)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
