"""`trainer` with no picture held in memory: how a set too large for it is read, whatever the size of the one at hand.

python -m benchmarks.stream fit --shards SET …
"""

from __future__ import annotations

from trainer import cli, data

if __name__ == "__main__":
    data.KEEP_DECODED = 0
    cli.main()
