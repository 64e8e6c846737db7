"""Reading, prompts, encoding, losses and accuracy; everything is written by the tests."""

from __future__ import annotations

import json
import math

import pytest
import tiny_lm
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

import zokernels as zo
from fedzo.data import TEMPLATES, Classification, custom, load_task
from fedzo.data.tasks import fingerprint
from fedzo.task import Task
from zokernels.finetune.config import UserError

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] it was . ? , bad film good a very terrible great no yes"


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    folder = tiny_lm.save(tmp_path_factory.mktemp("causal"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def words():
    vocabulary = {word: i for i, word in enumerate(WORDS.split())}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def masked_model(kind: str = "bert"):
    sizes = {
        "vocab_size": len(WORDS.split()),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**sizes)).eval()
    return RobertaForMaskedLM(RobertaConfig(**sizes)).eval()


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        comma = "," if path.suffix == ".csv" else "\t"
        lines = [list(rows[0]), *([str(v) for v in row.values()] for row in rows)]
        path.write_text("".join(comma.join(line) + "\n" for line in lines))
    return str(path)


REVIEWS = [
    {"sentence": ("a good film " if i % 2 else "a very bad film ") * (1 + i % 3), "label": i % 2}
    for i in range(24)
]


# --- prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "record", "causal_prompt", "masked_prompt", "word", "masked_word"),
    [
        (
            "sst2",
            {"sentence": "fun all along ", "label": "1"},
            "fun all along It was",
            "fun all along It was <mask>.",
            " great",
            "great",
        ),
        (
            "rte",
            {"sentence1": "A cat sat", "sentence2": "An animal sat", "label": "not_entailment"},
            'A cat sat\nDoes this mean that "An animal sat" is true? Yes or No?\n',
            "A cat sat? <mask>, An animal sat",
            "No",
            "No",
        ),
        (
            "rte",
            {"premise": "P", "hypothesis": "H", "label": 0},
            'P\nDoes this mean that "H" is true? Yes or No?\n',
            "P? <mask>, H",
            "Yes",
            "Yes",
        ),
        (
            "wic",
            {"text": "Word: bank. Sentence 1: A river bank . Sentence 2: A bank job .", "label": 0},
            'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
            "A river bank .\nA bank job .\n",
            '"A river bank ." / "A bank job ." Similar sense of "bank"? <mask>.',
            "No",
            "No",
        ),
        (
            "boolq",
            {"passage": "Ice melts.", "question": "does ice melt", "answer": True},
            "Ice melts. Does ice melt?",
            "Ice melts.. Question: Does ice melt? Answer: <mask>.",
            " Yes",
            "Yes",
        ),
        (
            "agnews",
            {"text": "Shares fell.", "label": "Business"},
            "Shares fell. This is about",
            "<mask> News: Shares fell.",
            " Business",
            "Business",
        ),
    ],
)
def test_prompts_and_answer_words(task, record, causal_prompt, masked_prompt, word, masked_word):
    template = TEMPLATES[task]
    assert isinstance(template, Classification)
    assert template.render(record) == causal_prompt
    assert template.render(record, masked=True) == masked_prompt
    assert template.words[template.label(record)] == word
    assert template.masked_words[template.label(record)] == masked_word


@pytest.mark.parametrize("task", ["alpaca", "codealpaca", "dolly", "gsm8k"])
@pytest.mark.parametrize(
    ("record", "has_input"),
    [
        ({"instruction": "Add.", "input": "1 2", "output": "3"}, True),
        ({"instruction": "Add.", "input": "", "response": "3"}, False),
        ({"instruction": "Add.", "context": "1 2", "response": "3"}, True),
        ({"question": "Add.", "answer": "3"}, False),
    ],
)
def test_instructions_take_the_columns_their_files_have(task, record, has_input):
    prompt, answer = TEMPLATES[task].render(record)
    assert answer == "3" and "### Instruction:\nAdd." in prompt
    assert prompt.endswith("### Response:") and ("### Input:\n1 2" in prompt) is has_input


def test_a_whole_prompt_in_the_data_stays_as_it_is():
    assert TEMPLATES["dolly"].render({"prompt": "Say A:", "response": "A"}) == ("Say A:", "A")


# --- tasks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
def test_a_causal_task_from_every_kind_of_file(causal, tmp_path, suffix):
    model, tokenizer = causal
    path = write(tmp_path / f"reviews.{suffix}", REVIEWS)
    task = load_task(model, tokenizer, path, template="sst2", eval_fraction=0.25)
    assert isinstance(task, Task)
    assert task.train_size == 18 and len(task.labels) == 18 and task.natural_ids is None
    texts = {tokenizer.decode(e.tokens) for e in task.prepared.train + task.prepared.held_out}
    assert texts == {record["sentence"].strip() + " It was" for record in REVIEWS}
    scores = task.evaluate(model)
    assert scores["examples"] == 6 and 0 <= scores["accuracy"] <= 1


def test_candidate_loss_and_accuracy_are_those_of_whole_strings(causal, tmp_path):
    """Each candidate's log-likelihood, from a plain forward of prompt and word, one at a time."""
    model, tokenizer = causal
    template = custom(
        prompt="{sentence} is", words={"0": " bad", "1": " goodness"}, label_column="label"
    )
    path = write(tmp_path / "reviews.csv", REVIEWS)
    task = load_task(
        model, tokenizer, path, template=template, eval_data=path, objective="candidates"
    )
    rows = []
    with torch.no_grad():
        for record in REVIEWS:
            prompt = tokenizer(f"{record['sentence'].strip()} is").input_ids
            scores = []
            for word in template.words:
                tail = tokenizer(word, add_special_tokens=False).input_ids
                logp = model(torch.tensor([prompt + tail])).logits[0].log_softmax(-1)
                places = range(len(prompt) - 1, len(prompt) + len(tail) - 1)
                scores.append(sum(float(logp[i, t]) for i, t in zip(places, tail, strict=True)))
            rows.append(scores)
    scores, labels = torch.tensor(rows), torch.tensor([r["label"] for r in REVIEWS])
    batch = task.batch(range(len(REVIEWS)))
    expected = F.cross_entropy(scores, labels)
    torch.testing.assert_close(task.loss(model, batch), expected, rtol=1e-4, atol=1e-5)
    held_out = task.evaluate(model)
    assert held_out["loss"] == pytest.approx(float(expected), rel=1e-4)
    assert held_out["accuracy"] == pytest.approx(float((scores.argmax(1) == labels).float().mean()))


def test_instruction_loss_is_taken_on_the_answer_alone(causal, tmp_path):
    model, tokenizer = causal
    rows = [{"instruction": f"Add {i}", "output": str(i)} for i in range(8)]
    path = write(tmp_path / "alpaca.json", rows)
    task = load_task(model, tokenizer, path, template="alpaca", eval_data=path, max_length=256)
    assert task.labels is None
    labels = task.batch([3])["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == " 3<end>"
    losses = []
    with torch.no_grad():
        for example in task.prepared.held_out:
            tokens = torch.tensor([example.tokens])
            per_token = F.cross_entropy(
                model(tokens).logits[0, example.start - 1 : -1],
                tokens[0, example.start :],
                reduction="none",
            )
            losses += per_token.tolist()
    held_out = task.evaluate(model)
    assert held_out["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert held_out["perplexity"] == pytest.approx(math.exp(held_out["loss"]))


def test_the_loss_has_gradients_where_they_are_enabled(causal, tmp_path):
    model, tokenizer = causal
    rows = [{"instruction": f"Add {i}", "output": str(i)} for i in range(8)]
    path = write(tmp_path / "alpaca.json", rows)
    task = load_task(model, tokenizer, path, template="alpaca", eval_data=path, max_length=64)
    batch, weight = task.batch([1, 2]), model.model.layers[0].mlp.up_proj.weight
    loss = task.loss(model, batch)
    with torch.no_grad():
        torch.testing.assert_close(task.loss(model, batch), loss.detach())
    (gradient,) = torch.autograd.grad(loss, [weight])
    step = 1e-3 / gradient.norm()
    shifts = {}
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * gradient
            shifts[sign] = task.loss(model, batch)
            weight -= sign * step * gradient
    slope = float((shifts[1] - shifts[-1]) / (2 * step))
    assert slope == pytest.approx(float(gradient.square().sum()), rel=0.05)


def test_a_long_instruction_keeps_its_answer_and_the_prompts_end(causal, tmp_path):
    model, tokenizer = causal
    rows = [{"instruction": "x" * 300, "output": "y" * 300}, {"instruction": "a", "output": "b"}]
    path = write(tmp_path / "long.json", rows)
    task = load_task(model, tokenizer, path, template="alpaca", eval_data=path, max_length=64)
    example = task.prepared.train[0]
    text = tokenizer.decode(example.tokens)
    assert example.cut and len(example.tokens) == 64 and example.start == 32
    assert text.endswith("y" * 31) and "### Response: y" in text


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("objective", ["candidates", "label"])
def test_masked_loss_and_accuracy_are_those_of_the_whole_model(words, tmp_path, kind, objective):
    model = masked_model(kind)
    path = write(tmp_path / "reviews.jsonl", REVIEWS)
    task = load_task(
        model, words, path, template="sst2", eval_data=path, masked=True, objective=objective
    )
    assert isinstance(task, Task)
    assert task._head == {"bert": "cls", "roberta": "lm_head"}[kind]
    labels = torch.tensor([r["label"] for r in REVIEWS])
    two = torch.tensor([words.convert_tokens_to_ids(w) for w in ("terrible", "great")])
    rows = []
    with torch.no_grad():
        for record in REVIEWS:
            ids = words(f"{record['sentence'].strip()} it was [MASK].").input_ids
            rows.append(model(torch.tensor([ids])).logits[0, ids.index(words.mask_token_id)])
    logits = torch.stack(rows)
    batch = task.batch(range(len(REVIEWS)))
    expected = (
        F.cross_entropy(logits[:, two], labels)
        if objective == "candidates"
        else F.cross_entropy(logits, two[labels])
    )
    torch.testing.assert_close(task.loss(model, batch), expected, rtol=1e-4, atol=1e-5)
    held_out = task.evaluate(model)
    right = (logits[:, two].argmax(1) == labels).float().mean()
    assert held_out["accuracy"] == pytest.approx(float(right))
    assert held_out["loss"] == pytest.approx(float(expected), rel=1e-4)


def test_a_long_masked_prompt_keeps_its_mask(words, tmp_path):
    rows = [{"sentence": "good " * 90, "label": 1}, {"sentence": "bad", "label": 0}] * 2
    model, path = masked_model(), write(tmp_path / "long.jsonl", rows)
    for template in (
        "sst2",
        custom(
            prompt="<mask> film {sentence}",
            words={"0": "bad", "1": "good"},
            label_column="label",
            masked=True,
        ),
    ):
        task = load_task(
            model, words, path, template=template, eval_data=path, masked=True, max_length=20
        )
        for example in task.prepared.train:
            assert len(example.tokens) <= 20
            assert example.tokens[example.start] == words.mask_token_id
            assert example.tokens[0] == 2 and example.tokens[-1] == 3


@pytest.mark.parametrize("masked", [False, True])
def test_both_probes_in_one_pass_give_the_numbers_of_two(causal, words, tmp_path, masked):
    model, tokenizer = (masked_model(), words) if masked else causal
    path = write(tmp_path / "reviews.csv", REVIEWS)
    task = load_task(model, tokenizer, path, template="sst2", masked=masked)
    batch = task.batch([0, 5, 9])
    stacked = zo.dual_loss(model, batch, seed=3, eps=1e-2, loss_fn=task.loss)
    one_by_one = [
        zo.branches(model, [3], [[c]])(lambda: task.loss(model, batch))[0] for c in (1e-2, -1e-2)
    ]
    torch.testing.assert_close(torch.stack(list(stacked)), torch.stack(one_by_one))
    assert stacked[0] != stacked[1]


# --- sources --------------------------------------------------------------------------------------


def test_a_folder_gives_its_training_and_held_out_files(causal, tmp_path):
    model, tokenizer = causal
    write(tmp_path / "train.tsv", REVIEWS[:20])
    write(tmp_path / "test.tsv", REVIEWS[:1])
    write(tmp_path / "dev.tsv", REVIEWS[20:])
    task = load_task(model, tokenizer, str(tmp_path), template="sst2")
    assert task.train_size == 20 and len(task.prepared.held_out) == 4


def test_a_saved_dataset_is_read(causal, tmp_path):
    datasets = pytest.importorskip("datasets")
    model, tokenizer = causal
    datasets.Dataset.from_list(REVIEWS).save_to_disk(str(tmp_path / "saved"))
    task = load_task(model, tokenizer, str(tmp_path / "saved"), template="sst2")
    assert task.train_size + len(task.prepared.held_out) == len(REVIEWS)


def test_a_tsv_needs_no_header_and_quotes_are_text(causal, tmp_path):
    model, tokenizer = causal
    path = tmp_path / "news.tsv"
    path.write_text('He said "no\tWorld\nGoal" scored\tSports\nShares\tBusiness\n"x"\tSci/Tech\n')
    task = load_task(model, tokenizer, str(path), template="agnews", eval_data=str(path))
    assert task.labels == [0, 1, 2, 3]
    assert tokenizer.decode(task.prepared.train[0].tokens).startswith('He said "no This')


def test_a_tsv_is_split_at_tabs_and_line_ends_only(causal, tmp_path):
    model, tokenizer = causal
    odd = "one\u2028two\x85three\x0bfour " + "x" * 200_000
    path = tmp_path / "odd.tsv"
    path.write_bytes(f"sentence\tlabel\r\n{odd}\t1\r\nfine\t0\r\n".encode())
    task = load_task(model, tokenizer, str(path), template="sst2", eval_data=str(path))
    assert task.labels == [1, 0]


def test_names_of_files_in_a_folder_may_be_in_capitals(causal, tmp_path):
    model, tokenizer = causal
    write(tmp_path / "Train.csv", REVIEWS[:20])
    write(tmp_path / "Dev.csv", REVIEWS[20:])
    task = load_task(model, tokenizer, str(tmp_path), template="sst2")
    assert task.train_size == 20 and len(task.prepared.held_out) == 4


def test_natural_ids_come_from_the_column_that_is_named(causal, tmp_path):
    model, tokenizer = causal
    rows = [{**r, "author": f"a{i % 3}"} for i, r in enumerate(REVIEWS)]
    path = write(tmp_path / "reviews.csv", rows)
    task = load_task(
        model, tokenizer, path, template="sst2", eval_data=path, natural_column="author"
    )
    assert task.natural_ids == [f"a{i % 3}" for i in range(24)]
    dolly = [{"instruction": "i", "response": "r", "category": c} for c in "abab"]
    path = write(tmp_path / "dolly.jsonl", dolly)
    task = load_task(model, tokenizer, path, template="dolly", eval_data=path)
    assert task.natural_ids == list("abab")


def test_limits_choose_the_same_examples_every_time(causal, tmp_path):
    model, tokenizer = causal
    path = write(tmp_path / "reviews.csv", REVIEWS)

    def task():
        return load_task(
            model, tokenizer, path, template="sst2", eval_data=path, train_limit=10, eval_limit=7
        )

    first, second = task(), task()
    assert first.train_size == 10 and len(first.prepared.held_out) == 7
    assert first.prepared == second.prepared and fingerprint(first) == fingerprint(second)
    assert set(first.labels) == {0, 1}


@pytest.mark.parametrize(
    ("template", "text", "message"),
    [
        ("sst2", "sentence\tlabel\nfine\t1\nodd\t7\n", "row 2: unknown label '7'; .* 0/negative"),
        ("sst2", "sentence\tlabel\nfine\t1\nshort\n", "line 3 has 1 columns; expected 2"),
        ("sst2", "text\tlabel\nfine\t1\n", "row 1: no column 'sentence'"),
        ("sst2", "", "is empty"),
        ("sst2", "sentence\tlabel\n", "holds no example"),
        ("sst2", "a\tb\tc\n", "names none of the columns"),
        ("wic", "text\tlabel\nno pattern\t1\n", "row 1: text must read 'Word: W"),
        ("alpaca", "instruction\toutput\nAdd\t \n", "row 1: the answer is empty"),
        ("alpaca", "instruction\ttext\nAdd\tx\n", "no column 'output' or 'response' or 'answer'"),
        ("text", "text\tlabel\n \t1\n", "row 1: no text in column 'text'"),
    ],
)
def test_bad_rows_are_named(causal, tmp_path, template, text, message):
    model, tokenizer = causal
    path = tmp_path / "data.tsv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_task(model, tokenizer, str(path), template=template, eval_data=str(path))


def test_other_mistakes_are_named(causal, words, tmp_path):
    model, tokenizer = causal
    path = write(tmp_path / "reviews.csv", REVIEWS)

    def attempt(message, model=model, tokenizer=tokenizer, data=path, **options):
        with pytest.raises((UserError, ValueError), match=message):
            load_task(model, tokenizer, data, **{"template": "sst2", **options})

    attempt("--task must be one of .*sst2.*; got 'sst3'", template="sst3")
    attempt("no such file", data=str(tmp_path / "nothing.csv"))
    attempt("--eval-data: no such file", eval_data=str(tmp_path / "nothing.csv"))
    attempt("must hold one train file", data=str(write_two(tmp_path / "two")))
    attempt("no such column", natural_column="writer", eval_data=path)
    attempt("too few to hold some out", data=write(tmp_path / "one.csv", REVIEWS[:1]))
    attempt("leaves no room beside the answer words", max_length=4)
    masked = {"model": masked_model(), "tokenizer": words, "masked": True}
    attempt("needs a causal language model", template="text", **masked)
    attempt(
        "must be one token",
        template=custom(
            prompt="{sentence} <mask>",
            words={"0": "very bad", "1": "good"},
            label_column="label",
            masked=True,
        ),
        **masked,
    )
    attempt(
        "have the same word",
        template=custom(
            prompt="{sentence}", words={"0": " bad", "1": " bad"}, label_column="label"
        ),
    )
    attempt("needs a mask token", masked=True)


def write_two(folder):
    folder.mkdir()
    for name in ("a.csv", "b.csv"):
        write(folder / name, REVIEWS)
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": "{x}", "words": {"0": "a"}}, "two labels or more"),
        ({"prompt": "x", "words": {"0": "a", "1": "b"}}, "must name a column"),
        ({"prompt": "{x", "words": {"0": "a", "1": "b"}}, "is no template"),
        ({"prompt": "{x}", "words": {"0": "a", "1": "b"}, "masked": True}, "must hold <mask>"),
    ],
)
def test_a_custom_task_is_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        custom(label_column="label", **arguments)
