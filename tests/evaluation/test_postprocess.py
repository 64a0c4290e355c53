"""From decoder outputs to detections."""

from __future__ import annotations

import torch

from d3etr.evaluation.postprocess import top_detections
from d3etr.structures import DecoderOutputs


def test_the_best_query_class_pairs_of_the_last_layer_win() -> None:
    logits = torch.full((2, 1, 3, 4), -9.0)
    logits[0, 0, 0, 0] = 99  # not the last layer
    logits[1, 0, 2, 1], logits[1, 0, 2, 3], logits[1, 0, 0, 2] = 3.0, 1.0, 2.0
    boxes = torch.rand(2, 1, 3, 4)
    boxes[1, 0, 2] = torch.tensor([0.5, 0.25, 0.2, 0.5])
    scores, labels, corners = top_detections(DecoderOutputs(logits, boxes), [(40, 100)], 3)
    torch.testing.assert_close(scores[0], torch.tensor([3.0, 2.0, 1.0]).sigmoid())
    assert labels.tolist() == [[1, 2, 3]]
    torch.testing.assert_close(corners[0, 0], torch.tensor([40.0, 0.0, 60.0, 20.0]))
    assert torch.equal(corners[0, 0], corners[0, 2])


def test_equals_the_loop_over_images() -> None:
    torch.manual_seed(0)
    outputs = DecoderOutputs(torch.randn(2, 4, 6, 3), torch.rand(2, 4, 6, 4))
    sizes = [(20, 30), (50, 10), (7, 9), (100, 100)]
    scores, labels, corners = top_detections(outputs, sizes, 100)
    assert scores.shape == (4, 18), "never more than queries x classes"
    for image, (height, width) in enumerate(sizes):
        flat = [
            (
                float(outputs.logits[-1, image, q, c].sigmoid()),
                c,
                outputs.boxes_cxcywh[-1, image, q],
            )
            for q in range(6)
            for c in range(3)
        ]
        for rank, (score, label, box) in enumerate(sorted(flat, key=lambda item: -item[0])):
            x, y, w, h = box.tolist()
            expected = [(x - w / 2) * width, (y - h / 2) * height]
            expected += [(x + w / 2) * width, (y + h / 2) * height]
            assert abs(float(scores[image, rank]) - score) < 1e-6
            assert int(labels[image, rank]) == label
            torch.testing.assert_close(corners[image, rank], torch.tensor(expected))


def test_with_exclusive_classes_each_query_says_its_most_likely_one() -> None:
    torch.manual_seed(0)
    logits, boxes = torch.randn(2, 4, 6, 3), torch.rand(2, 4, 6, 4)
    outputs = DecoderOutputs(logits, boxes, softmax_classes=True)
    scores, labels, corners = top_detections(outputs, [(10, 10)] * 4, 4)
    assert scores.shape == (4, 4)
    every, classes = logits[-1].sigmoid().max(-1)
    order = every.argsort(1, descending=True)[:, :4]
    torch.testing.assert_close(scores, every.gather(1, order))
    assert torch.equal(labels, classes.gather(1, order))
    centres = (corners[..., :2] + corners[..., 2:]) / 20
    torch.testing.assert_close(centres, boxes[-1, :, :, :2][torch.arange(4)[:, None], order])
