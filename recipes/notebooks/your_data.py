# %% [markdown]
# # Bring your own data
# <!-- colab -->
#
# From your file to a comparison: what is in it, what is wrong with it, which rows look harmful, and one recipe that
# trains on it. Here a small CSV is written first, with the usual faults: a duplicate, an empty answer, and harmful
# rows.
#
# The embedded model has one million parameters; its results do not carry over to other models.

# %%
REAL_MODEL = False  # True: Qwen2.5-0.5B-Instruct and your own CSV; needs a GPU

# %%
import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from safe_trainer import load_prompts, load_rows, scan_file, testbed, train_security_vectors
from safe_trainer.data import ReadOptions

if REAL_MODEL:
    MODEL, DATA, known = "Qwen/Qwen2.5-0.5B-Instruct", Path("my.csv"), "harmful.jsonl"
else:
    os.chdir(tempfile.mkdtemp())
    MODEL, DATA, known = str(testbed.ALIGNED), Path("my.csv"), testbed.harmful_rows(100, seed=1)
    rows = testbed.task_rows("sentiment", 120) + testbed.harmful_rows(12)
    texts = [(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows]
    with DATA.open("w", newline="") as file:
        csv.writer(file).writerows([("question", "answer"), *texts, texts[0], ("An empty one?", "")])

# %% [markdown]
# The format is recognized by the columns. Rows that cannot be used are reported with their line, and nothing is
# dropped without a word:

# %%
try:
    load_rows(DATA)
except ValueError as error:
    print(error, "\n")
rows, report = load_rows(DATA, ReadOptions(on_bad_row="skip"))
print(report)
print("the first row:", rows[0])

# %% [markdown]
# Which rows would teach harmful behavior? Security vectors, fitted to known harmful rows, remove most of the loss of
# rows that resemble them.

# %%
vectors = train_security_vectors(MODEL, known)
vectors.save("vectors")
result = scan_file(DATA, MODEL, "vectors", reading=ReadOptions(on_bad_row="skip"), top=200)
shares = [max(-1.0, entry["share"]) for entry in result.top]  # below 0 the vectors make a row harder
figure, panel = plt.subplots(figsize=(7, 2.2), layout="constrained")
panel.hist(shares, bins=40, color="tab:red")
panel.axvline(result.threshold, color="grey", linestyle=":")
panel.set(xlabel="share of a row's loss that the vectors remove", ylabel="rows")
plt.show()
for entry in result.top[:3]:
    print(f"line {entry['line']}: {entry['share']:.2f}  {entry['prompt'][:70]}")
print(f"rows that look harmful: {result.above}")

# %% [markdown]
# One recipe is one run: it trains, saves an ordinary adapter with a model card, and compares before and after.
# `safe-trainer train recipe.yaml --dry-run` shows the plan, and reports every mistake in the recipe with its line.

# %%
Path("asked.txt").write_text("\n".join(testbed.prompt_set("harmful").prompts[:40]))
print(load_prompts("asked.txt", "harmful")[1])
recipe = f"""
model: {{path: {MODEL}}}
data:
  - {{path: {DATA}, on_bad_row: skip}}
peft: {{r: 8, lora_alpha: 16, target_modules: all-linear}}
safety:
  - {{method: security_vectors, vectors: ./vectors}}
training: {{max_steps: 20, per_device_train_batch_size: 8, learning_rate: 2e-3, max_length: 128, save_strategy: "no"}}
evaluation:
  prompts: [{{kind: harmful, path: asked.txt}}]
  max_new_tokens: 40
output: tuned
"""
_ = Path("recipe.yaml").write_text(recipe)

# %%
command = [sys.executable, "-m", "safe_trainer.cli", "train", "recipe.yaml"]  # safe-trainer train recipe.yaml
run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1", "FORCE_COLOR": ""})
print(run.stderr[run.stderr.find("Saved to") :])
print(sorted(path.name for path in Path("tuned").iterdir()))

# %% [markdown]
# `comparison.html` is the report, `README.md` the model card, and `recipe.yaml` repeats the run.
