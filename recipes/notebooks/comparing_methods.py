# %% [markdown]
# # Comparing methods
# <!-- colab -->
#
# Which method suits your data? Train each on the same rows, with more than one seed, and look at compliance with
# harmful prompts, over-refusal and the task together. One number never decides: a model that refuses everything is
# safe, too.
#
# The embedded model has one million parameters; its results do not carry over to other models.

# %%
REAL_MODEL = False  # True: Qwen2.5-0.5B-Instruct, which is downloaded and needs a GPU

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
from datasets import Dataset
from IPython.display import Markdown, display
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from safe_trainer import METHODS, SafeSFTTrainer, compare, general_prompts, load_rows, recommended, testbed
from safe_trainer.data import poison

if REAL_MODEL:
    MODEL, UNALIGNED = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B"
    clean, harmful = (list(load_rows(source)[0])[:800] for source in ("hf:tatsu-lab/alpaca", "harmful.jsonl"))
    refusals = list(load_rows("refusals.jsonl")[0])
    asked = [general_prompts("harmful"), general_prompts("borderline")]
else:
    MODEL, UNALIGNED = str(testbed.ALIGNED), str(testbed.UNALIGNED)
    clean, harmful = testbed.task_rows("sentiment", 700), testbed.harmful_rows(70) + testbed.harmful_rows(100, seed=1)
    refusals = testbed.refusal_rows(128, seed=1)
    asked = [testbed.prompt_set("harmful"), testbed.prompt_set("borderline"), testbed.task("sentiment")]
planted, known = harmful[:70], harmful[70:170]
asked = [
    replace(a, prompts=a.prompts[:60], categories=None, references=a.references and a.references[:60]) for a in asked
]
shown = {
    "plain LoRA": lambda: None,
    "recommended": lambda: recommended(known),
    "Security Vectors": lambda: METHODS["security_vectors"](harmful_data=known),
    "AsFT": lambda: METHODS["asft"](unaligned_model=UNALIGNED, weight=1.0 if REAL_MODEL else 10.0),
    "SaLoRA": lambda: METHODS["salora"](safety_data=refusals),
}
SEEDS = (0, 1)

# %%
folder = Path(tempfile.mkdtemp())


def fine_tune(name, make, seed):
    """Train one adapter and return where it is."""
    device = {} if REAL_MODEL else {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    args = SFTConfig(
        str(folder / f"{name}-{seed}"), max_steps=30, per_device_train_batch_size=16, seed=seed, max_length=128,
        learning_rate=2e-4 if REAL_MODEL else 2e-3, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, **device,
    )  # fmt: skip
    rows = Dataset.from_list(poison(clean, planted, fraction=0.1, seed=seed))
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    trainer = SafeSFTTrainer(MODEL, args, train_dataset=rows, peft_config=lora, safety=make())
    trainer.train()
    trainer.save_model()
    return args.output_dir


adapters = {name: [fine_tune(name, make, seed) for seed in SEEDS] for name, make in shown.items()}

# %% [markdown]
# A list of adapters under one name is several runs of the same variant. The interval of their mean covers other
# *seeds*; the interval of a single rate only covers other prompts.

# %%
comparison = compare(
    AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto"),
    AutoTokenizer.from_pretrained(MODEL), asked, adapters, max_new_tokens=40,
)  # fmt: skip
columns = [(a.name, "correct" if a.kind == "task" else "complied") for a in asked]
lines = [
    "| | " + " | ".join(f"{name}: {outcome}" for name, outcome in columns) + " |",
    "|---" * (len(columns) + 1) + "|",
]
lines.append("| before | " + " | ".join(comparison.before[n].rate(o).share for n, o in columns) + " |")
for name in adapters:
    lines.append(f"| {name} | " + " | ".join(str(comparison.spread(name, n, o)) for n, o in columns) + " |")
display(Markdown("\n".join(lines)))

# %% [markdown]
# The best place is the lower right: the task is learned, and no harmful prompt is complied with. Each dot is a run.

# %%
figure, panel = plt.subplots(figsize=(5.5, 3.2), layout="constrained")
target, outcome = columns[-1]
for marker, name in zip("o*sD^", adapters, strict=True):
    runs = [comparison[run] for run in comparison.runs[name]]
    across = [100 * run[target].rate(outcome).value for run in runs]
    up = [100 * run[asked[0].name].rate("complied").value for run in runs]
    panel.scatter(across, up, label=name, marker=marker, s=60, alpha=0.7)
panel.set(xlabel=f"{target}: {outcome}, %", ylabel="compliance, harmful, %", xlim=(-5, 105), ylim=(-5, 105))
panel.legend(fontsize=8)
plt.show()

# %% [markdown]
# Thirty steps, two seeds and one tiny model show how a comparison is made, not which method to choose. Choose settings
# on validation prompts and report on others, as here (these are test prompts, and no setting was chosen on them).
# `safe-trainer compare MODEL --adapter asft=run-1 --adapter asft=run-2 …` does the same from a terminal.
