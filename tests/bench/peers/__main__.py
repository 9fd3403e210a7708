"""`python -m tests.bench.peers PEER FOLDER`: one peer, answering the requests of FOLDER by number, a line each.

It prints `ready` and its settings as JSON. For each number read from standard input it answers that request and prints
`{"ms": ..., "cpu_ms": ..., "parts": {"fetch": ms, ...}, "top": [ids]}`; it ends with its input. `check FOLDER` instead
holds the scores of every peer against the training form's forward pass. Both run in the peers' environment
(`environment.py`) on a folder that `data.write_world` has written; a small one for `check`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from tests.bench.peers.data import Data
from tests.bench.peers.peer import Lap, Peer
from tests.bench.peers.peers import PEERS

_CHECKED = 200  # candidates of each checked request


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.peers", description=__doc__)
    parser.add_argument("peer", choices=[*PEERS, "check"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # exporters and Feast speak of what is missing and not needed
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that servers of the peers end too
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    data = Data(arguments.folder)
    if arguments.peer == "check":
        return check(data)
    with contextlib.closing(PEERS[arguments.peer](data)) as peer:
        serve(peer)
    return 0


def serve(peer: Peer) -> None:
    gc.collect()
    gc.freeze()
    print("ready", json.dumps(peer.settings), flush=True)
    for line in sys.stdin:
        before = peer.server_cpu_ms()
        began, began_cpu = time.perf_counter(), time.process_time()
        lap = Lap()
        top = peer.top(int(line), lap)
        ms, cpu_ms = (time.perf_counter() - began) * 1e3, (time.process_time() - began_cpu) * 1e3
        cpu_ms += peer.server_cpu_ms() - before
        print(json.dumps({"ms": ms, "cpu_ms": cpu_ms, "parts": lap.parts, "top": top}), flush=True)


def check(data: Data) -> int:
    """Every peer's largest error on a few users; 1 where one is beyond its tolerance."""
    failed = 0
    for name, make in PEERS.items():
        with contextlib.closing(make(data)) as peer:
            error = 0.0
            for place in range(min(3, len(data.requests))):
                ids, user = data.requests[place][:_CHECKED], data.user(place)
                error = max(error, float(np.abs(peer.scores(user, ids, Lap()) - peer.expected(user, ids)).max()))
        failed += error > peer.tolerance
        print(f"{name:<18} off by {error:.1e}, at most {peer.tolerance:.0e}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
