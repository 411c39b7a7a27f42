"""What a token costs the learner: by number of runs, length of sequences and size of groups.

Three sweeps of `forward_backward` with rank-16 adapters on attention and MLP: 2,048 tokens with a
loss on all of them, as 64 sequences of 1 to 64 runs; one run's sequences of 64 to 4,096 tokens, as many
as make 2,048 tokens, but at least one; and a group of 1 to 32 completions of 64 tokens after a prompt of 512,
with a loss on the completions. `ours` is the rate at 64 runs, `theirs` at one. Writes a plot beside
this script (with `--quick`, none), and the tables as Markdown to stderr.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from dense_batches import datums, learn_together
from harness import options, report, say, seconds
from peft_side import add_run

from tinsmith import Datum, LoraConfig
from tinsmith.engines.backbone import Backbone
from tinsmith.engines.learner import LearnerEngine

TOKENS = 2048
RUNS, LENGTHS, GROUPS = (1, 2, 4, 8, 16, 32, 64), (64, 256, 1024, 2048, 4096), (1, 2, 4, 8, 16, 32)
PROMPT, COMPLETION = 512, 64
PLOT = Path(__file__).with_suffix(".png")

Batches = dict[str, Sequence[Datum]]


def main() -> None:
    chosen = options(__doc__)
    small = chosen.quick
    engine = LearnerEngine(Backbone(chosen.model))
    counts, lengths, groups = (
        ((1, 4), LENGTHS[:1], GROUPS[:2]) if small else (RUNS, LENGTHS, GROUPS)
    )
    for index in range(max(counts)):
        lora = LoraConfig(rank=2 if small else 16, seed=index, train_unembed=False)
        add_run(engine, f"run-{index}", lora)
    vocabulary, rng = engine.backbone.vocab_size, np.random.default_rng(0)

    def random(sequences: int, length: int) -> np.ndarray:
        return rng.integers(0, vocabulary, (sequences, length + 1))

    def of_runs(count: int) -> Batches:
        data = datums(random(64, 4 if small else TOKENS // 64))
        return {f"run-{i}": data[i::count] for i in range(count)}

    def of_length(length: int) -> Batches:
        return {"run-0": datums(random(max(1, TOKENS // length), length))}

    def of_group(size: int) -> Batches:
        prompt = 64 if small else PROMPT
        tokens = random(size, prompt + COMPLETION)
        tokens[:, :prompt] = tokens[0, :prompt]
        weights = np.repeat([0.0, 1.0], [prompt - 1, COMPLETION + 1])
        return {
            "run-0": [
                Datum(row[:-1], {"target_tokens": row[1:], "weights": weights}) for row in tokens
            ]
        }

    sweeps = {
        "runs": rates(engine, {n: of_runs(n) for n in counts}, chosen.runs),
        "tokens of a sequence": rates(engine, {n: of_length(n) for n in lengths}, chosen.runs),
        "completions of a prompt": rates(engine, {n: of_group(n) for n in groups}, chosen.runs),
    }
    for name, sweep in sweeps.items():
        say("\n".join([f"\n| {name} | tokens/s |", "|---:|---:|"]))
        say("\n".join(f"| {n} | {rate:.1f} |" for n, rate in sweep.items()))
    if not small:
        plot(sweeps)
    by_runs = sweeps["runs"]
    most, one = by_runs[max(counts)], by_runs[1]
    tables = {
        name: {str(n): round(rate, 1) for n, rate in sweep.items()}
        for name, sweep in sweeps.items()
    }
    report("tokens/s", most, one, most / one, chosen.runs, sweeps=tables)


def rates(engine: LearnerEngine, points: dict[int, Batches], runs: int) -> dict[int, float]:
    """Tokens of the batch a second, at best of `runs` rounds through all points after a warm-up."""
    best = dict.fromkeys(points, float("inf"))
    for round_ in range(runs + 1):
        for n, batches in points.items():
            taken = seconds(lambda batches=batches: learn_together(engine, batches))
            say(f"{'warm-up' if round_ == 0 else f'run {round_}'}, {n}: {taken:.2f} s")
            if round_:
                best[n] = min(best[n], taken)
    tokens = {
        n: sum(d.model_input.length for b in p.values() for d in b) for n, p in points.items()
    }
    return {n: tokens[n] / taken for n, taken in best.items()}


def plot(sweeps: dict[str, dict[int, float]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(sweeps), figsize=(11, 3.2), layout="constrained")
    for axis, (name, sweep) in zip(axes, sweeps.items(), strict=True):
        axis.plot(list(sweep), list(sweep.values()), "o-")
        axis.set_xscale("log", base=2)
        axis.set_xticks(list(sweep), [str(n) for n in sweep])
        axis.set_ylim(bottom=0)
        axis.set_xlabel(name)
    axes[0].set_ylabel("tokens/s")
    figure.savefig(PLOT, dpi=120)


if __name__ == "__main__":
    main()
