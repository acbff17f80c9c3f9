"""A plan for a person to read."""

from typing import Any

from mvjax.clip import Clip
from mvjax.parallel.chips import GB
from mvjax.training.plan import Plan


def report(config: Any, topology: str, plan: Plan) -> str:
    """Several lines: what was compiled, whether it fits, what it exchanges and costs."""
    per_chip = plan.batch_size / plan.devices
    slices = f"{plan.slices} x " if plan.slices > 1 else ""
    share = plan.peak_bytes / plan.hbm_bytes
    fits = "fits" if share <= 1 else "DOES NOT FIT"
    frozen = f", {_millions(plan.frozen)} frozen in the backbone" if plan.frozen else ""
    host = f", {_bytes(plan.host_bytes)} in the host" if plan.host_bytes else ""
    training = f"LoRA of rank {config.lora.rank}" if config.lora.rank else "full training"
    what = f"video, {training}" if config.stage == "video" else "action decoder"
    rows = [
        ("step", f"{what}, {Clip(**config.clip).tokens:,} tokens per clip"),
        ("pod", f"{slices}{topology}, {plan.devices} x {plan.device}"),
        ("mesh", " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())),
        ("batch", f"{plan.batch_size} clips, {per_chip:g} per chip"),
        ("parameters", f"{_millions(plan.parameters)}, {_millions(plan.trainable)} learn{frozen}"),
        (
            "memory",
            f"arguments {_bytes(plan.argument_bytes)}, peak {_bytes(plan.peak_bytes)} of "
            f"{_bytes(plan.hbm_bytes)} per chip ({share:.0%}): {fits}{host}",
        ),
        (
            "time",
            f"{plan.flops / 1e12:.4g} TFLOP per chip: {plan.step_seconds:.3g} s per step at "
            f"{plan.mfu:.0%} of {plan.peak_flops / 1e12:g} TFLOP/s, {plan.clips_per_second:.3g} "
            "clips/s in the pod",
        ),
        *_exchanges(plan),
        ("compiled", f"in {plan.compile_seconds:.0f} s"),
    ]
    return "\n".join(f"{name:<12}{text}" for name, text in rows)


def _exchanges(plan: Plan) -> list[tuple[str, str]]:
    if not plan.collectives:
        return [("exchange", "none")]
    rows = []
    for exchange in plan.collectives:
        where = " between slices" if exchange.across_slices else ""
        size = f"{exchange.count:>6} x {exchange.kind}{where}, {_bytes(exchange.sent_bytes)}"
        rows.append(("" if rows else "exchange", size))
    floor = f"sent per chip and step; {plan.link_seconds:.3g} s if all links are busy"
    return [*rows, ("", floor)]


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:,.2f} G"


def _bytes(count: float) -> str:
    return f"{count / GB:.2f} GB" if count >= GB / 100 else f"{count / 2**20:.2f} MB"


def table(plans: dict[str, dict[str, Any]]) -> str:
    """Markdown: one line per plan.

    Args:
        plans: arguments of `launch.plan` -> what it wrote with --json.
    """
    if not plans:
        return ""
    head = (
        "| pod | chips | mesh d·f·c·t | clips | peak GB | arguments GB | TFLOP | sent GB | s | "
        "clips/s | `python -m launch.plan ...` |\n|---|" + "---:|" * 9 + "---|\n"
    )
    return head + "".join(f"| {' | '.join(_cells(*line))} |\n" for line in plans.items())


def _cells(arguments: str, p: dict[str, Any]) -> list[str]:
    across = sum(c["sent_bytes"] for c in p["collectives"] if c["across_slices"]) / GB
    host = f" + {p['host_bytes'] / GB:.1f} in the host" if p["host_bytes"] else ""
    inside = sum(c["sent_bytes"] for c in p["collectives"] if not c["across_slices"]) / GB
    return [
        f"{p['slices']} x {p['topology']}" if p["slices"] > 1 else p["topology"],
        f"{p['devices']}",
        "·".join(str(size) for size in p["mesh"].values()),
        f"{p['batch_size']}",
        f"{p['peak_bytes'] / GB:.1f} of {p['hbm_bytes'] / GB:.1f}{host}",
        f"{p['argument_bytes'] / GB:.2f}",
        f"{p['flops'] / 1e12:.0f}",
        f"{inside:.1f}" + (f" + {across:.2f}" if across else ""),
        f"{p['step_seconds']:.2f}",
        f"{p['clips_per_second']:.3g}",
        f"`{arguments}`",
    ]
