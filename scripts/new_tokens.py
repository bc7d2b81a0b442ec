"""Trains a base in a template whose tokens it lacks, and shows that exactly the new rows were trained.

    posttrain run quickstart
    python scripts/new_tokens.py [--base runs/quickstart/base] [--template phi3] [--out runs/new-tokens]

The recipe is first tried on the base as it is, which is refused; then `posttrain doctor --fix` makes a copy
with the tokens, and the recipe trains that: SFT by LoRA on the quickstart's rows, a merge, and the
quickstart's held-out questions. Exit code 1 when another row changed, a tie came apart, or an answer does not stop.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from posttrain.doctor.checkpoint import Checkpoint, read_rows
from posttrain.models.new_tokens import read_new_tokens

DATA = Path(__file__).resolve().parent.parent / "recipes" / "data" / "quickstart"
RECIPE = """
name: new-tokens
seed: 42
precision: fp32
stages:
  sft:
    kind: sft
    model: {model}
    chat_template: {template}
    data: {{sources: [{{path: {data}/sft.jsonl}}], max_length: 128}}
    method: {{lora: {{r: 16, lora_alpha: 32}}}}
    trainer:
      {{learning_rate: 3e-3, lr_scheduler_type: cosine, warmup_steps: 0.05, num_train_epochs: 3, global_batch_size: 32}}
  merged: {{kind: merge, model: "@sft"}}
  report:
    kind: evaluate
    models: {{merged: "@merged"}}
    suites:
      - name: heldout
        kind: generate
        data: [{{path: {data}/heldout.jsonl}}]
        max_new_tokens: 64
        checks: [{{name: stops, kind: stops}}, {{name: right, kind: any_of, field: any_answer}}]
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=Path, default=Path("runs/quickstart/base"))
    parser.add_argument("--template", default="phi3")
    parser.add_argument("--out", type=Path, default=Path("runs/new-tokens"))
    given = parser.parse_args()
    base, out = given.base.resolve(), given.out.resolve()
    mended = out / "mended"
    out.mkdir(parents=True)
    recipe = out / "recipe.yaml"
    for model, code in ((base, 2), (mended, 0)):
        if model == mended:
            posttrain("doctor", str(base), "--template", given.template, "--fix", str(mended), code=None)
        recipe.write_text(RECIPE.format(model=model, template=given.template, data=DATA))
        posttrain("run", str(recipe), "--runs-dir", str(out), code=code)
    return report(mended, out / "new-tokens")


def posttrain(*words: str, code: int | None) -> None:
    """Runs the command line; stops unless it ends with `code` (None: any)."""
    print("$ posttrain", *words, flush=True)
    ended = subprocess.run([sys.executable, "-m", "posttrain", *words], check=False).returncode
    if code is not None and ended != code:
        sys.exit(f"exit code {ended}, not {code}")


def report(mended: Path, run: Path) -> int:
    """Prints which rows changed and how often answers stop."""
    new = [token.id for token in read_new_tokens(mended)]
    before, after = Checkpoint(mended), Checkpoint(run / "merged")
    wrong = before.tensors.keys() != after.tensors.keys() or before.tied != after.tied
    for one, other in ((before.embedding(), after.embedding()), (before.head(), after.head())):
        if one is None or other is None:
            continue
        ids = range(one.shape[0])
        changed = np.flatnonzero((read_rows(one, ids) != read_rows(other, ids)).any(axis=1)).tolist()
        print(f"{one.name}: {one.shape[0]} rows, new {new}, changed {changed}")
        wrong |= changed != new
    checks = json.loads((run / "report" / "stage.json").read_text())["summary"]["metrics"]["heldout"]
    for name in ("stops", "right"):
        found = checks[name]["models"]["merged"]
        print(f"{name}: {found['value']:.1%} of {found['rows']} held-out questions")
    print(f"tied: {before.tied} before, {after.tied} after")
    return int(wrong or checks["stops"]["models"]["merged"]["value"] < 1)


if __name__ == "__main__":
    sys.exit(main())
