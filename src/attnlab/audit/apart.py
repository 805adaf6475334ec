"""An audit in a process of its own: the code that is judged can neither end this one, nor hold it, nor print to it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from typing import Any, BinaryIO

from ..errors import UserError
from ..results import Tell
from .result import Audit


def audit_apart(target: str, *, seconds: float, tell: Tell | None = None, **instructions: Any) -> Audit:
    """Return `target.audit_target(target, **instructions)`, made in a child process.

    seconds: the child is ended after so long. UserError where the audit could not run, where the code ends the process,
    and where it takes too long.
    """
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "attnlab.audit.apart", str(write)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(write,),
    )
    os.close(write)
    late = threading.Timer(seconds, child.kill)
    late.start()
    try:
        assert child.stdin
        child.stdin.write(json.dumps({"target": target, **instructions}).encode())
        child.stdin.close()
        with os.fdopen(read, "rb") as messages:
            answer = _answer(messages, tell)
        code = child.wait()
    finally:
        in_time = late.is_alive()
        late.cancel()
        child.kill()
        child.wait()
    if answer is not None and "audit" in answer:
        return Audit.from_dict(answer["audit"])
    if answer is not None and "refused" in answer:
        raise UserError(answer["refused"])
    if not in_time:
        raise UserError(f"the audit of {target} took longer than {seconds:g} s: give more --timeout, or fewer --laws")
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    if answer is None:
        raise UserError(
            f"the process that should judge {target} did not start ({how}): see what "
            f"'{sys.executable} -c \"import attnlab.audit.target\"' says in this folder"
        )
    raise UserError(f"{target} ended the process that judged it ({how}): a module must not do that, so nothing is said")


def _answer(messages: BinaryIO, tell: Tell | None) -> dict[str, Any] | None:
    """Return the last message, after telling the progress of those before; None where the child sent none."""
    message: dict[str, Any] | None = None
    for line in messages:
        try:
            message = json.loads(line)
        except ValueError:  # cut off where the child was ended
            break
        if tell is not None and "law" in message:
            tell(message["law"], message["done"], message["of"])
    return message


def _child(file: int) -> None:
    """Audit what stdin says, and write progress and the answer to the file descriptor."""
    from ..laws.call import in_full
    from .target import audit_target

    _limit_memory()
    order = json.load(sys.stdin)
    target = order.pop("target")
    with os.fdopen(file, "w") as messages:

        def send(**message: Any) -> None:
            print(json.dumps(message), file=messages, flush=True)

        send(ready=True)
        try:
            audit = audit_target(target, tell=lambda law, done, of: send(law=law, done=done, of=of), **order)
            send(audit=audit.to_dict())
        except UserError as error:
            send(refused=str(error))
        except Exception as error:
            send(refused=f"{target} cannot be audited: {in_full(error)}")


def _limit_memory() -> None:
    """Let this process have no more than half of the machine's memory, where the system can say so."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        resource.setrlimit(resource.RLIMIT_DATA, (half, resource.getrlimit(resource.RLIMIT_DATA)[1]))


if __name__ == "__main__":
    _child(int(sys.argv[1]))
