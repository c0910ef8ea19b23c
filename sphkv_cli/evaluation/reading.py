"""What the rows say, in sentences; and whether limits hold."""

from collections.abc import Sequence

from sphkv_cli.blocks import times_text
from sphkv_cli.evaluation.options import EvaluateOptions
from sphkv_cli.evaluation.result import GateOutcome, Row

_KL_OF_ROUNDING = 1e-6
_SAME_BYTES = 1.005


def gate_outcomes(options: EvaluateOptions, rows: Sequence[Row]) -> tuple[GateOutcome, ...]:
    """Every limit on every row of ours."""
    found = []
    for row in rows:
        if not row.is_ours:
            continue
        kl, top1, ratio = row.kl_geometric.mean, row.top1.mean, row.perplexity_ratio.mean
        if options.gate_kl is not None:
            holds = kl <= options.gate_kl
            found.append(GateOutcome(row.name, "KL", options.gate_kl, kl, holds))
        if options.gate_top1 is not None:
            holds = top1 >= options.gate_top1
            found.append(GateOutcome(row.name, "top-1 agreement", options.gate_top1, top1, holds))
        if options.gate_perplexity is not None:
            holds = ratio <= options.gate_perplexity
            limit = options.gate_perplexity
            found.append(GateOutcome(row.name, "perplexity ratio", limit, ratio, holds))
    return tuple(found)


def read(protocol: str, rows: Sequence[Row]) -> tuple[str, ...]:
    """Sentences in order of weight; a result against us is said as plainly as one for us."""
    sentences = []
    control = rows[-1]
    if control.kl.mean > _KL_OF_ROUNDING:
        sentences.append(
            f"The dense control has a KL of {control.kl.mean:.2g}: differences below that are "
            "rounding of this model's arithmetic."
        )
    n_documents = len(control.documents)
    if n_documents < 2:
        sentences.append("One document was scored: there are no confidence intervals.")
    others = [row for row in rows if row is not control]
    if protocol == "uniform":
        sentences += _uniform(others)
    else:
        sentences += _retention(others)
    return tuple(sentences)


def _uniform(rows: Sequence[Row]) -> list[str]:
    """Our best code against every published method that takes at least as many bytes."""
    ours = [row for row in rows if row.is_ours]
    theirs = [row for row in rows if not row.is_ours]
    sentences = []
    for row in theirs:
        smaller = [code for code in ours if code.laid_out_rate <= row.laid_out_rate]
        if not smaller:
            continue
        best = min(smaller, key=lambda code: code.kl_geometric.mean)
        times = best.kl_geometric.mean / max(row.kl_geometric.mean, 1e-12)
        verdict = "less KL" if times < 1 else "more KL: no reason to prefer it for quality"
        factor = 1 / times if times < 1 else times
        sentences.append(
            f"At no more bytes than {row.name} ({row.laid_out_rate:.2f} b whole cache), "
            f"{best.name} ({best.laid_out_rate:.2f} b) has {times_text(factor)} times {verdict}."
        )
    return sentences


def _retention(rows: Sequence[Row]) -> list[str]:
    """Plan and policy at every budget (rows of several are named "plan, 2b")."""
    by_name = {row.name: row for row in rows}
    suffixes = [name.removeprefix("plan") for name in by_name if name.split(", ")[0] == "plan"]
    sentences = []
    for suffix in suffixes:
        plan, policy = by_name["plan" + suffix], by_name["policy" + suffix]
        where = suffix.replace(",", " at") or ""
        # A plan's budget is filled to the last page, a method's bytes are what they are.
        most = _SAME_BYTES * plan.coded_laid_out_rate
        baselines = [
            row
            for row in rows
            if row.coded_laid_out_rate <= most
            and not row.family.startswith(("plan", "policy", "joint", "oracle", "dense"))
        ]
        if baselines:
            base = min(baselines, key=lambda row: row.kl_geometric.mean)
            times = base.kl_geometric.mean / max(plan.kl_geometric.mean, 1e-12)
            how = f"{times_text(times)} times less KL than" if times > 1 else "no less KL than"
            sentences.append(
                f"The plan{where} ({plan.coded_laid_out_rate:.2f} b laid out) has {how} the best "
                f"other method of no more bytes, {base.name} ({base.coded_laid_out_rate:.2f} b)."
            )
        times = policy.kl_geometric.mean / max(plan.kl_geometric.mean, 1e-12)
        sentences.append(
            f"The frozen policy{where} has {times:.2f} times the KL of the plan made per text."
        )
    return sentences
