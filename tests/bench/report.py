"""What a benchmark leaves behind: `reports/<name>.json`, one PNG, and a table on the terminal.

A figure is `{"value", "unit", "low", "high", "n"}`: the median over n repetitions with its range, unless the caller
gives the value (a percentile over all samples with the range over windows). Tables are lists of flat objects.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REPORTS = Path("reports")


def hardware() -> dict[str, object]:
    """The machine, as far as it explains a timing."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _jsonable(value: Any) -> Any:
    """The value with null for what is no finite number: an interval that too few users gave must not cost the run."""
    if isinstance(value, dict):
        return {name: _jsonable(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_jsonable(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Report:
    """Collects figures and tables of one run; `finish` writes them. Not thread-safe."""

    def __init__(self, name: str, seed: int, quick: bool) -> None:
        self.name, self.seed, self.quick = name, seed, quick
        self.figures: dict[str, dict[str, object]] = {}
        self.tables: dict[str, list[dict[str, object]]] = {}
        self._load_before = os.getloadavg()
        self._started = time.time()

    def figure(self, name: str, values: Sequence[float] | float, unit: str, value: float | None = None) -> None:
        """Records `value`, by default the median, and the range of repeated measurements of one thing."""
        samples = [float(values)] if isinstance(values, (int, float)) else [float(value) for value in values]
        low, high = min(samples), max(samples)
        value = statistics.median(samples) if value is None else float(value)
        self.figures[name] = {"value": value, "unit": unit, "low": low, "high": high, "n": len(samples)}
        print(f"  {name:<36} {value:>12.6g} {unit:<8} [{low:.6g} .. {high:.6g}] n={len(samples)}", flush=True)

    def table(self, name: str, rows: list[dict[str, object]]) -> None:
        self.tables[name] = rows

    def finish(self, draw: Callable[[Any], None]) -> Path:
        """Writes the JSON and the plot; `draw` fills a matplotlib figure. Returns the path of the JSON."""
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt

        REPORTS.mkdir(exist_ok=True)
        path = REPORTS / f"{self.name}.json"
        content = {
            "name": self.name,
            "seed": self.seed,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
            "seconds": round(time.time() - self._started, 1),
            "hardware": hardware(),
            "load_before": list(self._load_before),
            "load_after": list(os.getloadavg()),
            "quick": self.quick,
            "figures": self.figures,
            "tables": self.tables,
        }
        path.write_text(json.dumps(_jsonable(content), indent=1, allow_nan=False) + "\n")
        canvas = plt.figure(figsize=(11, 4.2), layout="constrained")
        draw(canvas)
        canvas.savefig(path.with_suffix(".png"), dpi=110)
        plt.close(canvas)
        print(f"\n{path} and {path.with_suffix('.png')}")
        return path
