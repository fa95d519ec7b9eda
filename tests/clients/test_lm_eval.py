"""EleutherAI's evaluation harness, which asks for echoed prompts with log-probabilities."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.harness import Family, Served
from transformers import AutoModelForCausalLM, AutoTokenizer

from superpose_adapters.bundled import MINI

ROWS = 12
TASK = """\
task: held_out
dataset_path: json
dataset_kwargs:
  data_files: {rows}
test_split: train
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: right
metric_list:
  - metric: acc
"""


def held_out(domain: str) -> list[dict[str, str]]:
    file = MINI.held_out(domain)
    return [json.loads(line) for line in file.read_text().splitlines()[:ROWS]]


def rows(served: Served, mix: Mapping[str, float] | None) -> list[dict[str, Any]]:
    """Return questions with an answer of another, their own, and what the model says itself."""
    found = []
    for index, domain in product(range(ROWS // 2), ("math", "medicine")):
        ours, other = (held_out(domain)[(index + k) % ROWS] for k in (0, 1))
        prompt = f"Question: {ours['question']}\nAnswer:"
        greedy = served.client.generate(prompt, mix=mix, temperature=0, max_new_tokens=2).text
        choices = [other["answer"][:60], ours["answer"][:60], greedy.strip()]
        found.append({"question": ours["question"], "choices": choices, "right": 1})
    return found


def evaluate(
    served: Served, folder: Path, model: str, mix: Mapping[str, float] | None
) -> tuple[float, list[Any]]:
    """Run `lm_eval` as its users do; return acc, and what it asked and got of each row."""
    (folder / "tasks").mkdir(parents=True)
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(served, mix)))
    (folder / "tasks" / "held_out.yaml").write_text(TASK.format(rows=data))
    url = f"http://{served.server.http_address}/v1/completions"
    arguments = f"model={model},base_url={url},tokenizer={MINI.base()},max_length=257"
    subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model=local-completions"),
            *(f"--model_args={arguments}", "--tasks=held_out", "--batch_size=8"),
            *(f"--include_path={folder / 'tasks'}", f"--output_path={folder / 'out'}"),
            "--log_samples",
        ],
        check=True,
        env={**os.environ, "HF_HOME": str(folder / "hf"), "HF_DATASETS_OFFLINE": "1"},
    )
    (results,) = (folder / "out").rglob("results_*.json")
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    acc = json.loads(results.read_text())["results"]["held_out"]["acc,none"]
    return acc, [json.loads(line) for line in samples.read_text().splitlines()]


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("model", "mix"),
    [("base", {}), ("math=1;medicine=0.5", {"math": 1, "medicine": 0.5}), ("default", None)],
)
def test_its_figures_are_those_of_score_and_of_transformers(
    served: Served, tmp_path: Path, model: str, mix: Mapping[str, float] | None
) -> None:
    acc, samples = evaluate(served, tmp_path, model, mix)
    tokenizer = AutoTokenizer.from_pretrained(MINI.base())
    merged = Family(
        AutoModelForCausalLM.from_pretrained(MINI.base(), dtype=torch.float32),
        MINI.base(),
        MINI.adapters(),
    ).folded({"medicine": 1} if mix is None else mix)
    right, said = 0, 0
    assert len(samples) == ROWS
    for sample in samples:
        reference = []
        asked = sample["arguments"].values()
        for each, (answered,) in zip(asked, sample["resps"], strict=True):
            context, rest = each["arg_0"], each["arg_1"]
            ids = tokenizer(context + rest)["input_ids"]
            begin = len(tokenizer(context)["input_ids"])
            (scored,) = served.client.score([ids], mix=mix, logprobs=True).items
            assert float(answered[0]) == pytest.approx(sum(scored.logprobs[begin - 1 :]), abs=1e-4)
            with torch.inference_mode():
                logits = merged(torch.tensor([ids])).logits[0, begin - 1 : -1].log_softmax(-1)
            following = torch.tensor(ids[begin:])
            reference.append(float(logits.gather(1, following[:, None]).sum()))
            greedy = torch.equal(logits.argmax(-1), following)
            assert str(answered[1]) == str(greedy)
            said += greedy
        right += max(range(3), key=reference.__getitem__) == sample["doc"]["right"]
    assert acc == pytest.approx(right / ROWS)
    assert said  # What the model says is found out to be that.
