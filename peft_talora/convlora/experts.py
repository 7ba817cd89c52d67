"""The experts of Conv-LoRA, exactly, without an up-sampled map.

Expert e works at the scale s = e + 1: it enlarges a grid of tokens s times (bicubic), applies a 3x3 convolution and GELU,
and shrinks the result again (bicubic). Shrinking without antialiasing reads few fine positions of each token: a patch of
4 x 4, or only one for odd s. So only the fine positions that are read, and their neighbours under the convolution, are
computed, axis by axis:

    6 fine rows per token --3x3 kernel, along y--> 4 rows --fine columns and kernel, along x--> 4 x 4 --GELU--> 1

Fine positions have the same offsets from their token everywhere. What differs near the border (replicated tokens, the zero
padding of the convolution) is in small matrices, built for every scale and picked by the routed expert. All shapes depend
on the shape of the grid alone, whatever the routing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# torch's bicubic interpolation
_CUBIC = -0.75
# its weights for a shrinking by an even factor: the four positions around the token's centre, in 1/32
_EVEN_WEIGHTS = (-3, 19, 19, -3)
# how many tokens away a needed fine position can read (scale 2 reads 3, the others 2)
_REACH = 3
# The matrices along an axis are dense: axes longer than this are cut into tiles. The size of a tile does not depend on the
# length, so that a compiler can leave the length open.
_MAX_UNCUT = 32
_TILE = 16


def expert_outputs(z: Tensor, index: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """E_e(Z) = down_s(GELU(conv_e(up_s(Z)))) with s = e + 1, for the expert e of each sample.

    Args:
        z: Tokens on their grid, (B, H, W, r).
        index: The expert of each sample, LongTensor (B,) in 0..n-1.
        weight: Kernels of the experts, (n, r, r, 3, 3).
        bias: (n, r).

    Returns:
        (B, H, W, r). Experts that no sample uses get zero gradients.
    """
    rank, num_experts = z.shape[3], weight.shape[0]
    rows, columns = _Axis(z.shape[1], num_experts, z), _Axis(z.shape[2], num_experts, z)
    # every tile of a sample is a sample of its own in between
    tokens = _cut(z, rows, columns)
    expert, row_key, column_key = _keys(index, rows, columns)
    number = tokens.shape[0]

    # up-sample along y, to 6 fine rows per token: (N, r * 6, h * read columns)
    up = rows.upsampling().reshape(-1, 6 * rows.size, rows.num_read)[row_key.repeat_interleave(rank)]
    fine = torch.bmm(up, tokens.reshape(number * rank, rows.num_read, columns.num_read))
    fine = fine.reshape(number, 6 * rank, rows.size * columns.num_read)
    # the kernel along y, its three columns apart: (N, 4 * r * 3, h * read columns)
    mixed = torch.baddbmm(_biases_along_y(bias)[expert], _kernels_along_y(weight)[expert], fine)
    # up-sample along x to the 4 fine columns under each of the three, and sum: (N, 4 * r * h, 4 * w)
    mixed = mixed.reshape(number, 4 * rank, 3, rows.size, columns.num_read).transpose(2, 3)
    mixed = mixed.reshape(number, 4 * rank * rows.size, 3 * columns.num_read)
    patches = F.gelu(torch.bmm(mixed, columns.upsampling_under_kernel()[column_key]))
    # down-sample along x, then y: (N, r, h, w)
    shrunk = torch.bmm(patches, columns.downsampling_matrix()[column_key])
    shrunk = shrunk.reshape(number, 4, rank, rows.size, columns.size)
    shrunk = (shrunk * rows.downsampling()[row_key][:, :, None, :, None]).sum(1)
    return _join(shrunk, z.shape, rows, columns)


def _cut(z: Tensor, rows: _Axis, columns: _Axis) -> Tensor:
    """The tokens that each tile reads: (B, H, W, r) -> (B * tiles, r, read rows, read columns)."""
    batch, rank = z.shape[0], z.shape[3]
    z = columns.take(rows.take(z, 1), 2)
    z = z.reshape(batch, rows.tiles, rows.num_read, columns.tiles, columns.num_read, rank).permute(0, 1, 3, 5, 2, 4)
    return z.reshape(batch * rows.tiles * columns.tiles, rank, rows.num_read, columns.num_read)


def _join(tiles: Tensor, shape: torch.Size, rows: _Axis, columns: _Axis) -> Tensor:
    """The tiles side by side: (B * tiles, r, h, w) -> (B, H, W, r)."""
    batch, height, width, rank = shape
    tiles = tiles.reshape(batch, rows.tiles, columns.tiles, rank, rows.size, columns.size).permute(0, 1, 4, 2, 5, 3)
    tiles = tiles.reshape(batch, rows.tiles * rows.size, columns.tiles * columns.size, rank)
    return tiles[:, :height, :width]


def _keys(index: Tensor, rows: _Axis, columns: _Axis) -> tuple[Tensor, Tensor, Tensor]:
    """Of each tile, the expert and the entries in the tables of the axes, (B * tiles,) each."""
    tiled = (index.shape[0], rows.tiles, columns.tiles)
    expert = index[:, None, None].expand(tiled)
    row_key = expert + rows.num_experts * rows.arange(rows.tiles)[:, None]
    column_key = expert + columns.num_experts * columns.arange(columns.tiles)
    return expert.flatten(), row_key.flatten(), column_key.flatten()


class _Axis:
    """One axis of the grid, cut into tiles of one size, each with the tokens that it reads.

    Fine positions of a token are numbered j = 0..5; those that are read by the down-sampling are j = 1..4.

    Args:
        length: Number of tokens.
        num_experts: Number n of scales.
        like: A tensor with the data type and device of the matrices.
    """

    def __init__(self, length: int, num_experts: int, like: Tensor) -> None:
        self.length, self.num_experts = length, num_experts
        self.dtype, self.device = like.dtype, like.device
        if length <= _MAX_UNCUT:
            self.tiles, self.size, self.num_read, margin = 1, length, length, 0
        else:
            # the last tile may reach beyond the axis; what it computes there is dropped
            self.tiles = (length + _TILE - 1) // _TILE
            self.size, self.num_read, margin = _TILE, _TILE + 2 * _REACH, _REACH
        first = self.arange(self.tiles)[:, None] * self.size
        # number of each tile's tokens, and of those that it reads: (tiles, size), (tiles, num_read)
        self.token = first + self.arange(self.size)
        self.read = first - margin + self.arange(self.num_read)
        self.scale = self.arange(1, num_experts + 1)
        # the fine position j of token i has the number s * i + first_fine + j
        self.first_fine = torch.div(self.scale - 1, 2, rounding_mode="floor") - 2

    def arange(self, *limits: int) -> Tensor:
        return torch.arange(*limits, device=self.device)

    def take(self, z: Tensor, dim: int) -> Tensor:
        """The tokens that the tiles read, one tile after the other; beyond the border that at the border."""
        if self.length <= _MAX_UNCUT:
            return z
        return z.index_select(dim, self.read.clamp(0, self.length - 1).flatten())

    def upsampling(self) -> Tensor:
        """Fine positions from the tokens read, (tiles, n, 6, size, num_read); zero outside of the fine map."""
        reads = self._reads().to(self.dtype)
        matrices = (self._taps() @ reads.flatten(2)).reshape(self.tiles, self.num_experts, 6, self.size, self.num_read)
        return matrices * self._is_inside().to(self.dtype)[..., None]

    def _taps(self) -> Tensor:
        """Weight of the token at distance -3..3 for each fine position, (n * 6, 7)."""
        scale, j, step = self.scale[:, None, None], self.arange(6)[:, None], self.arange(-_REACH, _REACH + 1)
        # distance between the centres, in 1 / (2 s) tokens
        distance = (2 * (self.first_fine[:, None, None] + j) + 1 - scale - 2 * scale * step).abs()
        d = distance.to(torch.promote_types(self.dtype, torch.float32)) / (2 * scale)
        near = ((_CUBIC + 2) * d - (_CUBIC + 3)) * d * d + 1
        far = _CUBIC * (((d - 5) * d + 8) * d - 4)
        taps = torch.where(d <= 1, near, torch.where(d < 2, far, 0))
        return taps.flatten(0, 1).to(self.dtype)

    def _reads(self) -> Tensor:
        """Whether a token's neighbour at distance -3..3 is that token of those read, bool (tiles, 7, size, num_read)."""
        neighbour = self.token[:, None, :, None] + self.arange(-_REACH, _REACH + 1)[:, None, None]
        read = self.read[:, None, None, :]
        # an uncut axis has no tokens beyond the border to read
        return torch.minimum(torch.maximum(neighbour, read[..., :1]), read[..., -1:]) == read

    def _is_inside(self) -> Tensor:
        """Whether a fine position lies on the fine map, bool (tiles, n, 6, size)."""
        scale = self.scale[:, None, None]
        fine = scale * self.token[:, None, None, :] + self.first_fine[:, None, None] + self.arange(6)[:, None]
        return (fine >= 0) & (fine < scale * self.length)

    def upsampling_under_kernel(self) -> Tensor:
        """The fine positions j = b + dx under the three columns dx of a kernel at b = 0..3.

        Returns:
            (tiles * n, 3 * num_read, 4 * size)
        """
        matrices = self.upsampling().unfold(2, 4, 1).permute(0, 1, 2, 4, 5, 3)
        return matrices.reshape(-1, 3 * self.num_read, 4 * self.size)

    def downsampling(self) -> Tensor:
        """Weights of the fine positions j = 1..4 of each token, (tiles * n, 4, size)."""
        position = self.arange(4)
        even = sum(weight * (position == a) for a, weight in enumerate(_EVEN_WEIGHTS))
        weights = torch.where(self.scale[:, None] % 2 == 1, 32 * (position == 1), even)[..., None]
        # a position outside of the fine map (scale 2 has them) counts as its neighbour on the border
        inside = self._is_inside()[:, :, 1:5]
        outside = torch.where(inside, 0, weights).unflatten(2, (2, 2)).flip(3).flatten(2, 3)
        return ((torch.where(inside, weights, 0) + outside).to(self.dtype) / 32).flatten(0, 1)

    def downsampling_matrix(self) -> Tensor:
        """The same weights along the diagonals, (tiles * n, 4 * size, size)."""
        diagonal = torch.eye(self.size, dtype=self.dtype, device=self.device)
        return (self.downsampling()[..., None] * diagonal).flatten(1, 2)


def _kernels_along_y(weight: Tensor) -> Tensor:
    """Kernels sliding over six fine rows: (n, r, r, 3, 3) -> (n, 4 * r * 3, r * 6), output rows (a, o, dx)."""
    num_experts, rank = weight.shape[:2]
    # (n, o, dx, c, dy), moved by a
    weight = weight.permute(0, 1, 4, 2, 3)
    sliding = torch.stack([F.pad(weight, (a, 3 - a)) for a in range(4)], dim=1)
    return sliding.reshape(num_experts, 12 * rank, 6 * rank)


def _biases_along_y(bias: Tensor) -> Tensor:
    """(n, r) -> (n, 4 * r * 3, 1): added under the kernel's central column, whose weights along x sum to 1."""
    return F.pad(bias[:, None, :, None], (1, 1)).expand(-1, 4, -1, -1).reshape(bias.shape[0], -1, 1)
