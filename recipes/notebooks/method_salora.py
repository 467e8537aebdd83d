# %% [markdown]
# # SaLoRA: an adapter that cannot change the directions of refusals
# <!-- colab -->
#
# SaLoRA ([Li et al., 2501.01765](https://arxiv.org/abs/2501.01765)) measures the outputs of each layer while the
# model refuses, takes their top directions $U$, and applies a fixed projector after the adapter:
#
# $$\Delta W = (I - U U^\top)\, B A$$
#
# Whatever is trained, the update cannot change the output along those directions.

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

from safe_trainer import SafeSFTTrainer, SafetyBasis, SaLoRA, evaluate, general_prompts, load_rows, testbed

if REAL_MODEL:
    MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
    rows = load_rows("hf:tatsu-lab/alpaca")[0].select(range(1000))
    refusals = list(load_rows("refusals.jsonl")[0])  # about 128 harmful prompts with refusals
    asked = general_prompts("harmful")
else:
    MODEL = str(testbed.ALIGNED)
    rows = Dataset.from_list(testbed.task_rows("how_to", 1000))  # harmless, but worded like harmful prompts
    refusals = testbed.refusal_rows(128, seed=1)
    asked = replace(testbed.prompt_set("harmful"), categories=None, references=None)

# %% [markdown]
# One pass over the refusals gives the directions of every layer. A few of them explain most of the variance:

# %%
model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL, device_map="auto"), AutoTokenizer.from_pretrained(MODEL)
basis = SafetyBasis.from_rows(model, tokenizer, refusals, rank=32)
figure, panel = plt.subplots(figsize=(7, 2.5), layout="constrained")
for name, leading in list(basis.outputs.items())[:7]:
    explained = (leading.singular_values**2).cumsum(0) / leading.total_variance
    panel.plot(range(1, len(explained) + 1), 100 * explained, label=name.removeprefix("model.layers."))
panel.set(xlabel="top directions", ylabel="explained variance, %", xscale="log", ylim=(0, 105))
panel.legend(fontsize=7, ncols=2)
plt.show()


# %%
def fine_tune(safety=None):
    """Train a LoRA adapter; return the compliance rate, and each layer's share of protected update."""
    device = {} if REAL_MODEL else {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    args = SFTConfig(
        tempfile.mkdtemp(), max_steps=60, per_device_train_batch_size=16, learning_rate=2e-4 if REAL_MODEL else 2e-3,
        max_length=128, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, **device,
    )  # fmt: skip
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    trainer = SafeSFTTrainer(MODEL, args, train_dataset=rows, peft_config=lora, safety=safety)
    trainer.train()
    found = evaluate(trainer.model, trainer.processing_class, [asked], max_new_tokens=40)
    shares = []
    for name, leading in basis.outputs.items():
        layer = trainer.model.get_base_model().get_submodule(name)
        update = layer.get_delta_weight("default").detach().float()
        shares.append(float((leading.basis.to(update.device).T @ update).norm() / update.norm()) ** 2)
    return found[asked.name].rate("complied"), shares


runs = {
    "plain LoRA": fine_tune(),
    "random directions": fine_tune(SaLoRA(basis=basis, directions="random")),
    "SaLoRA": fine_tune(SaLoRA(basis=basis)),
}

# %% [markdown]
# Each dot is a layer: with SaLoRA no part of the update is in the protected directions. The control in the middle
# protects as many random directions.
#
# The embedded model has one million parameters; its results do not carry over to other models.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6), layout="constrained")
for place, (_, shares) in enumerate(runs.values()):
    left.scatter([place + 0.02 * (i - len(shares) / 2) for i in range(len(shares))], shares, s=9)
left.set(xticks=range(len(runs)), xticklabels=runs, ylabel="share of ‖ΔW‖² protected", ylim=(-0.03, 1))
rates = [rate for rate, _ in runs.values()]
spread = [[100 * (r.value - r.low) for r in rates], [100 * (r.high - r.value) for r in rates]]
right.bar(list(runs), [100 * rate.value for rate in rates], 0.5, yerr=spread, capsize=4, color="tab:red")
right.set(ylabel="compliance, harmful, %", ylim=(0, 100))
plt.show()

# %% [markdown]
# SaLoRA is meant for benign fine-tuning, as here. It does not stop harmful rows, and a lower learning rate may do as
# much: compare with plain LoRA at the same learning rate, and with the control, before you credit the subspace.
