"""`tinsmith envs try`: an episode in the terminal, every agent played by hand or by a model."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from rich.console import Console

from ..envs.fork_server import EnvSource
from ..envs.isolation import EnvPool, EnvProcess
from ..envs.multi_agent import Transition
from ..envs.registry import pickled_factory
from ..envs.renderer import ChatRenderer, Conversation
from ..envs.text_stream import TextStream
from ..primitives.paths import SCHEME
from ..primitives.types import Message, SampledSequence, SampledToken, SamplingParams
from .lookup import find_checkpoint, has_registry, open_registry
from .options import Address, AsJson, EnvKwargs, EnvName, Home, parse_env_kwargs, print_json

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..primitives.client import SamplingClient

STEP_SECONDS = 600.0
COLOURS = {"system": "magenta", "user": "cyan", "tool": "yellow", "assistant": "green"}
HELP = "type your turns; a line that ends in \\ goes on in the next; /quit ends"


def try_env(
    home: Home,
    name: EnvName,
    env_kwargs: EnvKwargs = "{}",
    seed: Annotated[int, typer.Option(help="Of the episode, and of the model's turns.")] = 0,
    model: Annotated[
        str | None,
        typer.Option(
            show_default="you",
            help="Who plays: a base model, a run (its newest checkpoint), or a tinker:// path.",
        ),
    ] = None,
    max_turns: Annotated[int, typer.Option(help="After which the episode is truncated.")] = 16,
    max_tokens: Annotated[int, typer.Option(help="Of one turn of the model.")] = 256,
    temperature: Annotated[float, typer.Option(help="Of the model; 0 is greedy.")] = 1.0,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Play an episode: see what a policy sees, what it earns, and what `info` says.

    With --json the episode goes to stderr and stdout ends with one JSON object.
    """
    source, kwargs = EnvSource(name, pickled_factory(name)), parse_env_kwargs(env_kwargs)
    screen = Screen(Console(stderr=as_json, highlight=False))
    params = SamplingParams(max_tokens, temperature=temperature, seed=seed)

    async def main() -> list[Seat]:
        async with (
            EnvPool(1) as pool,
            pool.open(source, kwargs, step_seconds=STEP_SECONDS) as env,
            _player(model, home, address, params, screen) as player,
        ):
            return await play(env, player, screen, seed, max_turns)

    try:
        seats = asyncio.run(main())
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if as_json:
        played = {"env": name, "seed": seed, "model": model}
        if len(seats) > 1:
            print_json(played | {"agents": {seat.agent: seat.to_json() for seat in seats}})
        else:
            print_json(played | seats[0].to_json())


@dataclass
class Seat:
    """One agent's part of the episode."""

    agent: str
    player: Player
    new: list[Message] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    terminated: bool = False
    truncated: bool = False

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated

    def to_json(self) -> dict[str, Any]:
        names = ("messages", "info", "rewards", "terminated", "truncated")
        return {"reward": sum(self.rewards), **{name: getattr(self, name) for name in names}}


class Player(Protocol):
    """Who takes the turns of one agent."""

    async def turn(self, new: Sequence[Message], tools: Any) -> str | None:
        """The next turn, given what came since the last; None: no more of it."""


class Screen:
    """What is shown of an episode."""

    def __init__(self, console: Console) -> None:
        self.console = console

    named = False  # whether it matters which agent something concerns

    def messages(self, messages: Sequence[Message], agent: str) -> None:
        for message in messages:
            self.begin(message["role"], agent)
            self.console.print(message["content"], markup=False)

    def begin(self, role: str, agent: str) -> None:
        if self.named:
            self.console.print(f"[{agent}] ", end="", style="bold", markup=False)
        self.console.print(f"{role:>9}  ", end="", style=f"bold {COLOURS.get(role, 'white')}")

    def piece(self, text: str) -> None:
        self.console.print(text, end="", markup=False, soft_wrap=True)

    def outcome(self, reward: float, info: dict[str, Any], agent: str) -> None:
        whose = f"[{agent}] " if self.named else ""
        self.console.print(
            f"{whose}   reward  {reward:g}   info {json.dumps(info)}",
            style="dim",
            markup=False,
            soft_wrap=True,
        )

    def end(self, seats: Sequence[Seat]) -> None:
        for seat in seats:
            how = "terminated" if seat.terminated else "truncated" if seat.truncated else "left"
            turns, whose = len(seat.rewards), f"{seat.agent} " if self.named else ""
            self.console.rule(f"{whose}{how} after {turns} turns, reward {sum(seat.rewards):g}")


async def play(
    env: EnvProcess, player: Callable[[str], Player], screen: Screen, seed: int, max_turns: int
) -> list[Seat]:
    """An episode, shown as it goes. `player` gives each agent by name who plays it."""
    (opening,) = await env.begin(seed, None)
    seats = [Seat(agent, player(agent)) for agent in env.agents]
    screen.named = len(seats) > 1
    acting = _take(opening, seats, screen)
    while acting:
        actions: dict[str, str] = {}
        for seat in acting:
            action = await seat.player.turn(seat.new, env.tools[seat.agent])
            if action is None:
                screen.end(seats)
                return seats
            seat.messages.append({"role": "assistant", "content": action})
            seat.rewards.append(0.0)
            seat.new = []
            actions[seat.agent] = action
        (transition,) = await env.act(actions)
        acting = _take(transition, seats, screen)
        for seat in acting:
            seat.truncated = len(seat.rewards) >= max_turns
        acting = [seat for seat in acting if not seat.truncated]
    screen.end(seats)
    return seats


def _take(transition: Transition, seats: Sequence[Seat], screen: Screen) -> list[Seat]:
    """Tell the seats what happened; those that are to act next."""
    for seat in seats:
        agent = seat.agent
        new = transition.observations.get(agent, [])
        seat.new += new
        seat.messages += new
        seat.info = transition.infos.get(agent, seat.info)
        seat.terminated |= transition.terminations.get(agent, False)
        seat.truncated |= transition.truncations.get(agent, False)
        screen.messages(new, agent)
        if seat.rewards and agent in transition.rewards:
            seat.rewards[-1] += transition.rewards[agent]
            screen.outcome(transition.rewards[agent], seat.info, agent)
    return [s for s in seats if s.agent in transition.observations and not s.done]


class ByHand:
    """Turns typed at the terminal."""

    def __init__(self, screen: Screen, agent: str) -> None:
        self.screen, self.agent = screen, agent

    async def turn(self, new: Sequence[Message], tools: Any) -> str | None:
        lines: list[str] = []
        while True:
            self.screen.piece(f"{self.agent}> " if self.screen.named else "> ")
            line = await _typed()
            if line is None:
                return None
            if not lines and line.strip() == "/quit":
                return None
            if not line.endswith("\\"):
                return "\n".join([*lines, line])
            lines.append(line[:-1])


async def _typed() -> str | None:
    """A line of stdin, None at its end. Read in a daemon thread, so that Ctrl-C need not wait for
    the line."""
    loop = asyncio.get_running_loop()
    typed: asyncio.Future[str | None] = loop.create_future()

    def tell(line: str | None) -> None:
        if not typed.done():
            typed.set_result(line)

    def read() -> None:
        try:
            line: str | None = input()
        except EOFError:
            line = None
        loop.call_soon_threadsafe(tell, line)

    threading.Thread(target=read, daemon=True).start()
    return await typed


class ByModel:
    """Turns sampled from a policy, shown as they come."""

    def __init__(
        self, policy: SamplingClient, params: SamplingParams, screen: Screen, agent: str
    ) -> None:
        self.policy, self.params, self.screen, self.agent = policy, params, screen, agent
        self.renderer = ChatRenderer(policy.get_tokenizer())
        self.conversation: Conversation | None = None

    async def turn(self, new: Sequence[Message], tools: Any) -> str:
        if self.conversation is None:
            self.conversation = self.renderer.start(new, tools)
        else:
            self.conversation.add_messages(new)
        self.screen.begin("assistant", self.agent)
        pieces, sampled = TextStream(self.renderer.tokenizer), list[SampledToken]()
        async for token in self.policy.sample_stream(self.conversation.prompt, 1, self.params):
            sampled.append(token)
            self.screen.piece(pieces.push(token.token))
        self.screen.piece(pieces.finish() + "\n")
        return self.conversation.add_turn(SampledSequence.of(sampled))


@asynccontextmanager
async def _player(
    model: str | None, home: Path, address: str | None, params: SamplingParams, screen: Screen
) -> AsyncIterator[Callable[[str], Player]]:
    if model is None:
        screen.console.print(HELP, style="dim")
        yield lambda agent: ByHand(screen, agent)
        return
    from ..actors.cluster import connect
    from ..engines.models import resolve_model

    with screen.console.status("starting the service") as status:
        service = await connect(address, home=home)
    try:
        with screen.console.status(f"loading {model}") as status:
            path = _checkpoint(model, home)
            if path is not None:
                policy = await service.create_sampling_client(path)
            else:
                await asyncio.to_thread(resolve_model, model, service.home, status.update)
                policy = await service.create_sampling_client(base_model=model)
        yield lambda agent: ByModel(policy, params, screen, agent)
    finally:
        service.close()


def _checkpoint(model: str, home: Path) -> str | None:
    """The checkpoint that `model` names, None for a base model."""
    if model.startswith(SCHEME):
        return find_checkpoint(model, home)
    is_run = (Path(model) / "run.json").exists() or (
        has_registry(home) and any(run.run_id == model for run in open_registry(home).runs())
    )
    return find_checkpoint(model, home) if is_run else None
