"""Two processes train as one does, and none waits for another that has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from encoders.batches import Groups
from encoders.data.dataset import Dataset
from encoders.distributed import ALONE, Peers, peers
from encoders.train import fit
from tests.encoders.small import OPTIONS, small_data

ROOT = Path(__file__).parents[2]
RANK = """
import os, sys
from pathlib import Path
import safetensors.torch, torch
from encoders.distributed import peers
from encoders.train import fit
from tests.encoders.small import OPTIONS, small_data
torch.set_num_threads(1)
folder = Path(sys.argv[1])
with peers() as together:
    fitted = fit(small_data(), OPTIONS, checkpoint=folder / "c", log=folder / "log.csv", peers=together, save_seconds=0)
safetensors.torch.save_file(dict(fitted.model.state_dict()), folder / f"rank{together.rank}")
"""
FOREVER = """
import dataclasses, sys
from encoders import __main__ as command
from encoders.distributed import peers
from encoders.train import fit
from tests.encoders.small import OPTIONS, small_data

def forever(_):
    options = dataclasses.replace(OPTIONS, epochs=10**6, patience=10**6)
    with peers() as together:
        fit(small_data(), options, peers=together, report=lambda line: print(line, flush=True))

command._train = forever
sys.exit(command.main(["train", "--data", "small", "--out", "none"]))
"""
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(scope="module")
def data() -> Dataset:
    return small_data()


def test_two_processes_end_as_one(data: Dataset, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)], cwd=ROOT, env=ENVIRON, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    first, second = (safetensors.torch.load_file(tmp_path / f"rank{rank}") for rank in (0, 1))
    lines: list[str] = []
    alone = fit(data, OPTIONS, log=tmp_path / "alone.csv", report=lines.append)
    wanted = alone.model.state_dict()
    assert first.keys() == second.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=2e-4, msg=name)
    assert done.stdout.count("epoch 1:") == 1  # one process reports
    both, one = (np.genfromtxt(tmp_path / name, delimiter=",", names=True) for name in ("log.csv", "alone.csv"))
    np.testing.assert_array_equal(both["step"], one["step"])
    np.testing.assert_allclose(both["loss"], one["loss"], rtol=1e-4)


def test_a_killed_process_ends_the_other(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FOREVER],
            cwd=ROOT,
            env={**ENVIRON, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        assert ranks[0].stdout is not None
        assert any(line.startswith("epoch 1") for line in ranks[0].stdout)
        ranks[1].send_signal(signal.SIGKILL)
        _, said = ranks[0].communicate(timeout=120)
        assert ranks[0].returncode == 1
        assert "train: another process of this training ended or does not answer" in said
    finally:
        for rank in ranks:
            rank.kill()
            with contextlib.suppress(ValueError):
                rank.communicate()


def test_every_group_is_one_processs_share() -> None:
    numbers = np.arange(7)
    groups = Groups(numbers, numbers, numbers + 1, numbers)
    shares = [Peers(rank, 3).share(groups) for rank in range(3)]
    assert sorted(np.concatenate([share.user for share in shares])) == list(numbers)
    assert [len(Peers(rank, 3).share(groups.select(numbers[:2]))) for rank in range(3)] == [1, 1, 0]


def test_alone_nothing_is_exchanged() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, 2.0])
    with peers({}) as together:
        assert together == ALONE
    assert ALONE.add_up([weight], [1.5]) == [1.5]
    assert ALONE.agree([2.5]) == [2.5]
    assert weight.grad.tolist() == [1.0, 2.0]
