"""The text of ``midpo inspect``: what is in a set, and how it becomes tokens, before training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .messages import printable
from .read import ReadReport
from .schema import Document, Pair
from .selection import LABEL_RULES, SCORE_RULES, Selected, select
from .tokens import TEMPLATE_DATE, Tokenization

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIDTH = 110
_STAGES = ("safety", "helpfulness")


def describe_pairs(
    pairs: Sequence[Pair],
    report: ReadReport,
    *,
    stage: str | None = None,
    tokenization: Tokenization | None = None,
    show: int = 2,
) -> str:
    """Counts, reading, dropped rows, label balance, lengths, and ``show`` pairs token by token.

    Args:
        stage: safety, helpfulness or a rule of the router: its pairs alone are measured and shown;
            else all pairs.
        tokenization: how texts become tokens; without it lengths are in words and characters.
    """
    rules: tuple[str, ...] = LABEL_RULES
    if stage in LABEL_RULES:
        rules = (str(stage),)
    if stage in ("router", *SCORE_RULES):
        rules = tuple(rule for rule in LABEL_RULES if rule not in _STAGES)
    lines = [*_reading(pairs, report), "", *_labels(pairs), "", "pairs of each stage"]
    for rule in rules:
        selected, dropped = select(pairs, rule)
        name = rule if rule in _STAGES else f"router (rule {rule})"
        lines.append(f"  {name:<28}{len(selected):>7}{_reasons(dropped)}")
        if selected:
            lines.append(f"  {'':<28}{_balance(pairs, selected)}")
    if stage in ("router", *SCORE_RULES):
        lines.append("  The rules pareto and ranked read scores, which only a run computes.")
    sided = stage in LABEL_RULES  # otherwise no response is the chosen one yet
    shown = [(i, 0) for i in range(len(pairs))]
    if stage is not None and sided:
        shown, _ = select(pairs, stage)
    if not shown:
        return "\n".join([*lines, "", "no pair to measure or show"])
    kept = [pairs[i] for i, _ in shown]
    titles = [f"pair {pairs[i].source}" for i, _ in shown]
    if sided:
        titles = [
            f"{title}: chosen is response {side}"
            for title, (_, side) in zip(titles, shown, strict=True)
        ]
    if tokenization is None:
        lines += ["", *_text_lengths(kept), "", *_texts(kept[:show], titles)]
    else:
        lines += ["", *_tokens(kept, titles, tokenization, show)]
    return "\n".join(lines)


def special_faults(
    document: Document, template: Sequence[int], bos: int | None, eos: int
) -> list[str]:
    """Faults of BOS and EOS in one document, as texts.

    Args:
        template: the prompt's turns with no text in them: its special tokens are the template's.
    """
    prefix, faults = document.prefix, []
    if bos is not None and list(prefix[:2]) == [bos, bos]:
        faults.append("BOS twice at the beginning")
    if bos is not None and prefix.count(bos) > max(template.count(bos), 1):
        faults.append("BOS inside the prompt, not from the template")
    if prefix.count(eos) > template.count(eos):
        faults.append("EOS inside the prompt, not from the template")
    for number, ids in enumerate(document.suffixes):
        if eos in ids[:-1]:
            faults.append(f"EOS inside response {number}")
        if bos is not None and bos != eos and bos in ids:
            faults.append(f"BOS inside response {number}")
    return faults


def _reading(pairs: Sequence[Pair], report: ReadReport) -> list[str]:
    lines = ["rows"]
    for (path, rows), (_, kept) in zip(report.rows, report.kept, strict=True):
        lines.append(f"  {path}: {rows} rows, {kept} taken")
    lines += [f"  {line}" for line in report.lines()]
    lines.append(f"  {len(pairs)} pairs, {len({pair.prompt for pair in pairs})} prompts")
    lines += [f"  dropped: {count} {reason}" for reason, count in report.dropped.most_common()]
    lines += [f"  conflict: {text}" for text in report.conflicts[:5]]
    if len(report.conflicts) > 5:
        lines.append(f"  ... and {len(report.conflicts) - 5} conflicts more")
    return lines


def _labels(pairs: Sequence[Pair]) -> list[str]:
    better: Counter[Any] = Counter("null" if p.better is None else p.better for p in pairs)
    safer: Counter[Any] = Counter("null" if p.safer is None else p.safer for p in pairs)
    safety: Counter[Any] = Counter()
    agree: Counter[Any] = Counter()
    wrong = 0
    for p in pairs:
        names = ("none safe", "one safe", "both safe")
        safety["unknown" if None in p.safe else names[sum(map(bool, p.safe))]] += 1
        if None not in (p.better, p.safer):
            agree["same" if p.better == p.safer else "differ"] += 1
        if p.safer is not None:
            wrong += p.safe[p.safer] is False and p.safe[1 - p.safer] is True
    lines = ["labels"]
    names_counts = {"better_response_id": better, "safer_response_id": safer}
    names_counts |= {"safe flags": safety, "better and safer": agree}
    for name, counts in names_counts.items():
        if counts or name != "better and safer":
            values = [f"{value} {counts[value]}" for value in sorted(counts, key=str)]
            lines.append(f"  {name}: {', '.join(values)}")
    if wrong:
        lines.append(
            f"  warning: in {wrong} pairs safer_response_id is the unsafe response, and the other "
            "one is safe"
        )
    return lines


def _balance(pairs: Sequence[Pair], selected: Sequence[Selected]) -> str:
    first = sum(side == 0 for _, side in selected) / len(selected)
    longer = 0
    for i, side in selected:
        longer += len(pairs[i].responses[side]) > len(pairs[i].responses[1 - side])
    return f"chosen is response 0 in {first:.2f}, the longer text in {longer / len(selected):.2f}"


def _reasons(dropped: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{n} {reason}" for reason, n in dropped.items())
    return f"   left out: {reasons}" if dropped else ""


def _table(title: str, unit: str, rows: Mapping[str, Sequence[int]]) -> list[str]:
    lines = [f"{title:<28}{'mean':>8}{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}  {unit}"]
    for name, values in rows.items():
        points = np.percentile(values, [50, 90, 99, 100], method="higher")
        cells = "".join(f"{int(x):>8}" for x in points)
        lines.append(f"  {name:<26}{np.mean(values):>8.1f}{cells}")
    return lines


def _text_lengths(pairs: Sequence[Pair]) -> list[str]:
    parts = {
        "prompt": ["\n\n".join(text for _, text in pair.prompt) for pair in pairs],
        "response": [text for pair in pairs for text in pair.responses],
    }
    words = {name: [len(text.split()) for text in texts] for name, texts in parts.items()}
    characters = {name: [len(text) for text in texts] for name, texts in parts.items()}
    return [*_table("length", "words", words), *_table("", "characters", characters)]


def _texts(pairs: Sequence[Pair], titles: Sequence[str]) -> list[str]:
    lines = []
    for pair, title in zip(pairs, titles, strict=False):
        lines.append(title)
        lines += [f"  {role}: {printable(text, 2 * WIDTH)}" for role, text in pair.prompt]
        for number, text in enumerate(pair.responses):
            lines.append(f"  response {number}: {printable(text, 2 * WIDTH)}")
    return lines


def _tokens(
    pairs: Sequence[Pair],
    titles: Sequence[str],
    tokenization: Tokenization,
    show: int,
) -> list[str]:
    """Lengths in tokens, faults of special tokens, and the first pairs token by token."""
    tokenizer, before = tokenization.tokenizer, Counter(tokenization.counts)
    documents = tokenization.documents(pairs)
    cut = tokenization.counts - before
    triples = zip(pairs, titles, documents, strict=True)
    kept = [(pair, title, doc) for pair, title, doc in triples if doc is not None]
    if not kept:
        return [f"no pair is left after tokenising{_reasons(cut)}"]
    lengths: dict[str, list[int]] = {"prompt": [], "response": [], "prompt and response": []}
    templates: dict[tuple[str, ...], list[int]] = {}
    faults: Counter[str] = Counter()
    first: dict[str, str] = {}
    for pair, _, document in kept:
        lengths["prompt"].append(len(document.prefix))
        for ids in document.suffixes:
            lengths["response"].append(len(ids))
            lengths["prompt and response"].append(len(document.prefix) + len(ids))
        roles = tuple(role for role, _ in pair.prompt)
        if roles not in templates:
            templates[roles] = tokenization.template_ids(pair.prompt)
        bos, eos = tokenization.bos, tokenization.eos
        for fault in special_faults(document, templates[roles], bos, eos):
            faults[fault] += 1
            first.setdefault(fault, pair.source)
    lines = _table("length", f"tokens, at most {tokenization.max_length}", lengths)
    lines += [f"  {count} {what}" for what, count in cut.items()]
    for fault, count in faults.items():
        lines.append(f"  warning: {fault}: {count} pairs, first {first[fault]}")
    template = repr(tokenization.template)
    if tokenization.chat:
        dated = f", with its date fixed to {TEMPLATE_DATE}" if tokenization.dated else ""
        template = f"the tokenizer's chat template{dated}"
    null = " ".join(_names(tokenizer, tokenization.null_ids))
    lines += ["", f"template: {template}", f"unconditional context: {null}"]
    for _, title, document in kept[:show]:
        lines += ["", title, *_row("prompt", 0, document.prefix, tokenizer)]
        for number, ids in enumerate(document.suffixes):
            end = "ends with EOS" if ids[-1] == tokenization.eos else "cut, no EOS"
            lines += _row(f"response {number}, {end}", 1, ids, tokenizer)
    return lines


def _names(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    return [printable(str(name)) for name in tokenizer.convert_ids_to_tokens(list(ids))]


def _row(
    title: str, mask: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Token names with their response mask; the middle of a long row is left out."""
    words = [name.replace(" ", "\\x20") for name in _names(tokenizer, ids)]
    if len(words) > 120:
        words = [*words[:70], f"...({len(words) - 110}_more)...", *words[-40:]]
    rows = [""]
    for word in words:
        if rows[-1] and len(rows[-1]) + 1 + len(word) > WIDTH:
            rows.append("")
        rows[-1] += f" {word}" if rows[-1] else word
    return [f"  {title}: {len(ids)} tokens", *(f"    mask {mask} | {row}" for row in rows)]
