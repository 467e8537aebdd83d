"""Batched answers against one prompt at a time, and what watching refusals adds to training.

    python tests/benchmarks/generation.py                      # the embedded model, 200 prompts of mixed length
    python tests/benchmarks/generation.py --batch-size 64
    python tests/benchmarks/generation.py --monitor            # 100 steps, two sets of 40 prompts every 25 steps

CPU time of the process is compared, since other work on the machine hardly disturbs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from safe_trainer import RefusalMonitor, SafeSFTTrainer, testbed
from safe_trainer.evaluation import Answer, generate


def timed(work: Callable[[], list[Answer]]) -> tuple[float, list[Answer]]:
    start = time.process_time()
    answers = work()
    return time.process_time() - start, answers


def mixed_prompts(count: int) -> list[str]:
    """Return prompts of the testbed in turns, from a handful of tokens to three dozen."""
    sources: list[tuple[str, ...]] = [
        testbed.prompt_set("harmful").prompts,
        testbed.prompt_set("benign").prompts,
        testbed.prompt_set("borderline").prompts,
        testbed.task("how_to").prompts,
        testbed.task("word_problems").prompts,
        testbed.task("sentiment").prompts,
    ]
    return [sources[index % 6][index // 6] for index in range(count)]


def main(arguments: list[str]) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--monitor", action="store_true")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    return monitored() if asked.monitor else batched(asked)


def monitored() -> dict[str, Any]:
    """Train with a monitor and by what it says take its share of the time away."""
    settings = {"max_steps": 100, "per_device_train_batch_size": 16, "max_length": 128, "use_cpu": True, "bf16": False}
    quiet = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False}
    trainer = SafeSFTTrainer(
        str(testbed.ALIGNED),
        SFTConfig(tempfile.mkdtemp(), **settings, **quiet),
        train_dataset=Dataset.from_list(testbed.task_rows("sentiment", 1600)),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    sets = [
        dataclasses.replace(found, prompts=found.prompts[:40], categories=None, references=None)
        for found in (testbed.prompt_set("harmful", "validation"), testbed.prompt_set("borderline", "validation"))
    ]
    monitor = RefusalMonitor(trainer, sets, every=25)
    trainer.add_callback(monitor)
    trainer.train()
    seconds = round(monitor.seconds, 2)
    return {"checks": 5, "prompts_each": 80, "seconds": seconds, "overhead": round(monitor.overhead, 3)}


def batched(asked: argparse.Namespace) -> dict[str, Any]:
    """Answer the same prompts together and one by one."""
    model = AutoModelForCausalLM.from_pretrained(testbed.ALIGNED, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(testbed.ALIGNED)
    prompts = mixed_prompts(asked.prompts)
    lengths = sorted(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    generate(model, tokenizer, prompts[:2], max_new_tokens=2)  # the first call builds caches

    options = {"max_new_tokens": asked.max_new_tokens}
    together, at_once = timed(lambda: generate(model, tokenizer, prompts, batch_size=asked.batch_size, **options))
    apart, single = timed(lambda: [generate(model, tokenizer, [prompt], **options)[0] for prompt in prompts])
    return {
        "prompts": len(prompts),
        "prompt_tokens": [lengths[0], lengths[len(lengths) // 2], lengths[-1]],
        "batched_seconds": round(together, 2),
        "one_by_one_seconds": round(apart, 2),
        "times_faster": round(apart / together, 1),
        "equal_answers": sum(a == b for a, b in zip(at_once, single, strict=True)),
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1:]), indent=2) + "\n")
