"""The processes of tests/training/test_strategies.py: they train each job that standard input lists, one by one.

A job is [config, folder, options of `train`]; what came of it is a line of JSON, from the first process. An option
`slow` gives the rank that takes that many seconds for its data; `stop_at` the step after which all are asked to stop.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time

from torch import distributed as dist

from attnlab.config import Execution, RunConfig, from_dict
from attnlab.training.train import Stopped, Trainer, train


def main() -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    honest = Trainer.batch
    for config, folder, options in json.load(open(sys.argv[1])):
        stop_at = options.pop("stop_at", None)
        how, slow = Execution(**options.pop("how", {})), options.pop("slow", None)
        said: list[str] = []

        def tell(event: dict, stop_at: int | None = stop_at, said: list[str] = said) -> None:
            if event["step"] == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            said += [event["say"]] if "say" in event else []

        def late(trainer: Trainer, step: int, slow: list | None = slow) -> list:
            time.sleep(slow[1] if slow and trainer.processes.rank == slow[0] else 0)
            return honest(trainer, step)

        Trainer.batch = late

        try:
            result = train(from_dict(RunConfig, config), folder, how=how, progress=tell, **options).to_dict()
            result["said"] = said
        except Stopped as stop:
            result = {"stopped": str(stop)}
        except ValueError as error:
            result = {"refused": str(error)}
        Trainer.batch = honest
        if os.environ.get("RANK", "0") == "0":
            print("RESULT " + json.dumps(result), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as attnlab does under a launcher
