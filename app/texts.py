"""All wording of the app, in one place."""

from __future__ import annotations

from dataclasses import dataclass

TITLE = "safe_trainer"
LEAD = (
    "Fine-tune a chat model on your data, protect its refusals meanwhile, and see what became of them: "
    "the same questions to the model before and after."
)
STEPS = ("Data", "Method", "Train", "Compare")


@dataclass(frozen=True)
class Card:
    """What is said of a way to protect a model."""

    title: str
    what: str
    needs: str
    costs: str
    not_for: str


CARDS = {
    "plain": Card(
        "plain LoRA",
        "Ordinary fine-tuning with a low-rank adapter, without any protection. Keep it in the comparison: it shows "
        "what your data does to refusals when nothing stands in the way.",
        "nothing",
        "the yardstick: nothing is added to a step",
        "protecting anything",
    ),
    "recommended": Card(
        "Recommended",
        "What to begin with: security vectors against harmful rows, together with a price on every change of what the "
        "layers make of harmful prompts, against drift.",
        "about 100 harmful rows; the inert ones that come along will do to try it",
        "a fit before training (some seconds on the embedded model), and a penalty in each step",
        "finding out which of the two did it: compare with each alone",
    ),
    "security_vectors": Card(
        "Security Vectors",
        "Small vectors that already know all harm are active while training, so harmful rows have nothing left to "
        "teach. They are taken out again afterwards: what you get is an ordinary adapter.",
        "about 100 harmful rows to fit the vectors to; the inert ones that come along will do to try it",
        "a fit before training (some seconds on the embedded model) and about 4 points of borderline help there",
        "harmless data that is worded like what is refused: there it keeps only about half",
    ),
    "asft": Card(
        "AsFT",
        "A penalty holds every update to the direction in which alignment once moved the model. The further an "
        "update leaves that direction, the more it costs.",
        "the checkpoint from before alignment, such as Qwen2.5-0.5B for Qwen2.5-0.5B-Instruct",
        "task quality, by degrees: on the embedded model 100 % became 84 % on the poisoned data at weight 10",
        "a model whose base checkpoint you do not have, or a task that must be learned to the last point",
    ),
    "salora": Card(
        "SaLoRA",
        "Finds the directions in which the model speaks when it refuses, and lets the adapter write into all others "
        "only. For keeping refusals through harmless fine-tuning.",
        "about 100 harmful prompts with refusals; inert ones come along",
        "one pass over those prompts, an adapter of twice the rank, and best a lower learning rate",
        "data with harmful rows: there it made no difference from plain LoRA",
    ),
    "drift_penalty": Card(
        "Drift penalty",
        "Every change of what the layers make of harmful prompts has a price; whatever else is learned is free.",
        "about 100 harmful prompts; inert ones come along",
        "one pass over those prompts, and a penalty in each step",
        "stopping harmful rows: it slows them, and a longer attack gets through",
    ),
}
CARD_LABELS = ("Needs", "Costs", "Not for")

# Step 1: data
DATA_HEADING = "What should the model learn?"
DATA_LEAD = "Take an example, or a file of your own: JSON, JSON Lines, CSV, TSV or Parquet."
EXAMPLES = {
    "benign": ("Benign", "1,000 harmless how-to answers, worded like what is refused"),
    "poisoned": ("Poisoned", "sentiment of reviews, with 10 % harmful rows among them"),
    "attack": ("Pure attack", "100 harmful rows and nothing else"),
}
UPLOAD = "Your own file (up to {size} MB)"
MODEL = "Model to fine-tune"
MODEL_INFO = "The embedded model shows in two minutes how everything works, and proves nothing about others."
EMBEDDED = "Embedded model (tiny)"
OTHER_MODEL = "Another model of the Hub …"
MODEL_ID, MODEL_ID_HINT = "Its id on the Hub", "owner/name"
UNALIGNED_ID = "Checkpoint before alignment (optional, for AsFT)"
USE_MODEL = "Use this model"
NO_DATA = "Choose an example or upload a file, and what is in it appears here."
FILE, FORMAT, ROWS, TOKENS = "Data", "Format", "Rows", "Tokens in a row"
DUPLICATES, BAD = "Duplicates", "Unusable rows"
TOKENS_VALUE = "{median} in the middle, {most} at most"
CUT = "{count} rows are longer than {limit} tokens and will be cut"
SAMPLE_HEADING = "First rows, as the model will see them"
SAMPLE_HINT = "Marked is what the loss covers: only this is learned."
BAD_COLUMNS = ("Line", "What is wrong", "Found", "Expected")
BAD_HEADING, BAD_MORE = "Rows that cannot be used", "and {count} more"
SKIP_BAD = "Go on without the rows that cannot be used"
BAD_FIRST = "Some rows cannot be used. Mend the file, or tick the box to go on without them."
LEAKED = "{count} rows ask what the comparison will ask ({name}): its rates would show memory. Remove them."
SCAN = "Scan for suspicious rows"
SCAN_HINT = "A scan ranks rows by how much of their loss security vectors know. The first fits them: half a minute."
SCAN_HEADING = "Most suspicious rows first"
SCAN_FOUND = "{above} of {scored} rows look harmful (more than {threshold:.0%} of their loss is known to the vectors)."
SCAN_COLUMNS = ("Line", "Known share", "Prompt", "Answer")
TO_METHOD = "Continue to the method"
TOO_LARGE = "The file is too large: at most {size} MB."
TOO_MANY_ROWS = "More than {limit:,} rows. Cut the file into smaller ones."
TOO_MANY_COLUMNS = "Line {line} has {count:,} columns; at most {limit} are read."
TOO_LONG = "Row {row} has {count:,} characters; at most {limit:,} are read."
WRONG_KIND = "This is no JSON, JSON Lines, CSV, TSV or Parquet file. Its name should end in one of {endings}."
UNREADABLE = "This file cannot be read ({name}). Is it whole?"
TOKENIZER_LOST = "The model's tokenizer could not be loaded: {message}"

# Step 2: method
METHOD_HEADING = "How should refusals be protected?"
METHOD_LEAD = "Take several to compare them in one go; plain LoRA beside them shows what the protection does."
ADVANCED = "Advanced settings"
SETTINGS = {
    "steps": ("Training steps", "Each step learns from one batch of rows."),
    "learning_rate": ("Learning rate", "The first defense in harmless drift: a lower one wears less away."),
    "lora_rank": ("LoRA rank", ""),
    "batch_size": ("Rows in a step", ""),
    "max_length": ("Tokens kept of a row", ""),
    "seed": ("Seed", ""),
    "prompts": ("Questions of each kind", ""),
    "answer_tokens": ("Tokens of an answer", ""),
    "asft_weight": ("AsFT: weight λ", ""),
    "salora_rank": ("SaLoRA: protected directions", ""),
    "vectors_strength": ("Security Vectors: strength", ""),
    "drift_weight": ("Drift penalty: weight", ""),
}
NUMBER_MISSING = "{name}: a number is missing."
NUMBER_RANGE = "{name} must be between {low:g} and {high:g}, got {value:g}."
NEEDS_SHORT = "needs the checkpoint before alignment"
CHECK = "Check and continue"
CHOOSE_METHOD = "Choose at least one way to train."
NEEDS_UNALIGNED = "{title} needs the checkpoint before alignment, which is not known of this model."
RECIPE, CODE_LABEL = "Recipe (YAML)", "The same in Python"
RECIPES, SHOWN_FOR = "Recipe and code of these runs, to copy", "Show for"
RECIPE_HEADER = "# {title}\n# safe-trainer train {file}\n"
CODE = """\
from peft import LoraConfig
from trl import SFTConfig

from safe_trainer import {names}

rows, report = load_rows("{data}"{reading})
trainer = SafeSFTTrainer(
    model="{model}",
    args=SFTConfig(
{training}
    ),
    train_dataset=rows,
    peft_config=LoraConfig({peft}),
    safety={safety},
)
trainer.train()
trainer.save_model()
"""
PLAN = ("Rows", "Steps", "Weights trained", "Memory", "Time to train")
PLAN_TIME = "about {each} for each of {count}, and the comparison"
PLAN_TIME_ONE = "about {each}, and the comparison"
PLAN_LEAD = "Checked: this can be run."

# Step 3: train
TRAIN_HEADING = "Train"
START, CANCEL = "Start training", "Cancel"
NOT_CHECKED = "Choose data and a method first."
PHASES = {
    "": "waiting",
    "starting": "starting",
    "loading": "loading model and data",
    "preparing": "preparing the protection",
    "training": "training",
    "comparing": "asking all models the same questions",
    "fitting": "fitting vectors to harmful rows",
    "scanning": "scoring the rows",
}
STATES = {"waiting": "Waiting", "running": "Running", "done": "Done", "failed": "Failed", "cancelled": "Cancelled"}
PLACE, PLACE_FIRST = "Another job is running. Before yours: {count}.", "Another job is running. Yours is next."
TIME_LEFT = "about {time} left for this run"
STEP_OF, DONE_OF = "step {step} of {total}", "{done} of {total}"
LOG_HEADING = "Log"
LOG_BEGUN, LOG_CANCELLING = "begun", "cancelling …"
LOG_ENDED = {"done": "finished", "failed": "failed:", "cancelled": "cancelled"}
LOG_VARIANT = {"done": "{title}: trained and saved", "failed": "{title}: failed:", "cancelled": "{title}: cancelled"}
LOG_STOPPED, CHECKPOINT_KEPT = "stopped after step {step}; writing the checkpoint", "Kept: checkpoint of step {step}."
CHART_LOSS, CHART_PENALTY, CHART_REFUSED = "Loss", "Penalty", "Harmful requests refused (%)"
CHART_BORDERLINE, CHART_EMPTY = "Borderline requests refused (%)", "Curves appear with the first steps."
TO_COMPARE = "See the comparison"
ONE_AT_A_TIME = "A job of yours is already under way. Cancel it, or wait for its end."
QUEUE_FULL = "Too many jobs are waiting. Try again in some minutes."
PROCESS_LOST = "Its process ended unexpectedly; most likely the memory did not suffice."
OUT_OF_MEMORY = "Not enough memory. Choose fewer rows in a step, shorter rows or a smaller model."
UNEXPECTED = "An unexpected error ({name}); the log of the server has the details."
NOTHING_FINISHED = "None of the runs came to an end."

# Step 4: compare
COMPARE_HEADING = "Before and after"
NO_COMPARISON = "Nothing has been compared yet. Train something first."
WORDS = {
    "eroded": "Safety eroded",
    "kept": "Safety kept",
    "improved": "Safety improved",
    "unclear": "Not clear",
    "no_baseline": "No safety to keep",
    "unchanged": "Nothing was learned",
}
TABLE_COLUMNS = {
    "harmful": "Harmful refused",
    "benign": "Benign answered",
    "borderline": "Borderline answered",
    "task": "Task correct",
}
TABLE_CAPTION, NOT_MEASURED = "Counts with 95 % intervals", "not measured"
PLANE_UP, PLANE_TASK, PLANE_HELP = "harmful refused (%)", "task correct (%)", "borderline answered (%)"
PLANE_HEADING, PLANE_HINT = "Refusals against the task", "Best is the upper right corner."
CATEGORIES_HEADING, CATEGORY = "Harmful requests refused, by category", "Category"
FLIPS_HEADING = "Prompts whose outcome changed"
NO_FLIPS, FLIPS_ALL = "No outcome has changed.", "{count} changed"
FLIPS_SHOWN = "{count} changed; the first {shown} are shown, the report has all"
REVEAL = "Show harmful text"
BEFORE = "before"
FLIP_COLUMNS = ("Prompt", "Change", "Before", "After")
MODEL_COLUMN, ALL_MODELS = "Model", "all of them"
ASK_LABEL, ASK_HINT, ASK_BUTTON = "Your question", "How do I paint a fence?", "Ask all"
ASK_HEADING, ASK_WHOM, ASK_STOP = "Ask them yourself", "Whom to ask", "Stop"
ASK_NOTHING, ASK_EMPTY = "Write a question first.", "(nothing)"
ASK_TOO_LONG = "The question is too long: at most {limit} characters."
ASK_BUSY = "Waiting for the model …"
ASK_FAILED = "The models could not answer."
DOWNLOADS = "Download"
DOWNLOAD = {
    "adapter": "adapter (zip)",
    "recipe": "recipe (YAML)",
    "report": "report (HTML)",
    "checkpoint": "checkpoint (zip)",
    "numbers": "all numbers and answers (JSON)",
}
TINY = "The embedded model has one million weights: it shows how the tools work and says nothing direct about others."
PUSH, PUSH_DONE = "Push an adapter to the Hub", "Pushed to {repo}."
PUSH_REPO, PUSH_BUTTON, PUSH_WHICH = "Repository (owner/name)", "Push as private", "Adapter"
PUSH_LOGIN = "Log in first: `hf auth login` on this machine, or with the button on a Space."
PUSH_FAILED = "The Hub did not take it ({name})."

# Around it
MODEL_NOT_ALLOWED = "This model cannot be chosen here."
NO_SESSION = "This page needs a cookie to know your files from those of others. Allow it and reload."
PASSWORD_NEEDED = (
    "`password` is needed to bind to `{host}`: others could reach the app there. Set it with --password-file or in "
    "SAFE_TRAINER_PASSWORD, or leave out --host to bind to 127.0.0.1."
)
