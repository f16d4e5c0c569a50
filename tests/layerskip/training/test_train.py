"""Training improves the draft on held-out texts, changes nothing but the draft, and resumes where it stopped."""

from itertools import islice

import pytest
import torch

from layerskip import DraftConfig, FixedLength, LayerSkipModel, SkipSet, generate
from layerskip.drafting.bridges import fit_bridge
from layerskip.drafting.draft_layer import DraftLayer
from layerskip.drafting.layer_skip import LayerSkipDrafter
from layerskip.drafting.weights import DraftWeights
from layerskip.errors import InvalidInputError
from layerskip.training import RANKS, TrainableDraft, TrainingSettings, train, vocabulary_of
from layerskip.training.evaluation import Scorer, frozen, ideal_speedup, step_cost_by_weights
from tests.layerskip.training.conftest import EXIT, SETTINGS, random_prompts
from tests.models import LAYERS, near_tie_or_same, transformers_greedy

START, STOP = 2 * EXIT, 2 * LAYERS
SHORT = TrainingSettings(epochs=6, batch_positions=64, learning_rate=3e-3)
EXITED = SkipSet(LAYERS, range(EXIT, LAYERS), range(EXIT, LAYERS))


def a_layer(model, like=LAYERS - 1):
    return TrainableDraft(model, DraftWeights(layers=[DraftLayer.copied(model, START, STOP, like)]))


def a_bridge(model, shards):
    states = [text.states.float() for text in shards.learned()]
    before, after = torch.cat(states, dim=1)
    return TrainableDraft(model, DraftWeights(bridges=[fit_bridge(before, after, START, STOP)]))


@pytest.mark.parametrize("loss", ["kl", "ce", "both"])
def test_a_trained_layer_does_better_on_held_out_texts(writer, shards, loss):
    settings = TrainingSettings(loss=loss, epochs=6, batch_positions=64, learning_rate=3e-3)
    trained = train(writer, a_layer(writer), shards, settings)
    first = trained.evaluations[0].agreement
    assert trained.agreement.loss < 0.95 * first.loss
    assert trained.agreement.top[8] > first.top[8]
    assert [trained.agreement.top[k] for k in RANKS] == sorted(trained.agreement.top[k] for k in RANKS)
    assert trained.agreement.loss == pytest.approx(min(evaluation.agreement.loss for evaluation in trained.evaluations))
    assert not trained.interrupted


def test_a_bridge_is_refined_from_the_closed_form(writer, shards):
    trained = train(writer, a_bridge(writer, shards), shards, SHORT)
    assert trained.agreement.loss < trained.evaluations[0].agreement.loss
    bridge = trained.weights.bridges[0]
    assert (bridge.start, bridge.stop) == (START, STOP)


def test_the_models_weights_and_what_they_ask_for_stay(writer, shards):
    before = {name: weight.clone() for name, weight in writer.hf_model.state_dict().items()}
    asking = [weight.requires_grad for weight in writer.hf_model.parameters()]
    train(writer, a_layer(writer), shards, TrainingSettings(epochs=1))
    assert all(torch.equal(weight, before[name]) for name, weight in writer.hf_model.state_dict().items())
    assert [weight.requires_grad for weight in writer.hf_model.parameters()] == asking
    assert all(weight.grad is None for weight in writer.hf_model.parameters())


def test_what_was_trained_is_what_drafts(writer, shards):
    """Acceptance while decoding is near the agreement on the texts, and the output is the target model's."""
    trained = train(writer, a_layer(writer), shards, SHORT)
    drafter = LayerSkipDrafter(writer, DraftConfig(EXITED, stopping=FixedLength(1)), trained.weights)
    texts = list(islice(shards.learned(), 50))
    accepted = drafted = 0
    for text in texts:
        prompt = text.tokens[: text.prompt_length].tolist()
        generation = generate(writer, prompt, drafter=drafter, max_new_tokens=12, eos_token_ids=[])
        near_tie_or_same(writer.hf_model, prompt, generation.tokens, transformers_greedy(writer.hf_model, prompt, 12))
        accepted, drafted = accepted + generation.stats.accepted, drafted + generation.stats.drafted
    with frozen(writer):
        scorer = Scorer(writer, writer.stack_of(SkipSet(LAYERS)), "kl")
        draft = TrainableDraft(writer, trained.weights)
        expected = scorer.agreement(draft, [texts]).top[1]
    # Positions that follow an accepted token are not asked in decoding, but the two rates are near each other.
    assert accepted / drafted == pytest.approx(expected, abs=0.12)


def test_scores_are_those_of_the_stack_over_the_text(writer, shards):
    draft = a_layer(writer)
    [text, *_] = shards.held_out(10)
    stack = writer.stack_of(EXITED, stand_ins=draft.weights.steps)
    with torch.inference_mode():
        cache = writer.new_cache(len(text.tokens))
        x = stack.run(writer.embed(text.tokens.long()), writer.pass_context(len(text.tokens), cache))
        chosen = writer.logits(x[:, text.draft_positions]).argmax(-1)
    with frozen(writer):
        agreement = Scorer(writer, writer.stack_of(SkipSet(LAYERS)), "ce").agreement(draft, [[text]])
    expected = (chosen == text.choices).float().mean()
    assert agreement.top[1] == pytest.approx(float(expected), abs=0.1)  # states were kept in bfloat16
    assert agreement.positions == len(text.choices)


def test_the_gradient_is_that_of_the_whole_loss_however_it_is_cut(writer, shards, monkeypatch):
    texts = shards.held_out(40)
    gradients = []
    for chunk in (2**24, 64 * 3):
        monkeypatch.setattr("layerskip.training.evaluation._SCORES", chunk)
        draft = a_layer(writer)
        with frozen(writer):
            loss = Scorer(writer, writer.stack_of(SkipSet(LAYERS)), "both").learn_from(draft, texts)
        gradients.append([loss, *(parameter.grad for parameter in draft.weights.parameters())])
    for whole, cut in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, cut, atol=1e-5, rtol=1e-4)


def test_a_copy_of_the_only_skipped_layer_loses_nothing(llama, tmp_path):
    """The divergence from the target model is that of rounding the kept states, and its first choice nearly always."""
    from layerskip.training import DataSettings, TrainingTextWriter

    settings = DataSettings(LAYERS - 1, max_new_tokens=12, batch_size=16)
    shards = TrainingTextWriter(llama, random_prompts(64), settings, tmp_path, "f").collect(300)
    draft = TrainableDraft(llama, DraftWeights(layers=[DraftLayer.copied(llama, STOP - 2, STOP, LAYERS - 1)]))
    with frozen(llama):
        scorer = Scorer(llama, llama.stack_of(SkipSet(LAYERS)), "kl")
        agreement = scorer.agreement(draft, [shards.held_out(100)])
    assert agreement.loss < 1e-2
    assert agreement.top[1] > 0.9
    assert agreement.coverage == 1


def test_a_draft_vocabulary_bounds_what_can_agree(writer, shards):
    ids = vocabulary_of(writer, shards, 16)
    assert len(ids) == 16
    assert ids.tolist() == sorted(set(ids.tolist()))
    trained = train(writer, a_layer(writer), shards, TrainingSettings(epochs=1), token_ids=ids)
    held_out = shards.held_out(4096)
    choices = torch.cat([text.choices for text in held_out])
    assert trained.agreement.coverage == pytest.approx(float(torch.isin(choices, ids).float().mean()))
    assert trained.agreement.top[8] <= trained.agreement.coverage < 1
    assert trained.weights.token_ids is ids


def test_a_training_that_was_stopped_ends_like_one_that_was_not(llama, tmp_path_factory):
    from layerskip.training import TrainingTextWriter

    shards = TrainingTextWriter(llama, random_prompts(64), SETTINGS, tmp_path_factory.mktemp("d"), "f").collect(600)
    whole = train(llama, a_layer(llama), shards, SHORT, folder=tmp_path_factory.mktemp("whole"))

    folder = tmp_path_factory.mktemp("stopped")

    def stop_at(number):
        evaluations = []

        def observe(evaluation):
            evaluations.append(evaluation)
            if len(evaluations) == number:
                raise KeyboardInterrupt

        return observe

    stopped = train(llama, a_layer(llama), shards, SHORT, folder=folder, observe=stop_at(4))
    assert stopped.interrupted
    assert len(stopped.evaluations) == 4
    assert stopped.agreement.loss == pytest.approx(min(evaluation.agreement.loss for evaluation in stopped.evaluations))
    resumed = train(llama, a_layer(llama), shards, SHORT, folder=folder)
    assert not resumed.interrupted
    assert resumed.evaluations[0].progress == pytest.approx(stopped.evaluations[-1].progress)
    assert resumed.agreement.loss == pytest.approx(whole.agreement.loss, rel=1e-4)
    for name, weight in whole.weights.layers[0].state_dict().items():
        torch.testing.assert_close(resumed.weights.layers[0].state_dict()[name], weight, atol=1e-4, rtol=1e-3)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def of_other_weights(path):
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"weights": {}}, path)


def of_no_optimizer(path):
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"optimizer": {"state": {}, "param_groups": []}}, path)


def of_no_best_weights(path):
    saved = torch.load(path, weights_only=True)
    torch.save(saved | {"state": saved["state"] | {"best": {}}}, path)


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("hello world"),
        lambda path: torch.save([1], path),
        of_other_weights,
        of_no_optimizer,
        of_no_best_weights,
    ],
    ids=["cut", "empty", "text", "a list", "of other weights", "of no optimizer", "of no best weights"],
)
def test_a_training_with_a_damaged_checkpoint_begins_anew(llama, shards, tmp_path, damage, caplog):
    settings = TrainingSettings(epochs=1, batch_positions=128)
    first = train(llama, a_layer(llama), shards, settings, folder=tmp_path)
    [path] = tmp_path.glob("training-*.pt")
    damage(path)
    again = train(llama, a_layer(llama), shards, settings, folder=tmp_path)
    assert [e.agreement.loss for e in again.evaluations] == pytest.approx([e.agreement.loss for e in first.evaluations])
    assert f"{path}: not a whole checkpoint" in caplog.text


def test_other_settings_are_another_training(llama, shards, writer, tmp_path):
    train(writer, a_layer(writer), shards, TrainingSettings(epochs=1), folder=tmp_path)
    train(writer, a_layer(writer), shards, TrainingSettings(epochs=1, loss="ce"), folder=tmp_path)
    train(writer, a_layer(writer, like=1), shards, TrainingSettings(epochs=1), folder=tmp_path)
    assert len(list(tmp_path.glob("training-*.pt"))) == 3


def test_no_gain_ends_it_early(writer, shards):
    hopeless = TrainingSettings(epochs=50, batch_positions=64, learning_rate=1e-30)
    trained = train(writer, a_layer(writer), shards, hopeless)
    assert trained.evaluations[-1].progress < 0.5
    assert trained.agreement.loss == pytest.approx(trained.evaluations[0].agreement.loss)


def test_a_time_limit_ends_it(writer, shards):
    trained = train(writer, a_layer(writer), shards, TrainingSettings(epochs=10**6, minutes=1e-4))
    assert trained.evaluations[-1].progress == 1


def test_only_what_reaches_the_top_is_trained(llama, shards):
    with pytest.raises(InvalidInputError, match="ends before sublayer 4; only one that reaches the top"):
        TrainableDraft(llama, DraftWeights(layers=[DraftLayer.copied(llama, 2, 4, 1)]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "mse"}, "loss 'mse' is unknown; expected kl, ce, both"),
        ({"epochs": 0}, "epochs: expected at least 1, got 0"),
        ({"minutes": 0}, "minutes: expected a number above 0, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(InvalidInputError, match=f"^{message}$"):
        TrainingSettings(**settings)


def test_a_model_in_bfloat16_is_tuned_in_float32(shards, writer):
    model = LayerSkipModel(type(writer.hf_model)(writer.config).to(torch.bfloat16).eval())
    model.hf_model.load_state_dict(writer.hf_model.state_dict())
    trained = train(model, a_layer(model), shards, SHORT)
    assert {weight.dtype for weight in trained.weights.layers[0].state_dict().values()} == {torch.float32}
    assert trained.agreement.loss < trained.evaluations[0].agreement.loss
    drafter = LayerSkipDrafter(model, DraftConfig(EXITED, stopping=FixedLength(2)), trained.weights)
    assert generate(model, [1, 2], drafter=drafter, max_new_tokens=6).stats.drafted


def test_the_ideal_speedup_is_that_of_the_best_length_with_all_branches():
    chain = [0.1 * length for length in range(1, 17)]
    assert ideal_speedup([{1: 0.0, 4: 0.0}] * 16, chain) == pytest.approx(1 / 1.1)
    assert ideal_speedup([{1: 1.0}] * 16, [0.0] * 16) == 17
    best = max((1 - 0.8 ** (g + 1)) / 0.2 / (0.1 * g + 1) for g in range(1, 17))
    assert ideal_speedup([{1: 0.8}] * 16, chain) == pytest.approx(best)
    assert ideal_speedup([{1: 0.3, 8: 0.6}, {1: 0.2, 8: 0.5}], [0.1, 0.2]) == pytest.approx((1 + 0.6 + 0.3 * 0.5) / 1.2)


def test_the_cost_of_a_step_is_the_share_of_weights_that_it_reads(llama):
    head, layer = 64 * 32, llama.sublayers[0].num_weights + llama.sublayers[1].num_weights
    full = LAYERS * layer + head
    assert step_cost_by_weights(llama, llama.target_stack) == 1
    stand_ins = DraftWeights(layers=[DraftLayer.copied(llama, START, STOP, 2)]).steps
    stack = llama.stack_of(EXITED, stand_ins=stand_ins, token_ids=torch.arange(16))
    assert step_cost_by_weights(llama, stack) == pytest.approx((2 * layer + head / 4) / full)
