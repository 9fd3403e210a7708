"""`make bench NAME=<name> [QUICK=1]`: runs one benchmark, or lists them when no name is given."""

from __future__ import annotations

import argparse
import importlib
import sys

BENCHES = {
    "bea_sweep": "1 to 64 bridges: accuracy, use, remedies, and a search for a failure (hours, in parts; quick 1 min)",
    "crosses": "memory per user against accuracy, by table of the user's crosses (hours, in parts; quick 2 min)",
    "lsh_bits": "accuracy, bytes and cost of 16 to 512 bits, by kind of signature (hours, in parts; quick 2 min)",
    "cost": "CPU per request with all work counted, against sequential COLD and DSSM (5 min; quick 2)",
    "quality": "all models and ablations: accuracy against real-time cost (hours, in parts of MINUTES=; quick 2 min)",
    "staleness": "what fresh item vectors are worth, per turnover speed (hours, in parts of MINUTES=; quick 2 min)",
    "marketplace": "what each term of the synthetic marketplace is worth to its oracle (6 min; quick 1)",
    "lanes": "recommend with the heavy steps on lanes, against the commit before, 1 to 30 clients (10 min; quick 2)",
    "parallel_inference": "user inference beside retrieval or after it, by retrieval time and history (4 min; quick 1)",
    "miss_storm": "caches emptied under load, feature service 10 times slower, waited for or not (4 min; quick 1)",
    "rtp": "10,000 candidates against the machine's limits, in process and through HTTP; growth (6 min; quick 1)",
    "recos": "concurrent inference of four models against whole queries, and ONNX Runtime (1 h, in parts of MINUTES=)",
    "head_precision": "what bf16 and int8 in the head do to scores and the best 100, on MovieLens (3 min; quick 1)",
    "arena_race": "the arena's readers against its writer, every row compared (MINUTES=3; quick 10 s)",
    "rollout": "switches of generations and kills under load, and a fill of 1M items (25 min; quick 3)",
    "ingest": "packs against single events, and how long ingest is away after a loss, 1M items (10 min; quick 2)",
    "main_path": "freshness, pipeline throughput, recommend latency by stage, parity, set-up time (6 min; quick 2)",
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--quick", action="store_true", help="the same figures on less work, in two minutes")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    if not arguments.name:
        print("make bench NAME=<name> [QUICK=1], where <name> is one of")
        for name, what in BENCHES.items():
            print(f"  {name:<16} {what}")
        return 0
    if arguments.name not in BENCHES:
        print(f"there is no benchmark {arguments.name!r}; `make bench` lists them", file=sys.stderr)
        return 2
    importlib.import_module(f"tests.bench.{arguments.name}").run(seed=arguments.seed, quick=arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
