"""The names that most users need, each written once; `__init__.py` loads them from here when they are first used."""

from . import recipe as recipe
from . import testbed as testbed
from .analysis.drift_monitor import DriftMonitor as DriftMonitor
from .analysis.scan import scan_file as scan_file
from .artifacts.alignment_direction import AlignmentDirection as AlignmentDirection
from .artifacts.fitting import train_security_vectors as train_security_vectors
from .artifacts.safety_basis import SafetyBasis as SafetyBasis
from .artifacts.security_vectors import TrainedVectors as TrainedVectors
from .data import PromptSet as PromptSet
from .data import general_prompts as general_prompts
from .data import load_prompts as load_prompts
from .data import load_rows as load_rows
from .data import load_suite as load_suite
from .evaluation import Comparison as Comparison
from .evaluation import RefusalMonitor as RefusalMonitor
from .evaluation import write_report as write_report
from .evaluation.compare import compare as compare
from .evaluation.evaluate import evaluate as evaluate
from .evaluation.gate import gate as gate
from .evaluation.generate import generate as generate
from .lora.io import compact_adapter as compact_adapter
from .lora.io import merge_adapter as merge_adapter
from .lora.loading import load_model as load_model
from .methods import METHODS as METHODS
from .methods.adapter_ema import AdapterEMA as AdapterEMA
from .methods.asft import AsFT as AsFT
from .methods.constrained_sft import ConstrainedSFT as ConstrainedSFT
from .methods.recommended import recommended as recommended
from .methods.refusal_anchor import RefusalAnchor as RefusalAnchor
from .methods.safe_grad import SafeGrad as SafeGrad
from .methods.safe_lora import apply_safe_lora as apply_safe_lora
from .methods.salora import SaLoRA as SaLoRA
from .methods.security_vectors import SecurityVectors as SecurityVectors
from .recipe.model_card import write_model_card as write_model_card
from .trainer import SafeSFTTrainer as SafeSFTTrainer

__version__: str
