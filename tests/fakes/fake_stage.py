"""A stage that takes steps, checkpoints and resumes like a real one, in milliseconds and without torch.

`FAKE` in the environment sets behaviours: `stage=word,stage=word`; `FAKE_STEP` is the seconds of a step.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from posttrain.errors import DataError, Interrupted
from posttrain.stages.context import Context, Summary

STEPS, EVERY = 6, 2


def run(config: object, context: Context) -> Summary:
    """Chains a hash over the inputs and the steps; the outcome depends on nothing else."""
    behaviour = dict(pair.split("=") for pair in os.environ.get("FAKE", "").split(",") if pair)
    word = behaviour.get(context.stage, "")
    print(f"fake {context.stage}: {word or 'as usual'}")
    if context.rank.world > 1:
        _meet(context, "start")
    if word == "crash":
        raise RuntimeError("the fake broke")
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "die1" and context.rank.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "break1":
        if context.rank.index == 1:
            raise RuntimeError("the second broke")
        time.sleep(60)  # as in a collective that never comes
    if word == "user":
        raise DataError("rows.jsonl:3", "no answer", "write one")
    if word == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if word == "child":
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", str(context.run_dir)])
    value = _train(context, word)
    if context.rank.first:
        (context.folder / "model.safetensors").write_text(value * 100)
        (context.folder / "config.json").write_text("{}")
    if context.rank.world > 1:
        _meet(context, "end")
    return Summary(
        f"value {value[:8]}",
        ["model.safetensors", "config.json"],
        table=f"table of {context.stage}" if word == "table" else "",
        failed=["accuracy 0.1 < 0.5"] if word == "gate" else [],
    )


def _meet(context: Context, point: str) -> None:
    """Waits for the other processes of the stage, as the data and every step of a real one do."""
    attempt = (context.folder / "job.json").stat().st_mtime_ns
    name = f".{context.stage}-{attempt}-{point}"
    (context.run_dir / f"{name}-{context.rank.index}").touch()
    while len(list(context.run_dir.glob(f"{name}-*"))) < context.rank.world:
        time.sleep(0.01)


def _train(context: Context, word: str) -> str:
    parents = [given.folder / "model.safetensors" for _, given in sorted(context.inputs.items()) if given.folder]
    start = [context.fingerprint, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in parents)]
    value, step = hashlib.sha256("".join(start).encode()).hexdigest(), 0
    checkpoints = context.folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    if done := sorted(checkpoints.glob("step-*")):
        step, value = int(done[-1].name[5:]), (done[-1] / "value").read_text()
        context.events("note", text=f"resumed at step {step}")
    while step < STEPS:
        if (word != "deaf" and context.should_stop()) and word != "late":
            if context.rank.first:
                _save(checkpoints, step, value)
            raise Interrupted(context.stage, f"stopped at step {step}")
        time.sleep(float(os.environ.get("FAKE_STEP", "0")))
        step, value = step + 1, hashlib.sha256(value.encode()).hexdigest()
        context.events("step", step=step, total=STEPS, loss=1.0 / step, tokens_per_second=1000.0)
        if step % EVERY == 0 and step < STEPS and context.rank.first:
            _save(checkpoints, step, value)
    return value


def _save(checkpoints: Path, step: int, value: str) -> None:
    temporary = checkpoints / f".step-{step}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    (temporary / "value").write_text(value)
    if not (checkpoints / f"step-{step}").exists():
        temporary.rename(checkpoints / f"step-{step}")
