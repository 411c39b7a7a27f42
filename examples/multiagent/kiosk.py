"""The game of `two_specialists.py`: one reads an order and plans, one has the tools and pays.

    planner    two pens and twice as many cups        ->  2*pen+4*cup
    tool user  2*pen+4*cup                            ->  price("pen") price("cup")
               pen 7, cup 3                           ->  pay("2*7+4*3")

The prices are drawn anew for every match and told by a tool alone; the order's words are told to
the planner alone.
"""

from __future__ import annotations

import hashlib
import random
import re
from typing import Literal

from tinsmith.envs import MultiAgentEnv, ToolSet

AGENTS = ("planner", "tool_user")
ITEMS = ("pen", "cup", "hat", "bag", "key", "map")
NUMBERS = ("zero", "one", "two", "three", "four")
AND = {"as many": lambda n: n, "one more": lambda n: n + 1, "twice as many": lambda n: 2 * n}
ORDER = re.compile(rf"(two|three|four) (\w+)s and ({'|'.join(AND)}|two|three|four) (\w+)s")
PLAN = re.compile(r"\s*(\d{1,2})\*([a-z]+) ?\+ ?(\d{1,2})\*([a-z]+)\s*")
SUM = re.compile(r"(\d{1,2})\*(\d{1,3})\+(\d{1,2})\*(\d{1,3})")

PLANNER = "Write the order as a sum, such as 3*hat+2*key. "
TOOL_USER = 'Ask for prices: price("hat") price("key"). Then pay: pay("3*5+2*8"). '


def read_order(order: str) -> dict[str, int]:
    """How many of each item the words ask for."""
    number, first, more, second = ORDER.search(order).groups()
    count = NUMBERS.index(number)
    return {first: count, second: AND[more](count) if more in AND else NUMBERS.index(more)}


def read_plan(text: str) -> dict[str, int] | None:
    match = PLAN.fullmatch(text)
    return match and {match[2]: int(match[1]), match[4]: int(match[3])}


def draw_order(rng: random.Random, split: Literal["train", "eval"]) -> str:
    """An order; of all there are (720), a fifth are kept for `eval`."""
    while True:
        first, second = rng.sample(ITEMS, 2)
        more = rng.choice([*AND, rng.choice(NUMBERS[2:])])
        order = f"{rng.choice(NUMBERS[2:])} {first}s and {more} {second}s"
        held_out = hashlib.blake2b(order.encode(), digest_size=1).digest()[0] < 256 // 5
        if held_out == (split == "eval"):
            return order


class Kiosk(MultiAgentEnv):
    """The tool user is paid for paying what the plan it was given comes to, right or wrong; the
    planner half for a plan that says what the order does, half for the order being paid rightly."""

    possible_agents = AGENTS

    def __init__(self, split: Literal["train", "eval"] = "train", turns: int = 3) -> None:
        self.split, self.turns = split, turns
        self.tools = ToolSet([self.price, self.pay], syntax="plain")
        self.tool_schemas = {"tool_user": self.tools.schemas}

    def price(self, item: str) -> str:
        """What an item costs."""
        return f"{item} {self.prices[item]}" if item in self.prices else f"no {item}"

    def pay(self, products: str) -> str:
        """Pay a sum such as 3*5+2*8, and leave."""
        match = SUM.fullmatch(products.replace(" ", ""))
        if not match:
            return "pay a sum such as 3*5+2*8"
        a, b, c, d = map(int, match.groups())
        self.paid = a * b + c * d
        return f"paid {self.paid}"

    def reset(self, *, seed=None, options=None):
        rng = random.Random(seed)
        self.order = draw_order(rng, self.split)
        self.prices = {item: rng.randint(2, 9) for item in ITEMS}
        self.paid: int | None = None
        return {"planner": PLANNER + self.order}, {}

    async def step(self, actions):
        if "planner" in actions:
            self.plan = read_plan(actions["planner"])
            return {"tool_user": TOOL_USER + actions["planner"].strip()}, {}, {}, {}, {}
        self.turns -= 1
        results = await self.tools.run(actions["tool_user"])
        if results and self.paid is None and self.turns > 0:
            return {"tool_user": ", ".join(r.text for r in results)}, {}, {}, {}, {}
        return self.judged()

    def judged(self):
        ordered = read_order(self.order)
        planned = self.plan == ordered
        executed = self.paid is not None and self.paid == self.cost(self.plan)
        success = self.paid is not None and self.paid == self.cost(ordered)
        rewards = {"planner": 0.5 * planned + 0.5 * success, "tool_user": float(executed)}
        info = {"planned": planned, "executed": executed, "success": success}
        return {}, rewards, dict.fromkeys(AGENTS, True), {}, dict.fromkeys(AGENTS, info)

    def cost(self, counts: dict[str, int] | None) -> int | None:
        if counts is None or not counts.keys() <= self.prices.keys():
            return None
        return sum(count * self.prices[item] for item, count in counts.items())


# ---- scripts to imitate: right some of the time ----


def careless_planner(messages, rng: random.Random) -> str:
    """Reads every other order, and guesses the second number of the rest."""
    (first, count), (second, more) = read_order(messages[-1]["content"]).items()
    return f"{count}*{first}+{more if rng.random() < 0.5 else rng.randint(2, 8)}*{second}"


def careless_tool_user(messages, rng: random.Random) -> str:
    """One time in four forgets a price, and one time in three a number of the plan."""
    plan = re.findall(r"(\d+)\*([a-z]+)", messages[0]["content"])[-2:]
    if len(messages) == 1:
        return " ".join(f'price("{item}")' for _, item in plan[: 1 + (rng.random() < 0.75)])
    told = dict(re.findall(r"([a-z]+) (\d+)", messages[-1]["content"]))
    factors = [(count, told.get(item, str(rng.randint(2, 9)))) for count, item in plan]
    if rng.random() < 1 / 3:
        factors[1] = (str(rng.randint(2, 8)), factors[1][1])
    return 'pay("{}")'.format("+".join(f"{count}*{price}" for count, price in factors))


def reads_out(messages, rng: random.Random) -> str:
    """A planner that does not plan: the tool user hears the order itself."""
    return messages[-1]["content"].removeprefix(PLANNER)
