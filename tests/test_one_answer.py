"""One engine, one answer at a time: what another thread or a second generator gets, and what closing leaves behind."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offmoe.checkpoint.find_model import DEMO
from offmoe.engine import Engine
from offmoe.errors import ContextFull, OffmoeError
from offmoe.settings import Sampling

PROMPT = "Tell me a short story about a fox who learns to share."
UNDER_WAY = r"an answer of this engine is under way: finish it, close\(\) its generator, or cancel\(\) it"
CLOSED = "this engine is closed: load the model again"
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}


def load(**settings: Any) -> Engine:
    return Engine.load(str(DEMO), **{"device": "cpu", "ctx": 128, "chunk": 16, "vram": "50%", **settings})


@pytest.fixture(scope="module")
def shared() -> Iterator[Engine]:
    with load() as engine:
        yield engine


@pytest.fixture
def engine(shared: Engine) -> Iterator[Engine]:
    yield shared
    shared.reset()
    shared.store.check()


def answer(engine: Engine, prompt: Any = PROMPT, **sampling: Any) -> list[int]:
    list(engine.generate(prompt, **{**GREEDY, **sampling}))
    return engine.answer_tokens


def test_a_second_answer_is_refused_until_the_first_ends(engine: Engine) -> None:
    want = answer(engine)
    first = engine.generate(PROMPT, **GREEDY)
    second = engine.generate("Hello!", **GREEDY)  # neither has begun
    got = [next(first).token]
    for use in (
        lambda: next(second),
        lambda: engine.generate("Hello!"),
        lambda: engine.prefill([5, 6]),
        lambda: engine.step(5),
        engine.reset,
    ):
        with pytest.raises(OffmoeError, match=UNDER_WAY):
            use()
    got += [piece.token for piece in first if piece.token is not None]
    assert got == want, "what was refused has changed nothing"
    assert answer(engine, "Hello!") == answer(engine, "Hello!")


def test_an_answer_that_nobody_wants_makes_room(engine: Engine) -> None:
    """Closed, dropped, never begun, in a cycle, cancelled while it waits."""
    want = answer(engine)
    closed = engine.generate(PROMPT, **GREEDY)
    next(closed)
    closed.close()
    assert answer(engine) == want
    for _ in engine.generate(PROMPT, **GREEDY):
        break
    assert answer(engine) == want
    never = engine.generate(PROMPT, **GREEDY)
    assert answer(engine) == want
    cycle: list[Any] = [engine.generate(PROMPT, **GREEDY)]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    gc.collect()
    assert answer(engine) == want
    waiting = engine.generate(PROMPT, **GREEDY)
    next(waiting)
    engine.cancel()
    assert answer(engine) == want
    assert list(waiting) == []
    assert [piece.token for piece in never if piece.token is not None] == want, "a cancel was another's"


def test_cancelled_before_it_begins(engine: Engine) -> None:
    pieces = engine.generate(PROMPT, **GREEDY)
    engine.cancel()
    assert list(pieces) == []
    assert engine.stats().finish_reason == "cancelled"
    assert len(engine.prefill(engine.prompt_ids(PROMPT))) == engine.config.vocab, "a prompt after it is run"


def test_from_many_threads_answers_are_right_or_refused(engine: Engine) -> None:
    want, results, begin = answer(engine), [], threading.Barrier(4)

    def ask() -> None:
        begin.wait()
        for _ in range(6):
            try:
                results.append([piece.token for piece in engine.generate(PROMPT, **GREEDY) if piece.token is not None])
            except OffmoeError as error:
                results.append(str(error))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 24
    told = [result for result in results if isinstance(result, list)]
    assert told
    assert all(result == want for result in told)
    assert all(result.startswith("an answer of this engine") for result in results if isinstance(result, str))


def test_one_answer_read_by_two_threads(engine: Engine) -> None:
    """Each piece goes to one of them."""
    want, got, pieces = answer(engine), [], engine.generate(PROMPT, **GREEDY)
    readers = [threading.Thread(target=lambda: got.extend(piece.token for piece in pieces)) for _ in range(2)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert sorted(token for token in got if token is not None) == sorted(want)


def test_an_answer_in_asyncio(engine: Engine) -> None:
    """Every piece in another thread of the loop's pool."""
    want = answer(engine)

    async def read() -> list[int]:
        pieces = engine.generate(PROMPT, **GREEDY)
        got = []
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            got.append(piece.token)
        return [token for token in got if token is not None]

    assert asyncio.run(read()) == want


def test_a_forked_child_answers_too(engine: Engine) -> None:
    """It has a copy of the answer under way, and ends it; the parent's goes on."""
    want, pieces = answer(engine), engine.generate(PROMPT, **GREEDY)
    got = [next(pieces).token]
    if (child := os.fork()) == 0:
        tokens = [*got, *(piece.token for piece in pieces if piece.token is not None)]
        os._exit(0 if tokens == want else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert [*got, *(piece.token for piece in pieces if piece.token is not None)] == want


def test_an_exception_in_the_reader_ends_the_answer(engine: Engine) -> None:
    with pytest.raises(ZeroDivisionError):
        [1 / 0 for _ in engine.generate(PROMPT, **GREEDY)]
    assert answer(engine) == answer(engine)


USES: dict[str, Any] = {
    "generate": lambda engine: engine.generate("Hello!"),
    "prefill": lambda engine: engine.prefill([5]),
    "step": lambda engine: engine.step(5),
    "reset": lambda engine: engine.reset(),
    "stats": lambda engine: engine.stats(),
    "prompt_ids": lambda engine: engine.prompt_ids("Hello!"),
    "think": lambda engine: engine.think("on"),
    "loading": lambda engine: engine.loading(),
    "with": lambda engine: engine.__enter__(),
}


def test_after_close_everything_is_refused_by_name() -> None:
    engine = load()
    answer(engine)
    before = engine.generate(PROMPT)
    engine.close()
    for use in USES.values():
        with pytest.raises(OffmoeError, match=CLOSED):
            use(engine)
    with pytest.raises(OffmoeError, match=CLOSED):
        next(before)
    engine.cancel()
    engine.close()


@pytest.mark.parametrize("vram", ["50%", "100%"])
def test_closing_twice_closes_no_descriptor_of_anybody_else(vram: str, tmp_path: Path) -> None:
    open_before = set(os.listdir("/proc/self/fd"))
    engine = load(vram=vram, ram=0)
    answer(engine)
    engine.close()
    assert set(os.listdir("/proc/self/fd")) == open_before
    others = [open(tmp_path / str(i), "w") for i in range(40)]  # noqa: SIM115  # they get the engine's numbers
    for part in (engine, engine.store, engine.store.reader, engine.store.ram, engine.decoder, engine.tokenizer,
                 engine.model.checkpoint):  # fmt: skip
        part.close()
    for file in others:
        file.write("x")
        file.close()


def test_closed_with_an_answer_waiting() -> None:
    with load() as engine:
        pieces = engine.generate(PROMPT, **GREEDY)
        next(pieces)
    assert list(pieces) == []


@pytest.mark.parametrize("after", [0.0, 0.02, 0.1, 0.3])
def test_closed_from_another_thread(after: float) -> None:
    """While the prompt is run, or an answer: the reader sees an end or an error by name."""
    engine, seen = load(chunk=2, ctx=1024), []

    def read() -> None:
        try:
            seen.append(len(list(engine.generate(PROMPT * 3, temperature=0.0))))
        except OffmoeError as error:
            seen.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(after)
    closers = [threading.Thread(target=engine.close) for _ in range(2)]
    for closer in closers:
        closer.start()
    for thread in (*closers, reader):
        thread.join(60)
        assert not thread.is_alive()
    assert len(seen) == 1
    assert isinstance(seen[0], int) or seen[0] == CLOSED


def test_closed_by_what_the_answer_itself_calls() -> None:
    with load() as engine:
        engine.store.routed = lambda *_: engine.close()
        with pytest.raises(OffmoeError, match=r"close\(\) was called by the answer under way"):
            answer(engine)
        with pytest.raises(OffmoeError, match=r"close\(\) was called by the answer under way"):
            engine.prefill([5, 6])
        engine.store.routed = None
        assert answer(engine)


IDS = [5, 17, 300]


@pytest.mark.parametrize(
    "given",
    [tuple(IDS), np.array(IDS), np.array(IDS, np.uint16), list(np.array(IDS)), torch.tensor(IDS), range(5, 8)],
    ids=lambda given: type(given).__name__,
)
def test_token_ids_of_every_kind(engine: Engine, given: Any) -> None:
    assert engine.prompt_ids(given) == [int(token) for token in given]
    assert all(type(token) is int for token in engine.prompt_ids(given))


EXPECTED = "expected text, a list of messages or a list of token ids"
USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, f"the prompt is of type NoneType: {EXPECTED}"),
        (b"hello", f"the prompt is of type bytes: {EXPECTED}"),
        (bytearray(b"hello"), f"the prompt is of type bytearray: {EXPECTED}"),
        (USER, f"the prompt is of type dict: {EXPECTED}"),
        (5, f"the prompt is of type int: {EXPECTED}"),
        (np.int64(5), f"the prompt is of type int64: {EXPECTED}"),
        ({5, 6}, f"the prompt is of type set: {EXPECTED}"),
        ((token for token in IDS), f"the prompt is of type generator: {EXPECTED}"),
        (object(), f"the prompt is of type object: {EXPECTED}"),
        ([True, False], f"element 1 of the prompt is of type bool: {EXPECTED}"),
        ([5, True], f"element 1 of the prompt is of type int: {EXPECTED}"),
        ([5, 6.0], f"element 1 of the prompt is of type int: {EXPECTED}"),
        ([5, "six"], f"element 1 of the prompt is of type int: {EXPECTED}"),
        ([USER, 5], f"element 2 of the prompt is of type int: {EXPECTED}"),
        (["Hi"], f"element 1 of the prompt is of type str: {EXPECTED}"),
        ([b"Hi"], f"element 1 of the prompt is of type bytes: {EXPECTED}"),
        ([[USER]], f"element 1 of the prompt is of type list: {EXPECTED}"),
        (np.array([5.0]), f"element 1 of the prompt is of type float: {EXPECTED}"),
        (np.array([[5]]), f"element 1 of the prompt is of type list: {EXPECTED}"),
        ([{1: "user", "content": "Hi"}], "message 1 has a key that is no text: expected role and content"),
        ([{"role": "user"}], "message 1 has a content of type NoneType"),
        ([{"role": 5, "content": "Hi"}], "message 1 has a role of type int"),
        ([{"role": "user", "content": b"Hi"}], "message 1 has a content of type bytes"),
        (
            [USER, {"role": "assistant", "content": "A", "tokens": "AB"}, USER],
            "message 2 has tokens that are not a",
        ),
        ([USER, {"role": "assistant", "content": "A", "tokens": [True]}, USER], "message 2 has tokens that are not a"),
        (
            [USER, {"role": "assistant", "content": "A", "tokens": None}, USER],
            "message 2 has tokens that are not a",
        ),
        ([USER, {"role": "assistant", "content": "A", "tokens": [-3]}, USER], "a token id lies outside the model's"),
        ([10**30], "a token id lies outside the model's vocabulary"),
    ],
    ids=lambda value: str(value).split(" at 0x")[0],  # the same in every worker
)
def test_prompts_of_wrong_types(engine: Engine, prompt: Any, message: str) -> None:
    with pytest.raises(OffmoeError) as error:
        engine.generate(prompt)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("sampling", "fields"),
    [
        ({"temperature": 1.0}, {}), ("greedy", {}), (5, {}), (None, {"temperature": "hot"}),
        (None, {"temperature": float("nan")}), (None, {"top_p": float("nan")}), (None, {"min_p": [0.1]}),
        (None, {"temperature": True}), (None, {"top_k": 1.5}), (None, {"top_k": "5"}), (None, {"top_k": True}),
        (None, {"seed": -1}), (None, {"seed": 1.0}), (None, {"seed": 2**64}), (None, {"max_tokens": float("inf")}),
        (None, {"max_tokens": 0}), (None, {"stop": 5}), (None, {"stop": [5]}), (None, {"stop": b"a"}),
        (None, {"stop": [None]}), (None, {"stop": ["a", ""]}), (None, {"stop": {"a": 1}}),
        (None, {"repeat_penalty": 0}), (None, {"temprature": 1.0}),
    ],
    ids=str,
)  # fmt: skip
def test_sampling_of_wrong_types(engine: Engine, sampling: Any, fields: dict[str, Any]) -> None:
    with pytest.raises(OffmoeError):
        engine.generate(PROMPT, sampling, **fields)


def test_sampling_of_numpys_numbers(engine: Engine) -> None:
    want = answer(engine, temperature=0.5, seed=3, top_k=5)
    given = Sampling(temperature=np.float32(0.5), seed=np.int64(3), top_k=np.int32(5))  # type: ignore[arg-type]
    assert answer(engine, sampling=given, temperature=None) == want


def test_why_an_answer_ended_is_known_before_its_last_text(engine: Engine) -> None:
    for count, _ in enumerate(engine.generate(PROMPT, temperature=0.0, max_tokens=3), 1):
        if count == 3:
            break  # as a reader may who counts
    assert engine.stats().finish_reason == "length"
    for count, _ in enumerate(engine.generate(PROMPT, temperature=0.0, max_tokens=3), 1):
        if count == 3:
            engine.cancel()
    assert engine.stats().finish_reason == "length", "it was whole"


def test_the_errors_hint_is_for_who_asks(engine: Engine) -> None:
    long = {"role": "user", "content": "word " * 200}
    said = {"role": "assistant", "content": "Yes."}
    system = {"role": "system", "content": "Be brief."}
    for prompt in ([5] * 128, "word " * 200, [system, long]):
        with pytest.raises(ContextFull, match=r"the prompt needs \d+ tokens and the context holds 128: shorten it, or"):
            engine.generate(prompt)
    with pytest.raises(ContextFull, match=r"the conversation needs .*: drop old turns, or start again with a larger"):
        engine.generate([long, said, USER])


@pytest.mark.parametrize(
    ("opened", "text", "inside"),
    [("", "It is so.", False), ("", "<think>hm", True), ("", "<think>hm</think>So", False), ("<think>\n", "hm", True),
     ("<think>\n", "hm</think>\nSo", False), ("<think>\n", "hm</thi", True)],
)  # fmt: skip
def test_an_answer_that_never_came_out_of_its_reasoning(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, opened: str, text: str, inside: bool
) -> None:
    tokenizer = engine.tokenizer
    assert tokenizer is not None
    said = tokenizer.encode(text)
    monkeypatch.setattr(engine.decoder, "tokens", lambda *_: (token for token in said))
    list(engine.generate(tokenizer.encode("Why? " + opened)))
    assert engine.answer_in_reasoning == inside
    assert engine.answer_tokens == said
