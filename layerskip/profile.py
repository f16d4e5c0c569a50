"""The draft profile: the draft that a search found for a model, as JSON that any program can load."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from layerskip.assistant import assistant_of
from layerskip.checks import instance, shown
from layerskip.costs import DraftRoundCosts
from layerskip.drafting.config import DraftConfig, PromptLookup
from layerskip.drafting.drafter import Drafter
from layerskip.drafting.factory import make_drafter
from layerskip.drafting.stopping import DraftStopping
from layerskip.drafting.weights import DraftWeights, draft_layer_ref, tensors_by_module
from layerskip.errors import InvalidInputError, InvalidProfileError
from layerskip.fingerprint import ModelIdentity, identify
from layerskip.model import LayerSkipModel
from layerskip.names import Precision
from layerskip.skip_set import SkipSet
from layerskip.token_tree import widths_of
from layerskip.utils import duration, write_atomically, write_bytes_atomically

logger = logging.getLogger(__name__)

FORMAT: Literal["layerskip.draft-profile"] = "layerskip.draft-profile"
VERSION: Literal[4] = 4
PromptSet = Literal["held-out", "search"]
PROFILE_NAME = "draft_profile.json"
# The length of prompt lookup, where profiles of version 3 or earlier give none.
_LENGTH_BEFORE = 8


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Measured(_Part):
    """What decoding with the profile measured, against plain decoding of the same prompts to the same tokens."""

    speedup: float = Field(gt=0, description="Plain seconds divided by self-speculative seconds.")
    speedup_low: float = Field(gt=0, description="Lower end of the speedup's 95 % interval.")
    speedup_high: float = Field(gt=0, description="Upper end of the speedup's 95 % interval.")
    acceptance_rate: float | None = Field(ge=0, le=1, description="Accepted tokens divided by drafted tokens.")
    plain_tokens_per_second: float = Field(gt=0, description="Plain decoding, prefill included.")
    speculative_tokens_per_second: float = Field(gt=0, description="Self-speculative decoding, prefill included.")
    prompts: int = Field(ge=1, description="Number of prompts decoded.")
    prompt_set: PromptSet = Field(
        description="Prompts kept out of the search, or those that the search itself optimized for (optimistic)."
    )
    max_new_tokens: int = Field(ge=1, description="Most tokens generated for each prompt.")
    near_ties: int = Field(
        ge=0, description="Prompts whose outputs diverge at a near-tie of the target model's best tokens."
    )
    disturbed: int = Field(
        default=0, ge=0, description="Prompts whose times are uncertain, because the machine was busy."
    )
    draft_bytes: int = Field(default=0, ge=0, description="Memory that the draft takes in addition to the model's.")
    device: str = Field(description="What it was measured on.")
    dtype: str = Field(description="Floating-point type of the model.")
    versions: dict[str, str] = Field(description="Versions of what it was measured with.")


class TensorsFile(_Part):
    """The safetensors file beside the profile: bridges, draft layers, draft heads and draft vocabulary."""

    file: str = Field(pattern=r"^[^/\\\\]+$", description="Its name, in the profile's folder.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="Checksum of its content.")
    bridges: int = Field(ge=0, description="Number of bridges in it.")
    layers: int = Field(
        default=0,
        ge=0,
        description="Number of draft layers in it; with draft heads, 1 if a layer is before them.",
    )
    heads: int = Field(default=0, ge=0, description="Number of draft heads in it.")
    vocabulary: int = Field(ge=0, description="Size of the draft vocabulary; 0 is the whole one.")

    @property
    def parts(self) -> list[str]:
        """What is in it, for people."""
        parts = [_counted(self.bridges, "bridge")] if self.bridges else []
        if self.heads:
            parts.append(_counted(self.heads, "draft head") + " after a draft layer" * (self.layers > 0))
        elif self.layers:
            parts.append(_counted(self.layers, "draft layer"))
        return [*parts, f"draft vocabulary of {self.vocabulary}"] if self.vocabulary else parts


class Provenance(_Part):
    """Where a profile comes from."""

    study: str | None = Field(default=None, description="Name of the study that found it.")
    trial: int | None = Field(default=None, ge=0, description="Number of the trial in that study.")
    created: datetime = Field(description="When the profile was made.")
    tool: str = Field(description="Name and version of the program that made it.")
    training_seconds: float | None = Field(
        default=None, ge=0, description="How long its draft layer or heads were trained; absent where nothing was."
    )

    @property
    def origin(self) -> str:
        """The study and trial, or how else it was made, for people."""
        if self.study is not None:
            return f"study {self.study}, trial {self.trial}"
        return "made by hand" if self.training_seconds is None else f"trained for {duration(self.training_seconds)}"


class DraftProfile(_Part):
    """A draft configuration for one model, with the draft's weights and what was measured with it.

    ``DraftProfile.load(path)`` reads one, ``profile.drafter(model)`` decodes with it, ``profile.save(path)`` writes it.
    :mod:`layerskip.hub` does so for repositories on the hub.

    Some fields have other names in the file than here; ``validation_alias`` is also where a later version of the format
    can name the key that an earlier one used.
    """

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    format: Literal["layerskip.draft-profile"] = Field(default=FORMAT, description="Names the format.")
    version: Literal[1, 2, 3, 4] = Field(
        default=VERSION,
        description="Version of the format; 1 has no tensors and no gate, 1 and 2 no precision, 1 to 3 other ngrams.",
    )
    model: ModelIdentity = Field(description="The model that the profile is for.")
    skip_set: SkipSet = Field(
        description="The sublayers that the draft skips; none where heads draft, which run nothing of the stack."
    )
    precision: Precision = Field(
        default="full",
        description="Of the sublayers that the draft runs, and of its head: the model's own, or copies with so many "
        "bits, which are made when the model is loaded.",
    )
    stopping: Annotated[DraftStopping, Field(discriminator="kind")] = Field(
        validation_alias="draft_exit", serialization_alias="draft_exit", description="When a draft ends."
    )
    target_confidence_threshold: float = Field(
        default=0.0,
        ge=0,
        le=1,
        validation_alias="gate",
        serialization_alias="gate",
        description="Confidence of the target model below which the next round drafts nothing.",
    )
    tree: tuple[int | tuple[int, ...], ...] = Field(
        default=(),
        strict=False,
        validation_alias="branches",
        serialization_alias="branches",
        description="How many tokens a draft proposes for its first place, its second, and so on; 1 for later ones. "
        "A number counts those after the first token of the place before; a list, which draft heads alone can have, "
        "those after each of its tokens.",
    )
    prompt_lookup: PromptLookup | None = Field(
        default=None,
        validation_alias="ngrams",
        serialization_alias="ngrams",
        description="What to copy from the text before the model drafts, and after; absent copies nothing.",
    )
    costs: DraftRoundCosts | None = Field(
        default=None,
        description="What rounds cost where it was searched, so that drafting pauses where it does not pay, with "
        "the same engine, device and dtype; absent never pauses.",
    )
    tensors: TensorsFile | None = Field(
        default=None, description="Bridges, draft layers, draft heads and draft vocabulary; absent without them."
    )
    measured: Measured | None = Field(default=None, description="What was measured; absent in a hand-made profile.")
    provenance: Provenance = Field(description="Where the profile comes from.")
    base_model_name_or_path: str | None = Field(
        default=None, description="The model on the hub, as in PEFT; absent in a profile that was never published."
    )
    revision: str | None = Field(default=None, description="The model's branch, tag or commit on the hub, as in PEFT.")
    _source: str = PrivateAttr(default="draft profile")
    _tensors: Mapping[str, Tensor] = PrivateAttr(default_factory=dict)
    _noted: set[str] = PrivateAttr(default_factory=set)  # fingerprints of other weights that were spoken of

    @classmethod
    def of(
        cls,
        config: DraftConfig,
        weights: DraftWeights | None = None,
        *,
        model: ModelIdentity,
        provenance: Provenance,
        measured: Measured | None = None,
        costs: DraftRoundCosts | None = None,
    ) -> DraftProfile:
        """The profile of a draft.

        Args:
            config: How to draft.
            weights: Its bridges, draft layers, draft heads and draft vocabulary; None without any.
            model: The model that it is for.
            provenance: Where it comes from.
            measured: What was measured with it.
            costs: What its rounds cost.

        Raises:
            InvalidInputError: There are draft heads, but the configuration skips sublayers.
        """
        weights = weights or DraftWeights()
        if weights.heads is not None and len(config.skip_set):
            raise InvalidInputError(f"draft heads: expected a skip set that skips nothing, got {config.skip_set}")
        tensors = weights.tensors()
        profile = cls(
            model=model,
            skip_set=config.skip_set,
            precision=config.precision,
            stopping=config.stopping,
            target_confidence_threshold=config.target_confidence_threshold,
            tree=config.tree,
            prompt_lookup=config.prompt_lookup,
            tensors=_tensors_file(weights, tensors) if tensors else None,
            costs=costs,
            measured=measured,
            provenance=provenance,
        )
        profile._tensors = tensors
        return profile

    @field_validator("version")
    @classmethod
    def _written_as_the_newest(cls, version: int) -> int:
        return VERSION

    @field_validator("tree")
    @classmethod
    def _tree_grows(cls, tree: tuple[int | tuple[int, ...], ...]) -> tuple[int | tuple[int, ...], ...]:
        widths_of(tree)
        return tree

    @model_validator(mode="after")
    def _layers_agree(self) -> DraftProfile:
        if self.skip_set.num_layers != self.model.num_layers:
            raise ValueError(
                f"skip_set.num_layers: expected {self.model.num_layers} as in model.num_layers, "
                f"found {self.skip_set.num_layers}"
            )
        return self

    @model_validator(mode="after")
    def _fits_its_drafter(self) -> DraftProfile:
        if self.drafts_with_heads and len(self.skip_set):
            raise ValueError(f"skip_set: expected nothing skipped, because draft heads draft; found {self.skip_set}")
        if not self.drafts_with_heads and not all(isinstance(place, int) for place in self.tree):
            raise ValueError("branches: expected one number for each place, because no draft heads draft; found a list")
        return self

    @classmethod
    def load(cls, path: str | Path) -> DraftProfile:
        """Read a profile.

        Args:
            path: Its file, or a folder that holds a ``draft_profile.json``.

        Raises:
            InvalidProfileError: The file cannot be read or is not a valid profile. The message names the file, the
                field and what was expected.
        """
        path = Path(path)
        if path.is_dir():
            path /= PROFILE_NAME
        return cls.read(path, source=str(path)).with_tensors(path.parent)

    @classmethod
    def read(cls, path: Path, *, source: str) -> DraftProfile:
        """Read a profile's own file, without its tensors.

        Args:
            path: The file.
            source: What to call it in errors.

        Raises:
            InvalidProfileError: As in :meth:`load`.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InvalidProfileError(f"{source}: not a text file; expected a draft profile in JSON") from error
        except FileNotFoundError as error:
            advice = _instead_of_missing(path)
            raise InvalidProfileError(f"{source}: cannot read the draft profile: {error.strerror}; {advice}") from error
        except OSError as error:
            raise InvalidProfileError(f"{source}: cannot read the draft profile: {error.strerror}") from error
        except ValueError as error:  # a name that no file can have
            raise InvalidProfileError(f"{shown(source)}: cannot read the draft profile: {error}") from error
        try:
            profile = cls.model_validate_json(_as_of_this_version(text), by_alias=True, by_name=False)
        except ValidationError as error:
            raise InvalidProfileError(f"{source}: {_in_one_line(error)}") from error
        for name in ("format", "version"):
            if name not in profile.model_fields_set:
                raise InvalidProfileError(f"{source}: {name}: is missing; a draft profile says what it is")
        profile._source = source
        return profile

    def with_tensors(self, folder: Path) -> DraftProfile:
        """The profile with its tensors, from their file in a folder.

        Raises:
            InvalidProfileError: The file is missing, is not the one that the profile names, or is not a draft's.
        """
        if self.tensors is None:
            return self
        path = folder / self.tensors.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InvalidProfileError(
                f"{self._source}: tensors.file: cannot read {path}: {error.strerror}; keep it beside the profile"
            ) from error
        if hashlib.sha256(content).hexdigest() != self.tensors.sha256:
            raise InvalidProfileError(
                f"{self._source}: tensors.sha256: {path} is not the file that the profile was saved with; "
                "restore it, or search again"
            )
        try:
            tensors = load(content)
            tensors_by_module(tensors)
        except (SafetensorError, InvalidInputError) as error:
            raise InvalidProfileError(f"{self._source}: tensors.file: {path}: {error}") from error
        profile = self.model_copy()
        profile._tensors = tensors
        return profile

    def for_base_model(self, name_or_path: str, revision: str | None = None) -> DraftProfile:
        """The same profile with the name of its model on the hub, to publish it.

        Args:
            name_or_path: The model, as ``AutoModelForCausalLM.from_pretrained`` takes it.
            revision: Its branch, tag or commit; None takes its default branch.
        """
        return self.model_copy(update={"base_model_name_or_path": name_or_path, "revision": revision})

    def save(self, path: str | Path) -> None:
        """Write the profile so that a killed process leaves the old one or the new one.

        Tensors are written first, to a file named by their content, so that an older profile keeps its own. No such
        file is ever removed: copies of the older profile may need it, and so may other processes.

        Raises:
            InvalidProfileError: The file cannot be written.
        """
        if not Path(path).name:
            raise InvalidProfileError(f"{path}: cannot write the draft profile: expected the name of a file")
        try:
            if self.tensors is not None:
                write_bytes_atomically(Path(path).with_name(self.tensors.file), self.tensors_bytes())
            write_atomically(Path(path), self.to_json())
        except OSError as error:
            raise InvalidProfileError(f"{path}: cannot write the draft profile: {error.strerror}") from error

    def tensors_bytes(self) -> bytes:
        """The content of the file beside the profile."""
        return save(dict(self._tensors))

    def to_json(self) -> str:
        """The content of the profile's file."""
        return self.model_dump_json(indent=2) + "\n"

    def check(self, model: LayerSkipModel) -> ModelIdentity:
        """Make sure that the profile is for this model.

        A profile without tensors is for every model of the same family and sizes: the output is the model's own,
        whatever is skipped. Of other weights than those that it was measured on, such as fine-tuned or quantized ones,
        one line in the log says so.

        Returns:
            The model's identity, whose fingerprint tells whether its weights are those of the profile.

        Raises:
            InvalidProfileError: It is not. The message names the file, the first field that differs and both values.
            InvalidInputError: The model is not wrapped.
        """
        instance("model", model, LayerSkipModel, "; wrap it: LayerSkipModel(model)")
        identity = identify(model)
        for name, (expected, found) in self.model.differences(identity).items():
            if name == "fingerprint" and self.tensors is None:
                self._note_other_weights(str(found))
                continue
            raise InvalidProfileError(
                f"{self._source}: model.{name}: the profile is for {expected!r} ({self.model.id}), "
                f"but this model has {found!r}; search this model for a profile of its own"
            )
        return identity

    def _note_other_weights(self, fingerprint: str) -> None:
        if fingerprint not in self._noted:
            self._noted.add(fingerprint)
            logger.warning(
                "%s: was measured on other weights of these sizes (%s); the output is this model's own, and "
                "'layerskip bench' measures the speedup here",
                self._source,
                self.model.id,
            )

    def drafter(self, model: LayerSkipModel, corpus: Sequence[int] | None = None) -> Drafter:
        """A drafter for :func:`layerskip.generate`: with heads where the profile has some, or else with the stack.

        Args:
            model: The model.
            corpus: Token ids of a text that new ones may repeat parts of, such as the code that is being edited: drafts
                are copied from it as from the text itself, by the profile's prompt lookup or by the default one. None
                without one.

        Raises:
            InvalidProfileError: The profile is for another model, or drafts at a precision that cannot run here.
            InvalidInputError: The model is not wrapped, the draft's weights do not fit it, or the corpus has other
                token ids than the model's.
        """
        self.check(model)
        self._check_precision(model)
        return make_drafter(model, self.config, self.weights(model), costs=self.costs, corpus=corpus)

    def _check_precision(self, model: LayerSkipModel) -> None:
        try:
            model.copies.check(self.precision)
        except InvalidInputError as error:
            raise InvalidProfileError(f"{self._source}: {error}") from error

    def as_assistant(self, model: PreTrainedModel) -> PreTrainedModel:
        """The draft as a model of its own, for ``model.generate(..., assistant_model=profile.as_assistant(model))``.

        It shares the model's weights and changes nothing in the model. Make it anew when the model was moved to
        another device or dtype. The profile's draft vocabulary is not used: ``generate`` wants scores for every token.

        Raises:
            InvalidProfileError: As in :meth:`drafter`.
            InvalidInputError: The profile leaves out every attention or drafts with heads, or the model is in training
                mode.
            UnsupportedModelError: The model cannot be taken apart into sublayers, or runs something else than its
                classes do, such as accelerate's hooks.
        """
        if self.drafts_with_heads:
            raise InvalidInputError(
                "as_assistant: the profile drafts with heads on the model's hidden states, which are no model of their "
                "own; use layerskip.speculate(profile)"
            )
        wrapper = LayerSkipModel(model, for_assistant=True)
        self.check(wrapper)
        self._check_precision(wrapper)
        return assistant_of(wrapper, self.config, self.weights(wrapper))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DraftProfile) and self.model_dump() == other.model_dump()

    @property
    def config(self) -> DraftConfig:
        """How the profile drafts."""
        layer = draft_layer_ref(self._tensors, 2 * self.model.num_layers)
        if layer is not None and layer.kind == "bridge" and self.provenance.training_seconds is None:
            layer = None  # fitted in closed form, as any bridge
        return DraftConfig(
            self.skip_set,
            bridges=self.tensors is not None and self.tensors.bridges > (layer is not None and layer.kind == "bridge"),
            draft_layer=layer,
            vocabulary_size=0 if self.tensors is None else self.tensors.vocabulary,
            precision=self.precision,
            stopping=self.stopping,
            target_confidence_threshold=self.target_confidence_threshold,
            tree=self.tree,
            prompt_lookup=self.prompt_lookup,
        )

    def weights(self, model: LayerSkipModel) -> DraftWeights:
        """Its bridges, draft layers, draft heads and draft vocabulary, in the dtype in which they were saved.

        Args:
            model: The model, of which draft layers take the form.

        Raises:
            InvalidInputError: They do not fit the model.
        """
        return DraftWeights.from_tensors(self._tensors, model)

    @property
    def drafts_with_heads(self) -> bool:
        """Whether draft heads propose, so that nothing of the stack runs to draft."""
        return self.tensors is not None and self.tensors.heads > 0

    @property
    def draft(self) -> str:
        """Everything about the draft but its skip set, for people."""
        precision = [] if self.precision == "full" else [self.precision]
        return "; ".join([self.config.policy, *precision, *([] if self.tensors is None else self.tensors.parts)])

    @property
    def pays(self) -> bool:
        """Whether decoding with the profile was measured to be faster than plain decoding, or never measured."""
        return self.measured is None or self.measured.speedup > 1


def _as_of_this_version(text: str) -> str:
    """A profile's file as this version of the format has it, if that is what the file is.

    Up to version 3 prompt lookup limited the run that it looked for, and copied as much after a short one.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):  # which reading it as a profile names
        return text
    lookup = fields.get("ngrams") if isinstance(fields, dict) and fields.get("version") in (1, 2, 3) else None
    if not isinstance(lookup, dict) or "per_match" in lookup:
        return text
    length = lookup.get("length", _LENGTH_BEFORE)
    fields["ngrams"] = {key: value for key, value in lookup.items() if key != "longest"}
    fields["ngrams"] |= {"length": length, "per_match": length}
    return json.dumps(fields)


def _tensors_file(weights: DraftWeights, tensors: Mapping[str, Tensor]) -> TensorsFile:
    checksum = hashlib.sha256(save(dict(tensors))).hexdigest()
    return TensorsFile(
        file=f"draft-{checksum[:16]}.safetensors",
        sha256=checksum,
        bridges=len(weights.bridges),
        layers=len(weights.layers),
        heads=0 if weights.heads is None else weights.heads.count,
        vocabulary=0 if weights.token_ids is None else len(weights.token_ids),
    )


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number > 1)}"


def _instead_of_missing(path: Path) -> str:
    """Advice on a profile that is not there."""
    similar = difflib.get_close_matches(
        path.name.removesuffix(".json"), [other.stem for other in path.parent.glob("*.json")], n=1
    )
    if similar:
        return f"did you mean '{path.with_name(similar[0])}.json'?"
    if len(path.parts) == 1 and path.suffix != ".json":
        return "layerskip.load_profile takes names of ready profiles, too"
    return "'layerskip search MODEL' makes one"


def _in_one_line(error: ValidationError) -> str:
    """The first thing that is wrong: field, what was expected, what was found."""
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    message = _problem(problem)
    return f"{field}: {message}" if field else message


def _problem(problem: ErrorDetails) -> str:
    kind, context = problem["type"], problem.get("ctx", {})
    found = shown(problem["input"])
    match kind:
        case "missing":
            return "required, but missing"
        case "union_tag_not_found":
            return f"{str(context['discriminator'])[1:-1]}: required, but missing"
        case "extra_forbidden" | "unexpected_keyword_argument":
            return "unknown field; remove it, or update layerskip if a newer version wrote the file"
        case "json_invalid":
            return f"not JSON: {context['error']}"
        case "literal_error":
            return f"expected {context['expected']}, found {found}"
        case "union_tag_invalid":
            return f"{context['discriminator']}: expected {context['expected_tags']}, found '{context['tag']}'"
        case "value_error":
            return str(context["error"])
        case _:
            expected = problem["msg"].removeprefix("Input should be ").removeprefix("Input should ")
            return f"expected {expected}, found {found}"
