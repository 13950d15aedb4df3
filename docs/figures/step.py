"""Draws docs/figures/step.png from benchmarks/results/adam.json: the time of a step with an elastic net and a clip."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "adam.json"
MODELS = {
    "mlp_251": "MLP\n251 parameters",
    "many_small_1000x1k": "1000 tensors\nof 1000",
    "resnet50": "ResNet-50\n25.6 M",
    "gpt2_124m": "GPT-2\n124 M",
}
ARMS = {
    "penalty in loss + clip_grad_norm_ + Adam": ("the loop, torch.optim.Adam", "0.65"),
    "penalty in loss + clip_grad_norm_ + fused=True": ("the loop, Adam(fused=True)", "0.45"),
    "penalty by foreach + clip_grad_norm_ + fused=True": ("foreach penalty, clip, Adam(fused=True)", "tab:orange"),
    "regfused.Adam": ("regfused.Adam", "tab:blue"),
}


def in_words(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def main() -> None:
    results = json.loads(RESULTS.read_text())
    figure, axis = pyplot.subplots(figsize=(10, 3.8), layout="constrained")
    width = 0.8 / len(ARMS)
    for i, (arm, (label, color)) in enumerate(ARMS.items()):
        seconds = [results["models"][model]["jobs"]["elastic_net"]["arms"][arm]["median_us"] / 1e6 for model in MODELS]
        places = [m + (i - (len(ARMS) - 1) / 2) * width for m in range(len(MODELS))]
        bars = axis.bar(places, seconds, width * 0.92, label=label, color=color)
        axis.bar_label(bars, [in_words(s) for s in seconds], fontsize=7, padding=2)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: in_words(value)))
    axis.set_xticks(range(len(MODELS)), MODELS.values())
    axis.set_ylim(top=axis.get_ylim()[1] * 2)
    facts = results["environment"]
    axis.set_title(
        f"L1 + L2 + clip + Adam: time of a step, lower is better ({facts['threads']} threads, {facts['cpu']}, float32)",
        fontsize=10,
    )
    axis.legend(fontsize=8, loc="upper left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
