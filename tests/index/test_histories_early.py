"""A reader that opened the store while it was new, and sees it grow: its map must not end before the data do."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from index.histories import HistoriesWriter, StoredBehaviour

USERS, EACH = 60, 5_000  # 17 MB, more than LMDB maps unless it is told
READER = f"""
import sys
from pathlib import Path
from index.histories import HistoriesReader
reader = HistoriesReader(Path(sys.argv[1]))
print("open", flush=True)
sys.stdin.readline()
print([len(reader.history(f"u{{user}}", 10**15).keys) for user in range({USERS})])
"""


def test_a_reader_opened_on_a_new_store_follows_its_growth(tmp_path: Path) -> None:
    writer = HistoriesWriter(tmp_path, EACH, b"k")
    argv = [sys.executable, "-c", READER, str(tmp_path)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "open\n"
        for user in range(USERS):
            first = user * EACH
            records = [
                StoredBehaviour(f"u{user}", f"i{at}", f"e{at}", "click", at, at, 0, at)
                for at in range(first, first + EACH)
            ]
            writer.apply(records, [], {("behaviours", 0): first + EACH})
        said, _ = reader.communicate("go\n", timeout=60)
    writer.close()
    assert said == f"{[EACH] * USERS}\n"
