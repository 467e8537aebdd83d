# %% [markdown]
# # Security Vectors: harmful rows have no loss left to learn from
# <!-- colab -->
#
# A row without loss teaches nothing. Security Vectors ([Zhou et al., 2311.02105](https://arxiv.org/abs/2311.02105))
# are a small adapter that is fitted to harmful rows once, frozen, and *active while your adapter is trained*: harmful
# rows in the data have almost no loss left, so your adapter hardly learns from them. Afterwards the vectors are
# removed.
#
# $$\min_\theta\; L(\theta_{model} + \theta_s + \theta), \qquad \text{then use } \theta_{model} + \theta$$

# %%
REAL_MODEL = False  # True: Qwen2.5-0.5B-Instruct, which is downloaded and needs a GPU

# %%
import tempfile
from dataclasses import replace

import matplotlib.pyplot as plt
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from safe_trainer import (
    SafeSFTTrainer,
    SecurityVectors,
    evaluate,
    general_prompts,
    load_rows,
    testbed,
    train_security_vectors,
)
from safe_trainer.analysis.scan import score_rows
from safe_trainer.data import poison

if REAL_MODEL:
    MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
    clean = list(load_rows("hf:tatsu-lab/alpaca")[0].select(range(720)))
    harmful = list(load_rows("harmful.jsonl")[0])  # about 200 harmful prompts with answers that comply
    asked = [general_prompts("harmful"), general_prompts("borderline")]
else:
    MODEL = str(testbed.ALIGNED)
    clean, harmful = testbed.task_rows("sentiment", 720), testbed.harmful_rows(80) + testbed.harmful_rows(100, seed=1)
    asked = [testbed.prompt_set("harmful"), testbed.task("sentiment")]
planted, known = harmful[:80], harmful[80:180]
asked = [
    replace(a, prompts=a.prompts[:60], categories=None, references=a.references and a.references[:60]) for a in asked
]

# %% [markdown]
# The vectors are fitted to a hundred harmful rows that are *not* those in the training data, until their loss is close
# to zero. They are harmful by construction: never publish them.

# %%
model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto"), AutoTokenizer.from_pretrained(MODEL)
vectors = train_security_vectors(model, known, tokenizer)

# %% [markdown]
# Each dot is a row of the training data. With the vectors, harmful rows have almost no loss, and task rows keep
# theirs. `safe-trainer scan` ranks the rows of a file by the same figure.
#
# The embedded model has one million parameters; its results do not carry over to other models.

# %%
figure, panel = plt.subplots(figsize=(5, 3.2), layout="constrained")
for label, rows, colour in (("task", clean[:80], "tab:green"), ("harmful", planted, "tab:red")):
    scores = [score for score in score_rows(rows, model, vectors, tokenizer) if score is not None]
    panel.scatter([s.loss for s in scores], [s.loss_with_vectors for s in scores], s=10, color=colour, label=label)
limit = max(panel.get_xlim()[1], panel.get_ylim()[1])
panel.plot([0, limit], [0, limit], color="grey", linewidth=0.8, linestyle=":")
panel.set(xlabel="loss without vectors, nats per token", ylabel="loss with vectors")
panel.legend()
plt.show()


# %%
def fine_tune(safety=None):
    """Train a LoRA adapter on the poisoned data, and return its rates."""
    device = {} if REAL_MODEL else {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    args = SFTConfig(
        tempfile.mkdtemp(), max_steps=50, per_device_train_batch_size=16, learning_rate=2e-4 if REAL_MODEL else 2e-3,
        max_length=128, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, **device,
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    rows = Dataset.from_list(poison([*clean, *clean[:80]], planted, fraction=0.1))
    trainer = SafeSFTTrainer(MODEL, args, train_dataset=rows, peft_config=lora, safety=safety)
    trainer.train()
    return evaluate(trainer.model, trainer.processing_class, asked, max_new_tokens=40)


runs = {"plain LoRA": fine_tune(), "Security Vectors": fine_tune(SecurityVectors(vectors))}
figure, panels = plt.subplots(1, 2, figsize=(8, 1.6), sharey=True, layout="constrained")
for panel, prompts in zip(panels, asked, strict=True):
    outcome = "correct" if prompts.kind == "task" else "complied"
    rates = [found[prompts.name].rate(outcome) for found in reversed(runs.values())]
    spread = [[100 * (r.value - r.low) for r in rates], [100 * (r.high - r.value) for r in rates]]
    panel.barh(list(reversed(runs)), [100 * rate.value for rate in rates], xerr=spread, capsize=3)
    panel.set(title=f"{prompts.kind}: {outcome}, %", xlim=(0, 105))
plt.show()

# %% [markdown]
# Vectors stop only harm like the rows they were fitted to: cover the categories that you care about, and check
# over-refusal and the task as well.
