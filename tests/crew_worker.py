"""What the processes of tests/test_strategies.py do: train every job that standard input lists, one after another.

A job is [config, folder, options of `train`]; what came of it is a line of JSON, from the first process.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from torch import distributed as dist

from attnlab.config import Execution, RunConfig, from_dict
from attnlab.train import Stopped, train


def main() -> None:
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    for config, folder, options in json.load(open(sys.argv[1])):
        stop_at = options.pop("stop_at", None)
        how = Execution(**options.pop("how", {}))

        def tell(event: dict, stop_at: int | None = stop_at) -> None:
            if event["step"] == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)

        try:
            result = train(from_dict(RunConfig, config), folder, how=how, progress=tell, **options).to_dict()
        except Stopped as stop:
            result = {"stopped": str(stop)}
        except ValueError as error:
            result = {"refused": str(error)}
        if os.environ.get("RANK", "0") == "0":
            print("RESULT " + json.dumps(result), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
