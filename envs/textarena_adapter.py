"""Games of TextArena: `make("textarena:TicTacToe-v0")`."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from ..primitives.errors import InvalidInput, NotFound
from .core import message
from .extras import extra
from .multi_agent import MultiAgentEnv, MultiResetResult, MultiStepResult

textarena = extra("textarena", "an environment 'textarena:<id>'")
MAX_PLAYERS = 15


class TextArenaEnv(MultiAgentEnv):
    """A TextArena game of the agents `player_0`, `player_1`, ...; one of a single player is an
    environment like any other.

    Who is to act is told what happened since it last acted. Where the game's wrappers show it in
    another way (the `-train` games: the rules and the board), it is told that every time. The
    game's own handling of invalid moves, its turn limit and its rewards are kept; an agent that
    cannot act loses to its one opponent, as by invalid moves.

    Args:
        env_id: as in `textarena.make`.
        num_players: None for the fewest that the game takes.
        kwargs: of the game itself.

    Raises:
        NotFound: no such game.
        InvalidInput: the game does not take these arguments or so many players.
    """

    def __init__(self, env_id: str, num_players: int | None = None, **kwargs: Any) -> None:
        if env_id not in textarena.envs.registration.ENV_REGISTRY:
            raise NotFound(f"environment 'textarena:{env_id}': TextArena has no such game")
        self.name = f"environment 'textarena:{env_id}'"
        try:
            self.env = textarena.make(env_id, **kwargs)
        except TypeError as error:
            raise InvalidInput(f"{self.name} cannot be made with {kwargs!r}: {error}") from error
        self.num_players = self._fewest() if num_players is None else num_players
        self.possible_agents = [f"player_{number}" for number in range(self.num_players)]
        views = [wrapper for wrapper in _wrappers(self.env) if _shows(wrapper)]
        # The default view repeats the whole history, which the conversation holds already.
        self.told_anew = all(
            type(view) is textarena.wrappers.LLMObservationWrapper for view in views
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> MultiResetResult:
        random.seed(seed)  # games draw from the process's generator
        self._begin(self.num_players, seed)
        return self._observations(), {}

    def step(self, actions: dict[str, str]) -> MultiStepResult:
        ((agent, action),) = actions.items()
        done, info = self.env.step(action=action)
        if not done:
            return self._observations(), {}, {}, {}, {agent: dict(info or {})}
        rewards, infos = self.env.close()
        over = dict.fromkeys(self.possible_agents, True)
        return (
            self._last_words(),
            {a: float((rewards or {}).get(n, 0)) for n, a in enumerate(self.possible_agents)},
            over,
            {},
            {a: dict(infos.get(n, {})) for n, a in enumerate(self.possible_agents)},
        )

    def forfeit(self, failures: dict[str, str]) -> MultiStepResult:
        if len(self.possible_agents) != 2 or len(failures) != 1:
            return super().forfeit(failures)  # type: ignore[return-value]
        over = dict.fromkeys(self.possible_agents, True)
        rewards = {a: -1.0 if a in failures else 1.0 for a in self.possible_agents}
        return {}, rewards, over, {}, {}

    def _begin(self, num_players: int, seed: int | None) -> None:
        self.env.reset(num_players=num_players, seed=seed)
        self.base = self.env
        while isinstance(self.base, textarena.Wrapper):
            self.base = self.base.env

    def _fewest(self) -> int:
        """TextArena does not tell how many players a game takes, but refuses other numbers."""
        refusal: Exception | None = None
        for number in range(1, MAX_PLAYERS + 1):
            try:
                self._begin(number, 0)
            except (AssertionError, ValueError) as error:
                refusal = error
                continue
            # Some games take a single player without being made for one.
            if number > 1 or isinstance(self.base.state, textarena.SinglePlayerState):
                return number
        raise InvalidInput(f"{self.name} takes no number of players up to {MAX_PLAYERS}: {refusal}")

    def _observations(self) -> dict[str, Any]:
        player, observation = (self.base if self.told_anew else self.env).get_observation()
        agent = self.possible_agents[player]
        text = observation if isinstance(observation, str) else self._text(observation, player)
        return {agent: [message("user", text or "It is your turn.")]}

    def _last_words(self) -> dict[str, Any]:
        observations = getattr(self.base.state, "observations", None) or {}
        return {
            agent: self._text(observations.get(number, []), number)
            for number, agent in enumerate(self.possible_agents)
        }

    def _text(self, observation: list[tuple[int, str, Any]], player: int) -> str:
        names = self.base.state.role_mapping or {}
        lines = []
        for sender, said, kind in observation:
            if sender == player and kind == textarena.ObservationType.PLAYER_ACTION:
                continue  # its own turn, as it is in its conversation
            name = "GAME" if sender == textarena.GAME_ID else f"Player {sender}"
            lines.append(f"[{names.get(sender, name)}] {said}")
        return "\n".join(lines)


def _wrappers(env: Any) -> list[Any]:
    chain = []
    while isinstance(env, textarena.Wrapper):
        chain.append(env)
        env = env.env
    return chain


def _shows(wrapper: Any) -> bool:
    return isinstance(wrapper, textarena.ObservationWrapper)


def find_textarena(env_id: str) -> Callable[..., TextArenaEnv]:
    """A factory of the game."""

    def factory(num_players: int | None = None, **kwargs: Any) -> TextArenaEnv:
        return TextArenaEnv(env_id, num_players, **kwargs)

    return factory
