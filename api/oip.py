"""The bodies of the Open Inference Protocol, version 2 (KServe's), with Triton's binary tensor data: a JSON object, and
behind it the bytes of those tensors that it gives no numbers of. All bytes are little-endian, row by row.

JSON has no 16-bit floats, so FP16 and BF16 come and go as bytes alone. The numbers of FP32 are those of its bits.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from api.problems import ProblemError, decode, invalid
from api.runtime.folder import Served, ShapeError

HEADER = "inference-header-content-length"  # the bytes of the JSON object, where others follow it
PRIORITY_MAX = 9  # the lowest class
_SIZE = "binary_data_size"
_DATATYPES = {
    torch.bool: "BOOL",
    torch.uint8: "UINT8",
    torch.int8: "INT8",
    torch.int16: "INT16",
    torch.int32: "INT32",
    torch.int64: "INT64",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.float32: "FP32",
    torch.float64: "FP64",
}
_BYTES_ALONE = (torch.float16, torch.bfloat16)
_NESTED = re.compile(rb"\s*\[\s*\[")
_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class RequestInput(msgspec.Struct):
    name: str
    shape: list[_Size]
    datatype: str
    parameters: dict[str, Any] = {}
    data: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)  # empty


class RequestOutput(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class InferRequest(msgspec.Struct):
    inputs: list[RequestInput]
    outputs: list[RequestOutput] = []
    id: str = ""
    parameters: dict[str, Any] = {}


class ResponseOutput(msgspec.Struct, omit_defaults=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] = {}
    data: list[Any] | msgspec.UnsetType = msgspec.UNSET


class InferResponse(msgspec.Struct, omit_defaults=True):
    model_name: str
    outputs: list[ResponseOutput]
    id: str = ""
    parameters: dict[str, str] = {}


class TensorMeta(msgspec.Struct):
    """-1 in `shape`: a dimension of any size within the export's bounds."""

    name: str
    datatype: str
    shape: list[int]


class ModelMeta(msgspec.Struct):
    name: str
    platform: str
    inputs: list[TensorMeta]
    outputs: list[TensorMeta]


_REQUEST = msgspec.json.Decoder(InferRequest)


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request that the model can take."""

    inputs: tuple[Tensor, ...]  # in the model's order
    outputs: tuple[tuple[int, bool], ...]  # the model's outputs that are wanted, and whether as bytes
    id: str
    priority: int
    timeout_s: float
    trace: bool


def meta_of(served: Served) -> ModelMeta:
    inputs, outputs = (
        [TensorMeta(port.name, _DATATYPES[port.dtype], port.shape) for port in ports]
        for ports in (served.inputs, served.outputs)
    )
    return ModelMeta(served.name, "pytorch_pt2", inputs, outputs)


# ---- requests


def ask_of(served: Served, body: bytes, header: str | None) -> Ask:
    """`header`: what HEADER says; None: all is JSON. Raises ProblemError."""
    length = len(body)
    if header is not None:
        if not (header.isascii() and header.isdigit() and len(header) < 10) or int(header) > len(body):
            raise invalid(HEADER, f"expected the bytes of the JSON object, of {len(body)} in all")
        length = int(header)
    if length == 0 and header is not None:
        every = tuple((at, True) for at in range(len(served.outputs)))
        return Ask((_raw(served, body),), every, "", 0, math.inf, False)
    request = decode(_REQUEST, body[:length])
    places = _places([one.name for one in request.inputs], [port.name for port in served.inputs], "input")
    if len(places) < len(served.inputs):
        lacking = next(port.name for at, port in enumerate(served.inputs) if at not in places)
        raise invalid(lacking, f"input `{lacking}` is missing")
    _check(served, request, places)
    parts = _parts(request.inputs, memoryview(body)[length:])
    tensors: dict[int, Tensor] = {}
    for place, one, part in zip(places, request.inputs, parts, strict=True):
        dtype = served.inputs[place].dtype
        tensors[place] = of_json(one, dtype) if part is None else of_bytes(one.name, one.shape, dtype, part)
    inputs = tuple(tensors[at] for at in range(len(served.inputs)))
    return Ask(inputs, _wanted(served, request), request.id, *_options(request.parameters))


def _raw(served: Served, body: bytes) -> Tensor:
    """The one input of a model, all of the body, whose one free size follows from the number of bytes."""
    if len(served.inputs) != 1 or served.inputs[0].shape.count(-1) > 1:
        raise invalid(HEADER, "0 is for models with one input of at most one free size")
    (port,) = served.inputs
    known = math.prod(size for size in port.shape if size != -1) * port.dtype.itemsize
    free = len(body) // known if known else 0
    shape = [free if size == -1 else size for size in port.shape]
    _checked(served, [shape])
    return of_bytes(port.name, shape, port.dtype, memoryview(body))


def _places(names: Sequence[str], known: Sequence[str], what: str) -> list[int]:
    """Where each name stands in `known`."""
    places = []
    for name in names:
        if name not in known:
            raise invalid(f"{what}s", f"the model has no such {what}; it has {', '.join(known)}")
        places.append(known.index(name))
        if len(set(places)) < len(places):
            raise invalid(name, f"{what} `{name}` is there twice")
    return places


def _check(served: Served, request: InferRequest, places: Sequence[int]) -> None:
    """Datatypes and shapes."""
    shapes: dict[int, list[int]] = {}
    for place, one in zip(places, request.inputs, strict=True):
        expected = _DATATYPES[served.inputs[place].dtype]
        if one.datatype != expected:
            raise invalid(one.name, f"input `{one.name}` is {expected}")
        shapes[place] = one.shape
    _checked(served, [shapes[at] for at in range(len(served.inputs))])


def _checked(served: Served, shapes: Sequence[Sequence[int]]) -> None:
    try:
        served.check(shapes)
    except ShapeError as error:
        raise invalid(error.name, f"the shape of input `{error.name}` does not fit: {error}") from error


def _parts(inputs: Sequence[RequestInput], rest: memoryview) -> list[memoryview | None]:
    """The bytes of each input; None of those that come as numbers."""
    parts: list[memoryview | None] = []
    begin = 0
    for one in inputs:
        size, numbers = one.parameters.get(_SIZE), bool(bytes(one.data))
        if (size is None) != numbers:
            raise invalid(one.name, f"input `{one.name}` has {'both' if numbers else 'none'} of data and {_SIZE}")
        if size is None:
            parts.append(None)
            continue
        if type(size) is not int or not 0 <= size <= len(rest) - begin:
            raise invalid(one.name, f"{_SIZE} of input `{one.name}` is not the number of bytes that are left for it")
        parts.append(rest[begin : begin + size])
        begin += size
    if begin != len(rest):
        raise invalid("inputs", f"{len(rest)} bytes follow the JSON object; the inputs' {_SIZE} are {begin} in all")
    return parts


def of_bytes(name: str, shape: Sequence[int], dtype: torch.dtype, part: memoryview) -> Tensor:
    """A tensor of its own memory. Raises ProblemError."""
    count = math.prod(shape)
    if len(part) != count * dtype.itemsize:
        raise invalid(name, f"input `{name}` has {len(part)} bytes; its shape makes {count * dtype.itemsize}")
    raw = np.frombuffer(part, np.uint8)
    if dtype is torch.bool and raw.size and raw.max() > 1:
        raise invalid(name, f"input `{name}` has bytes that are not 0 or 1")
    tensor = torch.empty(shape, dtype=dtype)
    tensor.reshape(-1).view(torch.uint8).numpy()[:] = raw
    return tensor


def of_json(one: RequestInput, dtype: torch.dtype) -> Tensor:
    """A tensor of its own memory. Raises ProblemError."""
    if dtype in _BYTES_ALONE:
        raise invalid(one.name, f"input `{one.name}` is {one.datatype}, which JSON has not; send it as bytes ({_SIZE})")
    data = bytes(one.data)
    nested = _NESTED.match(data) is not None
    kind = bool if dtype is torch.bool else float if dtype.is_floating_point else int
    try:
        numbers = decode(_numbers(kind, len(one.shape) if nested else 1), data)
    except ProblemError as error:
        raise invalid(one.name, f"data of input `{one.name}`: {error.body.detail}") from error
    try:
        array = _array(numbers, dtype)
    except OverflowError as error:
        raise invalid(one.name, f"input `{one.name}` has a number that is beyond {one.datatype}") from error
    except ValueError as error:
        raise invalid(one.name, f"the lists of input `{one.name}` are not of one shape") from error
    if array.size != math.prod(one.shape) or (nested and list(array.shape) != one.shape):
        raise invalid(one.name, f"the numbers of input `{one.name}` are not those of its shape")
    return torch.from_numpy(array).reshape(one.shape)


@cache
def _numbers(kind: type, depth: int) -> msgspec.json.Decoder[Any]:
    """Of lists of lists ... of numbers; `depth` is one of a model's."""
    for _ in range(depth):
        kind = list[kind]  # type: ignore[valid-type]
    return msgspec.json.Decoder(kind)


def _array(numbers: list[Any], dtype: torch.dtype) -> NDArray[Any]:
    """Raises OverflowError, and ValueError for lists of several shapes."""
    target = torch.empty(0, dtype=dtype).numpy().dtype
    if dtype is not torch.float32:
        return np.array(numbers, target)
    with np.errstate(over="raise"):
        try:
            return np.array(numbers, np.float64).astype(np.float32)
        except FloatingPointError as error:
            raise OverflowError from error


def _wanted(served: Served, request: InferRequest) -> tuple[tuple[int, bool], ...]:
    """Outputs in the order of the request, by default all of them."""
    every = _flag(request.parameters, "binary_data_output", False)
    if not request.outputs:
        return tuple((at, every) for at in range(len(served.outputs)))
    places = _places([one.name for one in request.outputs], [port.name for port in served.outputs], "output")
    flags = [_flag(one.parameters, "binary_data", every) for one in request.outputs]
    return tuple(zip(places, flags, strict=True))


def _options(parameters: Mapping[str, Any]) -> tuple[int, float, bool]:
    """Priority, seconds, trace. Others are none of this server's, and may be there."""
    priority, timeout = parameters.get("priority", 0), parameters.get("timeout")
    if type(priority) is not int or not 0 <= priority <= PRIORITY_MAX:
        raise invalid("priority", f"`priority` is a class from 0, the highest, to {PRIORITY_MAX}")
    if timeout is not None and (type(timeout) is not int or timeout <= 0):
        raise invalid("timeout", "`timeout` is a whole number of microseconds above 0")
    return priority, math.inf if timeout is None else timeout / 1e6, _flag(parameters, "trace", False)


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if type(value) is not bool:
        raise invalid(name, f"`{name}` is true or false")
    return value


# ---- answers


def answer_of(
    served: Served, ask: Ask, found: Sequence[Tensor], parameters: Mapping[str, str]
) -> tuple[bytes, int | None]:
    """The body and, where bytes follow it, the length of its JSON object. Raises ProblemError."""
    outputs, parts = list[ResponseOutput](), list[bytes]()
    for place, as_bytes in ask.outputs:
        output, part = output_of(served.outputs[place].name, found[place], as_bytes)
        outputs.append(output)
        parts += [part] if as_bytes else []
    head = msgspec.json.encode(InferResponse(served.name, outputs, ask.id, dict(parameters)))
    return b"".join([head, *parts]), len(head) if parts else None


def output_of(name: str, tensor: Tensor, as_bytes: bool) -> tuple[ResponseOutput, bytes]:
    """Raises ProblemError where JSON has no such numbers."""
    made = ResponseOutput(name, _DATATYPES[tensor.dtype], list(tensor.shape))
    flat = tensor.detach().reshape(-1)
    if as_bytes:
        part = bytes_of(flat)
        made.parameters = {_SIZE: len(part)}
        return made, part
    if tensor.dtype in _BYTES_ALONE:
        raise invalid(name, f"output `{name}` is {made.datatype}, which JSON has not; ask for binary_data")
    if tensor.is_floating_point() and not bool(torch.isfinite(flat).all()):
        raise invalid(name, f"output `{name}` has a NaN or an infinity, which JSON has not; ask for binary_data")
    made.data = flat.tolist()
    return made, b""


def bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.reshape(-1)
    if flat.stride(0) != 1:  # also where it is empty, or a single number
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().tobytes()
