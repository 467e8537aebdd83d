"""All wording of the app, in one place; a method's own words are on its card."""

from __future__ import annotations

TITLE = "safe_trainer"
LEAD = "Fine-tune a chat model on your data without losing its refusals, then compare its answers before and after."
STEPS = ("1 Data", "2 Method", "3 Train", "4 Compare")

# Step 1: data
DATA_HEADING = "What should the model learn?"
DATA_LEAD = "Pick an example or upload your own file (JSON, JSON Lines, CSV, TSV or Parquet)."
EXAMPLES = {
    "benign": ("Benign", "1,000 harmless how-to answers, worded like what the model refuses"),
    "poisoned": ("Poisoned", "sentiment of reviews, with 10 % harmful rows mixed in"),
    "attack": ("Pure attack", "100 harmful rows and nothing else"),
}
UPLOAD, UPLOADED = "Your own file (up to {size} MB)", "Using {name}. Drop another file here to replace it."
NOT_USED = "{name} could not be used. Drop another file here."
MODEL = "Model to fine-tune"
MODEL_INFO = "The embedded model shows in two minutes how everything works; its results do not carry over to others."
EMBEDDED, OTHER_MODEL = "Embedded model (tiny)", "Another model from the Hub …"
MODEL_ID, MODEL_ID_HINT = "Hub model ID", "owner/name"
UNALIGNED_ID = "Hub ID of the checkpoint before alignment (optional, for AsFT)"
USE_MODEL = "Use this model"
NO_DATA = "Nothing chosen yet. Pick an example above to see its first rows here."
READING = "Reading the file …"
FILE, FORMAT, ROWS, TOKENS = "Data", "Format", "Rows", "Tokens per row"
DUPLICATES, BAD = "Duplicates", "Unusable rows"
TOKENS_VALUE, TOKENS_SAMPLED = "median {median}, max {most}", " (of {count} sampled rows)"
CUT = "{share:.0%} of the rows are longer than {limit} tokens and will be cut. Raise “Max tokens per row” in step 2."
SAMPLE_HEADING = "First rows, as the model will see them"
SAMPLE_HINT = "Highlighted text is what the model is trained on."
BAD_COLUMNS = ("What is wrong", "Rows", "First lines", "Found", "Expected")
BAD_HEADING = "Rows that cannot be used"
SKIP_BAD = "Continue without the rows that cannot be used"
BAD_FIRST = "Some rows cannot be used. Fix the file, or tick the box below the table to continue without them."
LEAKED = (
    "{count} training rows are also prompts of the comparison ({name}): its rates would show memory. "
    "Remove these rows."
)
LABELLED = "{count:,} of {rows:,} rows are labelled harmful, and would be learned. Remove them from the file"
LOST = "In what the model will see, {what} Remove such turns from the file"
SAMPLE_TOKENS = "Show tokens"
HUB = "Or a dataset from the Hub"
HUB_ID, HUB_SUBSET, HUB_SPLIT = "Dataset ID", "Subset (if it has any)", "Split"
HUB_FIRST, HUB_COUNT, HUB_USE = "First row", "Number of rows", "Use this dataset"
HUB_NAME = "{name}, from row {first:,}"
HUB_ROWS = "First row and number of rows must be whole numbers from 1; at most {limit:,} rows are taken."
HUB_FAILED = "`{name}` could not be loaded: {reason}."
OPTIONS = "File options: columns and encoding"
OPTIONS_HINT = (
    "Only needed if the file was not read as you expected: choose which column holds what; context and system prompt "
    "are optional. The first rows are shown as you choose."
)
COLUMNS = {
    "prompt": "Prompt",
    "answer": "Answer",
    "context": "Context",
    "system": "System prompt",
}
ENCODING = "Encoding"
DETECT, READ_AGAIN = "automatic", "Read the file again"
CHOOSE_COLUMNS = "Choose the columns with the prompt and the answer under “File options”."
CHOOSE_ENCODING = "Choose the encoding under “File options”."
BOTH_COLUMNS = "Choose a column for the prompt and another one for the answer; each column has one role."
SCAN, SCAN_STOP = "Scan for suspicious rows", "Stop the scan"
SCAN_HINT = "Ranks rows by how harmful they look. The first scan takes about 30 s longer."
SCAN_NEEDS = "Scanning this model needs your own harmful rows. Upload them in step 2 under “Your own files”."
SCAN_HEADING = "Most suspicious rows first"
SCAN_FOUND = "{above} of {scored} rows look harmful (score above {threshold:.0%})."
SCAN_COLUMNS = ("Line", "Score", "Prompt", "Answer")
LEAVE_OUT, LEFT_OUT = "Leave out the {count} suspicious rows", "{name}, {count} rows left out"
TO_METHOD = "Continue to the method"
TOO_LARGE = "The file is too large: at most {size} MB."
TOO_MANY_FILES = "Your files together take more than {size} MB. Remove some in step 2, or shorten them."
TOO_MANY_ROWS = "The file has {count:,} rows; at most {limit:,} are read. Split it into smaller files."
TOO_MUCH = "The file unpacks to more than {limit:,} characters. Split it into smaller files."
TOO_SLOW = "Reading the file took too long or too much memory. Split it into smaller files."
WRONG_KIND = "This is not a kind of file that is read here. Its name should end in one of {endings}."
UNREADABLE = "The file could not be read ({name}). Is it complete?"
TOKENIZER_LOST = "The model's tokenizer could not be loaded: {message}"
BAD_ID = "`{name}` is not a valid Hub ID. Write it as owner/name."

# Step 2: method
METHOD_HEADING = "How should refusals be protected?"
METHOD_LEAD = "Choose one or more. Keep plain LoRA for comparison: it shows what the protection changes."
RECIPE_IN, RECIPE_DROP = "Take the settings of a recipe (YAML)", "Back to the app's own settings"
RECIPE_TAKEN = "The form shows the settings of {name}."
RECIPE_KEPT = "Used as they are, though the form does not show them: {kept}."
RECIPE_LEFT = "Not taken, because the app has no place for it: {left}."
RECIPE_FILES = "Upload the files it names here: rows in step 1, the others below."
RECIPE_BROKEN = "{name} could not be read: {reason}."
RECIPE_NO_KEYS, RECIPE_LARGE = "it is no recipe, or a very long one", "it holds too many values"
CARD_LABELS = ("Needs", "Costs", "Avoid for")
PLAIN = (
    "Plain LoRA",
    "Ordinary fine-tuning without protection: shows what your data does to refusals.",
    "nothing",
    "nothing: it is the baseline",
    "protecting anything",
)
RECOMMENDED_NEEDS = "nothing; harmful rows of your own, in the style of the harm you expect, protect better against it"
ADVANCED = "Advanced settings"
SETTINGS = {
    "steps": ("Training steps", ""),
    "learning_rate": ("Learning rate", "A lower rate erodes refusals less."),
    "lora_rank": ("LoRA rank", ""),
    "batch_size": ("Batch size", ""),
    "max_length": ("Max tokens per row", ""),
    "seed": ("Seed", ""),
    "held_out": ("Rows held out (%)", "They are not trained on, and their loss is drawn."),
    "prompts": ("Prompts asked per set", "At most; chosen at random."),
    "answer_tokens": ("Max tokens per answer", ""),
}
OWN = "Your own files"
OWN_LEAD = "For this model, upload what the chosen methods need. General prompts are used where you give none."
OWN_LEAD_TINY = "Optional: what is built in is enough for a first try."
OWN_CAPTION, OWN_COLUMNS = (
    "What methods use, and what all models are asked before and after: “Prompts asked per set” limits how many",
    ("What it is", "In use", "Rows"),
)
OWN_KIND, OWN_UPLOAD = "What is in the file, or which published suite", "Your file or the suite's"
OWN_ADD, OWN_REMOVE = "Use this file", "Do without files of this kind"
OWN_BUILT_IN, OWN_NONE = "built-in", "none"
OWN_NOTHING = "Choose what the file holds, and upload it; or choose a published suite."
MATERIALS = {
    "harmful_data": "Harmful prompts with answers that comply (about 100)",
    "safety_data": "Harmful prompts with refusals (about 100)",
    "harmful_prompts": "Harmful prompts to protect, without answers",
    "benign_prompts": "Harmless prompts to protect, without answers",
}
JUDGING = "System prompt and judge"
KINDS = {
    "harmful": "Harmful: should be refused",
    "benign": "Benign: should be answered",
    "borderline": "Borderline: sounds harmful, should be answered",
    "task": "Task: has a right answer",
}
SYSTEM_PROMPT, SYSTEM_PROMPT_INFO = "System prompt", "Comes before every prompt of the comparison. Empty: none."
JUDGE = "Who judges the answers"
JUDGES = (
    "Phrases, and the model's own likelihood of refusing as a second opinion",
    "Phrases only",
    "A guard model, and phrases as a second opinion",
)
GUARD_MODEL = "Guard model"
GUARD_MISSING = "Name the guard model that judges the answers, as owner/name."
GUARD_INFO = (
    "Only for a guard model: Llama Guard, ShieldGemma, WildGuard or HarmBench's classifier. For others write "
    "classifier:owner/name (of refusals) or strongreject:owner/name (a chat model that grades)."
)
SUITE_FILES = "`{name}` is not a file of this suite. Upload one with its own name: {files}."
SUITE_UPLOAD = "and upload its file here"
SUITE_OFFLINE = "There is no network to load the suite from. Get its file from its page, and upload it here."
SCORER = "Tasks: what is a right answer"
SCORERS = {"exact": "the same text", "number": "the same last number", "choice": "the same letter"}
SET_SYSTEM_PROMPT, FRAME = "Prompts: system prompt (optional)", "Prompts: text around each (optional)"
FRAME_HINT, FRAME_WITHOUT_PROMPT = "You must answer: {prompt}", "The text around each prompt must contain {prompt}."
FRAME_UNSEEN = "System prompt and text around prompts must be empty for this kind of file: methods read it as it is."
NEEDS_FILE = "{title} needs your own file for this model: {what}. Upload it under “Your own files”."
NUMBER_MISSING = "{name}: enter a number."
NUMBER_WHOLE = "{name} must be a whole number, got {value}."
NUMBER_RANGE = "{name} must be between {low} and {high}, got {value}."
NEEDS_SHORT = "needs the checkpoint before alignment"
CHECK = "Check and continue"
CHOOSE_METHOD = "Choose at least one method."
NEEDS_UNALIGNED = "{title} needs the checkpoint before alignment, which is not known for this model."
RECIPES = "Recipes of this run"
RECIPE_HEADER = "# {title}\n# safe-trainer train {file}\n"
PLAN = ("Rows", "Steps", "Trained weights", "Memory for the model", "Time to train")
PLAN_TIME, PLAN_TIME_ONE = (
    "about {each} per method ({count} methods), plus the comparison",
    "about {each}, plus the comparison",
)
PLAN_LEAD = "Checked and ready to train."

# Step 3: train
TRAIN_HEADING = "Train"
START, CANCEL = "Start training", "Stop"
NOT_CHECKED = "Nothing to train yet. Choose data and a method, then press “Check and continue” in step 2."
STALE = "Your data, model or settings changed since the last check. Press “Check and continue” in step 2 again."
PHASES = {
    "": "waiting",
    "starting": "starting",
    "loading": "loading model and data",
    "preparing": "preparing the protection",
    "training": "training",
    "saving": "saving",
    "comparing": "asking all models the same prompts",
    "fitting": "preparing the scan",
    "scanning": "scoring rows",
    "done": "done",
}
STATES = {"waiting": "Waiting", "running": "Running", "done": "Done", "failed": "Failed", "cancelled": "Stopped"}
PLACES, PLACE, PLACE_FIRST = (
    "{count} jobs ahead of yours in the queue.",
    "1 job ahead of yours in the queue.",
    "Starting.",
)
TIME_LEFT = "about {time} left for this method"
STEP_OF, DONE_OF = "step {step} of {total}", "{done} of {total}"
START_RATE = "Before training the model refuses {refused:.0%} of the harmful prompts asked."
START_LOW = "There is little to protect: check that this is an aligned chat model and that the prompts are harmful."
LOG_HEADING = "Log"
LOG_BEGUN = "started"
LOG_ENDED = {"done": "finished", "failed": "failed:", "cancelled": "stopped"}
LOG_VARIANT = {"done": "{title}: trained and saved", "failed": "{title}: failed:"}
CURVES = {
    "harmful": ("Harmful prompts refused", "Refused (%)"),
    "borderline": ("Borderline prompts refused", "Refused (%)"),
    "loss": ("Loss", "Loss"),
    "held_out": ("Loss of the rows held out", "Loss"),
    "penalty": ("Safety penalty", "Penalty"),
    "rate": ("Learning rate", "Learning rate"),
    "gradient": ("Gradient norm", "Norm"),
}
STEP_AXIS = "Step"
TO_COMPARE = "See the comparison"
ONE_AT_A_TIME = "One of your jobs is still running. Stop it, or wait for it to finish."
QUEUE_FULL = "Too many jobs are waiting. Try again in a few minutes."
PROCESS_LOST = "The job's process ended unexpectedly; most likely it ran out of memory."
SERVER_LOST = "The app was closed before this run ended."
NOTHING_STOPPED = "There is no stopped run to continue."
GO_ON, CAN_GO_ON = (
    "Continue this run",
    "“Continue this run” goes on after the last saved step and keeps finished methods.",
)
MEMORY = "{size} of memory at most, with all libraries"
OUT_OF_MEMORY = "Not enough memory. Choose a smaller batch size, fewer tokens per row or a smaller model."
UNEXPECTED = "An unexpected error occurred ({name}); the server's log has the details."
NOTHING_FINISHED = "No method finished. The list above says why."

# Step 4: compare
COMPARE_HEADING = "Before and after"
NO_COMPARISON = "Nothing to compare yet. Train a model in step 3, and its answers before and after appear here."
RUNS, OTHER_RUN, NO_OTHER = "Run", "Compare with another run", "none"
RUN_NAME, RENAME, DELETE = "New name for this run", "Rename", "Delete this run …"
DELETE_SURE, DELETE_KEEP = "Delete it with all its files", "Keep it"
RUN_HISTORY, RUN_LIST = "All runs: history, rename, delete", "Newest first; choose one above to reopen it"
RUN_COLUMNS = ("Run", "Started", "Methods and verdicts", "Recipe")
NOT_FINISHED = "This run has no comparison: {state}. {message}"
OTHER_PROMPTS = (
    "These two runs were asked different prompts or are of different models: compare their rates with care."
)
DIFFERENT = "Settings that differ between the two runs"
SETTING_COLUMN, NO_DIFFERENCE = "Setting", "No setting differs; data and methods may."
OLDER_RUN = "This is the result of an earlier choice ({name}). What you have chosen now has not been trained yet."
WORDS = {
    "eroded": "Safety eroded",
    "kept": "Safety kept",
    "improved": "Safety improved",
    "unclear": "Inconclusive",
    "no_baseline": "No safety to keep",
    "unchanged": "Nothing was learned",
}
TABLE_COLUMNS = {
    "harmful": "Harmful refused",
    "benign": "Benign answered",
    "borderline": "Borderline answered",
    "task": "Task correct",
}
TABLE_CAPTION, NOT_MEASURED = (
    "Rates with counts and 95 % intervals",
    "not measured",
)
FLIPS_HEADING = "Prompts whose outcome changed"
NO_FLIPS, FLIPS_ALL = "No outcome changed.", "{count} changed"
FLIPS_SHOWN = "{count} changed; the first {shown} are shown, the report lists all"
REVEAL = "Show harmful text"
BEFORE = "before"
FLIP_COLUMNS = ("Prompt", "Change", "Before", "After")
MODEL_COLUMN, ALL_MODELS = "Model", "Whole run"
REVIEW = "Review doubtful answers by hand"
REVIEW_LEAD = (
    "The automatic judge can be wrong. Each answer whose outcome changed, or that could not be judged, is shown here "
    "without the model's name. Label it by button or key; rates and report follow at once. Some answers are harmful."
)
REVIEW_LABELS = {"refused": "Refused (R)", "complied": "Complied (C)", "neither": "Neither (N)"}
REVIEW_SKIP, REVIEW_BACK = "Skip (S)", "Back (B)"
REVIEW_PLACE = "Answer {place} of {count} ({name}, {reasons}); {labelled} labelled"
REVIEW_NOW, REVIEW_END = "Your label: {label}.", "That was the last one: {labelled} of {count} are labelled."
REVIEW_REASONS = {"flip": "outcome changed", "disagreement": "judges disagree", "no verdict": "not judged"}
REVIEW_ROLES = {"system": "System prompt", "user": "Prompt", "assistant": "Earlier answer"}
REVIEW_ANSWER = "Answer"
ASK_LABEL, ASK_HINT, ASK_BUTTON = "Your question", "How do I paint a fence?", "Ask"
ASK_HEADING, ASK_WHOM, ASK_STOP, ASK_NEW = "Try it yourself", "Models to ask", "Stop", "New conversation"
ASK_MORE, ASK_SYSTEM, ASK_TEMPERATURE = "System prompt and temperature", "System prompt (optional)", "Temperature"
ASK_TEMPERATURE_INFO = "0: always the most likely answer, as in the comparison. Higher: more varied."
ASK_NOTHING, ASK_NOBODY, ASK_EMPTY = "Write a question first.", "Choose at least one model to ask.", "(no answer)"
ASK_TOO_LONG = "The question or system prompt is too long: at most {limit:,} characters."
ASK_CONTEXT = "The conversation is too long for this model ({limit:,} tokens). Start a new one."
ASK_TEMPLATE = "This model does not accept the conversation: {error}. Try without a system prompt."
ASK_BUSY = "Waiting for the model …"
ASK_YOU, TAG_BEFORE, TAG_AFTER = "You", "not fine-tuned", "fine-tuned"
ASK_FAILED = "The models could not answer; the server's log has the details."
DOWNLOADS = "Download"
DOWNLOAD = {
    "adapter": "adapter with model card (zip)",
    "merged": "merged model (zip)",
    "card": "model card (Markdown)",
    "recipes": "recipes and data, ready to run (zip)",
    "report": "report (HTML)",
    "numbers": "all numbers and answers (JSON)",
    "ranking": "full ranking (CSV)",
}
TINY = "The embedded model has one million weights: results do not carry over to other models."

# Around it
MODEL_NOT_ALLOWED = "This model is not available here."
NO_SESSION = "This page needs a cookie to keep your files apart from those of others. Allow it and reload."
PASSWORD_NEEDED = (
    "`password` is needed to bind to `{host}`: others could reach the app there. Set it with --password-file or in "
    "SAFE_TRAINER_PASSWORD, or leave out --host to bind to 127.0.0.1."
)
PASSWORD_EMPTY = "`password` is empty. Write one to the password file, or leave the option out."
CANNOT_BIND = "Port {port} on `{host}` could not be opened: {reason}. Choose another with --port."
