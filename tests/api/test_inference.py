"""The Open Inference Protocol before the real process: models of a folder, JSON and bytes, errors, deadlines."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from api import oip
from api.bodies import BODY_MAX, Body
from api.inference import _asked
from api.problems import ProblemError
from api.runtime.folder import Served, served_of
from api.service import Service
from infra.settings import Settings
from tests.api.runtime.exported import KINDS, ZOO, Double, Slow, save, save_kinds, save_zoo
from tests.api.runtime.test_graph import CLOSE, model, query
from tests.conftest import free_ports
from tests.host import Host

LANES = len(os.sched_getaffinity(0))
PLACES = 2 * LANES + 2  # queries at once
JSON = dict[str, Any]
EQUAL = {"rtol": 0.0, "atol": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    save_zoo(path)
    save_kinds(path)
    save(path, "slow", Slow(), (torch.zeros(3, 250),), ({0: torch.export.Dim("rows", min=2)},))
    save(path, "double", Double(), (torch.zeros(3, 2),), ({0: torch.export.Dim("rows", min=2)},))
    (path / "broken.pt2").write_bytes(b"no archive")
    return path


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """The API with the folder, nothing to rank, and timelines."""
    state = tmp_path_factory.mktemp("host")
    settings = Settings(
        kafka_bootstrap=f"127.0.0.1:{free_ports(1)[0]}",
        state=state,
        api_port=free_ports(1)[0],
        models=str(folder),
        traces=str(state / "traces"),
        requests_max=PLACES,
    )
    one = Host(settings)
    try:
        one.start()
        yield one
    finally:
        one.close()


@pytest.fixture(scope="module")
def zoo(folder: Path) -> dict[str, Served]:
    return {name: served_of(folder / f"{name}.pt2") for name in (*ZOO, "kinds")}


def asked(of: Served, tensors: Sequence[Tensor], as_bytes: bool, **more: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers."""
    inputs, parts = [], []
    for port, tensor in zip(of.inputs, tensors, strict=True):
        one, part = oip.output_of(port.name, tensor, as_bytes or port.dtype in (torch.float16, torch.bfloat16))
        inputs.append(one)
        parts.append(part)
    head = msgspec.json.encode({"inputs": inputs, **more})
    return b"".join([head, *parts]), {oip.HEADER: str(len(head))} if any(parts) else {}


def tensors_of(answer: httpx.Response) -> dict[str, Tensor]:
    assert answer.status_code == 200, answer.text
    length = int(answer.headers.get(oip.HEADER, len(answer.content)))
    media = "json" if length == len(answer.content) else "octet-stream"
    assert answer.headers["content-type"] == f"application/{media}"
    head = msgspec.json.decode(answer.content[:length])
    begin, found = length, {}
    names = {name: dtype for dtype, name in oip._DATATYPES.items()}
    for one in head["outputs"]:
        dtype = names[one["datatype"]]
        if size := one.get("parameters", {}).get("binary_data_size"):
            part = memoryview(answer.content)[begin : begin + size]
            begin += size
            found[one["name"]] = oip.of_bytes(one["name"], one["shape"], dtype, part)
        else:
            found[one["name"]] = torch.tensor(one["data"], dtype=dtype).reshape(one["shape"])
    assert begin == len(answer.content)
    return found


# ---- what there is


def test_the_document_has_the_protocol(served: Host) -> None:
    document = served.client.get("/openapi.json").json()
    infer = document["paths"]["/v2/models/{name}/infer"]["post"]
    reference = infer["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert document["components"]["schemas"][reference.rsplit("/", 1)[1]]["required"] == ["inputs"]
    assert "application/octet-stream" in infer["responses"]["200"]["content"]
    assert {"/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/{name}"} <= document["paths"].keys()
    named = {part.split('"')[0] for part in json.dumps(document).split("#/components/schemas/")[1:]}
    assert named <= document["components"]["schemas"].keys()


def test_server_and_models_say_what_they_are(served: Host) -> None:
    client = served.client
    server = client.get("/v2").json()
    assert server["name"] == "forerank"
    assert "binary_tensor_data" in server["extensions"]
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/models/din").json() == {
        "name": "din",
        "platform": "pytorch_pt2",
        "inputs": [
            {"name": "profile", "datatype": "INT64", "shape": [1, 4]},
            {"name": "history", "datatype": "INT64", "shape": [1, 9, 2]},
            {"name": "valid", "datatype": "BOOL", "shape": [1, 9]},
            {"name": "item", "datatype": "INT64", "shape": [-1, 2]},
        ],
        "outputs": [{"name": "output0", "datatype": "FP32", "shape": [-1]}],
    }
    assert client.get("/v2/models/din/ready").json() == {"ready": True, "name": "din"}
    assert client.head("/v2/models/din/ready").status_code == 200
    for path in ("/v2/health/ready", "/v2/models/broken", "/v2/models/broken/ready"):
        broken = client.get(path)
        assert broken.status_code == 503
        assert "torch.export.load cannot read it" in broken.json()["error"]
    assert "model broken is not served: torch.export.load cannot read it" in served.log
    assert "model din is served" in served.log


# ---- answers


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """As on a lane: how a product is cut decides its last bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("exact", ["", "-exact"])
@pytest.mark.parametrize("name", ZOO)
def test_answers_are_the_modules(served: Host, zoo: dict[str, Served], name: str, exact: str) -> None:
    """Exact ones have its bits; others may be rounded otherwise. Numbers have the same bits as bytes."""
    module = model(name)
    for rows in (2, 8, 33, 200):
        given, found = query(name, rows), list[Tensor]()
        for as_bytes in (True, False):
            parameters = {"binary_data_output": as_bytes}
            body, headers = asked(zoo[name], given, as_bytes, parameters=parameters, id=f"q {rows}")
            answer = served.client.post(f"/v2/models/{name}{exact}/infer", content=body, headers=headers)
            found.append(tensors_of(answer)["output0"])
            head = msgspec.json.decode(answer.content[: int(answer.headers.get(oip.HEADER, len(answer.content)))])
            assert (head["model_name"], head["id"]) == (name + exact, f"q {rows}")
        with torch.inference_mode():
            torch.testing.assert_close(found[0], module(*given), **(EQUAL if exact else CLOSE))
        assert oip.bytes_of(found[0]) == oip.bytes_of(found[1])


def test_every_datatype_and_any_selection_of_outputs(served: Host, zoo: dict[str, Served]) -> None:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 256, (5, 2, 8), dtype=torch.uint8, generator=generator)
    given = [
        raw[..., 0] > 100 if dtype is torch.bool else raw[..., : dtype.itemsize].contiguous().view(dtype).squeeze(2)
        for dtype in KINDS.values()
    ]
    body, headers = asked(zoo["kinds"], given, True, parameters={"binary_data_output": True})
    found = tensors_of(served.client.post("/v2/models/kinds/infer", content=body, headers=headers))
    assert list(found) == list(KINDS)
    for one, tensor in zip(found.values(), given, strict=True):
        assert one.dtype == tensor.dtype
        assert oip.bytes_of(one) == oip.bytes_of(tensor.flip(0))
    outputs = [
        {"name": "int16"},
        {"name": "float16", "parameters": {"binary_data": True}},
        {"name": "bool"},
        {"name": "float64", "parameters": {"binary_data": True}},
    ]
    body, headers = asked(zoo["kinds"], given, True, outputs=outputs)
    some = tensors_of(served.client.post("/v2/models/kinds/infer", content=body, headers=headers))
    assert list(some) == ["int16", "float16", "bool", "float64"]
    assert all(oip.bytes_of(one) == oip.bytes_of(found[name]) for name, one in some.items())


def test_a_body_of_one_tensor_alone(served: Host) -> None:
    x = np.arange(10, dtype="<f4")
    answer = served.client.post("/v2/models/double/infer", content=x.tobytes(), headers={oip.HEADER: "0"})
    assert tensors_of(answer)["output0"].tolist() == (x * 2).reshape(5, 2).tolist()


# ---- errors


def double(**changes: Any) -> JSON:
    one = {"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]} | changes
    return {"inputs": [{name: value for name, value in one.items() if value is not None}]}


def binary(size: Any) -> JSON:
    return double(data=None, parameters={"binary_data_size": size})


@pytest.mark.parametrize(
    ("body", "rest", "why"),
    [
        (double(shape=[2, 3]), b"", "expected [-1, 2]"),
        (double(shape=[4]), b"", "1 dimensions"),
        (double(shape=[1, 2], data=[1, 2]), b"", "takes 2 to"),
        (double(shape=[-1, 2]), b"", ">= 0"),
        (double(shape="2,2"), b"", "Expected `array`"),
        (double(datatype="FP64"), b"", "input `x` is FP32"),
        (double(datatype="BYTES"), b"", "input `x` is FP32"),
        (double(name="y"), b"", "no such input; it has x"),
        (double(name=None), b"", "missing required field `name`"),
        (double(data=[1, 2, 3]), b"", "not those of its shape"),
        (double(data=[1, 2, 3, "4"]), b"", "Expected `float`"),
        (double(data=[1, 2, 3, 1e39]), b"", "beyond FP32"),
        (double(data=None), b"", "none of data and binary_data_size"),
        (double(parameters={"binary_data_size": 16}), bytes(16), "both of data and binary_data_size"),
        (binary(16), bytes(15), "not the number of bytes"),
        (binary(12), bytes(12), "has 12 bytes; its shape makes 16"),
        (binary(16), bytes(17), "17 bytes follow"),
        (binary(-16), bytes(16), "not the number of bytes"),
        (binary("16"), bytes(16), "not the number of bytes"),
        ({"inputs": []}, b"", "input `x` is missing"),
        ({"inputs": double()["inputs"] * 2}, b"", "input `x` is there twice"),
        ({}, b"", "missing required field `inputs`"),
        ([], b"", "Expected `object`"),
        (double() | {"outputs": [{"name": "y"}]}, b"", "no such output; it has output0"),
        (double() | {"outputs": [{"name": "output0"}] * 2}, b"", "`output0` is there twice"),
        (double() | {"parameters": {"priority": -1}}, b"", "`priority` is a class"),
        (double() | {"parameters": {"priority": 10}}, b"", "`priority` is a class"),
        (double() | {"parameters": {"priority": True}}, b"", "`priority` is a class"),
        (double() | {"parameters": {"timeout": 0}}, b"", "microseconds above 0"),
        (double() | {"parameters": {"timeout": 0.5}}, b"", "microseconds above 0"),
        (double() | {"parameters": {"trace": 1}}, b"", "`trace` is true or false"),
        (double() | {"parameters": {"binary_data_output": "yes"}}, b"", "is true or false"),
        (double() | {"id": 7}, b"", "Expected `str`"),
    ],
)
def test_requests_that_the_model_cannot_take(served: Host, body: Any, rest: bytes, why: str) -> None:
    head = msgspec.json.encode(body)
    headers = {oip.HEADER: str(len(head))} if rest else {}
    answer = served.client.post("/v2/models/double/infer", content=head + rest, headers=headers)
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    assert why in answer.json()["error"]


@pytest.mark.parametrize(
    ("content", "header", "why"),
    [
        (b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, NaN, 3, 4]}]}', None, "no NaN"),
        (b'{"inputs": [', None, "not JSON"),
        (b"\xff", None, "not JSON"),
        (b"", None, "not JSON"),
        (b"{}", "3", "bytes of the JSON object, of 2 in all"),
        (b"{}", "-1", "bytes of the JSON object"),
        (b"{}", "9" * 30, "bytes of the JSON object"),
        (bytes(17), "0", "has 17 bytes; its shape makes 16"),
        (bytes(8), "0", "takes 2 to"),
    ],
)
def test_bodies_that_are_no_request(served: Host, content: bytes, header: str | None, why: str) -> None:
    headers = {} if header is None else {oip.HEADER: header}
    answer = served.client.post("/v2/models/double/infer", content=content, headers=headers)
    assert (answer.status_code, list(answer.json())) == (400, ["error"])
    assert why in answer.json()["error"]


def test_values_that_only_the_model_can_judge(served: Host, zoo: dict[str, Served]) -> None:
    for name in ZOO:
        given = [torch.full_like(one, 10_000) if one.dtype == torch.int64 else one for one in query(name, 4)]
        body, headers = asked(zoo[name], given, True)
        answer = served.client.post(f"/v2/models/{name}/infer", content=body, headers=headers)
        assert answer.status_code == 400, name
        assert "the model cannot compute with these values: " in answer.json()["error"]
    given = [torch.full((2, 2), 2 if dtype != torch.bool else 1).to(dtype) for dtype in KINDS.values()]
    body, headers = asked(zoo["kinds"], given, True)
    answer = served.client.post("/v2/models/kinds/infer", content=body, headers=headers)
    assert "output `float16` is FP16, which JSON has not" in answer.json()["error"]
    place = len(body) - sum(one.nbytes for one in given[list(KINDS).index("bool") :])
    content = body[:place] + b"\2" + body[place + 1 :]
    answer = served.client.post("/v2/models/kinds/infer", content=content, headers=headers)
    assert "bytes that are not 0 or 1" in answer.json()["error"]
    given[list(KINDS).index("float32")][0, 0] = torch.nan
    body, headers = asked(zoo["kinds"], given, True, outputs=[{"name": "float32"}])
    answer = served.client.post("/v2/models/kinds/infer", content=body, headers=headers)
    assert (answer.status_code, list(answer.json())) == (400, ["error"])
    assert "output `float32` has a NaN" in answer.json()["error"]


def test_other_refusals(served: Host) -> None:
    client = served.client
    for path, status in (
        ("/v2/models/none", 404),
        ("/v2/models/none/ready", 404),
        ("/v2/models/din/versions/1", 404),
        ("/v2/repository/index", 404),
        ("/v2/models/din/infer", 405),
    ):
        answer = client.get(path)
        assert (answer.status_code, list(answer.json())) == (status, ["error"]), path
    assert client.post("/v2/models/none/infer", json=double()).status_code == 404
    assert client.post("/v2/models/broken/infer", json=double()).status_code == 503
    large = client.post("/v2/models/double/infer", content=bytes(BODY_MAX + 1))
    assert (large.status_code, list(large.json())) == (413, ["error"])
    body = double() | {"parameters": {"timeout": 1}}
    late = client.post("/v2/models/double/infer", json=body)
    assert (late.status_code, list(late.json())) == (504, ["error"])
    assert "within `timeout`" in late.json()["error"]


# ---- under load


def metric(host: Host, name: str) -> float:
    """The newest value of a series, 0 where there is none yet."""
    lines = host.client.get("/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.rpartition(" ")[0] == name), 0.0)


def test_who_goes_away_cancels_and_who_cannot_wait_is_told(served: Host) -> None:
    cancelled = 'forerank_queries_dropped_total{reason="cancelled"}'
    before, refused = metric(served, cancelled), metric(served, 'forerank_refused_total{kind="inferences"}')
    content = bytes(12_000_000)
    head = f"POST /v2/models/slow/infer HTTP/1.1\r\nhost: x\r\n{oip.HEADER}: 0\r\n"
    head += f"content-length: {len(content)}\r\n\r\n"
    callers = [socket.create_connection(("127.0.0.1", served.settings.api_port)) for _ in range(PLACES)]
    for caller in callers:
        caller.sendall(head.encode() + content)
    served.wait_for(lambda: metric(served, "forerank_query_queue") >= PLACES - LANES - 1)

    def full() -> bool:
        return served.client.post("/v2/models/double/infer", json=double()).status_code == 503

    served.wait_for(full)
    assert metric(served, 'forerank_refused_total{kind="inferences"}') > refused
    callers.pop().close()
    served.wait_for(lambda: not full(), 60.0)  # his place is free, and priority 0 goes before all else
    body = double() | {"parameters": {"timeout": 20_000, "priority": 1}}
    late = served.client.post("/v2/models/double/infer", json=body)
    assert late.status_code == 504
    for caller in callers:
        caller.close()
    served.wait_for(lambda: metric(served, cancelled) - before >= PLACES, 60.0)
    assert served.client.post("/v2/models/double/infer", json=double()).status_code == 200
    assert metric(served, 'forerank_lane_busy_seconds_total{lane="0"}') > 0
    assert metric(served, 'forerank_query_wait_seconds_count{priority="0"}') > 0


def test_a_timeline_on_request(served: Host, zoo: dict[str, Served]) -> None:
    body, headers = asked(zoo["din"], query("din", 64), True, id="seen", parameters={"trace": True})
    answer = served.client.post("/v2/models/din/infer", content=body, headers=headers)
    name = answer.json()["parameters"]["trace"]
    found = msgspec.json.decode((Path(served.settings.traces) / name).read_bytes())
    own = [one for one in found["traceEvents"] if one.get("cat") == "this"]
    assert {one["name"].partition(" ")[0] for one in own} == {"din"}
    ran = {one["args"]["operator"] for one in own}
    assert ran == set(range(max(ran) + 1)), "how many there are the process has measured itself"
    body, headers = asked(zoo["din"], query("din", 64), True)
    answer = served.client.post("/v2/models/din/infer", content=body, headers=headers)
    assert "parameters" not in answer.json()
    assert [path.name for path in Path(served.settings.traces).iterdir()] == [name]


def test_new_processes_serve_what_the_folder_holds_then(
    own_host: Callable[..., Host], folder: Path, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "one.pt2").write_bytes(b"")
    traces = tmp_path / "traces"
    host = own_host(models=str(models), traces=str(traces), trace_share=1.0)
    client = host.start()
    assert client.get("/v2/models/one/ready").status_code == 503
    (models / "one.pt2").write_bytes((folder / "double.pt2").read_bytes())
    assert client.get("/v2/models/one/ready").status_code == 503
    assert host._process is not None
    os.kill(host._process.pid, signal.SIGHUP)
    host.wait_for(lambda: client.get("/v2/health/ready").json() == {"ready": True}, 60.0)
    answer = client.post("/v2/models/one/infer", json=double()).json()
    assert answer["outputs"][0]["data"] == [2, 4, 6, 8]
    assert [path.name for path in traces.iterdir()] == [answer["parameters"]["trace"]]


def test_a_timeline_needs_a_folder(folder: Path, tmp_path: Path) -> None:
    service = Service(Settings(state=tmp_path))
    body = Body(service.bodies, "")
    body._parts.append(msgspec.json.encode(double() | {"parameters": {"trace": True}}))
    with pytest.raises(ProblemError, match="FORERANK_TRACES names no folder") as raised:
        _asked(service, served_of(folder / "double.pt2"), body, None, time.monotonic())
    assert raised.value.body.status == 422
