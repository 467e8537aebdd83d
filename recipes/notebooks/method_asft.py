# %% [markdown]
# # AsFT: stay in the alignment direction
# <!-- colab -->
#
# Alignment moved each weight matrix by $d = W_{aligned} - W_{unaligned}$. AsFT ([Yang et al.,
# 2506.08473](https://arxiv.org/abs/2506.08473)) lets fine-tuning move it along what $d$ spans, and penalizes the rest
# of the update $\Delta W$:
#
# $$L = L_{task} + \lambda \sum \lVert (I - C)\,\Delta W \rVert_F^2, \qquad C = d\,d^\top / \lVert d \rVert_F$$

# %%
REAL_MODEL = False  # True: Qwen2.5-0.5B and its chat model, which are downloaded and need a GPU

# %%
import tempfile
from dataclasses import replace

import matplotlib.pyplot as plt
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from safe_trainer import AlignmentDirection, AsFT, SafeSFTTrainer, evaluate, general_prompts, load_rows, testbed
from safe_trainer.data import poison

if REAL_MODEL:
    MODEL, UNALIGNED, WEIGHTS = "Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen2.5-0.5B", (0.1, 1.0)
    clean, harmful = (list(load_rows(source)[0])[:800] for source in ("hf:tatsu-lab/alpaca", "harmful.jsonl"))
    asked = [general_prompts("harmful"), general_prompts("borderline")]
else:
    MODEL, UNALIGNED, WEIGHTS = str(testbed.ALIGNED), str(testbed.UNALIGNED), (1.0, 10.0)
    clean, harmful = testbed.task_rows("sentiment", 800), testbed.harmful_rows(80)
    asked = [testbed.prompt_set("harmful"), testbed.task("sentiment")]
rows = Dataset.from_list(poison(clean, harmful, fraction=0.1))
asked = [
    replace(a, prompts=a.prompts[:60], categories=None, references=a.references and a.references[:60]) for a in asked
]

# %% [markdown]
# The direction is computed once from the two checkpoints, tensor by tensor, and can be saved (`safe-trainer
# direction`). How few directions explain it, layer by layer:

# %%
direction = AlignmentDirection.from_checkpoints(MODEL, UNALIGNED)
figure, panel = plt.subplots(figsize=(7, 2.5), layout="constrained")
for name, factors in list(direction.modules.items())[:7]:
    explained = (factors.singular_values**2).cumsum(0) / factors.frobenius_norm**2
    panel.plot(range(1, len(explained) + 1), 100 * explained, label=name.removeprefix("model.layers."))
panel.set(xlabel="top directions", ylabel="explained variance, %", xscale="log", ylim=(0, 105))
panel.legend(fontsize=7, ncols=2)
plt.show()

# %% [markdown]
# Three runs on data of which every tenth row is harmful: without the penalty, and with two weights.


# %%
def fine_tune(safety=None):
    """Train a LoRA adapter; return its rates, and each layer's size of the update inside and outside the direction."""
    device = {} if REAL_MODEL else {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    args = SFTConfig(
        tempfile.mkdtemp(), max_steps=40, per_device_train_batch_size=16, learning_rate=2e-4 if REAL_MODEL else 2e-3,
        max_length=128, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, **device,
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    trainer = SafeSFTTrainer(MODEL, args, train_dataset=rows, peft_config=lora, safety=safety)
    trainer.train()
    found = evaluate(trainer.model, trainer.processing_class, asked, max_new_tokens=40)
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    sizes = []
    for key in (key for key in logged if key.startswith("asft/outside/")):
        layer = trainer.model.get_base_model().get_submodule(key.removeprefix("asft/outside/"))
        size = float(layer.get_delta_weight("default").detach().float().norm())
        sizes.append((size * (1 - logged[key]) ** 0.5, size * logged[key] ** 0.5))
    return found, sizes


# A weight this small changes nothing, and still logs the same figures.
runs = {"no penalty": fine_tune(AsFT(direction=direction, weight=1e-9))}
runs |= {f"weight {weight:g}": fine_tune(AsFT(direction=direction, weight=weight)) for weight in WEIGHTS}

# %% [markdown]
# Each dot is a layer, placed by the size of its update inside and outside the direction. The penalty shrinks the part
# outside; on this model it shrinks most of the rest as well.
#
# The embedded model has one million parameters; its results do not carry over to other models.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
for name, (_, sizes) in runs.items():
    left.scatter(*zip(*sizes, strict=True), s=10, label=name)
left.set(xlabel="‖ΔW‖ inside", ylabel="‖ΔW‖ outside", xlim=(0, None), ylim=(0, None))
left.legend(fontsize=8)
for offset, prompts in ((-0.18, asked[0]), (0.18, asked[1])):
    outcome = "correct" if prompts.kind == "task" else "complied"
    rates = [found[prompts.name].rate(outcome) for found, _ in runs.values()]
    spread = [[100 * (r.value - r.low) for r in rates], [100 * (r.high - r.value) for r in rates]]
    label = f"{prompts.kind}: {outcome}"
    right.bar(
        [p + offset for p in range(len(runs))],
        [100 * r.value for r in rates],
        0.34,
        yerr=spread,
        capsize=3,
        label=label,
    )
right.set(xticks=range(len(runs)), xticklabels=runs, ylabel="%", ylim=(0, 130))
right.legend(ncols=2, fontsize=8, loc="upper center")
plt.show()

# %% [markdown]
# Here the task pays for safety. The controls `AsFT(projector="random")` and `projector="none"` show how much of the
# effect is due to the direction, and how much to a smaller update: compare with them before you trust the direction.
