"""DINO against a slow loop over queries, heads and sampled points, written from paper and code.

(Zhang et al., arXiv 2203.03605, sections 3.3 to 3.5, and IDEA-Research/DINO, which transformers
does not have.) The encoder is Deformable DETR's, but for the encoding of positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_criterion_parity import CLASSES, as_targets, random_labels
from torch import Tensor
from torch.nn.functional import layer_norm, linear, multi_head_attention_forward, relu

from d3etr.config.detector import DetectorConfig
from d3etr.detectors.build import build_detector
from d3etr.detectors.denoising import DINOS, DenoisingConfig, draw_noise, noised_objects
from d3etr.detectors.dino import DINO
from d3etr.structures import ImageBatch, Memory

HEADS, LAYERS, QUERIES, WIDTH, LEVELS, POINTS = 2, 3, 6, 32, 2, 2
SIZES: dict[str, Any] = {
    "name": "dino",
    "backbone": {"name": "small", "stem_width": 8, "stage_widths": (8, 8, 16)},
    "width": WIDTH,
    "heads": HEADS,
    "encoder_layers": 1,
    "decoder_layers": LAYERS,
    "feedforward": 24,
    "queries": QUERIES,
    "levels": LEVELS,
    "points": POINTS,
    "denoising": {"queries": 6},
}


def detector_of(**changes: Any) -> DINO:
    """Random weights by which every part matters."""
    torch.manual_seed(0)
    detector = build_detector(DetectorConfig.parse(SIZES | changes), CLASSES).eval()
    assert isinstance(detector, DINO)
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            scale = 0.5 if "box_head" in name else 0.2
            parameter.add_(scale * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
    return detector


def images(padded: bool) -> ImageBatch:
    torch.manual_seed(1)
    pixels = torch.randn(2, 3, 32, 48)
    if not padded:
        return ImageBatch(pixels)
    padding = torch.zeros(2, 32, 48, dtype=torch.bool)
    padding[1, 20:], padding[1, :, 40:] = True, True
    return ImageBatch(pixels.masked_fill(padding[:, None], 0), padding)


def inverse_sigmoid(x: Tensor) -> Tensor:
    """The official code's."""
    x = x.clamp(0, 1)
    return (x.clamp(min=1e-3) / (1 - x).clamp(min=1e-3)).log()


@dataclass
class Slow:
    """The decoder of one image, from weights by name."""

    weights: dict[str, Tensor]
    tokens: Tensor  # [S, D]
    padding: Tensor | None  # [S]
    levels: tuple[tuple[int, int], ...]
    twice: bool = True

    def of(self, name: str, x: Tensor) -> Tensor:
        return linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return layer_norm(
            x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        )

    def mlp(self, name: str, x: Tensor) -> Tensor:
        depth = sum(x.startswith(f"{name}.layers.") and x.endswith(".bias") for x in self.weights)
        for layer in range(depth):
            x = self.of(f"{name}.layers.{layer}", x)
            x = relu(x) if layer + 1 < depth else x
        return x

    def ratio(self, level: int) -> tuple[float, float]:
        """Share (x, y) of a level's columns and rows that is image."""
        if self.padding is None:
            return 1.0, 1.0
        begin = sum(h * w for h, w in self.levels[:level])
        height, width = self.levels[level]
        part = ~self.padding[begin : begin + height * width].view(height, width)
        return part[0].sum().item() / width, part[:, 0].sum().item() / height

    def select(self) -> tuple[list[int], Tensor, Tensor]:
        """Places, references (logits) and class scores of the best tokens."""
        starts, scores, states = [], [], []
        for level, (height, width) in enumerate(self.levels):
            share = self.ratio(level)
            for row in range(height):
                for column in range(width):
                    place = len(starts)
                    box = [(column + 0.5) / (share[0] * width), (row + 0.5) / (share[1] * height)]
                    box += [0.05 * 2**level] * 2
                    hidden = self.padding is not None and bool(self.padding[place])
                    silent = hidden or not all(0.01 < side < 0.99 for side in box)
                    token = torch.zeros(WIDTH) if silent else self.tokens[place]
                    state = self.norm("proposals.norm", self.of("proposals.projection", token))
                    score = self.of("proposals.class_head", state)
                    logits = [
                        math.log(side / (1 - side)) if not silent else math.inf for side in box
                    ]
                    starts.append(torch.tensor(logits))
                    states.append(state)
                    scores.append(score.masked_fill(torch.tensor(hidden), -math.inf))
        order = sorted(range(len(starts)), key=lambda i: -scores[i].max().item())[:QUERIES]
        moves = [self.mlp("proposals.box_head", states[i]) + starts[i] for i in order]
        return order, torch.stack(moves), torch.stack([scores[i] for i in order])

    def position(self, box: Tensor) -> Tensor:
        """Embedding of a reference (x, y, width, height), relative to the finest padded level."""
        share = self.ratio(0) * 2
        parts = []
        for axis in (1, 0, 2, 3):
            for frequency in range(WIDTH // 4):
                angle = 2 * math.pi * box[axis] * share[axis] / 10_000 ** (4 * frequency / WIDTH)
                parts += [angle.sin(), angle.cos()]
        return self.mlp("decoder.position_head", torch.stack(parts))

    def cross(self, name: str, query: Tensor, box: Tensor) -> Tensor:
        """Deformable attention of one query, sample by sample."""
        channels = WIDTH // HEADS
        value = self.of(f"{name}.value", self.tokens)
        if self.padding is not None:
            value = value.masked_fill(self.padding[:, None], 0.0)
        offsets = self.of(f"{name}.offsets", query).view(HEADS, LEVELS, POINTS, 2)
        weights = self.of(f"{name}.weights", query).view(HEADS, -1).softmax(-1)
        mixed = []
        for head in range(HEADS):
            total = torch.zeros(channels)
            begin = 0
            for level, (height, width) in enumerate(self.levels):
                plane = value[begin : begin + height * width, head * channels :][:, :channels]
                begin += height * width
                share = torch.tensor(self.ratio(level))
                for point in range(POINTS):
                    offset = offsets[head, level, point] / POINTS * box[2:] * share / 2
                    x, y = (box[:2] * share + offset) * torch.tensor([width, height]) - 0.5
                    weight = weights[head, level * POINTS + point]
                    total = total + weight * bilinear(plane.view(height, width, -1), x, y)
            mixed.append(total)
        return self.of(f"{name}.output", torch.cat(mixed))

    def layer(self, index: int, hidden: Tensor, boxes: Tensor, mask: Tensor | None) -> Tensor:
        """States [N, D] behind one layer, of queries at ``boxes`` [N, 4] in [0, 1]."""
        name = f"decoder.layers.{index}"
        embedding = torch.stack([self.position(box) for box in boxes])
        query = hidden + embedding
        own = f"{name}.self_attention"
        both = ("query_key", "value")
        mixed, _ = multi_head_attention_forward(
            query,
            query,
            hidden,
            WIDTH,
            HEADS,
            torch.cat([self.weights[f"{own}.{part}.weight"] for part in both]),
            torch.cat([self.weights[f"{own}.{part}.bias"] for part in both]),
            None,
            None,
            False,
            0.0,
            self.weights[f"{own}.output.weight"],
            self.weights[f"{own}.output.bias"],
            attn_mask=mask,
        )
        hidden = self.norm(f"{name}.self_norm", hidden + mixed)
        read = [
            self.cross(f"{name}.cross_attention", state + place, box)
            for state, place, box in zip(hidden, embedding, boxes, strict=True)
        ]
        hidden = self.norm(f"{name}.cross_norm", hidden + torch.stack(read))
        inner = relu(self.of(f"{name}.feedforward.inner", hidden))
        outer = self.of(f"{name}.feedforward.outer", inner)
        return self.norm(f"{name}.feedforward.norm", hidden + outer)

    def decode(
        self, content: Tensor, references: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logits [L, N, C] and boxes [L, N, 4] of contents [N, D] and references (logits)."""
        hidden, reference = content, references.sigmoid()
        seen, logits, boxes = reference, [], []
        heads = sum("class_heads" in name and name.endswith("bias") for name in self.weights)
        for layer in range(LAYERS):
            head = layer if heads > 1 else 0
            hidden = self.layer(layer, hidden, reference, mask)
            shown = self.norm("decoder.norm", hidden)
            logits.append(self.of(f"decoder.class_heads.{head}", shown))
            name = f"decoder.box_heads.{head}"
            boxes.append((self.mlp(name, shown) + inverse_sigmoid(seen)).sigmoid())
            moved = (self.mlp(name, hidden) + inverse_sigmoid(reference)).sigmoid()
            reference = moved.detach()
            seen = moved if self.twice else reference
        return torch.stack(logits), torch.stack(boxes)


def bilinear(plane: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[E] of [h, w, E] at a cell's coordinates, zero outside."""
    total = torch.zeros(plane.shape[-1])
    left, top = int(x.floor()), int(y.floor())
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                share = (1 - (x - column).abs()) * (1 - (y - row).abs())
                total = total + share * plane[row, column]
    return total


def slow_of(detector: DINO, memory: Memory, image: int) -> Slow:
    padding = None if memory.padding is None else memory.padding[image]
    weights = dict(detector.named_parameters())
    twice = detector.config.look_forward_twice
    return Slow(weights, memory.tokens[image].detach(), padding, memory.levels, twice)


VARIANTS: dict[str, tuple[bool, dict[str, Any]]] = {
    "official": (False, {}),
    "padded": (True, {}),
    "heads of each layer, detached": (False, {"shared_heads": False, "look_forward_twice": False}),
    "heads of each layer": (False, {"shared_heads": False}),
}


@pytest.mark.parametrize(("padded", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_selection_layers_and_gradients_equal_the_slow_loop(
    padded: bool, changes: dict[str, Any]
) -> None:
    detector = detector_of(**changes)
    memory = detector.encode(images(padded))
    queries = detector.object_queries(memory)
    [ours] = detector.decode(memory, [queries])
    assert queries.place is not None and queries.reference_logits is not None
    assert memory.proposals is not None
    image = 1
    slow = slow_of(detector, memory, image)
    place, references, scores = slow.select()
    assert queries.place[image].tolist() == place
    close(queries.reference_logits[image], references.detach())
    close(memory.proposals.logits[0, image], scores)
    content = detector.query_content.weight
    logits, boxes = slow.decode(content, references.detach())
    close(ours.logits[:, image], logits)
    close(ours.boxes_cxcywh[:, image], boxes)
    for dimension in range(2):  # it would say little if layers or queries were alike
        assert boxes.std(dimension).mean() > 0.01
    decoder = {f"decoder.{name}": x for name, x in detector.decoder.named_parameters()}
    for layer in range(LAYERS):  # not the sum: who teaches whom is what this is about
        of_layer = [
            torch.autograd.grad(
                (part[layer] * torch.linspace(-1, 1, 4)).sum(),
                [*decoder.values(), content],
                retain_graph=True,
                materialize_grads=True,
            )
            for part in (ours.boxes_cxcywh[:, image], boxes)
        ]
        for name, mine, theirs in zip([*decoder, "content"], *of_layer, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4, msg=f"{layer}: {name}")


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_selected_tokens_are_the_content_without_mixed_selection() -> None:
    detector = detector_of(learned_content=False)
    memory = detector.encode(images(False))
    queries = detector.object_queries(memory)
    slow = slow_of(detector, memory, 0)
    tokens = torch.stack([slow.tokens[place] for place in slow.select()[0]])
    states = slow.norm("proposals.norm", slow.of("proposals.projection", tokens))
    assert queries.content is not None and not queries.content.requires_grad
    close(queries.content[0], states)


def test_positions_of_tokens_have_the_official_temperature_and_far_edges() -> None:
    found = detector_of().encode(images(False)).position[0]
    (height, width), _ = grids = (8, 12), (4, 6)
    level = detector_of().position.level
    for grid, begin, number in zip(grids, (0, height * width), (0, 1), strict=True):
        for row, column in ((0, 0), (2, 3), (grid[0] - 1, grid[1] - 1)):
            expected = []
            for cell, cells in ((row, grid[0]), (column, grid[1])):
                for frequency in range(WIDTH // 4):
                    angle = 2 * math.pi * (cell + 1) / cells / 20 ** (4 * frequency / WIDTH)
                    expected += [math.sin(angle), math.cos(angle)]
            token = found[begin + row * grid[1] + column] - level[number]
            torch.testing.assert_close(token, torch.tensor(expected), atol=1e-4, rtol=0)


def test_denoising_queries_equal_a_loop_over_objects() -> None:
    counts, config = (2, 0, 3), DenoisingConfig(queries=6, label_noise=0.8, box_noise=1.0)
    labels = random_labels(counts)
    labels[2]["boxes"][0] = torch.tensor([0.02, 0.97, 0.04, 0.06])  # corners leave the image
    targets = as_targets(labels)
    noise = draw_noise(targets.image_ids, 2 * 2 * 3, CLASSES, step=3)
    classes, boxes, objects = noised_objects(targets, noise, CLASSES, config, DINOS)
    crossed = 0
    for image, count in enumerate(counts):
        for query in range(12):
            slot, negative = query % 3, query // 3 % 2
            if slot >= count:
                assert classes[image, query] == CLASSES and objects[image, query] == -1
                assert (boxes[image, query] == 0).all()  # a box of half the image at its centre
                continue
            label, box = (labels[image][key][slot] for key in ("class_labels", "boxes"))
            corners = [box[0] - box[2] / 2, box[1] - box[3] / 2]
            corners += [box[0] + box[2] / 2, box[1] + box[3] / 2]
            for corner in range(4):
                move = (noise.moves[image, query, corner] + negative) * box[2 + corner % 2] / 2
                moved = corners[corner] + noise.signs[image, query, corner] * move
                corners[corner] = moved.clamp(0, 1)
            x, y, right, bottom = corners
            crossed += int(right < x)
            centre = torch.stack([(x + right) / 2, (y + bottom) / 2, right - x, bottom - y])
            close(boxes[image, query], inverse_sigmoid(centre))
            replaced = noise.doubts[image, query] < 0.4
            assert classes[image, query] == (noise.classes[image, query] if replaced else label)
            assert objects[image, query] == (-1 if negative else slot)
    assert crossed  # negative sides are the smallest ones


def test_denoising_leaves_the_main_group_alone_and_equals_a_dense_mask() -> None:
    detector = detector_of().train()
    memory = detector.encode(images(True))
    targets = as_targets(random_labels((1, 2)))
    queries = detector.object_queries(memory)
    [group] = detector.training_groups(memory, targets, 3).values()
    count, blocks = group.queries.count, group.queries.blocks
    assert (count, blocks) == (12, 3)
    [alone] = detector.decode(memory, [queries])
    main, denoised = detector.decode(memory, [queries, group.queries])
    torch.testing.assert_close(main.logits, alone.logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(main.boxes_cxcywh, alone.boxes_cxcywh, atol=1e-6, rtol=1e-6)
    parts = [group.queries.content, group.queries.reference_logits]
    assert parts[0] is not None and parts[1] is not None and queries.reference_logits is not None
    gradients = torch.autograd.grad(main.logits.sum(), detector.label_embedding.weight)
    assert gradients[0].abs().max() == 0

    image = 1
    hidden = torch.zeros(count + QUERIES, count + QUERIES, dtype=torch.bool)
    hidden[count:, :count] = True
    block = torch.arange(count) // (count // blocks)
    hidden[:count, :count] = block[:, None] != block
    logits, boxes = slow_of(detector, memory, image).decode(
        torch.cat([parts[0][image], detector.query_content.weight]),
        torch.cat([parts[1][image], queries.reference_logits[image]]),
        hidden,
    )
    close(denoised.logits[:, image], logits[:, :count])
    close(denoised.boxes_cxcywh[:, image], boxes[:, :count])
    close(main.logits[:, image], logits[:, count:])


@pytest.mark.parametrize(("twice", "taught"), [(True, [1, 2]), (False, [2])])
def test_a_layers_boxes_teach_the_move_of_the_layer_before_and_no_earlier_one(
    twice: bool, taught: list[int]
) -> None:
    settings = {"name": "rt_detr", "look_forward_twice": twice, "encoder_width": 32}
    removed = ("points", "encoder_layers")
    kept = {key: value for key, value in SIZES.items() if key not in removed}
    torch.manual_seed(0)
    detector = build_detector(DetectorConfig.parse(kept | settings), CLASSES)
    memory = detector.encode(images(False))
    [outputs] = detector.decode(memory, [detector.object_queries(memory)])
    last = [head.layers[-1].bias for head in detector.decoder.box_heads]
    found = torch.autograd.grad(
        outputs.boxes_cxcywh[-1].sum(), last, allow_unused=True, materialize_grads=True
    )
    assert [layer for layer, gradient in enumerate(found) if gradient.abs().max() > 0] == taught
