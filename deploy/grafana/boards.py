"""Writes Grafana's dashboards into `dashboards/` beside it, or into the folder that is given.

    python deploy/grafana/boards.py

compute.py, serving.py and students.py are the three boards; panels.py is how they look, queries.py what they ask, and
frame.py what they share. For Grafana 11.6, whose SDK writes them.
"""

import json
import sys
from pathlib import Path

import compute
import serving
import students
from grafana_foundation_sdk.cog.encoder import JSONEncoder

HERE = Path(__file__).parent


def main(folder: Path) -> None:
    for made in (compute.built(), serving.built(), students.built()):
        text = json.dumps(made, cls=JSONEncoder, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / f"{made.uid}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "dashboards")
