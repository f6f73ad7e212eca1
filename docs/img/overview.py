"""Draw overview.png, the README's picture: python docs/img/overview.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

CLIENTS = (("clinic-a", 64, "#4e79a7"), ("clinic-b", 16, "#f28e2b"), ("clinic-c", 4, "#59a14f"))
GREY, INK = "#e9ecef", "#343a40"
TOP, HEIGHT = 4.05, 3.2


def box(ax, x: float, y: float, width: float, height: float, colour: str) -> None:
    style = "round,pad=0,rounding_size=0.06"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="white"))


def arrow(ax, x: float, y: float, to_x: float, to_y: float) -> None:
    ax.add_patch(FancyArrowPatch((x, y), (to_x, to_y), arrowstyle="-|>", mutation_scale=14, color=INK, linewidth=1.3))


def heading(ax, x: float, title: str, text: str) -> None:
    ax.text(x, 5.0, title, ha="center", fontsize=13, weight="bold", color=INK)
    ax.text(x, 4.62, text, ha="center", fontsize=9.5, color=INK)


def main() -> None:
    fig, ax = plt.subplots(figsize=(11, 4.3))
    heading(ax, 1.25, "private clients", "each its own rank")
    heading(ax, 4.95, "one packed pass", "each token meets W once")
    heading(ax, 8.05, "one stacked bank", "all clients' A and B")
    heading(ax, 11.0, "exact aggregation", "one product, rounded once")
    total, y = sum(rank**0.5 for _, rank, _ in CLIENTS), TOP
    for number, (name, rank, colour) in enumerate(CLIENTS):
        at = TOP - 0.75 - number * 1.22
        box(ax, 0.2, at, 2.1, 0.75, colour)
        ax.text(1.25, at + 0.375, f"{name}, rank {rank}", ha="center", va="center", color="white", fontsize=11)
        box(ax, 3.5 + number * 0.98, TOP - 0.5, 0.93, 0.5, colour)
        tokens = f"tokens {name[-1]}"
        ax.text(3.965 + number * 0.98, TOP - 0.25, tokens, ha="center", va="center", color="white", fontsize=9)
        height = HEIGHT * rank**0.5 / total
        box(ax, 7.35, y - height + 0.03, 0.62, height - 0.06, colour)
        box(ax, 8.13, y - height + 0.03, 0.62, height - 0.06, colour)
        y -= height
        arrow(ax, 2.35, at + 0.375, 3.4, TOP - 0.25)
    box(ax, 3.5, TOP - HEIGHT, 2.89, HEIGHT - 0.75, GREY)
    ax.text(4.95, 2.05, "frozen base\nW", ha="center", va="center", fontsize=13, color=INK)
    ax.text(7.66, 0.55, "A", ha="center", color=INK, fontsize=12)
    ax.text(8.44, 0.55, "B", ha="center", color=INK, fontsize=12)
    arrow(ax, 6.5, 2.4, 7.25, 2.4)
    arrow(ax, 7.25, 1.9, 6.5, 1.9)
    arrow(ax, 8.85, 2.4, 9.6, 2.4)
    box(ax, 9.7, 1.75, 2.6, 1.3, GREY)
    formula = r"$W \leftarrow W + \sum_k p_k\, s_k\, B_k A_k$"
    ax.text(11.0, 2.4, formula, ha="center", va="center", fontsize=12.5, color=INK)
    ax.set_xlim(0, 12.5)
    ax.set_ylim(0.3, 5.4)
    ax.axis("off")
    fig.savefig(Path(__file__).with_name("overview.png"), dpi=120, bbox_inches="tight", pad_inches=0.1)


if __name__ == "__main__":
    main()
