"""Small networks between detection tokens and predictions: projections, perceptrons, softmax classes as logits.

Source: ViDT and ViDT+ (arXiv 2110.03921, 2204.07962), specs/detectors.md B2 to B4.
Letters: B images, N tokens, C channels, K classes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Perceptron(nn.Module):
    """Three linear layers with ReLU between them; names are the original's.

    Args:
        dim: C, of the input and of both hidden layers.
        out_dim: width of the output.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, out_dim)])

    def forward(self, states: Tensor) -> Tensor:
        """[..., C] to [..., out_dim]."""
        for layer in self.layers[:-1]:
            states = F.relu(layer(states))
        out: Tensor = self.layers[-1](states)
        return out


def vector_head(dim: int, num_coefficients: int, bias: float) -> Perceptron:
    """Head of the masks' coefficients, which starts at 0 for the first two and at ``bias`` for the others."""
    head = Perceptron(dim, num_coefficients)
    last = head.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    with torch.no_grad():
        last.bias.copy_(F.pad(torch.zeros(2), (0, num_coefficients - 2), value=bias))
    return head


def map_projection(in_channels: int, dim: int) -> nn.Sequential:
    """1x1 convolution to C channels and group norm, for maps [B, in_channels, h, w]."""
    convolution = nn.Conv2d(in_channels, dim, 1)
    nn.init.xavier_uniform_(convolution.weight)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)
    return nn.Sequential(convolution, nn.GroupNorm(math.gcd(32, dim), dim))


def project_tokens(projection: nn.Sequential, tokens: Tensor) -> Tensor:
    """A map projection for tokens, [B, N, in_channels] to [B, N, C]; its group norm mixes the tokens of an image."""
    projected: Tensor = projection(rearrange(tokens, "b n c -> b c n 1"))
    return rearrange(projected, "b c n 1 -> b n c")


class NeckFreeHead(nn.Module):
    """Softmax classes, "no object" among them, and boxes from the body's tokens alone.

    Args:
        token_channels: width of the tokens.
        dim: C.
        num_classes: K.
    """

    def __init__(self, token_channels: int, dim: int, num_classes: int) -> None:
        super().__init__()
        self.input_proj = map_projection(token_channels, dim)
        self.class_embed = Perceptron(dim, num_classes + 1)
        self.bbox_embed = Perceptron(dim, 4)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, N, token_channels] to softmax logits [B, N, K + 1] and boxes cxcywh [B, N, 4]."""
        states = project_tokens(self.input_proj, tokens)
        return self.class_embed(states), self.bbox_embed(states).float().sigmoid()


def softmax_log_odds(logits: Tensor) -> Tensor:
    """Logits whose sigmoid is the softmax probability of each class.

    Args:
        logits: [..., K + 1], the last for "no object".

    Returns:
        float32 [..., K].
    """
    log_probability = logits.float().log_softmax(dim=-1)[..., :-1]
    rest = -torch.expm1(log_probability)
    return log_probability - rest.clamp(min=torch.finfo(torch.float32).eps).log()
