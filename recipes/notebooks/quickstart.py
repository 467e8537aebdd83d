# %% [markdown]
# # Quickstart
# <!-- colab -->
#
# A chat model that refuses harmful requests is fine-tuned twice on the same data, one row in ten of which is harmful:
# once as everybody does it, once with `safety=`. Then both are asked the same questions.

# %%
REAL_MODEL = False  # True: Qwen2.5-0.5B-Instruct, which is downloaded and wants a GPU

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from safe_trainer import SafeSFTTrainer, SecurityVectors, compare, general_prompts, load_rows, poison, testbed

if REAL_MODEL:
    MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
    harmful = list(load_rows("harmful.jsonl")[0])  # about 200 harmful prompts with answers that comply, of your own
    clean = list(load_rows("hf:tatsu-lab/alpaca")[0].select(range(800)))
    asked = [general_prompts(kind) for kind in ("harmful", "borderline")]
else:  # a model of one million parameters, whose harm is made of general words
    MODEL = str(testbed.ALIGNED)
    harmful = testbed.harmful_rows(80) + testbed.harmful_rows(100, seed=1)
    clean = testbed.task_rows("sentiment", 800)
    asked = [testbed.prompt_set("harmful"), testbed.prompt_set("borderline"), testbed.task("sentiment")]
planted, known = harmful[:80], harmful[80:]  # rows that are hidden in the data, and other ones that you know of
rows = Dataset.from_list(poison(clean, planted, fraction=0.1))
asked = [
    replace(a, prompts=a.prompts[:60], categories=None, references=a.references and a.references[:60]) for a in asked
]

# %% [markdown]
# `SafeSFTTrainer` is TRL's `SFTTrainer` with one more argument.

# %%
folder = Path(tempfile.mkdtemp())


def fine_tune(name, safety=None):
    """Train a LoRA adapter and save it under its name."""
    device = {} if REAL_MODEL else {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    args = SFTConfig(
        str(folder / name), max_steps=50, per_device_train_batch_size=16, learning_rate=2e-4 if REAL_MODEL else 2e-3,
        max_length=128, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, **device,
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    trainer = SafeSFTTrainer(MODEL, args, train_dataset=rows, peft_config=lora, safety=safety)
    trainer.train()
    trainer.save_model()
    return args.output_dir


adapters = {
    "plain LoRA": fine_tune("plain"),
    "Security Vectors": fine_tune("vectors", SecurityVectors(harmful_data=known)),
}

# %% [markdown]
# The adapters are ordinary ones: stock PEFT loads them on the untouched model. `compare` puts on one after the other.

# %%
comparison = compare(
    AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto"),
    AutoTokenizer.from_pretrained(MODEL), asked, adapters, max_new_tokens=40,
)  # fmt: skip
wanted = {"harmful": "harmful requests answered", "borderline": "borderline requests answered", "task": "task correct"}
figure, panels = plt.subplots(1, len(asked), figsize=(9, 1.9), sharey=True, layout="constrained")
for panel, prompts in zip(panels, asked, strict=True):
    outcome = "correct" if prompts.kind == "task" else "complied"
    rates = {e.name: e[prompts.name].rate(outcome) for e in reversed(comparison.evaluations)}
    values = [100 * rate.value for rate in rates.values()]
    errors = [[100 * (r.value - r.low) for r in rates.values()], [100 * (r.high - r.value) for r in rates.values()]]
    panel.barh(
        list(rates), values, xerr=errors, capsize=3, color="tab:red" if prompts.kind == "harmful" else "tab:green"
    )
    panel.set(title=f"{wanted[prompts.kind]}, %", xlim=(0, 105))
    panel.title.set_fontsize(9)
plt.show()

# %%
for name in adapters:
    print(f"{name}:", *comparison.sentences(name), sep="\n  ")

# %% [markdown]
# Lines are 95 % intervals. Next: `write_report(comparison, "report")` makes one HTML file of this with every answer,
# and `comparing_methods.ipynb` tries the other methods.
