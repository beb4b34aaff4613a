"""The picture of `pyfleece bench`: the guest's share and latency by cluster size, and fleecing space against time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pyfleece.bench import BenchError, Case, Options
from pyfleece.progress import human

_PHASES = (("plain", "plain"), ("first", "first touch"), ("again", "again"), ("backup", "with backup"))


def check() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BenchError("--plot needs matplotlib: pip install 'pyfleece[plot]'") from None


def draw(options: Options, cases: Sequence[Case], path: str) -> None:
    """Write an SVG (or what the suffix of `path` says)."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (rates, latencies, space) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    names = [human(case.cluster_size) for case in cases]
    width = 0.8 / len(_PHASES)
    for number, (phase, title) in enumerate(_PHASES):
        places = [index + (number - 1.5) * width for index in range(len(cases))]
        rates.bar(places, [100 * case.share(phase) for case in cases], width, label=title)
        p99 = [statistics.median(getattr(one, phase).p99 for one in case.rounds) * 1e6 for case in cases]
        latencies.bar(places, p99, width, label=title)
    for axes, title in ((rates, "guest's rate, % of plain"), (latencies, "guest's p99 latency, us")):
        axes.set_xticks(range(len(cases)), names)
        axes.set_xlabel("cluster size")
        axes.set_title(title)
    rates.legend(fontsize="small")
    latencies.set_yscale("log")
    for case, name in zip(cases, names):
        times, sizes = zip(*case.rounds[-1].fleecing)
        space.plot(times, [size / (1 << 20) for size in sizes], label=name)
    space.set_title("fleecing image during the backup, MiB")
    space.set_xlabel("seconds since the cut")
    space.legend(title="cluster size", fontsize="small")
    figure.suptitle(f"{options.pattern.name}, {human(options.pattern.block)}, {options.pattern.threads} at once")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise BenchError(f"{path}: {error}") from error
    finally:
        pyplot.close(figure)
