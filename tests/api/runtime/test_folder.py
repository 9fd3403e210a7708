"""What is read from a file of torch.export.save, and what is refused in a sentence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from api.runtime.folder import Folder, ModelError, ShapeError, served_of
from tests.api.runtime.exported import Double, save


class Odd(nn.Module):
    """Nested inputs, one of which is not used, a named one, and a dict with a list."""

    def forward(self, a: Tensor, pair: dict[str, Tensor], unused: Tensor, *, scale: Tensor) -> dict[str, Any]:
        return {"scaled": a * scale, "rest": [pair["left"] + pair["right"].sum(), a > 0]}


def odd(folder: Path) -> Path:
    rows = Dim("rows", min=2, max=50)
    pair = {"left": torch.ones(8), "right": torch.ones(8)}
    shapes = {
        "a": {0: rows},
        "pair": {"left": {0: 2 * rows}, "right": {0: 2 * rows}},
        "unused": None,
        "scale": None,
    }
    example = (torch.randn(4, 3), pair, torch.ones(2))
    return save(folder, "odd", Odd(), example, shapes, scale=torch.tensor(2.0))


def test_names_and_sizes_are_those_of_the_export(tmp_path: Path) -> None:
    served = served_of(odd(tmp_path))
    assert [(port.name, port.dtype, port.shape) for port in served.inputs] == [
        ("a", torch.float32, [-1, 3]),
        ("pair_left", torch.float32, [-1]),
        ("pair_right", torch.float32, [-1]),
        ("unused", torch.float32, [2]),
        ("scale", torch.float32, []),
    ]
    assert [(port.name, port.dtype, port.shape) for port in served.outputs] == [
        ("scaled", torch.float32, [-1, 3]),
        ("output1", torch.float32, [-1]),
        ("output2", torch.bool, [-1, 3]),
    ]
    a, left, right = torch.randn(5, 3), torch.randn(10), torch.randn(10)
    given = (a, left, right, torch.ones(2), torch.tensor(3.0))
    served.check([one.shape for one in given])
    with torch.inference_mode():
        scaled, rest, positive = served.model.graph.run(*given)
    assert torch.equal(scaled, a * 3)
    torch.testing.assert_close(rest, left + right.sum())
    assert torch.equal(positive, a > 0)


@pytest.mark.parametrize(
    ("shapes", "name", "why"),
    [
        ([[5, 3, 1], [10], [10], [2], []], "a", "3 dimensions"),
        ([[5, 4], [10], [10], [2], []], "a", "dimension 1 is 4"),
        ([[5, 3], [10], [10], [3], []], "unused", "dimension 0 is 3"),
        ([[1, 3], [2], [2], [2], []], "a", "takes 2 to 50"),
        ([[51, 3], [102], [102], [2], []], "a", "takes 2 to 50"),
        ([[5, 3], [10], [11], [2], []], "pair_right", "it is 10"),
        ([[5, 3], [10], [10], [2], [1]], "scale", "1 dimensions"),
    ],
)
def test_other_sizes_are_refused(shapes: list[list[int]], name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match=why) as raised:
        served_of(odd(tmp_path)).check(shapes)
    assert raised.value.name == name


def test_one_size_in_two_inputs(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    rows = Dim("rows", min=2)
    served = served_of(save(tmp_path, "sum", Sum(), (torch.ones(3), torch.ones(3)), ({0: rows}, {0: rows})))
    served.check([[7], [7]])
    with pytest.raises(ShapeError, match="is 7 elsewhere"):
        served.check([[7], [8]])


def test_operations_in_place_keep_their_order(tmp_path: Path) -> None:
    """Products that take long enough to be operators each; the second reads what was there before the change."""

    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x @ x
            before = y @ x
            y.mul_(2)
            return y @ x + before

    served = served_of(save(tmp_path, "one", InPlace(), (torch.randn(400, 400),)))
    assert len(served.model.graph.operators) > 2
    x = torch.randn(400, 400)
    with torch.inference_mode():
        torch.testing.assert_close(served.model.graph.run(x), InPlace()(x), rtol=1e-3, atol=1e-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_an_example_of_equal_rows_hides_no_dependence(dtype: torch.dtype, tmp_path: Path) -> None:
    class Flips(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flip(0)

    path = save(tmp_path, "one", Flips(), (torch.ones(8, 2).to(dtype),), ({0: Dim("rows", min=2)},))
    x = (torch.arange(1_000).reshape(500, 2) % 7 - 3).to(dtype)
    with torch.inference_mode():
        assert torch.equal(served_of(path).model.graph.run(x), x.flip(0))


def test_rows_that_do_not_depend_on_each_other_run_in_blocks(tmp_path: Path) -> None:
    shapes = ({0: Dim("rows", min=2, max=100)},)
    for example in (torch.zeros(2, 3), torch.randn(90, 3)):
        graph = served_of(save(tmp_path, "one", Double(), (example,), shapes)).model.graph
        assert graph.block is not None
        assert graph.block >= 8
        assert graph.parted >= 0
        assert graph.blocks_of(100) == max(1, round(100 / graph.block))
    light = served_of(save(tmp_path, "one", Double(), (torch.zeros(2, 3),), ({0: Dim("rows", min=2)},))).model.graph
    assert light.block is not None
    assert light.block > 128, "a block of so few numbers is worth less than placing it"


def test_several_sizes_that_differ(tmp_path: Path) -> None:
    """A batch of sequences: attention over the second size, nothing over the first."""

    class Attends(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x @ x.transpose(1, 2), dim=2) @ x

    shapes = ({0: Dim("rows", min=2), 1: Dim("length", min=2)},)
    served = served_of(save(tmp_path, "one", Attends(), (torch.randn(4, 5, 3),), shapes))
    assert served.inputs[0].shape == [-1, -1, 3]
    x = torch.randn(7, 2, 3)
    served.check([x.shape])
    with torch.inference_mode():
        torch.testing.assert_close(served.model.graph.run(x), Attends()(x))


class Counts(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen.add_(1)
        return x + self.seen


class Halves(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        return x + 1


class Scaled(nn.Module):
    def forward(self, x: Tensor, times: int) -> Tensor:
        return x * times


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.complex(x, x)


class Half(nn.Module):
    """The length of its input is twice a number that no input has."""

    def forward(self, x: Tensor) -> Tensor:
        return x[: x.shape[0] // 2] * 2


ONE = torch.ones(4)


@pytest.mark.parametrize(
    ("module", "example", "why"),
    [
        (Counts(), (ONE,), "changes `seen`"),
        (Halves(), (ONE,), "changes `x`"),
        (Scaled(), (ONE, 3), "input 3 is no tensor"),
        (Same(), (ONE,), "computes nothing"),
        (Complex(), (ONE,), "complex64"),
    ],
)
def test_what_cannot_be_served(module: nn.Module, example: tuple[Any, ...], why: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=why):
        served_of(save(tmp_path, "one", module, example))


def test_a_size_that_no_input_has_by_itself(tmp_path: Path) -> None:
    path = save(tmp_path, "half", Half(), (ONE,), ({0: 2 * Dim("half", min=1)},))
    with pytest.raises(ModelError, match="sizes of its inputs cannot be told"):
        served_of(path)


def test_a_program_without_an_example(tmp_path: Path) -> None:
    program = export(Half(), (ONE,))
    program._example_inputs = None
    torch.export.save(program, tmp_path / "one.pt2")
    with pytest.raises(ModelError, match="no example"):
        served_of(tmp_path / "one.pt2")


def test_a_folder_is_served_without_what_is_broken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, "good", Double(), (ONE,))
    whole = save(tmp_path, "cut", Double(), (ONE,)).read_bytes()
    (tmp_path / "cut.pt2").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no zip.pt2").write_bytes(b"")
    (tmp_path / "readme.txt").write_text("")
    with caplog.at_level(logging.ERROR):
        folder = Folder.read(tmp_path)
    assert set(folder.models) == {"good"}
    assert "torch.export.load cannot read it" in folder.broken["cut"]
    assert "letters" in folder.broken["no zip"]
    assert "model cut is not served: torch.export.load cannot read it" in caplog.text
    assert Folder.read(tmp_path / "none") == Folder({}, {})
