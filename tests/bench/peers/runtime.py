"""ONNX Runtime as a careful user sets it up: one thread, sequential, all graph optimisations, weights in the graph."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn

F4 = NDArray[np.float32]


class Session:
    """A module in ONNX Runtime. `dynamic` names, for each input that has one, the first dimension that may change."""

    def __init__(
        self, module: nn.Module, example: Mapping[str, NDArray[Any]], outputs: Sequence[str], dynamic: Mapping[str, str]
    ) -> None:
        self._names = list(outputs)
        self._session = onnxruntime.InferenceSession(
            exported(module, example, outputs, dynamic), _options(), providers=["CPUExecutionProvider"]
        )

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return dict(zip(self._names, self._session.run(self._names, inputs), strict=True))


def exported(
    module: nn.Module, example: Mapping[str, NDArray[Any]], outputs: Sequence[str], dynamic: Mapping[str, str]
) -> bytes:
    """The ONNX model of a module that takes the arrays of `example` in order."""
    sizes = {name: torch.export.Dim(name, min=2) for name in set(dynamic.values())}
    shapes = tuple({0: sizes[dynamic[name]]} if name in dynamic else {} for name in example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module.eval(),
            tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in example.values()),
            input_names=list(example),
            output_names=list(outputs),
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        out: bytes = program.model_proto.SerializeToString()
    return out


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return options
