# %% [markdown]
# # Quickstart
# <!-- colab -->
#
# A chat model that refuses harmful prompts is fine-tuned twice on the same data, of which 10 % of the rows are
# harmful: once as usual, once with `safety=`. Then both answer the same prompts.
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
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from safe_trainer import SafeSFTTrainer, compare, general_prompts, load_rows, recommended, testbed
from safe_trainer.data import poison

if REAL_MODEL:
    MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
    harmful = list(load_rows("harmful.jsonl")[0])  # about 200 harmful prompts with answers that comply
    clean = list(load_rows("hf:tatsu-lab/alpaca")[0].select(range(800)))
    asked = [general_prompts(kind) for kind in ("harmful", "borderline")]
else:  # inert stand-ins: harmful text is made of general words
    MODEL = str(testbed.ALIGNED)
    harmful = testbed.harmful_rows(80) + testbed.harmful_rows(100, seed=1)
    clean = testbed.task_rows("sentiment", 800)
    asked = [testbed.prompt_set("harmful"), testbed.prompt_set("borderline"), testbed.task("sentiment")]
planted, known = harmful[:80], harmful[80:]  # rows hidden in the data, and other rows to protect with
rows = Dataset.from_list(poison(clean, planted, fraction=0.1))
asked = [
    replace(a, prompts=a.prompts[:60], categories=None, references=a.references and a.references[:60]) for a in asked
]

# %% [markdown]
# `SafeSFTTrainer` is TRL's `SFTTrainer` with one more argument. `recommended` needs nothing from you; harmful rows of
# your own make it fit your use better.

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
    "recommended": fine_tune("recommended", recommended(known)),
}

# %% [markdown]
# The adapters are ordinary: stock PEFT loads them on the untouched model. `compare` evaluates them one after another.

# %%
comparison = compare(
    AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto"),
    AutoTokenizer.from_pretrained(MODEL), asked, adapters, max_new_tokens=40,
)  # fmt: skip
wanted = {"harmful": ("complied", "compliance, harmful"), "borderline": ("refused", "over-refusal, borderline")}
figure, panels = plt.subplots(1, len(asked), figsize=(9, 1.9), sharey=True, layout="constrained")
for panel, prompts in zip(panels, asked, strict=True):
    outcome, title = wanted.get(prompts.kind, ("correct", "task accuracy"))
    rates = {e.name: e[prompts.name].rate(outcome) for e in reversed(comparison.evaluations)}
    values = [100 * rate.value for rate in rates.values()]
    errors = [[100 * (r.value - r.low) for r in rates.values()], [100 * (r.high - r.value) for r in rates.values()]]
    color = "tab:green" if outcome == "correct" else "tab:red"
    panel.barh(list(rates), values, xerr=errors, capsize=3, color=color)
    panel.set(title=f"{title}, %", xlim=(0, 105))
    panel.title.set_fontsize(9)
plt.show()

# %%
for name in adapters:
    print(f"{name}:", *comparison.sentences(name), sep="\n  ")

# %% [markdown]
# Lines are 95 % intervals. Next: `write_report(comparison, "report")` writes one HTML file with every answer, and
# `comparing_methods.ipynb` tries the other methods.
