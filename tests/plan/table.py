"""The rows of the committed table by `benchmarks.plan.KEY`."""

import json

from benchmarks.plan import KEY, RESULTS

ROWS = {tuple(row.get(part) for part in KEY): row for row in json.loads(RESULTS.read_text())}
