"""Self-speculative decoding with a model's own sublayers: the draft leaves some out, the full model verifies.

model = LayerSkipModel(AutoModelForCausalLM.from_pretrained(name))
profile = DraftProfile.load("draft_profile.json")
generation = generate(model, tokenizer(text).input_ids, drafter=profile.drafter(model))
print(tokenizer.decode(generation.tokens))
"""

from importlib.metadata import PackageNotFoundError, version

from layerskip.chat import Answer, Chat
from layerskip.checkpoints import Checkpoint, load_checkpoint
from layerskip.decoding.draft_exit import AdaptiveThreshold, ConfidenceThreshold, DraftExit, FixedLength
from layerskip.decoding.drafting import Drafter, NoDrafter, SkipDrafter
from layerskip.decoding.heads import HeadDrafter
from layerskip.decoding.loop import DecodingStats, Generation, Round, generate, stream, stream_rounds
from layerskip.decoding.memory import TextMemory
from layerskip.decoding.ngrams import FirstTry, NGramDrafter, NGrams
from layerskip.decoding.sampling import Sampling
from layerskip.drafts.bridges import fit_bridges
from layerskip.engine.costs import calibrate
from layerskip.errors import (
    CheckpointError,
    ExportError,
    HubError,
    InvalidInputError,
    InvalidProfileError,
    LayerSkipError,
    UnsupportedModelError,
)
from layerskip.export import Export, export_draft
from layerskip.identity import ModelIdentity, identify
from layerskip.profile import DraftProfile, Measured, Provenance
from layerskip.ready_profiles import find_profile, load_profile
from layerskip.stack.model import LayerSkipModel
from layerskip.stack.skipset import SkipSet
from layerskip.text import StopStrings
from layerskip.transformers_integration import speculate

__all__ = [
    "AdaptiveThreshold",
    "Answer",
    "Chat",
    "Checkpoint",
    "CheckpointError",
    "ConfidenceThreshold",
    "DecodingStats",
    "DraftExit",
    "DraftProfile",
    "Drafter",
    "Export",
    "ExportError",
    "FirstTry",
    "FixedLength",
    "Generation",
    "HeadDrafter",
    "HubError",
    "InvalidInputError",
    "InvalidProfileError",
    "LayerSkipError",
    "LayerSkipModel",
    "Measured",
    "ModelIdentity",
    "NGramDrafter",
    "NGrams",
    "NoDrafter",
    "Provenance",
    "Round",
    "Sampling",
    "SkipDrafter",
    "SkipSet",
    "StopStrings",
    "TextMemory",
    "UnsupportedModelError",
    "calibrate",
    "export_draft",
    "find_profile",
    "fit_bridges",
    "generate",
    "identify",
    "load_checkpoint",
    "load_profile",
    "speculate",
    "stream",
    "stream_rounds",
]

try:
    __version__ = version("layerskip")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"
