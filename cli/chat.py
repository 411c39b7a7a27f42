"""`tinsmith chat`: talk to any checkpoint, or to a base model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.status import Status

from ..envs.renderer import ChatRenderer, Conversation
from ..envs.text_stream import TextStream
from ..primitives.errors import InvalidInput, TinsmithError
from ..primitives.paths import SCHEME
from ..primitives.types import Message, SampledSequence, SampledToken, SamplingParams, StopReason
from .lookup import find_checkpoint
from .options import Address, AsJson, Home, print_json

if TYPE_CHECKING:
    from ..primitives.client import SamplingClient, ServiceClient

HELP = "/reset starts over, /quit ends, Ctrl-C cuts an answer short"


def chat(
    home: Home,
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN", help="A run's id or folder (its newest checkpoint), or a tinker:// path."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="A base model instead of a run.")] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(help="Of one answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="Makes the answers repeatable.")] = None,
    once: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Ask this, print the answer, and end.")
    ] = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Talk to a trained policy, or to a base model."""
    if (run is None) == (base is None):
        raise InvalidInput("give either a run or --base MODEL")
    if as_json and once is None:
        raise InvalidInput("--json goes with --once")
    source = base or find_checkpoint(str(run), home)
    params = SamplingParams(max_tokens, temperature=temperature, seed=seed)
    with asyncio.Runner() as runner:
        service = runner.run(_connect(address, home))
        try:
            talk = runner.run(_open(service, source, params, system))
            if once is None:
                _converse(runner, talk, source)
                return
            answer = runner.run(talk.ask(once, (lambda _: None) if as_json else _show))
        finally:
            service.close()
    if as_json:
        print_json({"model": source, **asdict(answer)})
    else:
        print()


async def _connect(address: str | None, home: Path) -> ServiceClient:
    from ..actors.cluster import connect

    with _status("starting the service"):
        return await connect(address, home=home)


async def _open(
    service: ServiceClient, source: str, params: SamplingParams, system: str | None
) -> Chat:
    from ..engines.models import resolve_model

    with _status(f"loading {source}") as status:
        if source.startswith(SCHEME):
            policy = await service.create_sampling_client(source)
        else:
            await asyncio.to_thread(resolve_model, source, service.home, status.update)
            policy = await service.create_sampling_client(base_model=source)
        return Chat(policy, ChatRenderer(policy.get_tokenizer()), params, system)


def _status(text: str) -> Status:
    return Console(stderr=True).status(text)


def _converse(runner: asyncio.Runner, talk: Chat, source: str) -> None:
    import readline  # noqa: F401  gives `input` its line editing

    typer.echo(f"{source}: {HELP}", err=True)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if text == "/quit":
            return
        if text == "/reset":
            talk.reset()
            continue
        if not text:
            continue
        try:
            runner.run(talk.ask(text, _show))
        except KeyboardInterrupt:
            pass  # the answer stays as far as it got
        except TinsmithError as error:
            typer.echo(f"tinsmith: {error} (/reset starts over)", err=True)
        print()


def _show(piece: str) -> None:
    print(piece, end="", flush=True)


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    stop_reason: StopReason


class Chat:
    """A conversation with a policy, turn by turn."""

    def __init__(
        self,
        policy: SamplingClient,
        renderer: ChatRenderer,
        params: SamplingParams,
        system: str | None = None,
    ) -> None:
        self.policy, self.renderer, self.params = policy, renderer, params
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.conversation: Conversation | None = None

    def reset(self) -> None:
        self.conversation = None

    async def ask(self, text: str, show: Callable[[str], None]) -> Answer:
        """Have the policy answer `text`, handing over each piece of it as it comes. An answer cut
        short by cancellation or an error stays in the conversation as far as it got."""
        message: Message = {"role": "user", "content": text}
        if self.conversation is None:
            self.conversation = self.renderer.start([*self.system, message])
        else:
            self.conversation.add_messages([message])
        conversation, pieces = self.conversation, TextStream(self.renderer.tokenizer)
        sampled: list[SampledToken] = []
        try:
            async for token in self.policy.sample_stream(conversation.prompt, 1, self.params):
                sampled.append(token)
                show(pieces.push(token.token))
            show(pieces.finish())
        finally:
            sequence = SampledSequence.of(sampled)
            answer = conversation.add_turn(sequence)
        return Answer(answer, len(sampled), sequence.stop_reason)
