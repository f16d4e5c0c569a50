"""How often decoding reads from the device: each read makes the host wait until the device has caught up."""

import warnings
from contextlib import ExitStack

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip import ConfidenceThreshold, DraftConfig, FixedLength, LayerSkipModel, Sampling, SkipSet, generate
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import EagerEngine, GraphEngine
from tests.capture import call_directly
from tests.models import FAMILIES, LAYERS, random_layers

SKIPPED = SkipSet(LAYERS, (2,), (1,))
# Operations that look at values on the host, or whose result has a size that depends on them.
_READING = {
    "_local_scalar_dense",
    *("item", "is_nonzero"),  # its names in inference mode
    *("nonzero", "masked_select", "multinomial", "equal", "repeat_interleave", "_unique2"),
}
# Whole tensors to the host, which a CPU tensor gives without any operation, and from it.
_TRANSFERS = {"tolist", "numpy", "cpu", "__array__", "tensor", "as_tensor"}


class HostReads:
    """Counts what would make the host wait, on any device."""

    def __enter__(self):
        self.count = 0
        self._stack = ExitStack()
        for mode in (_Operations(self), _Transfers(self)):
            self._stack.enter_context(mode)
        return self

    def __exit__(self, *error):
        self._stack.close()


class _Operations(TorchDispatchMode):
    def __init__(self, reads):
        super().__init__()
        self._reads = reads

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_flags = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        self._reads.count += by_flags or func.overloadpacket.__name__ in _READING
        return func(*args, **(kwargs or {}))


class _Transfers(TorchFunctionMode):
    def __init__(self, reads):
        super().__init__()
        self._reads = reads

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self._reads.count += getattr(func, "__name__", "") in _TRANSFERS
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module", params=["eager", "captured"])
def engine(request, llama):
    return EagerEngine(llama) if request.param == "eager" else GraphEngine(llama, call_directly)


def reads_in_rounds(engine, stopping, sampling, skip_set=SKIPPED, weights=None, **policy):
    """Reads of all rounds of a generation, and what it counted."""
    drafter = LayerSkipDrafter(engine.model, DraftConfig(skip_set, stopping=stopping, **policy), weights)
    counts, last = [], None
    for length in (12, 1, 12):  # what is made once for each shape of a draft; then one token, from the prompt alone
        with HostReads() as reads:
            last = generate(
                engine.model,
                [1, 2, 3],
                engine=engine,
                drafter=drafter,
                sampling=sampling,
                max_new_tokens=length,
                eos_token_ids=[],
            )
        counts.append(reads.count)
    assert last.stats.rounds > 2
    return counts[2] - counts[1], last.stats


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=20, top_p=0.9, seed=1)], ids=["greedy", "random"])
@pytest.mark.parametrize("vocabulary", [None, torch.arange(2, 60)], ids=["whole vocabulary", "draft vocabulary"])
class TestReads:
    def test_a_round_of_fixed_length_reads_once(self, engine, sampling, vocabulary):
        reads, stats = reads_in_rounds(engine, FixedLength(3), sampling, weights=DraftWeights(token_ids=vocabulary))
        assert reads == stats.rounds

    def test_branches_add_none(self, engine, sampling, vocabulary):
        reads, stats = reads_in_rounds(
            engine, FixedLength(3), sampling, weights=DraftWeights(token_ids=vocabulary), tree=(3, 2)
        )
        assert reads == stats.rounds

    def test_a_confidence_exit_reads_once_more_for_each_draft_step(self, engine, sampling, vocabulary):
        reads, stats = reads_in_rounds(
            engine, ConfidenceThreshold(0.3), sampling, weights=DraftWeights(token_ids=vocabulary)
        )
        assert reads == stats.rounds + stats.drafted

    def test_a_layer_of_the_drafts_own_adds_none(self, engine, sampling, vocabulary):
        weights = DraftWeights(token_ids=vocabulary, layers=random_layers(engine.model, {2: 2 * LAYERS}))
        skip_set = SkipSet(LAYERS, range(1, LAYERS), range(1, LAYERS))
        reads, stats = reads_in_rounds(engine, FixedLength(3), sampling, skip_set=skip_set, weights=weights)
        assert reads == stats.rounds

    def test_a_gate_reads_once_more_a_round(self, engine, sampling, vocabulary):
        reads, stats = reads_in_rounds(
            engine,
            FixedLength(3),
            sampling,
            weights=DraftWeights(token_ids=vocabulary),
            target_confidence_threshold=0.2,
        )
        assert reads == 2 * stats.rounds


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.tolist(),
        lambda x: float(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: x.argmax().item(),
        lambda x: x[x.argmax()],  # an index without dimensions is read by the host
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x.multinomial(1),
        lambda x: torch.tensor([1], device=x.device),
    ],
)
@pytest.mark.parametrize("inferring", [False, True])
def test_every_way_to_read_is_counted(read, inferring):
    with torch.inference_mode(inferring):
        x = torch.tensor([0.2, 0.3])
        with HostReads() as reads:
            read(x)
    assert reads.count == 1


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("captured", [False, True], ids=["eager", "captured"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, seed=1)], ids=["greedy", "random"])
def test_on_a_device_a_round_waits_once(family, captured, sampling):
    """Counted by CUDA's own warnings."""
    model = LayerSkipModel(FAMILIES[family]().to("cuda"))
    engine = GraphEngine(model) if captured else EagerEngine(model)
    drafter = LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=FixedLength(3)))

    def decode(length):
        return generate(
            model,
            [1, 2, 3],
            engine=engine,
            drafter=drafter,
            sampling=sampling,
            max_new_tokens=length,
            eos_token_ids=[],
        ).stats.rounds

    decode(24)  # captures, and first calls
    waits = []
    for length in (1, 24):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                rounds = decode(length)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing CUDA operation" in str(warning.message) for warning in caught))
    assert waits[1] - waits[0] <= rounds
