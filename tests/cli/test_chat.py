"""``layerskip apply --interactive``, over pipes and on a real pseudo-terminal."""

import io
import os
import re
import shutil

import pexpect
import pytest

from layerskip import Chat, DraftProfile, LayerSkipModel, SkipSet, generate, load_checkpoint
from layerskip.fingerprint import identify
from layerskip.tokenizer import encode_chat
from tests.cli.conftest import COMMAND, ENVIRONMENT, save_model

COUNT = 12
COLOUR = "\x1b[32m"
MENU = "/reset clears the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"


@pytest.fixture
def answers(wrapped, checkpoint):
    """What the target model answers to each message in turn."""

    def run(*messages, count=COUNT):
        history, texts = [], []
        for message in messages:
            history.append({"role": "user", "content": message})
            tokens = generate(wrapped, encode_chat(checkpoint.tokenizer, history), max_new_tokens=count).tokens
            texts.append(checkpoint.tokenizer.decode(tokens, skip_special_tokens=True))
            history.append({"role": "assistant", "content": texts[-1]})
        return texts

    return run


@pytest.fixture
def pipe(layerskip, profile, monkeypatch):
    """Chat over what is no terminal."""

    def run(text, *arguments, source=profile):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return layerskip("apply", source, "-i", "--max-new-tokens", COUNT, *arguments)

    return run


def figures(err):
    return [line for line in err.splitlines() if "tokens/s" in line]


# Over pipes.


def test_each_line_is_a_message_and_the_conversation_is_kept(run_command, profile, answers):
    """By the installed command and real pipes."""
    done = run_command("apply", profile, "-i", "--max-new-tokens", COUNT, input="one\n\n  two  \n")
    assert done.status == 0
    assert done.out == "".join(f"{text}\n" for text in answers("one", "  two  "))
    assert len(figures(done.err)) == 2
    assert MENU not in done.err


def test_a_prompt_on_the_command_line_is_the_first_message(pipe, answers):
    done = pipe("two\n", "one")
    assert done.out == "".join(f"{text}\n" for text in answers("one", "two"))


def test_reset_forgets_and_quit_ends_and_what_is_no_command_is_said(pipe, answers):
    done = pipe("one\n/reset\none\n/rest\n/help\n/quit\nnever\n")
    assert done.status == 0
    [answer] = answers("one")
    assert done.out == f"{answer}\n{answer}\n"
    assert "conversation cleared" in done.err
    assert f"/rest: unknown command; {MENU}" in done.err
    assert done.err.count(MENU) == 2


def test_a_message_may_begin_with_a_slash(pipe, answers):
    assert pipe("/etc/passwd is what?\n").out == answers("/etc/passwd is what?")[0] + "\n"


def test_json_is_one_object_with_every_turn(pipe, answers):
    turns = pipe("one\ntwo\n", "--json").object["turns"]
    assert [turn["message"] for turn in turns] == ["one", "two"]
    assert [turn["text"] for turn in turns] == answers("one", "two")
    assert turns[0]["reused"] == 0
    assert turns[1]["reused"] > 0
    assert {"tokens_per_second", "acceptance_rate", "finish_reason", "forgotten"} <= turns[0].keys()


def test_a_message_that_is_too_long_is_one_line_and_the_conversation_continues(pipe, answers):
    done = pipe("one\n" + "x" * 600 + "\ntwo\n")
    assert done.status == 0
    assert done.out == "".join(f"{text}\n" for text in answers("one", "two"))
    assert re.search(r"^layerskip: prompt: \d+ tokens do not fit the model's context of 512; shorten", done.err, re.M)


def test_what_no_longer_fits_the_context_is_left_out_and_that_is_said(pipe):
    done = pipe("".join(f"{number} {'x' * 150}\n" for number in range(4)), "--json")
    assert sum(turn["forgotten"] for turn in done.object["turns"]) >= 1
    assert re.search("dropped the oldest [12] exchanges? to fit the model's context", done.err)


def test_colours_are_for_terminals(pipe, answers):
    done = pipe("one\n", "--show-drafted", "--force")
    assert done.out == answers("one")[0] + "\n"
    assert "--show-drafted: no colours here" in done.err


def test_a_profile_that_does_not_pay_chats_without_drafting(pipe, make_profile, answers):
    done = pipe("one\n", source=make_profile(0.8))
    assert done.out == answers("one")[0] + "\n"
    assert "slower than plain decoding: not drafting" in done.err
    assert " · plain" in figures(done.err)[0]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["-i", "--prompts", "p.txt"], "--prompts cannot be combined with --interactive"),
        (["-i", "--raw"], "--raw cannot be combined with --interactive"),
        (["-i", "--compare"], "--compare cannot be combined with --interactive"),
        (["-i", "--show-drafted", "--json"], "--json cannot be combined with --show-drafted"),
        (["hello", "--show-drafted"], "--show-drafted needs --interactive"),
    ],
)
def test_options_that_make_no_sense_together_are_wrong_usage(layerskip, profile, arguments, named):
    done = layerskip("apply", profile, *arguments)
    assert done.status == 2
    assert done.error.startswith(named)


def test_a_model_without_a_chat_template_cannot_chat(layerskip, profile, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    done = layerskip("apply", profile, "-i", "--model", tmp_path / "plain")
    assert done.status == 2
    assert "no chat template" in done.err


# On a terminal.


@pytest.fixture
def endless(profile, tmp_path_factory, tmp_path):
    """A profile of a model whose answers go on for minutes."""
    folder = save_model(tmp_path_factory.mktemp("models") / "Long", seed=0, max_position_embeddings=1_000_000)
    model = LayerSkipModel(load_checkpoint(str(folder), device="cpu", dtype="float32").model)
    own = DraftProfile.load(profile).model_copy(update={"model": identify(model, str(folder))})
    own.save(tmp_path / "endless.json")
    return tmp_path / "endless.json"


class Terminal:
    """A chat on a pseudo-terminal."""

    def __init__(self, *arguments, **environment):
        command = [str(argument) for argument in ("apply", *arguments)]
        # With plain line editing, what is typed is echoed as it is; a dumb one would have no colours.
        env = ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "200", "INPUTRC": os.devnull} | environment
        env = {name: value for name, value in env.items() if value is not None}
        self.child = pexpect.spawn(str(COMMAND), command, env=env, encoding="utf-8", timeout=60, dimensions=(24, 1000))

    def see(self, text):
        """Wait for some text; what was printed before it."""
        self.child.expect_exact(text)
        return self.child.before

    def say(self, line):
        self.child.sendline(line)
        self.see(line)

    def end(self):
        self.child.expect(pexpect.EOF)
        self.child.close()
        return self.child.exitstatus


@pytest.fixture
def terminal(profile):
    opened = []

    def open_(*arguments, source=profile, count=COUNT, **environment):
        opened.append(Terminal(source, "-i", "--max-new-tokens", count, *arguments, **environment))
        # Libraries may say this and that before.
        opened[-1].greeting = opened[-1].see(MENU)
        return opened[-1]

    yield open_
    for one in opened:
        one.child.close(force=True)


def printed(text):
    """As a terminal shows it."""
    return text.replace("\n", "\r\n")


def test_a_chat_prompts_answers_without_colours_unless_asked_and_ends_with_ctrl_d(terminal, answers):
    first, second = answers("one", "two")
    chat = terminal(NO_COLOR=None)
    for message, answer in (("one", first), ("two", second)):
        chat.see("> ")
        chat.say(message)
        assert COLOUR not in chat.see(printed(answer) + "\r\n")
        assert COLOUR not in chat.see("tokens/s")
    chat.see("> ")
    chat.child.sendeof()
    assert chat.end() == 0


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_the_answer_and_keeps_the_chat(endless, terminal):
    chat = terminal(source=endless, count=500_000)
    for message in ("one", "two"):
        chat.see("> ")
        chat.say(message)
        chat.child.expect(re.compile(".{40}", re.S))  # the answer has begun
        chat.child.sendintr()
        chat.see(" · stopped")
    chat.see("> ")
    chat.child.sendeof()
    assert chat.end() == 0


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_while_typing_throws_the_line_away_and_keeps_the_chat(terminal, answers):
    chat = terminal()
    chat.see("> ")
    chat.child.send("not this")
    chat.see("not this")
    chat.child.sendintr()
    chat.see(MENU)
    chat.see("> ")
    chat.say("one")
    chat.see(printed(answers("one")[0]) + "\r\n")
    chat.see("> ")
    chat.child.sendeof()
    assert chat.end() == 0


def test_drafted_tokens_are_coloured_when_asked(terminal, profile, wrapped, checkpoint, tmp_path):
    always_right = DraftProfile.load(profile).model_copy(update={"skip_set": SkipSet(4)})
    always_right.save(tmp_path / "right.json")
    asking = Chat(wrapped, checkpoint.tokenizer, drafter=always_right.drafter(wrapped), max_new_tokens=40).ask("one")
    pieces = list(asking)
    assert {piece.drafted for piece in pieces} == {True, False}
    expected = "".join(f"{COLOUR}{piece.text}\x1b[0m" if piece.drafted else piece.text for piece in pieces)

    chat = terminal("--show-drafted", source=tmp_path / "right.json", count=40, NO_COLOR=None)
    chat.see("> ")
    chat.say("one")
    assert printed(expected) in chat.see("tokens/s")
    chat.see("100% of ")


def test_no_color_is_respected_and_quit_ends_a_chat(terminal):
    chat = terminal("--show-drafted", NO_COLOR="1")
    assert "--show-drafted: no colours here" in chat.greeting
    chat.see("> ")
    chat.say("one")
    assert COLOUR not in chat.see("tokens/s")
    chat.see("> ")
    chat.say("/quit")
    assert chat.end() == 0
