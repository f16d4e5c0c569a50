"""Self-speculative decoding with a model's own sublayers: the draft leaves some out, the target model verifies.

model = LayerSkipModel(AutoModelForCausalLM.from_pretrained(name))
profile = DraftProfile.load("draft_profile.json")
generation = generate(model, tokenizer(text).input_ids, drafter=profile.drafter(model))
print(tokenizer.decode(generation.tokens))
"""

from importlib.metadata import PackageNotFoundError, version

from layerskip.chat import Answer, Chat
from layerskip.checkpoints import Checkpoint, load_checkpoint
from layerskip.drafting.bridges import fit_bridges
from layerskip.drafting.drafter import Drafter, LayerSkipDrafter, NoDrafter
from layerskip.drafting.head_drafter import HeadDrafter
from layerskip.drafting.prompt_lookup import FallbackDrafter, PromptLookup, PromptLookupDrafter
from layerskip.drafting.stopping import AdaptiveThreshold, ConfidenceThreshold, DraftStopping, FixedLength
from layerskip.engine import make_engine
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
from layerskip.fingerprint import ModelIdentity, identify
from layerskip.generation import DecodingStats, Generation, Round, generate, stream, stream_rounds
from layerskip.model import LayerSkipModel
from layerskip.prefix_cache import PrefixCache
from layerskip.profile import DraftProfile, Measured, Provenance
from layerskip.ready_profiles import find_profile, load_profile
from layerskip.sampling import Sampling
from layerskip.skip_set import SkipSet
from layerskip.tokenizer import StopStrings
from layerskip.transformers_integration import speculate

__all__ = [
    "AdaptiveThreshold",
    "Answer",
    "Chat",
    "Checkpoint",
    "CheckpointError",
    "ConfidenceThreshold",
    "DecodingStats",
    "DraftProfile",
    "DraftStopping",
    "Drafter",
    "Export",
    "ExportError",
    "FallbackDrafter",
    "FixedLength",
    "Generation",
    "HeadDrafter",
    "HubError",
    "InvalidInputError",
    "InvalidProfileError",
    "LayerSkipDrafter",
    "LayerSkipError",
    "LayerSkipModel",
    "Measured",
    "ModelIdentity",
    "NoDrafter",
    "PrefixCache",
    "PromptLookup",
    "PromptLookupDrafter",
    "Provenance",
    "Round",
    "Sampling",
    "SkipSet",
    "StopStrings",
    "UnsupportedModelError",
    "export_draft",
    "find_profile",
    "fit_bridges",
    "generate",
    "identify",
    "load_checkpoint",
    "load_profile",
    "make_engine",
    "speculate",
    "stream",
    "stream_rounds",
]

try:
    __version__ = version("layerskip")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"
