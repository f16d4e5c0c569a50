"""Self-speculative decoding with a model's own sublayers: the draft skips some of them, the target model verifies.

model = LayerSkipModel(AutoModelForCausalLM.from_pretrained(name))
profile = DraftProfile.load("draft_profile.json")
generation = generate(model, tokenizer(text).input_ids, drafter=profile.drafter(model))
print(tokenizer.decode(generation.tokens))

The names below are imported when they are first used, so that ``import layerskip`` does not wait for torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerskip.chat import Chat as Chat
    from layerskip.checkpoints import load_checkpoint as load_checkpoint
    from layerskip.drafting.config import DraftConfig as DraftConfig
    from layerskip.drafting.config import PromptLookup as PromptLookup
    from layerskip.drafting.factory import make_drafter as make_drafter
    from layerskip.drafting.stopping import AdaptiveThreshold as AdaptiveThreshold
    from layerskip.drafting.stopping import ConfidenceThreshold as ConfidenceThreshold
    from layerskip.drafting.stopping import FixedLength as FixedLength
    from layerskip.engine.selection import make_engine as make_engine
    from layerskip.errors import LayerSkipError as LayerSkipError
    from layerskip.export import export_draft as export_draft
    from layerskip.generation import generate as generate
    from layerskip.generation import stream as stream
    from layerskip.generation import stream_rounds as stream_rounds
    from layerskip.hub import load_profile as load_profile
    from layerskip.model import LayerSkipModel as LayerSkipModel
    from layerskip.prefix_cache import PrefixCache as PrefixCache
    from layerskip.profile import DraftProfile as DraftProfile
    from layerskip.sampling import Sampling as Sampling
    from layerskip.skip_set import SkipSet as SkipSet
    from layerskip.tokenizer import StopStrings as StopStrings
    from layerskip.transformers_integration import speculate as speculate

_MODULES = {
    "AdaptiveThreshold": "drafting.stopping",
    "Chat": "chat",
    "ConfidenceThreshold": "drafting.stopping",
    "DraftConfig": "drafting.config",
    "DraftProfile": "profile",
    "FixedLength": "drafting.stopping",
    "LayerSkipError": "errors",
    "LayerSkipModel": "model",
    "PrefixCache": "prefix_cache",
    "PromptLookup": "drafting.config",
    "Sampling": "sampling",
    "SkipSet": "skip_set",
    "StopStrings": "tokenizer",
    "export_draft": "export",
    "generate": "generation",
    "load_checkpoint": "checkpoints",
    "load_profile": "hub",
    "make_drafter": "drafting.factory",
    "make_engine": "engine.selection",
    "speculate": "transformers_integration",
    "stream": "generation",
    "stream_rounds": "generation",
}

__all__ = list(_MODULES)

try:
    __version__ = version("layerskip")
except PackageNotFoundError:  # a checkout on the path, not installed
    __version__ = "0+unknown"


if not TYPE_CHECKING:  # for a type checker, a name that is not imported above is an error

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'layerskip' has no attribute '{name}'")
        value = getattr(import_module(f"layerskip.{_MODULES[name]}"), name)
        globals()[name] = value  # the next use finds it without this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
