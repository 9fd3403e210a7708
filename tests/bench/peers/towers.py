"""The user tower alone, from the tokens of the recent behaviours and the profile's vector to the user's vector: in the
product's generated code, and as a user of ONNX Runtime or PyTorch would run it.

`python -m tests.bench.peers.towers FOLDER SEED ROUNDS` holds each against the network's own forward pass in double
precision, runs them in turns and prints `{length: {name: [CPU ms, ...]}}`. It runs in the peers' environment.

In favour of the peers: the number of behaviours is fixed in their graphs, and none is missing, so nothing is masked
(with a mask of ones ONNX Runtime takes 1.5 to 3 times as long, torch 1.3 to 1.7). Attention is torch's fused one, and
in ONNX Runtime its own operator, which its optimiser does not find by itself (without it, 1.1 to 1.2 times as long).
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from time import thread_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from encoders import user_ir
from encoders.bundle import Bundle, seeded_bundle
from encoders.config import ModelConfig
from encoders.fold import UserFold
from encoders.model import UserTower
from encoders.ranker import RECENCY_EDGES
from infra.codegen import I64
from tests.bench.peers.peer import F4
from tests.bench.peers.runtime import Session

LENGTHS = (50, 200, 1_000)  # recent behaviours
_MOST_ERROR = 1e-5


class Unmasked(nn.Module):
    """`UserTower` of one user whose behaviours are all there: profile [1, d], tokens [1, R, d] -> [1, d]."""

    def __init__(self, tower: UserTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, profile: Tensor, tokens: Tensor) -> Tensor:
        tower, d = self.tower, tokens.shape[2]
        x = torch.cat([tower.null.expand(1, 1, d), tokens], dim=1)
        x = tower.norm1(x + tower.mix(self.attended(x)))
        x = tower.norm2(x + tower.ffn_out(functional.relu(tower.ffn_in(x))))
        affinity = (x @ tower.query(profile)[:, :, None]).squeeze(2) / math.sqrt(d)
        focused = (torch.softmax(affinity, dim=1)[:, None, :] @ x).squeeze(1)
        out: Tensor = tower.out(torch.cat([profile, x.mean(dim=1), focused], dim=1))
        return out

    def attended(self, x: Tensor) -> Tensor:
        heads, d = self.tower.heads, x.shape[2]
        q, k, v = self.tower.qkv(x).view(1, -1, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, d)


class OnnxUnmasked(Unmasked):
    """The same with ONNX Runtime's own attention."""

    def attended(self, x: Tensor) -> Tensor:
        q, k, v = self.tower.qkv(x).split(x.shape[2], dim=2)
        heads: dict[str, Any] = {"num_heads": self.tower.heads}
        kind = "com.microsoft::MultiHeadAttention"
        out: Tensor = torch.onnx.ops.symbolic(kind, (q, k, v), heads, dtype=q.dtype, shape=q.shape, version=1)
        return out


class _Code(user_ir._User):
    """The code of the user's vector alone, on tokens that are in scratch."""

    def emit(self) -> None:
        self._user_vector(self.S["tokens"], self.n, self.code.build.add(self.n, I64(1)))


def _generated(bundle: Bundle, profile: F4, tokens: F4) -> Callable[[], F4]:
    fold = UserFold(bundle)
    sizes = fold._sizes[False]
    plan = user_ir.scratch(sizes)
    places, scratch = plan.places, plan.memory()
    scratch[places["tokens"] : places["tokens"] + tokens.size] = tokens.ravel()
    user = scratch[places["user"] : places["user"] + sizes.dim]
    code = _Code(sizes, RECENCY_EDGES).compiled()
    unread = [None, 0, None, 0, None, 0, None, None, 0]  # behaviours, and the moment
    arguments = [fold._weights.ctypes.data, scratch.ctypes.data, tokens.shape[1], *unread, profile.ctypes.data]
    held = fold, profile  # alive as long as their addresses

    def run(held: object = held) -> F4:
        code(*arguments, *[None] * 9)
        return user

    return run


def ways(folder: Path, length: int, seed: int) -> dict[str, Callable[[], F4]]:
    """The tower over so many behaviours; each gives the user's vector [d]."""
    config = dataclasses.replace(ModelConfig(), recent=length)
    bundle, random = seeded_bundle(folder, config, seed), np.random.default_rng(seed)
    profile = random.standard_normal((1, config.dim)).astype(np.float32)
    tokens = random.standard_normal((1, length, config.dim)).astype(np.float32)
    given, inputs = {"profile": profile, "tokens": tokens}, (torch.from_numpy(profile), torch.from_numpy(tokens))
    tower = bundle.model.user_tower
    eager, session = Unmasked(tower).eval(), Session(OnnxUnmasked(tower), given, ["user"], {})

    @torch.inference_mode()
    def torch_eager() -> F4:
        out: F4 = eager(*inputs).numpy()[0]
        return out

    made: dict[str, Callable[[], F4]] = {
        "forerank": _generated(bundle, profile, tokens),
        "onnxruntime": lambda: session(given)["user"][0],
        "torch": torch_eager,
    }
    valid = torch.ones(1, length, dtype=torch.bool)
    exact = copy.deepcopy(tower).double()
    wanted = exact(*(one.double() for one in inputs), valid).numpy()[0]
    for name, run in made.items():
        error = float(np.abs(run() - wanted).max())
        assert error <= _MOST_ERROR, f"{name} over {length} behaviours is off by {error:.1e}"
    return made


def main() -> None:
    folder, seed, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    logging.disable(logging.WARNING)  # the exporter speaks of what is missing and not needed
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    spent: dict[int, dict[str, list[float]]] = {}
    for length in LENGTHS:
        made = ways(folder / f"tower-{length}", length, seed)
        spent[length] = {name: [] for name in made}
        for turn in range(-(rounds // 10) - 2, rounds):
            for name, run in made.items():
                began = thread_time()
                run()
                if turn >= 0:  # before, they warm up
                    spent[length][name].append((thread_time() - began) * 1e3)
    print(json.dumps(spent))


if __name__ == "__main__":
    main()
