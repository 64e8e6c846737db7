"""transformers' Trainer with zeroth-order steps: against loops written out, and every refusal."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_lm
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    Trainer,
    TrainingArguments,
)
from transformers.utils import logging

import zokernels as zo
from zokernels.integrations import transformers as integration
from zokernels.integrations.transformers import MeZOTrainer, MeZOTrainerMixin

Batch = dict[str, Tensor]
STEPS = 4


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.save(tmp_path_factory.mktemp("lm"))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


def words() -> Any:
    tokenizer = tiny_lm.tokenizer()
    tokenizer.pad_token = "<end>"
    return tokenizer


def texts(count: int = 24) -> list[dict[str, Any]]:
    """Of different lengths, so that batches have padding that does not count."""
    found = [words()(f"number {i} " + "x" * (5 * i % 17)) for i in range(count)]
    return [{k: row[k] for k in ("input_ids", "attention_mask")} for row in found]


def language_model(saved: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(saved)


def classifier(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=len(words()), **sizes, **heads, **changes)
    )


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    options: dict[str, Any] = {
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return TrainingArguments(str(folder), **(options | changes))


def trainer(
    model: Any, folder: Path, cls: type[Trainer] = MeZOTrainer, changes: Any = None, **more: Any
) -> Any:
    options: dict[str, Any] = {
        "train_dataset": texts(),
        "data_collator": DataCollatorForLanguageModeling(words(), mlm=False),
    }
    if cls is not Trainer and "optimizers" not in more:
        options["mezo"] = {"eps": 1e-2}
    return cls(model, arguments(folder, **(changes or {})), **(options | more))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    return all(torch.allclose(a[n], b[n], atol=tolerance, rtol=0) for n in a)


def batches(built: Any) -> list[Batch]:
    """What the trainer's loader gives in its first epoch."""
    torch.manual_seed(built.args.seed)
    return [dict(batch) for batch in built.get_train_dataloader()]


def by_hand(
    model: Any, parts: list[list[Batch]], lr: Callable[[int], float], **options: Any
) -> dict[str, Tensor]:
    """Steps over lists of micro-batches; every token counts the same."""
    opt = zo.MeZO(model, eps=1e-2, seed=3, **options)
    model.eval()
    for step, micro in enumerate(parts):
        opt.param_groups[0]["lr"] = lr(step)
        counts = [(part["labels"][:, 1:] != -100).sum() for part in micro]
        for part, count in zip(micro, counts, strict=True):
            share = count / torch.stack(counts).sum()
            opt.accumulate(part, lambda m, b, share=share: m(**b).loss * share)
        opt.step()
    return weights(model)


def linear(step: int) -> float:
    return 1e-2 * (STEPS - step) / STEPS


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_is_the_loop_written_out(saved: Path, tmp_path: Path, accumulation: int) -> None:
    changes = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 3}
    changes["max_steps"] = 4
    built = trainer(language_model(saved), tmp_path, changes=changes)
    given = batches(built)
    parts = [given[i : i + accumulation] for i in range(0, len(given), accumulation)][:STEPS]
    assert len(parts) == STEPS and len(parts[-1]) == accumulation
    built.train()
    assert not same(weights(built.model), weights(language_model(saved)))
    assert close(weights(built.model), by_hand(language_model(saved), parts, linear))


def test_accumulation_is_the_big_batch(saved: Path, tmp_path: Path) -> None:
    found = []
    for size, accumulation in ((4, 2), (8, 1)):
        changes = {
            "gradient_accumulation_steps": accumulation,
            "per_device_train_batch_size": size,
            "max_steps": 3,
        }
        built = trainer(language_model(saved), tmp_path, changes=changes)
        built.train()
        found.append(weights(built.model))
    assert close(*found)


def test_the_loss_without_logits_is_the_trainers_own(saved: Path, tmp_path: Path) -> None:
    class Own(MeZOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}
    histories, found = [], []
    for cls in (MeZOTrainer, Own):
        built = trainer(language_model(saved), tmp_path, cls, changes)
        built.train()
        found.append(weights(built.model))
        histories.append([entry["loss"] for entry in built.state.log_history if "loss" in entry])
    assert close(*found)
    assert histories[0] == pytest.approx(histories[1], rel=1e-5)


def test_a_micro_batch_in_which_nothing_counts(saved: Path, tmp_path: Path) -> None:
    class Blank(DataCollatorForLanguageModeling):
        def __call__(self, rows: Any, return_tensors: Any = None) -> Any:
            batch = super().__call__(rows, return_tensors)
            if len(batch["labels"]) == 1:
                batch["labels"][:] = -100
            return batch

    # Five rows at four a micro-batch: the second has one, which does not count.
    built = trainer(
        language_model(saved),
        tmp_path,
        changes={"gradient_accumulation_steps": 2, "max_steps": 2},
        train_dataset=texts(5),
        data_collator=Blank(words(), mlm=False),
    )
    built.train()
    assert built.optimizer.optimizer.skipped == 0
    assert not same(weights(built.model), weights(language_model(saved)))


@pytest.mark.parametrize("where", ["sequence classification", "label smoothing", "loss function"])
def test_other_losses(saved: Path, tmp_path: Path, where: str) -> None:
    changes: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 3}
    more: dict[str, Any] = {}
    if where == "sequence classification":
        model: Any = classifier()
        rows = [row | {"labels": i % 2} for i, row in enumerate(texts())]
        more = {"train_dataset": rows, "data_collator": DataCollatorWithPadding(words())}
    else:
        model = language_model(saved)
    if where == "label smoothing":
        changes["label_smoothing_factor"] = 0.2
    if where == "loss function":

        def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
            logits = outputs.logits[:, :-1].flatten(0, 1)
            total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
            return total / num_items_in_batch

        more["compute_loss_func"] = loss
    before = weights(model)
    built = trainer(model, tmp_path, changes=changes, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("error", zo.StackingWarning)
        built.train()
    assert not same(weights(model), before)
    # The same steps from the losses that Trainer itself computes.
    held = {n: t.clone() for n, t in weights(model).items()}
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(before[name])
    given = batches(built)
    opt = zo.MeZO(model, eps=1e-2, seed=3)
    model.eval()
    for step in range(3):
        micro = given[2 * step : 2 * step + 2]
        items = built._get_num_items_in_batch(micro, torch.device("cpu"))
        built.current_gradient_accumulation_steps = len(micro)
        opt.param_groups[0]["lr"] = 1e-2 * (3 - step) / 3
        for part in micro:
            parts = 2 if where != "loss function" and not built.model_accepts_loss_kwargs else 1
            opt.accumulate(
                closure=lambda part=part, items=items, parts=parts: (
                    built.compute_loss(model, dict(part), num_items_in_batch=items) / parts
                )
            )
        opt.step()
    assert close(weights(model), held)


def test_no_dropout_unless_asked(tmp_path: Path) -> None:
    found = {}
    for dropout in (False, True):
        model = classifier(hidden_dropout_prob=0.5)
        modes: set[bool] = set()
        model.register_forward_pre_hook(lambda module, _, modes=modes: modes.add(module.training))
        rows = [row | {"labels": i % 2} for i, row in enumerate(texts())]
        collator = DataCollatorWithPadding(words())
        built = trainer(
            model, tmp_path, train_dataset=rows, data_collator=collator, dropout=dropout
        )
        built.train()
        assert modes == {dropout}
        found[dropout] = [e["loss"] for e in built.state.log_history if "loss" in e]
    assert found[False] != found[True]


def test_what_is_logged(saved: Path, tmp_path: Path) -> None:
    built = trainer(language_model(saved), tmp_path, mezo={"eps": 1e-2, "num_directions": 2})
    built.train()
    entries = [entry for entry in built.state.log_history if "loss" in entry]
    assert len(entries) == STEPS
    assert all("grad_norm" not in entry for entry in entries)
    last = built.optimizer.optimizer.last
    assert entries[-1]["loss"] == pytest.approx(sum(last.losses) / 4, rel=1e-6)
    gradients = [abs(g) for g in last.projected_gradients[0]]
    assert entries[-1]["projected_gradient"] == pytest.approx(sum(gradients) / 2)
    plain = Trainer.floating_point_ops(built, {"input_ids": torch.zeros(2, 8)})
    assert built.floating_point_ops({"input_ids": torch.zeros(2, 8)}) == plain * 4 // 3


def test_steps_that_are_not_finite_are_counted(saved: Path, tmp_path: Path) -> None:
    class Breaks(MeZOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * float("nan")

    model = language_model(saved)
    built = trainer(model, tmp_path, Breaks)
    with pytest.warns(UserWarning, match="such steps are skipped"):
        built.train()
    assert same(weights(model), weights(language_model(saved)))
    entries = [entry for entry in built.state.log_history if "loss" in entry]
    assert [entry["skipped_steps"] for entry in entries] == list(range(1, STEPS + 1))


def test_weight_decay_goes_where_the_trainer_says(saved: Path, tmp_path: Path) -> None:
    built = trainer(language_model(saved), tmp_path, changes={"weight_decay": 0.1})
    optimizer = built.create_optimizer()
    named = dict(built.model.named_parameters())  # a tied head once
    decayed = set(built.get_decay_parameter_names(built.model)) & named.keys()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert set(optimizer.param_groups[0]["param_names"]) == decayed
    assert not decayed & set(optimizer.param_groups[1]["param_names"])
    assert any("norm" in name for name in optimizer.param_groups[1]["param_names"])


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_only_adapters_move(saved: Path, tmp_path: Path, decay: float) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(language_model(saved), config)
    before = weights(model)
    built = trainer(model, tmp_path, changes={"weight_decay": decay})
    built.train()
    moved = {n for n, t in weights(model).items() if not torch.equal(t, before[n])}
    assert moved == {n for n in before if "lora_" in n}
    built.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not list((tmp_path / "adapter").glob("model*.safetensors"))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_mask(saved: Path, tmp_path: Path, decay: float) -> None:
    model = language_model(saved).bfloat16()
    mask = zo.Mask.random(model, 0.01, seed=1)
    before = weights(model)
    changes = {"weight_decay": decay, "save_strategy": "steps", "save_steps": 2}
    built = trainer(model, tmp_path, changes=changes, mezo={"eps": 1e-2, "mask": mask})
    built.train()
    moved = sum(int((t != before[n]).sum()) for n, t in weights(model).items())
    assert 0 < moved <= mask.nnz
    # float32 values of masked elements are in the checkpoint.
    again = trainer(
        language_model(saved).bfloat16(),
        tmp_path,
        changes=changes,
        mezo={"eps": 1e-2, "mask": mask},
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(again.model), weights(model))


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.5}, {"fuse_update": True}, {"num_directions": 2, "estimator": "forward"}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resuming_is_bit_exact(
    saved: Path, tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    mezo = {"eps": 1e-2, **options}
    whole = trainer(language_model(saved).to(dtype), tmp_path, changes=changes, mezo=mezo)
    whole.train()
    again = trainer(language_model(saved).to(dtype), tmp_path, changes=changes, mezo=mezo)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(whole.model), weights(again.model))
    assert again.state.global_step == STEPS
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{STEPS}", dtype=dtype)
    assert same(weights(kept), weights(whole.model))


def test_resuming_keeps_the_options_of_the_checkpoint(saved: Path, tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2}
    trainer(language_model(saved), tmp_path, changes=changes).train()
    mezo = {"eps": 1.0, "num_directions": 3}
    again = trainer(language_model(saved), tmp_path, changes=changes, mezo=mezo)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    optimizer = again.optimizer.optimizer
    assert (optimizer.num_directions, optimizer.param_groups[0]["eps"]) == (1, 1e-2)


def test_a_journal_follows_the_checkpoint(saved: Path, tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 3}
    with zo.Trajectory.open(tmp_path / "run.zot") as journal:
        mezo = {"eps": 1e-2, "journal": journal}
        trainer(language_model(saved), tmp_path, changes=changes, mezo=mezo).train()
        assert journal.next_step == STEPS
    with zo.Trajectory.open(tmp_path / "run.zot") as journal:
        mezo = {"eps": 1e-2, "journal": journal}
        again = trainer(language_model(saved), tmp_path, changes=changes, mezo=mezo)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    fresh = language_model(saved)
    zo.Trajectory.load(tmp_path / "run.zot").replay_(fresh)
    assert same(weights(fresh), weights(again.model))


def test_evaluation_best_model_and_early_stopping(saved: Path, tmp_path: Path) -> None:
    built = trainer(
        language_model(saved),
        tmp_path,
        changes={
            "eval_strategy": "steps",
            "eval_steps": 2,
            "save_strategy": "steps",
            "save_steps": 2,
            "load_best_model_at_end": True,
            "learning_rate": 0.0,
            "max_steps": 12,
        },
        eval_dataset=texts(6),
        callbacks=[EarlyStoppingCallback(2, early_stopping_threshold=1e-3)],
    )
    before = weights(built.model)
    built.train()
    assert built.state.global_step == 6  # nothing changes at lr 0
    assert same(weights(built.model), before)
    evaluated = [entry["eval_loss"] for entry in built.state.log_history if "eval_loss" in entry]
    assert len(set(evaluated)) == 1 and len(evaluated) == 3


def test_an_optimizer_of_ones_own(saved: Path, tmp_path: Path) -> None:
    found = []
    for own in (True, False):
        model = language_model(saved)
        if own:
            opt = zo.MeZO(model, lr=1e-2, eps=1e-2, seed=3)
            built = trainer(model, tmp_path, optimizers=(opt, None))
        else:
            built = trainer(model, tmp_path)
        built.train()
        found.append(weights(model))
    assert same(*found)


def test_model_init_and_a_second_run(saved: Path, tmp_path: Path) -> None:
    built = trainer(None, tmp_path, model_init=lambda: language_model(saved))
    built.train()
    first = weights(built.model)
    built.train()
    assert same(weights(built.model), first)


def test_a_step_that_was_cut_off_leaves_nothing(saved: Path, tmp_path: Path) -> None:
    class Fails(MeZOTrainer):
        calls = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            Fails.calls += 1
            if Fails.calls == 2:
                raise RuntimeError("no memory, say")
            return super().training_step(*args, **kwargs)

    changes = {"gradient_accumulation_steps": 2, "max_steps": 2}
    built = trainer(language_model(saved), tmp_path, Fails, changes)
    with pytest.raises(RuntimeError, match="no memory"):
        built.train()
    built.train()
    other = trainer(language_model(saved), tmp_path, changes=changes)
    other.train()
    assert same(weights(built.model), weights(other.model))


def test_mixed_precision_and_checkpointing(saved: Path, tmp_path: Path) -> None:
    found = {}
    for name, changes in (
        ("plain", {}),
        ("bf16", {"bf16": True}),
        ("checkpointing", {"activation_checkpointing": True}),
    ):
        if not hasattr(TrainingArguments, "activation_checkpointing") and name == "checkpointing":
            changes = {"gradient_checkpointing": True}
        built = trainer(language_model(saved), tmp_path, changes=changes)
        with warnings.catch_warnings():
            warnings.simplefilter("error", zo.StackingWarning)
            built.train()
        assert built.accelerator.scaler is None
        found[name] = [entry["loss"] for entry in built.state.log_history if "loss" in entry]
    assert found["checkpointing"] == found["plain"]
    assert found["bf16"] != found["plain"]
    assert found["bf16"] == pytest.approx(found["plain"], rel=2e-2)


def test_the_context_of_the_loss_counts(saved: Path, tmp_path: Path) -> None:
    class Cast(MeZOTrainer):
        def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
            return torch.autocast("cpu", torch.bfloat16)

    class CastOwn(Cast):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    found = []
    for cls in (MeZOTrainer, Cast, CastOwn):
        built = trainer(language_model(saved), tmp_path, cls)
        built.train()
        found.append([entry["loss"] for entry in built.state.log_history if "loss" in entry])
    assert found[1] == found[2] != found[0]


def test_torch_compile(saved: Path, tmp_path: Path) -> None:
    found = []
    for changes in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        built = trainer(language_model(saved), tmp_path, changes=changes)
        built.train()
        found.append(weights(built.model))
    assert close(*found)


def test_float16_on_a_gpu_has_no_scaler_to_ask(saved: Path, tmp_path: Path) -> None:
    built = trainer(language_model(saved), tmp_path, changes={"fp16": True})
    built.accelerator.native_amp = True  # as on a GPU: gradients would be unscaled and clipped
    built.train()
    entries = [entry for entry in built.state.log_history if "loss" in entry]
    assert len(entries) == STEPS and all("grad_norm" not in entry for entry in entries)


def test_compute_loss_gets_a_copy_of_the_collators_type(saved: Path, tmp_path: Path) -> None:
    class Reads(MeZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            ids, labels = inputs.input_ids, inputs.pop("labels")
            return model(input_ids=ids, labels=labels, attention_mask=inputs.attention_mask).loss

    built = trainer(language_model(saved), tmp_path, Reads)
    built.train()
    assert built.state.global_step == STEPS


def test_cached_memory_is_given_back_as_asked(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(integration, "clear_device_cache", lambda: calls.append(1))
    changes = {"torch_empty_cache_steps": 2, "gradient_accumulation_steps": 2}
    trainer(language_model(saved), tmp_path, changes=changes).train()
    assert len(calls) == STEPS  # in two of four steps, once a micro-batch


def test_noise_that_training_mode_alone_has_is_told(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(integration.logger, "warning", told.append)
    for dropout in (False, True):
        changes = {"neftune_noise_alpha": 5.0}
        trainer(language_model(saved), tmp_path, changes=changes, dropout=dropout)
    assert [message.partition(" ")[0] for message in told] == ["neftune_noise_alpha"]


def test_a_checkpoint_without_the_optimizer_leaves_the_journal(saved: Path, tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    with zo.Trajectory.open(tmp_path / "run.zot") as journal:
        mezo = {"eps": 1e-2, "journal": journal}
        first = trainer(language_model(saved), tmp_path, changes=changes, mezo=mezo)
        first.train()
    with zo.Trajectory.open(tmp_path / "run.zot") as journal:
        mezo = {"eps": 1e-2, "journal": journal}
        again = trainer(language_model(saved), tmp_path, changes=changes, mezo=mezo)
        with pytest.raises(zo.TrajectoryError, match="the journal already has steps up to 3"):
            again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    fresh = language_model(saved)
    zo.Trajectory.load(tmp_path / "run.zot").replay_(fresh)
    assert same(weights(fresh), weights(first.model))


def test_a_compiled_model_with_a_mask_and_weight_decay(saved: Path, tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        model = language_model(saved)
        options = {"eps": 1e-2, "mask": zo.Mask.random(model, 0.05, seed=1)}
        given = torch.compile(model, backend="eager") if compiled else model
        changes = {"weight_decay": 0.1, "remove_unused_columns": False}
        built = trainer(given, tmp_path, changes=changes, mezo=options)
        built.train()
        assert [g["weight_decay"] for g in built.optimizer.param_groups] == [0.1]
        found.append(weights(model))
    assert close(*found)


def test_a_loss_against_the_model_without_its_adapters(saved: Path, tmp_path: Path) -> None:
    class Against(MeZOTrainer):
        def compute_loss(self, model: Any, inputs: Any, **kwargs: Any) -> Any:
            with model.disable_adapter():
                reference = model(**inputs).logits.log_softmax(-1)
            output = model(**inputs)
            difference = output.logits.log_softmax(-1) - reference
            return output.loss + difference.square().mean()

    model = adapted(saved, seed=0)
    before = weights(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    built = trainer(model, tmp_path, Against)
    with warnings.catch_warnings():
        warnings.simplefilter("error", zo.StackingWarning)
        built.train()
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    moved = {n for n, t in weights(model).items() if not torch.equal(t, before[n])}
    assert moved == {n for n, moves in flags.items() if moves}
    # Adapters begin as nothing: the first probe's difference is its displacement's alone.
    assert built.state.log_history[0]["loss"] > 0


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"mezo": {"lr": 1e-3}}, ValueError, "'lr'.*learning_rate"),
        ({"mezo": {"weight_decay": 1e-3}}, ValueError, "'weight_decay'.*weight_decay"),
        ({"mezo": {"process_group": None}}, ValueError, "process_group.*torchrun"),
        ({"mezo": 3}, TypeError, "mezo must be a mapping"),
        ({"dropout": 0.1}, TypeError, "dropout must be True or False; got 0.1"),
        ({"optimizer_cls_and_kwargs": (zo.MeZO, {})}, ValueError, "optimizer_cls_and_kwargs"),
    ],
    ids=str,
)
def test_bad_arguments(
    saved: Path, tmp_path: Path, more: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        trainer(language_model(saved), tmp_path, **more)


@pytest.mark.parametrize(
    ("mezo", "error", "message"),
    [
        ({"eps": 0}, ValueError, "eps must be > 0"),
        ({"epsilon": 1e-3}, TypeError, "epsilon"),
        ({"distribution": "uniform"}, ValueError, "distribution must be one of"),
        ({"mask": "mask.safetensors"}, TypeError, "mask must be a Mask or None; got str"),
    ],
    ids=str,
)
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_bad_options(
    saved: Path,
    tmp_path: Path,
    mezo: dict[str, Any],
    error: type[Exception],
    message: str,
    decay: float,
) -> None:
    built = trainer(language_model(saved), tmp_path, changes={"weight_decay": decay}, mezo=mezo)
    with pytest.raises(error, match=message):
        built.train()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_nothing_to_train(saved: Path, tmp_path: Path, decay: float) -> None:
    model = language_model(saved).requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter \(requires_grad\)"):
        trainer(model, tmp_path, changes={"weight_decay": decay}).train()


def test_bad_optimizers(saved: Path, tmp_path: Path) -> None:
    model, other = language_model(saved), language_model(saved)
    cases: list[tuple[Any, type[Exception], str]] = [
        (torch.optim.SGD(model.parameters(), lr=0.1), TypeError, "zokernels.MeZO; got SGD"),
        (zo.MeZO(other), ValueError, "MeZO of the trainer's model"),
        (zo.MeZO(model.named_parameters()), ValueError, "MeZO of the trainer's model"),
    ]
    for optimizer, error, message in cases:
        with pytest.raises(error, match=message):
            trainer(model, tmp_path, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="mezo must be empty"):
        trainer(model, tmp_path, optimizers=(zo.MeZO(model), None), mezo={"eps": 1e-2})


def test_a_trainer_with_gradients_is_told(saved: Path, tmp_path: Path) -> None:
    model = language_model(saved)
    built = trainer(model, tmp_path, Trainer, optimizers=(zo.MeZO(model), None))
    with pytest.raises(TypeError, match=r"integrations\.transformers\.MeZOTrainer"):
        built.train()


def test_other_ways_to_split_a_model_are_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"DataParallel.*torchrun"):
        trainer(language_model(saved), tmp_path)


@pytest.mark.parametrize("kind", ["tp", "cp", "sp"])
def test_parallelism_that_shares_batches_is_refused(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(Trainer, f"get_{kind}_size", lambda self: 2)
    with pytest.raises(ValueError, match=r"parallelism: every process needs the whole model"):
        trainer(language_model(saved), tmp_path)


def test_the_mixin_serves_other_trainers(saved: Path, tmp_path: Path) -> None:
    class Doubles(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    class Mine(MeZOTrainerMixin, Doubles):
        pass

    histories = []
    for cls in (MeZOTrainer, Mine):
        built = trainer(language_model(saved), tmp_path, cls, {"learning_rate": 0.0})
        built.train()
        histories.append([e["loss"] for e in built.state.log_history if "loss" in e])
    assert histories[1] == pytest.approx([2 * loss for loss in histories[0]], rel=1e-5)


# --- several processes ----------------------------------------------------------------------------

RANKS = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
import test_trainer as t

saved, folder, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"])
found = {}
for name, changes in t.SPLITS.items():
    # Adapters begin at random, and the first rank's are taken.
    model = t.adapted(saved, seed=rank) if name == "adapters" else t.language_model(saved)
    built = t.trainer(model, folder / str(rank), changes=changes)
    # Buffers of dtypes that gloo does not send.
    for index, value in enumerate((rank == 0, complex(rank), torch.tensor([rank]).bfloat16())):
        model.register_buffer(f"extra{index}", torch.as_tensor(value), persistent=False)
    built.train()
    assert model.extra0 and not model.extra1 and not model.extra2
    assert type(built.model_wrapped) is type(model), "wrapped for gradients"
    found[name] = (t.weights(model), [e["loss"] for e in built.state.log_history if "loss" in e])

# The first rank writes checkpoints; each resumes, and a loss that is NaN on one skips the step.
class Breaks(t.MeZOTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if rank == 1 and self.state.global_step == 2 else loss

ends = []
for checkpoint in (None, str(folder / "shared" / "checkpoint-2")):
    model = t.language_model(saved)
    changes = {"save_strategy": "steps", "save_steps": 2}
    mezo = {"eps": 1e-2, "momentum": 0.5, "fuse_update": True}
    built = t.trainer(model, folder / "shared", Breaks, changes, mezo=mezo)
    built.train(resume_from_checkpoint=checkpoint)
    built.optimizer.optimizer.check_ranks()
    assert built.optimizer.optimizer.skipped == 1
    ends.append(t.weights(model))
assert t.same(*ends)
torch.save(found, folder / f"{rank}.pt")
dist.destroy_process_group()
"""

SPLITS: dict[str, dict[str, Any]] = {
    "all": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 2},
    "adapters": {"per_device_train_batch_size": 4, "max_steps": 3},
}


def adapted(saved: Path, seed: int) -> Any:
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    return get_peft_model(language_model(saved), config)


def test_two_processes_make_the_steps_of_one(saved: Path, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    here = os.path.dirname(__file__)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [sys.executable, *command, str(script), str(saved), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=110,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]),
        },
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, changes in SPLITS.items():
        model = adapted(saved, seed=0) if name == "adapters" else language_model(saved)
        before = weights(model)
        twice = 2 * changes.get("gradient_accumulation_steps", 1)
        built = trainer(model, tmp_path, changes=changes | {"gradient_accumulation_steps": twice})
        built.train()
        losses = [entry["loss"] for entry in built.state.log_history if "loss" in entry]
        assert not same(weights(model), before)
        assert same(ranks[0][name][0], ranks[1][name][0])
        assert close(ranks[0][name][0], weights(model), 1e-4)  # summed in another order
        assert ranks[0][name][1] == pytest.approx(losses)
