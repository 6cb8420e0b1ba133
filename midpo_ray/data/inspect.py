"""The text of ``midpo inspect``: what is in a set, and how it becomes tokens, before anything is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from .read import ReadReport
from .schema import Pair
from .tokens import Tokenization
from .views import Choice, select

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WIDTH = 110
LABEL_VIEWS = ("safety", "helpfulness", "labels", "pareto_labels")
_NAMES = {"labels": "router (rule labels)", "pareto_labels": "router (rule pareto_labels)"}


def describe(
    pairs: Sequence[Pair],
    report: ReadReport,
    *,
    stage: str | None = None,
    tokenization: Tokenization | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    show: int = 2,
) -> str:
    """Counts, dropped rows by reason, label balance, lengths, and ``show`` pairs token by token with the response mask.

    Args:
        stage: safety, helpfulness, or one of the router's label rules: its pairs alone are measured and shown; else all pairs.
        tokenization: how texts become tokens; without it lengths are in words and characters.
        tokenizer: prints the tokens' names; default the tokenization's own.
    """
    views = _views(stage)
    chosen = {view: select(pairs, view) for view in views}
    lines = [*_read(pairs, report), "", *_labels(pairs), "", "pairs of each stage"]
    for view, (choices, dropped) in chosen.items():
        lines.append(f"  {_NAMES.get(view, view):<28}{len(choices):>7}{_reasons(dropped)}")
        if choices:
            lines.append(f"  {'':<28}{_balance(pairs, choices)}")
    if stage in ("router", "pareto", "ranked"):
        lines.append(
            "  The rules pareto and ranked read scores, which a run makes: they are not counted here."
        )
    sided = (
        stage in LABEL_VIEWS
    )  # else no response is the chosen one yet, and all pairs are measured
    choices = chosen[views[0]][0] if sided else [(i, 0) for i in range(len(pairs))]
    if not choices:
        return "\n".join([*lines, "", "no pair to measure or show"])
    if tokenization is None:
        return "\n".join(
            [*lines, "", *_text_lengths(pairs, choices), "", *_texts(pairs, choices[:show], sided)]
        )
    return "\n".join(
        [
            *lines,
            "",
            *_tokens(
                pairs, choices, tokenization, tokenizer or tokenization.tokenizer, show, sided
            ),
        ]
    )


def special_faults(
    prefix: Sequence[int],
    responses: Sequence[Sequence[int]],
    template: Sequence[int],
    bos: int | None,
    eos: int,
) -> list[str]:
    """Faults of BOS and EOS in one document, as texts.

    Args:
        template: the prompt's turns with nothing said in them; special tokens that are there are the template's own.
    """
    faults = []
    if bos is not None and list(prefix[:2]) == [bos, bos]:
        faults.append("BOS stands twice at the beginning")
    if bos is not None and prefix.count(bos) > max(template.count(bos), 1):
        faults.append("BOS inside the prompt, not from the template")
    if prefix.count(eos) > template.count(eos):
        faults.append("EOS inside the prompt, not from the template")
    for number, ids in enumerate(responses):
        if eos in ids[:-1]:
            faults.append(f"EOS inside response {number}")
        if bos is not None and bos != eos and bos in ids:
            faults.append(f"BOS inside response {number}")
    return faults


def _views(stage: str | None) -> tuple[str, ...]:
    if stage is None:
        return LABEL_VIEWS
    return (stage,) if stage in LABEL_VIEWS else LABEL_VIEWS[2:]


def _read(pairs: Sequence[Pair], report: ReadReport) -> list[str]:
    lines = ["rows"]
    for (path, rows), (_, kept) in zip(report.rows, report.kept, strict=True):
        lines.append(f"  {path}: {rows} rows, {kept} taken")
    lines.append(f"  {len(pairs)} pairs, {len({pair.prompt for pair in pairs})} prompts")
    lines += [f"  dropped: {count} {reason}" for reason, count in report.dropped.most_common()]
    lines += [f"  conflict: {text}" for text in report.conflicts[:5]]
    if len(report.conflicts) > 5:
        lines.append(f"  ... and {len(report.conflicts) - 5} conflicts more")
    return lines + [f"  note: {text}" for text in report.notes]


def _labels(pairs: Sequence[Pair]) -> list[str]:
    def of(values: Iterable[object]) -> str:
        counts = Counter(values)
        return ", ".join(f"{value} {counts[value]}" for value in sorted(counts, key=str))

    safety = Counter(
        "unknown"
        if None in p.safe
        else ("none safe", "one safe", "both safe")[sum(map(bool, p.safe))]
        for p in pairs
    )
    agree = Counter(
        "same" if p.better == p.safer else "differ"
        for p in pairs
        if None not in (p.better, p.safer)
    )
    wrong = sum(
        p.safer is not None and p.safe[p.safer] is False and p.safe[1 - p.safer] is True
        for p in pairs
    )
    lines = [
        "labels",
        f"  better_response_id: {of('null' if p.better is None else p.better for p in pairs)}",
        f"  safer_response_id: {of('null' if p.safer is None else p.safer for p in pairs)}",
        f"  safe flags: {', '.join(f'{name} {count}' for name, count in sorted(safety.items()))}",
    ]
    if agree:
        lines.append(
            f"  better and safer: {', '.join(f'{name} {count}' for name, count in sorted(agree.items()))}"
        )
    if wrong:
        lines.append(
            f"  warning: in {wrong} pairs safer_response_id is the unsafe response beside a safe one"
        )
    return lines


def _balance(pairs: Sequence[Pair], choices: Sequence[Choice]) -> str:
    first = sum(side == 0 for _, side in choices) / len(choices)
    longer = [
        len(pairs[i].responses[side]) - len(pairs[i].responses[1 - side]) for i, side in choices
    ]
    return f"chosen is response 0 in {first:.2f}, the longer text in {sum(d > 0 for d in longer) / len(choices):.2f}"


def _reasons(dropped: Mapping[str, int]) -> str:
    return (
        f"   left out: {', '.join(f'{n} {reason}' for reason, n in dropped.items())}"
        if dropped
        else ""
    )


def _table(title: str, unit: str, rows: Mapping[str, Sequence[int]]) -> list[str]:
    lines = [f"{title:<28}{'mean':>8}{'p50':>8}{'p90':>8}{'p99':>8}{'max':>8}  {unit}"]
    for name, values in rows.items():
        ordered = sorted(values)
        points = [
            ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99)
        ]
        figures = "".join(f"{x:>8}" for x in (*points, ordered[-1]))
        lines.append(f"  {name:<26}{sum(ordered) / len(ordered):>8.1f}{figures}")
    return lines


def _text_lengths(pairs: Sequence[Pair], choices: Sequence[Choice]) -> list[str]:
    prompts = ["\n\n".join(text for _, text in pairs[i].prompt) for i, _ in choices]
    responses = [text for i, _ in choices for text in pairs[i].responses]
    parts = {"prompt": prompts, "response": responses}
    words = {name: [len(text.split()) for text in texts] for name, texts in parts.items()}
    characters = {name: [len(text) for text in texts] for name, texts in parts.items()}
    return [*_table("length", "words", words), *_table("", "characters", characters)]


def _texts(pairs: Sequence[Pair], choices: Sequence[Choice], sided: bool) -> list[str]:
    lines = []
    for i, side in choices:
        lines.append(_title(pairs[i], side, sided))
        lines += [f"  {role}: {_clip(text)}" for role, text in pairs[i].prompt]
        lines += [f"  response {k}: {_clip(text)}" for k, text in enumerate(pairs[i].responses)]
    return lines


def _clip(text: str) -> str:
    plain = _printable(" ".join(text.split()))
    return plain if len(plain) <= 2 * WIDTH else plain[: 2 * WIDTH - 3] + "..."


def _printable(text: str) -> str:
    """Control characters as escapes, so that data cannot move a terminal's cursor or colour it."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _title(pair: Pair, side: int, sided: bool) -> str:
    return f"pair {pair.source}" + (f": chosen is response {side}" if sided else "")


def _tokens(
    pairs: Sequence[Pair],
    choices: Sequence[Choice],
    tokenization: Tokenization,
    tokenizer: PreTrainedTokenizerBase,
    show: int,
    sided: bool,
) -> list[str]:
    """Lengths in tokens, faults of special tokens, and the first pairs token by token."""
    before = Counter(tokenization.counts)
    documents = tokenization.documents([pairs[i] for i, _ in choices])
    cut = tokenization.counts - before
    kept = [
        (pairs[i], side, doc)
        for (i, side), doc in zip(choices, documents, strict=True)
        if doc is not None
    ]
    if not kept:
        return [f"no pair is left after tokenising{_reasons(cut)}"]
    lengths = {
        "prompt": [len(prefix) for _, _, (prefix, _) in kept],
        "response": [len(ids) for _, _, (_, suffixes) in kept for ids in suffixes],
        "prompt and response": [
            len(prefix) + len(ids) for _, _, (prefix, suffixes) in kept for ids in suffixes
        ],
    }
    lines = _table("length", f"tokens, at most {tokenization.max_length}", lengths)
    lines += [f"  {count} {what}" for what, count in cut.items()]
    templates: dict[tuple[str, ...], list[int]] = {}
    faults: Counter[str] = Counter()
    first: dict[str, str] = {}
    for pair, _, (prefix, suffixes) in kept:
        roles = tuple(role for role, _ in pair.prompt)
        if roles not in templates:
            templates[roles] = tokenization.template_ids(pair.prompt)
        for fault in special_faults(
            prefix, suffixes, templates[roles], tokenization.bos, tokenization.eos
        ):
            faults[fault] += 1
            first.setdefault(fault, pair.source)
    lines += [
        f"  warning: {fault}: {count} pairs, first {first[fault]}"
        for fault, count in faults.items()
    ]
    template = "the tokenizer's chat template" if tokenization.chat else repr(tokenization.template)
    lines += [
        "",
        f"template: {template}",
        f"unconditional context: {_named(tokenizer, tokenization.null_ids)}",
    ]
    for pair, side, (prefix, suffixes) in kept[:show]:
        lines += ["", _title(pair, side, sided)]
        lines += _row("prompt", 0, prefix, tokenizer)
        for number, ids in enumerate(suffixes):
            end = "ends with EOS" if ids[-1] == tokenization.eos else "cut, no EOS"
            lines += _row(f"response {number}, {end}", 1, ids, tokenizer)
    return lines


def _row(
    title: str, mask: int, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Tokens set apart by spaces, each line headed by its response mask; the middle of a long row is left out."""
    names = tokenizer.convert_ids_to_tokens(list(ids))
    words = [_printable(str(name)).replace(" ", "\\x20") for name in names]
    if len(words) > 120:
        words = [*words[:70], f"...({len(words) - 110}_more)...", *words[-40:]]
    lines, line = [f"  {title}: {len(ids)} tokens"], ""
    for word in words:
        if line and len(line) + 1 + len(word) > WIDTH:
            lines.append(f"    mask {mask} | {line}")
            line = ""
        line = f"{line} {word}" if line else word
    return [*lines, f"    mask {mask} | {line}"]


def _named(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return " ".join(_printable(str(name)) for name in tokenizer.convert_ids_to_tokens(list(ids)))
