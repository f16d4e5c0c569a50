"""The packed engine gives the text of the model, whatever the family, and leaves a model that is not its own alone."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet, generate
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.engine import (
    EagerEngine,
    PackedEngine,
    PassCosts,
    SharedPrefix,
    compile_sublayers,
    make_engine,
    measure_passes,
)
from layerskip.engine.fused_sublayers import FusedAttention, FusedMLP
from layerskip.errors import InvalidInputError
from layerskip.fingerprint import fingerprint
from layerskip.packed_linear import DTYPES, PackedLinear, has_kernels_for, packing_available
from tests.models import (
    CONTEXT,
    EVERY_FAMILY,
    LAYERS,
    near_tie_or_same,
    tiny_llama,
    tiny_model,
    transformers_greedy,
)
from tests.strategies import draft_exits, skip_sets, tokens, trees

pytestmark = pytest.mark.skipif(not packing_available(), reason="needs a build of PyTorch with oneDNN")

PROMPT = [1, 2, 3]
WIDE_IS_CHEAP = PassCosts({1: 9.0, 4: 5.0, 12: 1.0}, dict.fromkeys((1, 4, 12), 1.0))
TOKENS_COST = PassCosts({width: float(width) for width in range(1, 13)}, dict.fromkeys(range(1, 13), 1.0))


@pytest.fixture(scope="module", params=EVERY_FAMILY)
def each_engine(request):
    return PackedEngine(LayerSkipModel(EVERY_FAMILY[request.param]()))


@given(tokens(20), skip_sets(), draft_exits(), st.integers(1, 24), st.sampled_from([None, WIDE_IS_CHEAP, TOKENS_COST]))
@settings(max_examples=12)
def test_greedy_output_is_that_of_transformers_in_every_family(
    each_engine, prompt, skip_set, draft_exit, length, costs
):
    model = each_engine.model
    each_engine.costs = costs
    drafter = LayerSkipDrafter(model, DraftConfig(skip_set, stopping=draft_exit))
    ours = generate(model, prompt, engine=each_engine, drafter=drafter, max_new_tokens=length, eos_token_ids=[])
    near_tie_or_same(model.hf_model, prompt, ours.tokens, transformers_greedy(model.hf_model, prompt, length, set()))


@given(tokens(8), tokens(6, min_size=2), skip_sets())
@settings(max_examples=12)
@torch.inference_mode()
def test_a_verification_gives_the_logits_of_a_plain_pass_in_every_family(each_engine, text, drafted, skip_set):
    engine, model = each_engine, each_engine.model
    stack = model.stack_of(skip_set)
    for costs in (None, WIDE_IS_CHEAP, TOKENS_COST):
        engine.costs = costs
        cache = engine.new_cache(len(text))
        engine.prefill(torch.tensor(text), cache)
        plain = model.logits(model.forward(torch.tensor(drafted), cache))
        cache.rollback(len(text))
        steps = [engine.draft_step(torch.tensor([token]), cache, stack) for token in drafted[:-1]]
        cache.rollback(len(text))
        prefix = [step.prefix for step in steps]
        shared = SharedPrefix(torch.cat(prefix, dim=1), stack.shared) if stack.shared else None
        verified = engine.verify(torch.tensor(drafted), cache, shared).logits
        torch.testing.assert_close(verified, plain, atol=1e-3, rtol=1e-3)


@given(tokens(8), trees(), st.data())
@settings(max_examples=12)
@torch.inference_mode()
def test_a_tree_gives_the_logits_of_each_of_its_branches(each_engine, text, tree, data):
    engine, model = each_engine, each_engine.model
    engine.costs = None
    rows = data.draw(st.lists(st.integers(0, 63), min_size=len(tree.parents) + 1, max_size=len(tree.parents) + 1))
    cache = engine.new_cache(len(text))
    engine.prefill(torch.tensor(text), cache)
    logits = engine.verify(torch.tensor(rows), cache, tree=tree).logits
    for row in range(len(rows)):
        branch, place = [], row
        while place:
            branch, place = [rows[place], *branch], tree.parents[place - 1]
        branch = [rows[0], *branch]
        expected = model.logits(model.forward(torch.tensor([*text, *branch]), model.new_cache(CONTEXT)))[-1]
        torch.testing.assert_close(logits[row], expected, atol=1e-3, rtol=1e-3)


@given(tokens(8), tokens(8, min_size=2))
@settings(max_examples=12)
@torch.inference_mode()
def test_rows_do_not_depend_on_the_width_of_their_pass(each_engine, text, drafted):
    engine = each_engine
    engine.costs = None
    cache = engine.new_cache(CONTEXT)
    engine.prefill(torch.tensor(text), cache)
    together = engine.verify(torch.tensor(drafted), cache).logits
    cache.rollback(len(text))
    alone = torch.cat([engine.verify(torch.tensor([token]), cache).logits for token in drafted])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


def kinds(model):
    return {type(module) for sublayer in model.sublayers for module in sublayer.module.children()}


def test_the_model_stays_as_it_was():
    model = LayerSkipModel(tiny_llama())
    before = copy.deepcopy(model.hf_model.state_dict())
    modules = [id(module) for module in model.hf_model.modules()]
    engine = PackedEngine(model)
    generate(model, PROMPT, engine=engine, max_new_tokens=4)
    assert [id(module) for module in model.hf_model.modules()] == modules
    assert all(torch.equal(model.hf_model.state_dict()[name], weight) for name, weight in before.items())
    assert PackedLinear not in kinds(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_in_place_no_plain_weight_is_left_and_the_model_works_as_before(family, tied):
    hf_model = tiny_model(family, tie_word_embeddings=tied)
    model = LayerSkipModel(hf_model)
    expected, identity = transformers_greedy(hf_model, PROMPT, 12), fingerprint(model)
    weights = sum(sublayer.num_weights for sublayer in model.sublayers)
    engine = PackedEngine(model, in_place=True)
    assert nn.Linear not in kinds(model)
    left = sum(weight.untyped_storage().nbytes() for weight in hf_model.parameters())
    assert left < 2 * hf_model.get_input_embeddings().weight.nbytes
    assert all(sublayer.device.type == "cpu" for sublayer in model.sublayers)
    assert fingerprint(model) == identity
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS, (2,), (1,)), stopping=FixedLength(3)))
    for ours in (
        generate(model, PROMPT, engine=engine, drafter=drafter, max_new_tokens=12, eos_token_ids=[]).tokens,
        generate(model, PROMPT, max_new_tokens=12, eos_token_ids=[]).tokens,
        transformers_greedy(hf_model, PROMPT, 12),
    ):
        near_tie_or_same(hf_model, PROMPT, ours, expected)
    again = LayerSkipModel(hf_model)
    assert sum(sublayer.num_weights for sublayer in again.sublayers) == weights
    assert fingerprint(again) == identity


def test_a_model_packed_in_place_gives_the_head_rows_of_a_vocabulary():
    model = LayerSkipModel(tiny_llama())
    rows = model.hf_model.lm_head.weight.detach()[[5, 9]].clone()
    PackedEngine(model, in_place=True)
    stack = model.stack_of(SkipSet(LAYERS), token_ids=torch.tensor([5, 9]))
    assert torch.equal(stack.lm_head_rows, rows)


def steps_of(family, **settings):
    engine = PackedEngine(LayerSkipModel(tiny_model(family, **settings)))
    return {type(step) for _, step in engine.passes.target_stack.steps}


def test_plain_families_run_in_fewer_operators():
    for family in ("llama", "mistral", "qwen2", "gemma", "gemma2", "granite"):
        assert steps_of(family) == {FusedAttention, FusedMLP}


def test_what_computes_something_else_runs_as_the_model_has_it():
    assert FusedAttention not in steps_of("qwen3")  # norms of queries and keys
    assert FusedAttention in steps_of("smollm3")  # only layers with a rotary embedding


@pytest.mark.skipif(not has_kernels_for(torch.bfloat16), reason="needs a processor with kernels for bfloat16")
def test_in_bfloat16_the_first_difference_lies_at_a_near_tie():
    hf_model = tiny_llama().bfloat16()
    model = LayerSkipModel(hf_model)
    ours = generate(model, PROMPT, engine=PackedEngine(model), max_new_tokens=12, eos_token_ids=[]).tokens
    expected = transformers_greedy(hf_model, PROMPT, 12)
    at = next((i for i, (a, b) in enumerate(zip(ours, expected, strict=True)) if a != b), None)
    if at is not None:
        best = hf_model(torch.tensor([[*PROMPT, *expected[:at]]])).logits[0, -1].float().topk(2).values
        assert best[0] - best[1] < 0.03 * best[0].abs()


def test_costs_are_those_of_the_packed_passes(monkeypatch, tmp_path):
    monkeypatch.setenv("LAYERSKIP_CACHE", str(tmp_path))
    model = LayerSkipModel(tiny_llama())
    engine = make_engine(model, "packed")
    assert (engine.name, engine.model) == ("packed", model)
    assert engine.costs is not None
    called = []
    monkeypatch.setattr(
        engine.passes, "logits", lambda x, stack=None, run=engine.passes.logits: called.append(1) or run(x, stack)
    )
    measure_passes(engine, widths=(1, 2))
    assert called


@pytest.mark.parametrize("make", EVERY_FAMILY.values(), ids=EVERY_FAMILY)
def test_a_single_row_may_run_on_the_plain_weights(make):
    model = LayerSkipModel(make())
    engine = PackedEngine(model, plain_one_row=True)
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS, (1,)), stopping=FixedLength(3)))
    for each in (None, drafter):
        ours = generate(model, PROMPT, engine=engine, drafter=each, max_new_tokens=16, eos_token_ids=()).tokens
        near_tie_or_same(model.hf_model, PROMPT, ours, transformers_greedy(model.hf_model, PROMPT, 16))


def test_models_that_cannot_be_packed_are_refused_in_one_line():
    with pytest.raises(InvalidInputError, match="engine 'packed': has no kernels for float16; use the eager engine"):
        PackedEngine(LayerSkipModel(tiny_llama().half()))
    model = LayerSkipModel(tiny_llama())
    compile_sublayers(model, "eager")
    with pytest.raises(InvalidInputError, match="engine 'packed': does not run compiled sublayers"):
        PackedEngine(model)


def test_quantized_layers_are_left_as_they_are():
    quantization = pytest.importorskip("torchao.quantization")
    hf_model = tiny_llama()
    quantization.quantize_(hf_model, quantization.Int8WeightOnlyConfig())
    model = LayerSkipModel(hf_model)
    engine = PackedEngine(model)
    assert {type(step) for _, step in engine.passes.target_stack.steps}.isdisjoint({FusedAttention, FusedMLP})
    ours = generate(model, PROMPT, engine=engine, max_new_tokens=12, eos_token_ids=[]).tokens
    near_tie_or_same(hf_model, PROMPT, ours, transformers_greedy(hf_model, PROMPT, 12))


def test_layers_with_an_adapter_are_left_as_they_are_and_the_others_are_packed():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.3)
    model = LayerSkipModel(adapted.eval())
    engine = PackedEngine(model, in_place=True)
    attention = model.hf_model.model.layers[0].self_attn
    assert hasattr(attention.q_proj, "base_layer")
    assert type(attention.k_proj) is PackedLinear
    ours = generate(model, PROMPT, engine=engine, max_new_tokens=12, eos_token_ids=[]).tokens
    near_tie_or_same(adapted, PROMPT, ours, transformers_greedy(adapted, PROMPT, 12))


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("dtype", filter(has_kernels_for, DTYPES))
def test_copies_at_lower_precision_run_in_fewer_operators_and_draft_the_same(precision, dtype):
    model = LayerSkipModel(tiny_llama().to(dtype))
    engine, eager = PackedEngine(model, plain_one_row=True), EagerEngine(model)
    stack = model.stack_of(SkipSet(LAYERS, (1,), (0,)), precision=precision)
    assert {type(step) for _, step in engine._stacks.of(stack).steps} == {FusedAttention, FusedMLP}
    logits = []
    for each in (engine, eager):
        cache = each.new_cache(16)
        each.prefill(torch.tensor(PROMPT), cache)
        logits.append(each.draft_step(torch.tensor([5]), cache, stack).logits)
    assert torch.allclose(*logits, atol=0.05 * float(logits[1].abs().max()))
    drafter = LayerSkipDrafter(model, DraftConfig(SkipSet(LAYERS), stopping=FixedLength(3), precision=precision))
    ours = generate(model, PROMPT, engine=engine, drafter=drafter, max_new_tokens=16, eos_token_ids=())
    near_tie_or_same(model.hf_model, PROMPT, ours.tokens, transformers_greedy(model.hf_model, PROMPT, 16))
    assert ours.stats.accepted > 0
