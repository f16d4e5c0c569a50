"""Captured passes against eager ones; without a CUDA device something that behaves like a captured graph stands in."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cuda.bench import RunsAnew
from layerskip import DraftConfig, FixedLength, LayerSkipModel, PrefixCache, Sampling, SkipSet, generate
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.engine import EagerEngine, GraphEngine, PassCosts, make_engine
from layerskip.errors import CaptureError, InvalidInputError
from tests.capture import Counting, LikeAddresses, LikeAPool, call_directly, like_a_graph
from tests.models import EVERY_FAMILY, FAMILIES, LAYERS, near_tie_or_same, tiny_llama, transformers_greedy
from tests.strategies import draft_exits, precisions, skip_sets, tokens

WIDE_IS_CHEAP = PassCosts({width: 20.0 - width for width in range(1, 13)}, dict.fromkeys(range(1, 13), 1.0))
SKIPPED = SkipSet(LAYERS, (2,), (1,))


@pytest.fixture(scope="module", params=FAMILIES)
def captured(request):
    """An engine with small buckets, so that a text crosses several."""
    return GraphEngine(LayerSkipModel(FAMILIES[request.param]()), like_a_graph, smallest_bucket=8)


@given(tokens(20), skip_sets(), precisions(), draft_exits(), st.integers(1, 24))
@settings(max_examples=40)
def test_greedy_output_is_that_of_transformers(captured, prompt, skip_set, precision, draft_exit, length):
    ours = generate(
        captured.model,
        prompt,
        engine=captured,
        drafter=LayerSkipDrafter(captured.model, DraftConfig(skip_set, precision=precision, stopping=draft_exit)),
        max_new_tokens=length,
        eos_token_ids=[],
    )
    expected = transformers_greedy(captured.model.hf_model, prompt, length, set())
    near_tie_or_same(captured.model.hf_model, prompt, ours.tokens, expected)


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_greedy_output_of_every_family_is_that_of_transformers(family):
    model = LayerSkipModel(EVERY_FAMILY[family]())
    engine = GraphEngine(model, like_a_graph, smallest_bucket=8)
    for first, skip_set in enumerate((SKIPPED, SkipSet(LAYERS, (0, 3)), SkipSet(LAYERS, mlp=(0, 2)))):
        prompt = [first, 2, 3]
        drafter = LayerSkipDrafter(model, DraftConfig(skip_set, stopping=FixedLength(3)))
        ours = generate(model, prompt, engine=engine, drafter=drafter, max_new_tokens=24, eos_token_ids=[])
        near_tie_or_same(model.hf_model, prompt, ours.tokens, transformers_greedy(model.hf_model, prompt, 24))


@given(tokens(30), tokens(6), st.booleans())
@settings(max_examples=40)
def test_passes_give_the_logits_of_eager_ones(captured, text, new, padded):
    """Whatever an earlier, longer text left in the cache."""
    eager, engine = EagerEngine(captured.model), captured
    engine.costs = WIDE_IS_CHEAP if padded else None
    stack = captured.model.stack_of(SKIPPED)
    with torch.inference_mode():
        found, expected = [], []
        for one, logits in ((eager, expected), (engine, found)):
            cache = one.new_cache(len(text) + len(new) + 1)
            logits.append(one.prefill(torch.tensor(text), cache).logits)
            logits.append(one.draft_step(torch.tensor(new[:1]), cache, stack).logits.clone())
            cache.rollback(len(text))
            logits.append(one.verify(torch.tensor(new), cache).logits)
    engine.costs = None
    for ours, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)


@given(tokens(12), st.integers(1, 12), skip_sets(), precisions(), st.sampled_from([None, 5, 24]))
@settings(max_examples=30)
def test_a_chain_of_draft_steps_is_the_eager_one(captured, text, length, skip_set, precision, vocabulary):
    """Across buckets, and with everything that was handed out still what it was when the chain is done."""
    ids = None if vocabulary is None else torch.arange(3, 3 + vocabulary)
    stack = captured.model.stack_of(skip_set, token_ids=ids, precision=precision)
    chains = []
    with torch.inference_mode():
        for engine in (EagerEngine(captured.model), captured):
            cache = engine.new_cache(len(text) + length)
            engine.prefill(torch.tensor(text), cache)
            token, steps, confidences = torch.tensor(text[-1:]), [], []
            for _ in range(length):
                steps.append(engine.draft_step(token, cache, stack))
                confidences.append(float(steps[-1].confidence))
                token = steps[-1].likeliest
            chains.append((torch.cat([step.likeliest for step in steps]), torch.tensor(confidences)))
    (expected, sure), (found, ours) = chains
    if precision == "full":
        assert found.tolist() == expected.tolist()
        torch.testing.assert_close(ours, sure, atol=1e-4, rtol=1e-4)
    else:  # copies compute in bfloat16, whose rounding may tip a choice
        torch.testing.assert_close(ours[0], sure[0], atol=2e-2, rtol=2e-2)


def test_a_step_that_goes_on_from_the_last_sets_no_buffer():
    model = LayerSkipModel(tiny_llama())
    engine = GraphEngine(model, call_directly)
    stack = model.stack_of(SKIPPED)
    with torch.inference_mode():
        cache = engine.new_cache(10)
        engine.prefill(torch.tensor([1, 2]), cache)
        step = engine.draft_step(torch.tensor([3]), cache, stack)
        with Calls() as calls:
            step = engine.draft_step(step.likeliest, cache, stack)
        feedback = calls.names.count("aten.copy_.default")
        with Calls() as calls:
            engine.draft_step(step.likeliest + 0, cache, stack)
        assert calls.names.count("aten.copy_.default") == feedback + 1
        assert "aten.fill_.Scalar" not in calls.names
        cache.rollback(3)
        with Calls() as calls:
            engine.draft_step(step.likeliest, cache, stack)
        assert calls.names.count("aten.fill_.Scalar") == 1


class Calls(TorchDispatchMode):
    """The names of the operations that ran."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_pass_is_captured_once_for_a_stack_a_width_and_a_bucket():
    capture = Counting()
    model = LayerSkipModel(tiny_llama(max_position_embeddings=512))
    engine = GraphEngine(model, capture, smallest_bucket=32)
    drafter = LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=FixedLength(2)))
    counts = []
    for length in (12, 12, 12, 200):  # the last needs a larger cache and further buckets
        generate(model, [1, 2, 3], engine=engine, drafter=drafter, max_new_tokens=length, eos_token_ids=[])
        counts.append(capture.captured)
    assert counts[0] <= 4  # a draft step, and verifications of one to three tokens
    assert counts[0] == counts[1] == counts[2] < counts[3]


def test_the_cache_is_used_again_and_what_was_captured_with_it():
    model = LayerSkipModel(tiny_llama())
    engine = GraphEngine(model, call_directly, smallest_bucket=16)
    first = engine.new_cache(10)
    first.advance(5)
    again = engine.new_cache(16)
    assert again is first
    assert again.length == 0
    assert engine.new_cache(first.capacity) is not first


def test_captured_drafts_of_old_skip_sets_are_dropped():
    model = LayerSkipModel(tiny_llama())
    engine = GraphEngine(model, call_directly)
    for number in range(1, 45):
        skip_set = SkipSet.from_mask([bool(number >> bit & 1) for bit in range(2 * LAYERS)])
        drafter = LayerSkipDrafter(model, DraftConfig(skip_set, stopping=FixedLength(2)))
        generate(model, [1, 2], engine=engine, drafter=drafter, max_new_tokens=4)
    assert len(engine._drafts) <= 32


def test_sampling_with_a_seed_gives_the_text_of_the_eager_engine(captured):
    sampling = Sampling(temperature=0.8, seed=3)
    model = captured.model
    for length in (1, 12, 20):
        ours, expected = (
            generate(
                model,
                [1, 2, 3],
                engine=engine,
                drafter=LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=FixedLength(3))),
                sampling=sampling,
                max_new_tokens=length,
            )
            for engine in (captured, EagerEngine(model))
        )
        assert ours.tokens == expected.tokens


def test_without_a_cuda_device_graphs_are_refused():
    with pytest.raises(InvalidInputError, match="one CUDA device"):
        GraphEngine(LayerSkipModel(tiny_llama()))


OPERATORS = {"attention": 22, "mlp": 10}


def test_a_captured_pass_has_few_operators():
    """Each is a kernel on a device, and takes its two microseconds there, however small it is."""
    counts = []
    for layers in (2, 3):
        model = LayerSkipModel(tiny_llama(num_hidden_layers=layers))
        engine = GraphEngine(model, call_directly, in_place=True)
        with torch.inference_mode():
            cache = engine.new_cache(10)
            engine.prefill(torch.tensor([1, 2]), cache)
            engine.verify(torch.tensor([3]), cache)
            with Calls() as calls:
                engine.verify(torch.tensor([3]), cache)
        counts.append(sum(not is_view(name) for name in calls.names))
    assert counts[1] - counts[0] <= sum(OPERATORS.values())


def is_view(name):
    """Whether an operation only looks at memory in another way."""
    views = ("view", "slice", "transpose", "unsqueeze", "expand", "t.", "permute", "select", "split", "detach", "alias")
    return any(name.startswith(f"aten.{view}") for view in views) or "unsafe_view" in name


@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_weights_in_one_memory_change_no_text(family):
    hf_model = EVERY_FAMILY[family]()
    expected = transformers_greedy(hf_model, [1, 2, 3], 20)
    model = LayerSkipModel(hf_model)
    engine = GraphEngine(model, like_a_graph, in_place=True)
    drafter = LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=FixedLength(3)))
    ours = generate(model, [1, 2, 3], engine=engine, drafter=drafter, max_new_tokens=20, eos_token_ids=())
    near_tie_or_same(hf_model, [1, 2, 3], ours.tokens, expected)
    assert transformers_greedy(hf_model, [1, 2, 3], 20) == expected


def test_a_draft_layer_that_missed_a_token_catches_up_in_a_captured_pass():
    """After a draft that was accepted whole, the layer has to see two tokens."""
    model = LayerSkipModel(tiny_llama(max_position_embeddings=512))
    weights = DraftWeights(layers=[DraftLayer.copied(model, 2 * LAYERS - 2, 2 * LAYERS, LAYERS - 1)])
    config = DraftConfig(SkipSet(LAYERS, (LAYERS - 1,), (LAYERS - 1,)), stopping=FixedLength(2))
    engine = GraphEngine(model, like_a_graph, smallest_bucket=8)
    texts = []
    for own in (EagerEngine(model), engine):
        drafter = LayerSkipDrafter(model, config, weights)
        done = generate(model, [1, 2, 3], engine=own, drafter=drafter, max_new_tokens=24, eos_token_ids=())
        texts.append((done.tokens, done.stats.accepted, done.stats.drafted))
    assert texts[0] == texts[1]
    assert texts[0][1] > 0.9 * texts[0][2]  # it is the model's own layer
    assert any(steps.two for steps in engine._drafts.values())


def test_drafters_of_one_configuration_share_what_was_captured():
    capture = Counting()
    model = LayerSkipModel(tiny_llama())
    engine = GraphEngine(model, capture)
    ids = torch.arange(16)
    counts = []
    drafters = []
    for _ in range(3):
        drafter = LayerSkipDrafter(
            model, DraftConfig(SKIPPED, stopping=FixedLength(2)), DraftWeights(token_ids=ids.clone())
        )
        drafters.append(drafter)
        generate(model, [1, 2, 3], engine=engine, drafter=drafter, max_new_tokens=12, eos_token_ids=())
        counts.append(capture.captured)
    assert counts[0] == counts[2]
    assert drafters[0]._stack.lm_head_rows is drafters[2]._stack.lm_head_rows


def test_a_text_that_ends_soon_has_one_bucket():
    buckets = []

    class Engine(GraphEngine):
        def _room_for(self, width, cache):
            buckets.append(super()._room_for(width, cache)[1])
            return super()._room_for(width, cache)

    model = LayerSkipModel(tiny_llama(max_position_embeddings=512))
    engine = Engine(model, call_directly, smallest_bucket=64)
    generate(model, [1, 2, 3], engine=engine, max_new_tokens=100, eos_token_ids=())
    assert len(set(buckets)) == 1
    generate(model, [1, 2, 3], engine=engine, max_new_tokens=300, eos_token_ids=())
    assert len(set(buckets)) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("family", EVERY_FAMILY)
def test_on_a_device_captured_greedy_output_is_that_of_the_eager_engine(family):
    hf_model = EVERY_FAMILY[family]().to("cuda")
    model = LayerSkipModel(hf_model)
    eager, captured = EagerEngine(model), GraphEngine(model, smallest_bucket=16)
    for skip_set in (SKIPPED, SkipSet(LAYERS, (0, 3)), SkipSet(LAYERS, mlp=(0, 2))):
        ours, expected = (
            generate(
                model,
                [1, 2, 3],
                engine=engine,
                drafter=LayerSkipDrafter(model, DraftConfig(skip_set, stopping=FixedLength(3))),
                max_new_tokens=30,
            )
            for engine in (captured, eager)
        )
        near_tie_or_same(hf_model, [1, 2, 3], ours.tokens, expected.tokens)


def test_an_engine_is_chosen_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    model = LayerSkipModel(tiny_llama())
    engine = make_engine(model, "eager")
    assert isinstance(engine, EagerEngine)
    assert engine.model is model
    assert engine.costs is not None
    with pytest.raises(
        InvalidInputError, match=r"^engine 'steam' is unknown; expected auto, eager, packed or cuda-graphs$"
    ):
        make_engine(model, "steam")
    with pytest.raises(InvalidInputError, match="one CUDA device"):
        make_engine(model, "cuda-graphs")


def test_a_drafter_drafts_with_the_engine_of_each_generation():
    model = LayerSkipModel(tiny_llama())
    drafter = LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=FixedLength(3)))
    expected = generate(model, [1, 2, 3], drafter=drafter, max_new_tokens=12)
    engine = GraphEngine(model, call_directly)
    assert generate(model, [1, 2, 3], engine=engine, drafter=drafter, max_new_tokens=12).tokens == expected.tokens
    assert len(engine._drafts) == 1


def test_a_cache_that_grows_begins_a_new_pool():
    """The allocator refuses to capture into a pool whose graphs were all dropped."""
    model = LayerSkipModel(tiny_llama(max_position_embeddings=512))
    capture = LikeAPool()
    engine = GraphEngine(model, capture, smallest_bucket=32)
    drafter = LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=FixedLength(2)))
    pools = []
    for length in (4, 90, 4, 100):
        ours = generate(model, [1, 2, 3], engine=engine, drafter=drafter, max_new_tokens=length, eos_token_ids=())
        near_tie_or_same(model.hf_model, [1, 2, 3], ours.tokens, transformers_greedy(model.hf_model, [1, 2, 3], length))
        pools.append(capture.pools)
    assert pools[0] < pools[1] == pools[2]


class Failing(RunsAnew):
    """Captures a few passes, and then no more."""

    def __init__(self, captures):
        self.left = captures

    def __call__(self, run):
        self.left -= 1
        if self.left < 0:
            raise CaptureError("this model cannot be captured: operation not permitted when stream is capturing")
        return super().__call__(run)


@pytest.mark.parametrize("captures", range(4))
def test_a_model_that_cannot_be_captured_runs_eagerly_after_one_line(captures, caplog):
    model = LayerSkipModel(tiny_llama())
    engine = GraphEngine(model, Failing(captures), smallest_bucket=4)
    drafter = LayerSkipDrafter(model, DraftConfig(SKIPPED, tree=(2,), stopping=FixedLength(2)))
    for each in (None, drafter):
        ours = generate(model, [1, 2, 3], engine=engine, drafter=each, max_new_tokens=20, eos_token_ids=())
        near_tie_or_same(model.hf_model, [1, 2, 3], ours.tokens, transformers_greedy(model.hf_model, [1, 2, 3], 20))
    [line] = [record.getMessage() for record in caplog.records if "cuda-graphs" in record.getMessage()]
    assert line.startswith("engine 'cuda-graphs': this model cannot be captured: operation not permitted")
    assert line.endswith("; passes run eagerly")


def test_a_text_that_outgrows_the_cache_goes_on(monkeypatch):
    """Passes that were captured for the old memory are captured anew."""
    monkeypatch.setattr("layerskip.generation._FIRST_ROOM", 4)
    model = LayerSkipModel(tiny_llama(max_position_embeddings=1024))
    capture = LikeAPool()
    engine = GraphEngine(model, capture, smallest_bucket=8)
    drafter = LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=FixedLength(2), tree=(2,)))
    expected = transformers_greedy(model.hf_model, [1, 2, 3], 400)
    ours = generate(model, [1, 2, 3], engine=engine, drafter=drafter, max_new_tokens=400, eos_token_ids=())
    near_tie_or_same(model.hf_model, [1, 2, 3], ours.tokens, expected)
    assert capture.pools > 2


def test_a_prompt_that_outgrows_the_cache_leaves_no_pass_that_knows_its_old_place():
    model = LayerSkipModel(tiny_llama(max_position_embeddings=1024))
    capture = LikeAddresses()
    capture.engine = engine = GraphEngine(model, capture, smallest_bucket=8)
    drafter = LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=FixedLength(2)))
    cache = PrefixCache()
    prompt = [1, 2, 3]
    for more in (0, 300, 0):
        prompt = [*prompt, *[1 + n % 5 for n in range(more)]]
        ours = generate(
            model, prompt, engine=engine, drafter=drafter, max_new_tokens=8, eos_token_ids=(), prompt_cache=cache
        ).tokens
        near_tie_or_same(model.hf_model, prompt, ours, transformers_greedy(model.hf_model, prompt, 8))
    short = generate(model, [3, 2, 1], engine=engine, drafter=drafter, max_new_tokens=8, eos_token_ids=()).tokens
    near_tie_or_same(model.hf_model, [3, 2, 1], short, transformers_greedy(model.hf_model, [3, 2, 1], 8))


def test_a_bucket_is_never_larger_than_the_cache():
    model = LayerSkipModel(tiny_llama(max_position_embeddings=1024))
    engine = GraphEngine(model, like_a_graph, smallest_bucket=8)
    prompt = [1 + n % 5 for n in range(400)]
    cache = PrefixCache()
    generate(model, [1, 2], engine=engine, max_new_tokens=4, eos_token_ids=(), prompt_cache=cache)
    ours = generate(model, prompt, engine=engine, max_new_tokens=200, eos_token_ids=(), prompt_cache=cache).tokens
    near_tie_or_same(model.hf_model, prompt, ours, transformers_greedy(model.hf_model, prompt, 200))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_are_captured_too(dtype):
    model = LayerSkipModel(tiny_llama().to(dtype))
    engine = GraphEngine(model, like_a_graph)
    drafter = LayerSkipDrafter(model, DraftConfig(SKIPPED, stopping=FixedLength(2)))
    ours = generate(model, [1, 2, 3], engine=engine, drafter=drafter, max_new_tokens=8, eos_token_ids=()).tokens
    assert len(ours) == 8


def test_weights_that_are_joined_while_decoding_can_be_trained_afterwards():
    hf_model = tiny_llama()
    model = LayerSkipModel(hf_model)
    engine = GraphEngine(model, call_directly, in_place=True)
    hf_model.bfloat16()
    generate(model, [1, 2, 3], engine=engine, max_new_tokens=3, eos_token_ids=())
    weight = hf_model.model.layers[0].self_attn.q_proj.weight
    assert not weight.is_inference()
    with torch.no_grad():
        weight.mul_(2)


def test_a_draft_layer_sees_a_long_prompt_beside_captured_passes():
    """The first draft runs the whole prompt through it, which needs no room after the text."""
    model = LayerSkipModel(tiny_llama(max_position_embeddings=512))
    engine = GraphEngine(model, like_a_graph, smallest_bucket=8)
    weights = DraftWeights(layers=[DraftLayer.copied(model, 4, 2 * LAYERS, LAYERS - 1)])
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS), stopping=FixedLength(2)), weights)
    prompt = [1 + n % 7 for n in range(300)]
    ours = generate(model, prompt, engine=engine, drafter=drafter, max_new_tokens=8, eos_token_ids=()).tokens
    near_tie_or_same(model.hf_model, prompt, ours, transformers_greedy(model.hf_model, prompt, 8))


def test_a_cache_of_another_type_is_not_used_again():
    hf_model = tiny_llama()
    model = LayerSkipModel(hf_model)
    engine = GraphEngine(model, like_a_graph)
    generate(model, [1, 2, 3], engine=engine, max_new_tokens=4)
    hf_model.bfloat16()
    assert len(generate(model, [1, 2, 3], engine=engine, max_new_tokens=4, eos_token_ids=()).tokens) == 4
