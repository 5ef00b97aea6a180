"""Each connector's arithmetic against the published formula, written out once more in loops, and recorded numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.model.connectors import (
    CONNECTORS,
    MLP,
    AvgPool,
    CAbstractor,
    Compressor,
    Connector,
    PatchMerger,
    PixelShuffleMLP,
    Resampler,
    SpatialResampler,
    TokenPacker,
    build,
    pixel_shuffle,
)
from qformer.types import UsageError

CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def lively(connector: Connector) -> Connector:
    """Random weights and biases that are large enough to matter, but fixed places."""
    torch.manual_seed(0)
    for name, parameter in connector.named_parameters():
        if name != "pos_embed":
            nn.init.normal_(parameter, std=0.4)
    return connector.eval()


def tokens(count: int, grid: tuple[int, int], width: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(count, grid[0] * grid[1], width)


def two_layers(x: Tensor, layers: nn.Sequential) -> Tensor:
    first, second = layers[-3], layers[-1]
    hidden = x @ first.weight.T + first.bias
    return F.gelu(hidden) @ second.weight.T + second.bias


def test_pixel_shuffle_as_released() -> None:
    """InternVL's own outputs for 6x8 patches that count up; version 1 swaps rows and columns."""
    counting = torch.arange(384.0).view(2, 6, 8, 4)
    kept, swapped = pixel_shuffle(counting), pixel_shuffle(counting, transpose=True)
    assert kept.shape == (2, 3, 4, 16)
    assert kept[0, 0, 1].tolist() == [*range(8, 16), *range(40, 48)]
    assert kept[1, 2, 3].tolist() == [*range(344, 352), *range(376, 384)]
    assert swapped.shape == (2, 4, 3, 16)
    assert swapped[0, 1, 0].tolist() == kept[0, 0, 1].tolist()


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_pixel_shuffle_mlp(version: str) -> None:
    connector = lively(build("pixel_shuffle_mlp", 3, 5, version=version))
    assert isinstance(connector, PixelShuffleMLP)
    grid = (2, 4)
    x = tokens(2, grid, 3)
    blocks = torch.stack([x[:, [0, 1, 4, 5]].flatten(1), x[:, [2, 3, 6, 7]].flatten(1)], dim=1)
    norm = connector.mlp[0]
    expected = two_layers(F.layer_norm(blocks, (12,), norm.weight, norm.bias), connector.mlp)
    made = connector.project(x, grid)
    assert made.shape == ((2, 2, 1, 5) if version == "v1" else (2, 1, 2, 5))
    torch.testing.assert_close(made.flatten(1, 2), expected, **CLOSE)


def test_merger() -> None:
    connector = lively(PatchMerger(3, 5))
    x = tokens(1, (2, 4), 3)
    normed = F.layer_norm(x, (3,), connector.ln_q.weight, connector.ln_q.bias, 1e-6)
    blocks = torch.stack([normed[:, [0, 1, 4, 5]].flatten(1), normed[:, [2, 3, 6, 7]].flatten(1)], dim=1)
    torch.testing.assert_close(connector.project(x, (2, 4))[:, 0], two_layers(blocks, connector.mlp), **CLOSE)


def test_mlp_and_a_second_one() -> None:
    one, two = lively(MLP(3, 5, hidden=7)), lively(MLP(3, 5, adapters=2))
    assert isinstance(one, MLP)
    assert isinstance(two, MLP)
    x = tokens(2, (2, 3), 3)
    torch.testing.assert_close(one.project(x, (2, 3)).flatten(1, 2), two_layers(x, one.mlp), **CLOSE)
    mixed = two.project(torch.stack([x, -x], dim=2).flatten(1, 2), (2, 3))
    assert mixed.shape == (2, 2, 6, 5)
    torch.testing.assert_close(mixed.flatten(1, 2)[:, ::2], two_layers(x, two.mlp), **CLOSE)
    torch.testing.assert_close(mixed.flatten(1, 2)[:, 1::2], two_layers(-x, two.second), **CLOSE)


def attend(query: Tensor, keys: Tensor, values: Tensor, attn: nn.MultiheadAttention) -> Tensor:
    """One query float[L] over keys and values float[k, L], head by head."""
    weights, biases = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((query[None], keys, values), weights, biases, strict=True))
    heads = []
    for part in torch.arange(len(query)).chunk(attn.num_heads):
        scores = (k[:, part] @ q[0, part]) / math.sqrt(len(part))
        heads.append(scores.softmax(dim=0) @ v[:, part])
    return torch.cat(heads) @ attn.out_proj.weight.T + attn.out_proj.bias


def places(side: int, width: int) -> Tensor:
    found = torch.zeros(side * side, width)
    quarter = width // 4
    for row, column, i in np.ndindex(side, side, quarter):
        for half, place in enumerate((column, row)):
            angle = place / 10000 ** (i / quarter)
            found[row * side + column, half * 2 * quarter + i] = math.sin(angle)
            found[row * side + column, half * 2 * quarter + quarter + i] = math.cos(angle)
    return found


def read_tile(connector: Resampler, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as the formula has them."""
    side = math.isqrt(connector.queries)
    table = places(side, connector.proj.shape[0])
    torch.testing.assert_close(connector.pos_embed.data, table, atol=1e-6, rtol=0)
    width = (table.shape[1],)
    values = F.layer_norm(x @ connector.kv_proj.weight.T, width, connector.ln_kv.weight, connector.ln_kv.bias, 1e-6)
    moved = F.interpolate(table.T.view(1, -1, side, side), grid, mode="bicubic", align_corners=False)
    keys = values + moved.flatten(2)[0].T
    queries = F.layer_norm(connector.query, width, connector.ln_q.weight, connector.ln_q.bias, 1e-6) + table
    return queries, keys, values


def finish(connector: Resampler, rows: list[Tensor]) -> Tensor:
    post = connector.ln_post
    read = torch.stack(rows)
    return F.layer_norm(read, read.shape[1:], post.weight, post.bias, 1e-6) @ connector.proj


@pytest.mark.parametrize("grid", [(3, 3), (1, 7)])
def test_resampler(grid: tuple[int, int]) -> None:
    connector = lively(Resampler(6, 8, queries=9, heads=2))
    assert isinstance(connector, Resampler)
    x = tokens(2, grid, 6)
    made = connector.project(x, grid)
    for one, row in zip(x, made, strict=True):
        queries, keys, values = read_tile(connector, one, grid)
        torch.testing.assert_close(
            row, finish(connector, [attend(q, keys, values, connector.attn) for q in queries]), **CLOSE
        )


def roi_align(image: Tensor, box: tuple[float, ...], bins: tuple[int, int]) -> Tensor:
    """Torchvision's ROI-Align, not aligned and with adaptive samples, of a box (x0, y0, x1, y1) of float[h, w, L]."""
    x0, y0, x1, y1 = box
    width, height = max(x1 - x0, 1.0), max(y1 - y0, 1.0)
    columns, rows = bins
    samples = math.ceil(height / rows - 1e-9), math.ceil(width / columns - 1e-9)
    made = torch.zeros(rows, columns, image.shape[2])
    for row, column, i, j in np.ndindex(rows, columns, *samples):
        y = y0 + (row + (i + 0.5) / samples[0]) * height / rows
        x = x0 + (column + (j + 0.5) / samples[1]) * width / columns
        if y > image.shape[0] or x > image.shape[1]:
            continue
        y, x = min(y, image.shape[0] - 1), min(x, image.shape[1] - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
        upper = image[top, left] * (1 - x + left) + image[top, right] * (x - left)
        lower = image[bottom, left] * (1 - x + left) + image[bottom, right] * (x - left)
        made[row, column] += (upper * (1 - y + top) + lower * (y - top)) / math.prod(samples)
    return made


#: (rows, columns) of patches, and (columns, rows) of what a query reads; 3x14 has cells narrower than a patch.
CELLS = [((12, 12), (3, 3)), ((6, 10), (3, 2)), ((9, 5), (2, 4)), ((3, 14), (4, 2))]


@pytest.mark.parametrize(("grid", "bins"), CELLS)
def test_spatial_resampler(grid: tuple[int, int], bins: tuple[int, int]) -> None:
    connector = lively(SpatialResampler(6, 8, queries=16, heads=2))
    assert isinstance(connector, SpatialResampler)
    x = tokens(1, grid, 6)
    queries, keys, values = read_tile(connector, x[0], grid)
    rows = []
    height, width = (length / 4 for length in grid)
    for query, (row, column) in zip(queries, np.ndindex(4, 4), strict=True):
        box = column * width, row * height, (column + 1) * width, (row + 1) * height
        read = [roi_align(part.view(*grid, 8), box, bins).flatten(0, 1) for part in (keys, values)]
        rows.append(attend(query, *read, connector.attn))
    torch.testing.assert_close(connector.project(x, grid)[0], finish(connector, rows), **CLOSE)


def test_resamplers_count_published_heads_and_need_no_map_between_equal_widths() -> None:
    assert Resampler(256, 256, queries=4).attn.num_heads == 2
    assert not any(name.startswith("kv_proj") for name in Resampler(256, 256, queries=4).state_dict())
    trained = {name for name, weight in SpatialResampler(6, 8, queries=4).named_parameters() if weight.requires_grad}
    assert "pos_embed" not in trained
    assert {"query", "proj", "kv_proj.weight", "attn.in_proj_weight", "ln_post.bias"} < trained


@pytest.mark.parametrize("side", [1, 2, 4])
def test_compressor(side: int) -> None:
    """Of one key the softmax is 1: pictures are doubled."""
    connector = lively(Compressor(3, 5, inner=4))
    assert isinstance(connector, Compressor)
    grid = (4, 8)
    x = tokens(1, grid, 3)
    board, expected = x.view(4, 8, 3), []
    for row in range(0, 4, side):
        for column in range(0, 8, side):
            block = board[row : row + side, column : column + side].reshape(-1, 3)
            mean = block.mean(dim=0)
            query = connector.vlm_query_projector(mean)
            scores = connector.vlm_key_projector(block) @ query / 2  # the root of 4
            expected.append(mean + scores.softmax(dim=0) @ block)
    made = connector.compress(x, grid, side)
    torch.testing.assert_close(made[0], torch.stack(expected), **CLOSE)
    if side == 1:
        torch.testing.assert_close(made, 2 * x, **CLOSE)
    projected = connector.project(x, grid, side)
    assert projected.shape == (1, 4 // side, 8 // side, 5)
    torch.testing.assert_close(projected.flatten(1, 2), two_layers(made, connector.proj), **CLOSE)


def test_average_pooling() -> None:
    connector = lively(AvgPool(3, 5, queries=4))
    assert isinstance(connector, AvgPool)
    board = tokens(1, (4, 6), 3).view(4, 6, 3)
    means = torch.stack([board[r : r + 2, c : c + 3].mean(dim=(0, 1)) for r in (0, 2) for c in (0, 3)])
    torch.testing.assert_close(
        connector.project(board.view(1, 24, 3), (4, 6))[0], two_layers(means, connector.mlp), **CLOSE
    )


def test_c_abstractor() -> None:
    """RegNet's block by the functions of torch, for one block before the pooling and one behind it."""
    connector = lively(CAbstractor(4, 5, queries=4, hidden=8, depth=1, side=4))
    assert isinstance(connector, CAbstractor)

    def convolve(x: Tensor, part: nn.Module, groups: int = 1) -> Tensor:
        made = F.conv2d(x, part.conv.weight, padding="same", groups=groups).permute(0, 2, 3, 1)
        return F.layer_norm(made, made.shape[3:], part.bn.weight, part.bn.bias, 1e-6).permute(0, 3, 1, 2)

    def block(x: Tensor, part: nn.Module) -> Tensor:
        made = F.silu(convolve(F.silu(convolve(x, part.conv1)), part.conv2, groups=8))
        squeezed = part.se.fc2(F.silu(part.se.fc1(F.adaptive_avg_pool2d(made, 1))))
        made = convolve(made * squeezed.sigmoid(), part.conv3)
        return F.silu(made + (x if x.shape[1] == 8 else convolve(x, part.downsample)))

    x = tokens(1, (4, 4), 4)
    board = (x + connector.pos_emb).mT.view(1, 4, 4, 4)
    pooled = F.avg_pool2d(block(board, connector.net[0].b1), 2)
    read = block(pooled, connector.net[2].b1).flatten(2).mT
    first, _, second = connector.readout
    expected = F.silu(read @ first.weight.T + first.bias) @ second.weight.T + second.bias
    torch.testing.assert_close(connector.project(x, (4, 4)), expected, **CLOSE)
    assert connector.net[0].b1.se.fc1.out_channels == 1  # a quarter of what comes in
    assert connector.project(tokens(1, (3, 5), 4), (3, 5)).shape == (1, 4, 5)


@pytest.mark.parametrize(("scale", "levels"), [(2, 1), (3, 2)])
def test_token_packer(scale: int, levels: int) -> None:
    """The query is the last level's, which comes first; keys and values are made of all levels, the last one last."""
    connector = lively(TokenPacker(4 * levels, 5, scale=scale, levels=levels))
    assert isinstance(connector, TokenPacker)
    grid = (scale, 2 * scale)
    x = tokens(1, grid, 4 * levels)
    last = x[..., :4].mT.view(1, 4, *grid)
    points = F.interpolate(last, (1, 2), mode="bilinear", align_corners=False).flatten(2)[0].T
    if scale == 2:  # which is the mean of a block
        torch.testing.assert_close(points[0], x.view(2, 4, 4)[:, :2].mean(dim=(0, 1)), **CLOSE)
    queries = F.layer_norm(
        points @ connector.q_proj_1.weight.T, (4,), connector.ln_q_1.weight, connector.ln_q_1.bias, 1e-6
    )
    ascending = torch.cat(list(reversed(x[0].split(4, dim=1))), dim=1)  # as the released code puts its hidden states
    parts = []
    for layers, norm in ((connector.k_proj_1, connector.ln_k_1), (connector.v_proj_1, connector.ln_v_1)):
        parts.append(F.layer_norm(two_layers(ascending, layers), (4,), norm.weight, norm.bias, 1e-6).view(*grid, 4))
    rows = []
    for column, query in enumerate(queries):
        read = [part[:, column * scale : (column + 1) * scale].flatten(0, 1) for part in parts]
        rows.append(attend(query, *read, connector.clip_attn))
    torch.testing.assert_close(connector.project(x, grid)[0], two_layers(torch.stack(rows), connector.mlp), **CLOSE)


@pytest.mark.parametrize(
    ("name", "options", "grid", "message"),
    [
        ("pixel_shuffle_mlp", {}, (3, 4), r"joins 2x2 patches, but a tile has 3x4 .*multiples of 28 pixels"),
        ("merger", {"patch": 20}, (4, 3), r"joins 2x2 patches, but a tile has 4x3 .*multiples of 40 pixels"),
        ("token_packer", {"scale": 3}, (4, 6), r"joins 3x3 patches, but a tile has 4x6"),
        ("resampler", {"queries": 65}, None, "queries of the connector Resampler is 65; .* such as 64 or 81"),
        ("spatial_resampler", {"queries": 0}, None, "give a square number such as 1 or 4"),
        ("avg_pool", {"queries": 143}, None, "such as 121 or 144"),
        ("c_abstractor", {"queries": 8}, None, "such as 4 or 9"),
        ("resampler", {"heads": 3}, None, "width 8 does not divide into 3 heads"),
        ("token_packer", {"levels": 5}, None, "levels is 5 .* for image tokens 6 wide"),
        ("mlp", {"adapters": 3}, None, "connector.adapters is 3; give 1, or 2"),
        ("pixel_shuffle_mlp", {"version": "v3"}, None, "connector.version: input should be 'v1' or 'v2'"),
        ("mlp", {"hiden": 3}, None, "connector.hiden is not an option of 'mlp': did you mean 'hidden'"),
    ],
)
def test_what_cannot_be_is_refused(
    name: str, options: dict[str, object], grid: tuple[int, int] | None, message: str
) -> None:
    def attempt() -> None:
        connector = build(name, 6, 8, **options)
        if grid is not None:
            connector.project(torch.zeros(1, grid[0] * grid[1], 6), grid)

    with pytest.raises(UsageError, match=message):
        attempt()


def test_the_table_holds_every_connector() -> None:
    others = ["mlp", "pixel_shuffle_mlp", "resampler", "spatial_resampler", "compressor", "merger", "avg_pool"]
    assert list(CONNECTORS) == ["qformer", *others, "c_abstractor", "token_packer"]
    for name in others:
        assert isinstance(build(name, 8, 8), Connector)
