"""The demo: one shared teacher, four ways to learn from it, at equal student steps.

Claim    with few labels, a student learns more from a teacher's answers than from the labels, and UNIX gets as much out
         of three quarters of the answers as KD out of all.
Method   mnist5k (4000 training images, LABELLED of them with a label, 1000 to test). A teacher is trained on all
         labels and served; hard labels, KD, KD + mixup and UNIX are trained one after another, the same steps, the same
         student. Accuracy is that of the last epoch; samples asked and computed are read from the server's counters.
Machine  two cores, no GPU, no download.
n        one seed unless told otherwise; docs/benchmarks.md has the same with more seeds and intervals.

    python benchmarks/demo.py [--seeds 0,1,2] [--output runs/demo]
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DATASET = "mnist5k"
LABELLED = 100
TEACHER = {"name": "cnn", "channels": 1, "classes": 10, "size": 28, "width": 24}
STUDENT = "cnn-tiny"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="hard,kd,kd+mixup,unix")
    parser.add_argument("--seeds", default="0", help="each method is trained once with each")
    parser.add_argument("--teacher-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=12, help="of each student")
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    arguments = parser.parse_args()
    began = time.monotonic()
    weights = train_teacher(arguments.teacher_epochs, arguments.output / "teacher")
    log = arguments.output / "teacher-server.log"
    with serving(weights, log) as (grpc_address, http_address):
        student(
            "compare", "--methods", arguments.methods, "--seeds", arguments.seeds,
            "--dataset", DATASET, "--labelled", str(LABELLED), "--crop", "2",
            "--student", STUDENT, "--epochs", str(arguments.epochs), "--learning-rate", "0.4",
            "--threads", "1", "--depth", "0",
            "--teacher-address", grpc_address, "--metrics-url", f"http://{http_address}/metrics",
            "--job", "demo", "--output", str(arguments.output), "--overwrite",
        )  # fmt: skip
    print(f"log:    {log}")
    print(f"spend:  teacher-server ledger show --state-directory {weights.parent / 'state'}")
    print(f"the whole demo took {time.monotonic() - began:.0f} s")


def train_teacher(epochs: int, output: Path) -> Path:
    student(
        "train", "--method", "hard", "--dataset", DATASET, "--crop", "2", "--student", str(TEACHER["name"]),
        "--student-arguments", json.dumps({"width": TEACHER["width"]}), "--epochs", str(epochs),
        "--learning-rate", "0.2", "--job", "teacher", "--output", str(output), "--overwrite",
    )  # fmt: skip
    return output / f"epoch-{epochs:04d}.safetensors"


@contextmanager
def serving(weights: Path, log: Path) -> Iterator[tuple[str, str]]:
    """A teacher server on free ports; yields its gRPC and HTTP addresses, and ends it as an operator would."""
    command = [
        sys.executable, "-m", "teacher_server", "serve", "--model", "student_worker.models:build",
        "--model-arguments", json.dumps(TEACHER), "--weights", str(weights),
        "--grpc-port", "0", "--http-port", "0", "--state-directory", str(weights.parent / "state"),
    ]  # fmt: skip
    with (
        log.open("w") as lines,  # one for each query
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=lines, text=True) as server,
    ):
        try:
            line = server.stdout.readline() if server.stdout else ""
            ready = re.search(r"grpc (\S+), http (\S+),", line)
            if not ready:
                raise SystemExit(f"the server did not start: see {log}")
            print(line, end="", flush=True)
            yield ready[1], ready[2]
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def student(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "student_worker", *arguments], check=True)


if __name__ == "__main__":
    main()
