"""Prompts and answer words of the data sets the papers use.

Sources: MeZO (Malladi et al. 2023, arXiv 2305.17333, appendix E and the official templates) for
SST-2, RTE, BoolQ and WiC in a causal model and SST-2 and RTE in a masked one; PET (Schick and
Schuetze 2021, arXiv 2001.07676 and 2009.07118) for what MeZO has no prompt for: AG News in both,
BoolQ and WiC in a masked model. Instruction data takes Alpaca's prompt (Taori et al. 2023), which
FedMeZO's framework uses for all of it.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]
MASK = "<mask>"


class RowError(ValueError):
    """A row that does not fit its template: a missing column, an unknown label, an empty answer."""


def _same(record: Record) -> Record:
    return record


@dataclass(frozen=True)
class Classification:
    """Labels as words after a prompt.

    Attributes:
        name: of the task.
        prompt: what a causal model reads, columns in braces; the answer word follows at once.
        words: answer of each label in a causal model, with its leading space where it has one.
        masked: what a masked model reads, with ``<mask>`` where the answer word goes.
        masked_words: answer words there (single tokens).
        labels: for each label the values that stand for it in a file, in lower case.
        label_column: column of the label.
        columns: names of the columns of a file without header.
        prepare: turns a record into one with the prompt's columns.
    """

    name: str
    prompt: str
    words: tuple[str, ...]
    labels: tuple[tuple[str, ...], ...]
    masked: str | None = None
    masked_words: tuple[str, ...] = ()
    label_column: str = "label"
    columns: tuple[str, ...] = ()
    prepare: Callable[[Record], Record] = _same

    @property
    def names(self) -> tuple[str, ...]:
        """The first value of each label."""
        return tuple(values[0] for values in self.labels)

    def render(self, record: Record, *, masked: bool = False) -> str:
        """The prompt of a record.

        Raises:
            RowError: a column is missing.
        """
        if masked and self.masked is None:
            raise RowError(f"task {self.name} has no prompt for masked language models")
        return _filled((self.masked or "") if masked else self.prompt, self.prepare(record))

    def label(self, record: Record) -> int:
        """Index of the record's label.

        Raises:
            RowError: no label column, or a value that stands for no label.
        """
        value = str(_cell(self.prepare(record), self.label_column)).strip().lower()
        for index, values in enumerate(self.labels):
            if value in values:
                return index
        known = ", ".join("/".join(values) for values in self.labels)
        raise RowError(f"unknown label {value!r}; task {self.name} knows {known}")


@dataclass(frozen=True)
class Instruction:
    """A prompt and its answer; the loss is taken on the answer alone.

    Attributes:
        name: of the task.
        prompt: columns in braces.
        prompt_with_input: the prompt of records whose ``input`` is not empty.
        columns: of each column in the prompts the names it has in files, the first that is there
            counts; ``output`` is the answer.
        optional: columns that may be missing or empty.
        natural: column whose value is the natural id, None when there is none.
    """

    name: str
    prompt: str
    prompt_with_input: str | None = None
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: tuple[str, ...] = ("input",)
    natural: str | None = None

    def render(self, record: Record) -> tuple[str, str]:
        """Prompt and answer of a record.

        Raises:
            RowError: a column is missing or the answer is empty.
        """
        if "prompt" in record and not any(n in record for n in self.columns["instruction"]):
            prompt = str(record["prompt"])  # already a whole prompt
        else:
            values = {name: self._value(record, name) for name in self.columns}
            with_input = self.prompt_with_input is not None and values.get("input")
            prompt = _filled(str(self.prompt_with_input) if with_input else self.prompt, values)
        answer = self._value(record, "output")
        if not answer.strip():
            raise RowError("the answer is empty")
        return prompt, answer

    def _value(self, record: Record, name: str) -> str:
        for column in self.columns[name]:
            if record.get(column) is not None:
                return str(record[column])
        if name in self.optional:
            return ""
        raise RowError(
            f"no column {' or '.join(map(repr, self.columns[name]))}; the columns are "
            f"{', '.join(record) or 'none'}"
        )


@dataclass(frozen=True)
class Text:
    """Plain text for next-token prediction, one record a document."""

    name: str = "text"
    column: str = "text"


Template = Classification | Instruction | Text


def _cell(record: Record, name: str) -> Any:
    if record.get(name) is None:
        raise RowError(f"no column {name!r}; the columns are {', '.join(record) or 'none'}")
    return record[name]


def _filled(template: str, record: Record) -> str:
    names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    return template.format(**{name: str(_cell(record, name)).strip() for name in names})


def _question(record: Record) -> Record:
    question = str(_cell(record, "question")).strip()
    question = question[:1].upper() + question[1:].removesuffix("?")
    return {**record, "question": question}


_WIC = re.compile(
    r"Word: (?P<word>.+?)\. Sentence 1: (?P<sentence1>.+?) Sentence 2: (?P<sentence2>.+)", re.DOTALL
)


def _word_in_context(record: Record) -> Record:
    if "word" in record or "text" not in record:
        return record
    found = _WIC.fullmatch(str(record["text"]).strip())
    if found is None:
        raise RowError(
            "text must read 'Word: W. Sentence 1: S1 Sentence 2: S2'; got "
            f"{str(record['text'])[:60]!r}"
        )
    return {**record, **found.groupdict()}


def _hypothesis(record: Record) -> Record:
    renamed = dict(record)
    for ours, theirs in (("sentence1", "premise"), ("sentence2", "hypothesis")):
        if ours not in renamed and theirs in renamed:
            renamed[ours] = renamed[theirs]
    return renamed


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def _instruction(name: str, natural: str | None = None) -> Instruction:
    columns = {
        "instruction": ("instruction", "question"),
        "input": ("input", "context"),
        "output": ("output", "response", "answer"),
    }
    return Instruction(name, _ALPACA, _ALPACA_INPUT, columns, natural=natural)


TEMPLATES: dict[str, Template] = {
    t.name: t
    for t in (
        Classification(
            "sst2",
            "{sentence} It was",
            (" terrible", " great"),
            (("0", "negative"), ("1", "positive")),
            "{sentence} It was <mask>.",
            ("terrible", "great"),
            columns=("sentence", "label"),
        ),
        # Not of a paper: what SmolLM2-135M answers best (zokernels/finetune/presets.py).
        Classification(
            "reviews",
            "Review: {sentence}\nSentiment:",
            (" negative", " positive"),
            (("0", "negative"), ("1", "positive")),
            columns=("sentence", "label"),
        ),
        Classification(
            "rte",
            '{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n',
            ("Yes", "No"),
            (("0", "entailment"), ("1", "not_entailment")),
            "{sentence1}? <mask>, {sentence2}",
            ("Yes", "No"),
            columns=("index", "sentence1", "sentence2", "label"),
            prepare=_hypothesis,
        ),
        Classification(
            "wic",
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
            "{sentence1}\n{sentence2}\n",
            ("No", "Yes"),
            (("0", "false"), ("1", "true")),
            '"{sentence1}" / "{sentence2}" Similar sense of "{word}"? <mask>.',
            ("No", "Yes"),
            prepare=_word_in_context,
        ),
        Classification(
            "boolq",
            "{passage} {question}?",
            (" No", " Yes"),
            (("false", "0", "no"), ("true", "1", "yes")),
            "{passage}. Question: {question}? Answer: <mask>.",
            ("No", "Yes"),
            label_column="answer",
            prepare=_question,
        ),
        Classification(
            "agnews",
            "{text} This is about",
            (" World", " Sports", " Business", " Technology"),
            (
                ("world", "0"),
                ("sports", "1"),
                ("business", "2"),
                ("sci/tech", "3", "sci_tech", "technology"),
            ),
            "<mask> News: {text}",
            ("World", "Sports", "Business", "Technology"),
            columns=("text", "label"),
        ),
        _instruction("alpaca"),
        _instruction("codealpaca"),
        _instruction("dolly", natural="category"),
        _instruction("gsm8k"),
        Text(),
    )
}


def custom(
    *,
    prompt: str,
    words: Mapping[str, str],
    label_column: str,
    masked: bool = False,
) -> Classification:
    """A classification task of one's own: label value -> answer word.

    Raises:
        ValueError: fewer than two words, or a prompt that is no template.
    """
    if len(words) < 2:
        raise ValueError(f"words must name two labels or more; got {dict(words)}")
    try:
        columns = [name for _, name, _, _ in string.Formatter().parse(prompt) if name]
    except ValueError as error:
        raise ValueError(f"prompt {prompt!r} is no template: {error}") from error
    if not columns:
        raise ValueError(f"prompt must name a column in braces, such as {{text}}; got {prompt!r}")
    if masked and MASK not in prompt:
        raise ValueError(f"the prompt of a masked language model must hold {MASK}; got {prompt!r}")
    return Classification(
        "custom",
        prompt,
        tuple(words.values()),
        tuple((str(value).lower(),) for value in words),
        prompt if masked else None,
        tuple(word.strip() for word in words.values()) if masked else (),
        label_column=label_column,
    )
