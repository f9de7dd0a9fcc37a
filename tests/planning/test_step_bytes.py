"""The line of bytes through a step: each storage once, in the category that it is for."""

from __future__ import annotations

import torch
from torch import nn

from stackwise.planning.step_bytes import CATEGORIES, ByteLine, StepRecorder

CPU = torch.device("cpu")


def test_every_byte_of_a_small_step_has_its_place():
    layer = nn.Linear(10, 20, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def moments():
        return [t for held in optimizer.state.values() for t in held.values() if isinstance(t, torch.Tensor)]

    recorder = StepRecorder(CPU, layer.parameters(), moments, layer.parameters())
    with recorder:
        recorder.part("forward")
        x = torch.ones(3, 10)
        loss = layer(x).square().sum()
        recorder.part("backward")
        loss.backward()
        recorder.part("optimizer")
        optimizer.step()
        recorder.part("other")
    line = recorder.line
    first, last = (dict(zip(CATEGORIES, line.points[i][1], strict=True)) for i in (0, -1))
    assert first == {"weights": 800, "moments": 0, "gradients": 0, "activations": 0, "other": 0}
    assert (last["weights"], last["moments"], last["gradients"]) == (800, 800, 800)
    assert line.most["activations"] == 120 + 240, "the input of the product, and what is squared"
    assert last["activations"] == 120, "x is still held by this test"
    assert [name for _, name in line.parts] == ["start", "forward", "backward", "optimizer", "other"]
    assert [at for at, _ in line.parts] == sorted(at for at, _ in line.parts)
    assert line.peak[1]["weights"] == 800
    assert sum(line.peak[1].values()) == max(sum(row) for _, row in line.points)


def test_views_count_once_and_what_is_freed_is_gone():
    recorder = StepRecorder(CPU, [], list, [])
    with recorder:
        a = torch.zeros(100)
        views = [a[:50], a.view(10, 10), a.detach()]
        b = a + 1
        del a, views
        b.add_(1)
        _ = b * 2
    sizes = [sum(row) for _, row in recorder.line.points]
    assert sizes[:3] == [0, 400, 800]
    assert sizes[3:] == [400, 800]


def test_what_has_its_home_elsewhere_does_not_count_nor_do_its_gradients():
    near, far = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)
    trained = [*near.parameters(), *far.parameters()]
    recorder = StepRecorder(CPU, near.parameters(), list, trained, lambda: [far.weight])
    with recorder:
        far(near(torch.ones(2, 10))).sum().backward()
        _ = far.weight.detach().view(-1)
    last = dict(zip(CATEGORIES, recorder.line.points[-1][1], strict=True))
    assert (last["weights"], last["gradients"], last["other"]) == (400, 400, 0)


def test_other_devices_do_not_count():
    recorder = StepRecorder(torch.device("cuda"), [torch.zeros(5)], list, [])
    with recorder:
        _ = torch.zeros(100)
    assert recorder.line.most == dict.fromkeys(CATEGORIES, 0)


def test_a_thinned_line_keeps_its_peak():
    rows = [(i, (0, 0, 0, 0, 1000 - abs(i - 333))) for i in range(1001)]
    line = ByteLine(points=rows, operations=1001)
    thinned = line.thinned(10)
    assert len(thinned) <= 10
    assert max(thinned, key=lambda point: sum(point[1])) == rows[333]
    assert line.thinned(5000) == rows
