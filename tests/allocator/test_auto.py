"""``target_r="auto"``: the budget is what the held-out loss allows."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainingArguments

from dynlora import DynLoraCallback, NotFiniteError, RankAllocator
from dynlora.allocator.auto import BudgetSearch
from dynlora.lora.components import find_components
from dynlora.report.conclusion import conclusion
from dynlora.report.run import read_run
from small_net import SmallNet, adamw, adapted, data, train
from small_trainer import StopsAt

WIDTHS = (6, 16, 16, 4)


def held_out_loss(model):
    x, y = data()

    def loss():
        with torch.no_grad():
            return float(((model(0.9 * x) - y) ** 2).mean())

    return loss


def run(tolerance, steps=60, optimizer=adamw, **settings):
    """A run that trains on after its cut, unless ``settings`` say another ``prune_end``."""
    model = adapted(widths=WIDTHS, r=8)
    built = optimizer(model)
    loss = held_out_loss(model)
    calls = []

    def evaluate():
        calls.append(loss())
        return calls[-1]

    allocator = RankAllocator(
        model, built, total_steps=steps, target_r="auto", tolerance=tolerance,
        evaluate=evaluate, **{"prune_end": 0.3, **settings},
    )  # fmt: skip
    return model, built, allocator, calls


def test_nothing_is_pruned_before_the_freeze_and_the_first_step_alone_is_evaluated():
    model, built, allocator, calls = run(0.05)
    losses = train(model, built, allocator.stop - 1)
    plain = adapted(widths=WIDTHS, r=8)
    assert losses == train(plain, adamw(plain), allocator.stop - 1)
    assert len(calls) == 1
    assert allocator.history == []


@pytest.mark.parametrize("tolerance", [0.01, 0.2])
def test_at_the_freeze_the_held_out_loss_is_within_the_tolerance(tolerance):
    model, built, allocator, _ = run(tolerance)
    train(model, built, allocator.stop)
    found = allocator.history[-1]["auto"]
    loss = held_out_loss(model)()
    assert loss <= found["limit"] * (1 + 1e-5)
    gain = found["without"] - found["reference"]
    assert found["limit"] == pytest.approx(found["reference"] + tolerance * gain)
    assert found["reference"] <= found["whole"] < found["without"]
    assert allocator.cost <= allocator.target_cost == found["budget"] < allocator.total_cost


def test_more_tolerance_leaves_a_smaller_adapter():
    sizes = []
    for tolerance in (0.01, 0.1, 0.9):
        model, built, allocator, _ = run(tolerance)
        train(model, built, 60)
        allocator.finalize_()
        sizes.append(sum(p.numel() for n, p in model.named_parameters() if "lora_" in n))
        assert sizes[-1] == allocator.cost
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_where_nothing_smaller_is_accepted_the_search_changes_no_bit():
    model, built = (made := adapted(widths=WIDTHS, r=8)), adamw(made)
    losses = iter([1.0, 1.0])  # of the whole adapter, after the first and the last step; of less 2
    allocator = RankAllocator(
        model, built, total_steps=60, target_r="auto", evaluate=lambda: next(losses, 2.0)
    )
    plain = adapted(widths=WIDTHS, r=8)
    assert train(model, built, 60) == train(plain, adamw(plain), 60)
    assert allocator.finalize_() == dict.fromkeys(allocator.ranks(), 8)
    ours = dict(model.named_parameters())
    assert all(torch.equal(p, ours[name]) for name, p in plain.named_parameters())


def live_share(allocator):
    return sum(allocator.ranks().values()) / (8 * len(allocator.modules))


def losses_by_size(of_share):
    """A run whose held-out loss depends on the share of components that are live, and nothing else."""
    model = adapted(widths=WIDTHS, r=8)
    built = adamw(model)
    allocator = RankAllocator(
        model, built, total_steps=60, target_r="auto", tolerance=0.1, budget="components",
        evaluate=lambda: of_share(live_share(allocator)),
    )  # fmt: skip
    train(model, built, allocator.stop)
    return allocator


def test_where_the_whole_overfits_the_best_size_is_what_smaller_ones_are_compared_with():
    # without the adapter 3, with half of it 1, with all 2: relative to the whole, an eighth would do
    allocator = losses_by_size(lambda share: 3 - 4 * share if share <= 0.5 else 2 * share)
    found = allocator.history[-1]["auto"]
    assert (found["without"], found["whole"], found["reference"]) == (3, 2, 1)
    assert found["limit"] == pytest.approx(1.2)
    assert 0.45 <= live_share(allocator) <= 0.5


def test_where_training_gains_nothing_on_held_out_rows_a_warning_says_so_and_the_best_size_stays():
    with pytest.warns(UserWarning, match="gained nothing on the held-out rows"):
        allocator = losses_by_size(lambda share: 1 + abs(share - 0.25) if share else 0.5)
    assert live_share(allocator) == 0.25


def test_less_than_a_lora_of_rank_1_is_never_left():
    allocator = losses_by_size(lambda share: 1.0 if share else 3.0)
    assert live_share(allocator) == 1 / 8


def test_every_module_keeps_its_floor():
    model, built, allocator, _ = run(0.9999, min_r=1)
    train(model, built, allocator.stop)
    assert set(allocator.ranks().values()) == {1}


def test_a_resumed_run_keeps_the_budget_that_was_found():
    model, built, allocator, _ = run(0.05)
    train(model, built, allocator.stop + 3)
    state = json.loads(json.dumps(allocator.state_dict()))
    weights, moments = model.state_dict(), copy.deepcopy(built.state_dict())
    again, rebuilt, resumed, calls = run(0.05)
    again.load_state_dict(weights)
    rebuilt.load_state_dict(moments)
    resumed.load_state_dict(state)
    assert (resumed.target_cost, resumed.ranks()) == (allocator.target_cost, allocator.ranks())
    assert train(again, rebuilt, 10) == train(model, built, 10)
    assert calls == []


def test_the_record_says_what_each_rank_would_have_cost():
    model, built, allocator, _ = run(0.05)
    train(model, built, allocator.stop)
    by_rank = allocator.history[-1]["auto"]["by_rank"]
    assert [rank for rank, _, _ in by_rank] == [1, 2, 4]
    assert [cost for _, cost, _ in by_rank] == [r * allocator.total_cost // 8 for r in (1, 2, 4)]


@pytest.mark.parametrize("tolerance", [0.01, 0.2])
def test_no_size_is_evaluated_twice_in_an_order(tolerance):
    model, built, allocator, calls = run(tolerance)
    train(model, built, allocator.stop - 1)
    calls.clear()
    train(model, built, 1)
    found = allocator.history[-1]["auto"]
    sizes = {cost for _, cost, _ in found["by_rank"]} | {size for size, _ in found["tried"]}
    assert found["order"] == "energy"  # so two orders were searched, each with some seven sizes
    assert len(calls) <= 2 + 2 * len(sizes) + 1


def test_a_missing_evaluate_is_refused_with_the_way_out():
    model = adapted()
    with pytest.raises(ValueError, match="eval_dataset"):
        RankAllocator(model, adamw(model), total_steps=10, target_r="auto")


@pytest.mark.parametrize(
    ("value", "error"), [(float("nan"), NotFiniteError), (0.0, ValueError), (-1.0, ValueError)]
)
def test_a_loss_that_cannot_be_compared_is_refused(value, error):
    model = adapted()
    built = adamw(model)
    allocator = RankAllocator(model, built, total_steps=10, target_r="auto", evaluate=lambda: value)
    with pytest.raises(error):  # at once, and not after the last step
        train(model, built, 1)
    assert allocator.history == []


class WithLoss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = SmallNet(WIDTHS)
        self.dropout = torch.nn.Dropout(0.1)

    def forward(self, x, labels=None):
        logits = self.net(self.dropout(x))
        return {"loss": ((logits - labels) ** 2).mean(), "logits": logits}


def trainer(folder, callback, *, held_out=True, **changed):
    torch.manual_seed(0)
    model = get_peft_model(
        WithLoss(), LoraConfig(r=8, lora_alpha=16, target_modules=["0", "1", "2"])
    )
    x, y = data(rows=128)
    rows = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    settings = {
        "max_steps": 40, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "report_to": [],
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "remove_unused_columns": False, "dataloader_pin_memory": False, "label_names": ["labels"],
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **{**settings, **changed})
    return Trainer(
        model, arguments, callbacks=[callback] if callback else [], train_dataset=rows[:96],
        eval_dataset=rows[96:] if held_out else None,
    )  # fmt: skip


def losses_of(run):
    run.train()
    return [log["loss"] for log in run.state.log_history if "loss" in log]


@pytest.mark.parametrize("end", [0.3, 1.0])
def test_the_trainers_evaluation_set_decides_and_draws_no_random_number(tmp_path, end):
    callback = DynLoraCallback(target_r="auto", tolerance=0.1, prune_end=end)
    ours = losses_of(trainer(tmp_path / "ours", callback, held_out=True))
    plain = losses_of(trainer(tmp_path / "plain", None, held_out=True))
    frozen = callback.history[-1]["step"]
    assert frozen == 40 * end
    assert ours[:frozen] == plain[:frozen]
    assert sum(callback.ranks.values()) < 24
    text = (tmp_path / "ours" / "history.jsonl").read_text(encoding="utf-8")
    assert '"auto"' in text


def test_a_trainer_without_an_evaluation_set_is_refused_before_it_trains(tmp_path):
    with pytest.raises(ValueError, match="eval_dataset"):
        trainer(tmp_path, DynLoraCallback(target_r="auto"), held_out=False).train()


def within_the_limit(run, callback):
    """The event of the last cut, after a check of the model that was left."""
    event = callback.history[-1]
    found = event["auto"]
    loss = run.evaluate()["eval_loss"]
    assert loss <= found["limit"] * (1 + 1e-4)
    size = sum(p.numel() for n, p in run.model.named_parameters() if "lora_" in n)
    assert 0 < size <= found["budget"] < callback.allocator.total_cost
    assert sum(callback.ranks.values()) == event["live"]
    return event


BEST = {
    "save_strategy": "steps", "save_steps": 10, "eval_strategy": "steps", "eval_steps": 10,
    "load_best_model_at_end": True, "metric_for_best_model": "score",
}  # fmt: skip


def best_at_10(run):
    scores = iter([1.0, 0.0, 0.0, 0.0])
    run.compute_metrics = lambda _prediction: {"score": next(scores, 0.0)}
    return run


def test_a_run_that_stops_before_the_freeze_is_cut_where_it_stops(tmp_path):
    callback = DynLoraCallback(target_r="auto", tolerance=0.1, prune_end=1.0)
    run = trainer(tmp_path, callback)
    run.add_callback(StopsAt(25))
    run.train()
    assert within_the_limit(run, callback)["step"] == 25


@pytest.mark.parametrize("end", [0.5, 1.0])
def test_a_best_checkpoint_from_before_the_freeze_is_cut_too(tmp_path, end):
    callback = DynLoraCallback(target_r="auto", tolerance=0.1, prune_end=end)
    run = best_at_10(trainer(tmp_path, callback, **BEST))
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-10")
    run.compute_metrics = None
    event = within_the_limit(run, callback)
    assert event["auto"]["order"] in ("energy", "curvature")  # the scores belonged to other weights
    before = callback.history[-2]
    assert before["step"] == 40 * end
    assert before["auto"]["whole"] != event["auto"]["whole"]
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    (ended,) = [line for line in lines if line["event"] == "end"]
    assert ended["ranks"] == callback.ranks
    assert ended["kept_step"] == 10
    logs = [log for log in run.state.log_history if log["step"] == 10 and "eval_loss" in log]
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"after step 10 | |\n|---|---|\n| loss | {logs[0]['eval_loss']:.4g} |" in card
    told = conclusion(read_run(tmp_path))
    assert f"evaluation loss {logs[0]['eval_loss']:.4g}" in told.lower()


def test_the_best_checkpoint_is_cut_alike_after_a_kill(tmp_path):
    def built():
        callback = DynLoraCallback(target_r="auto", tolerance=0.1, prune_end=0.5)
        return best_at_10(trainer(tmp_path, callback, **BEST)), callback

    whole, ranks = built()
    whole.train()
    for point in (30, 40):
        resumed, again = built()
        resumed.compute_metrics = lambda _prediction: {"score": 0.0}
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{point}"))
        assert again.ranks == ranks.ranks
        for (name, ours), (_, theirs) in zip(
            resumed.model.named_parameters(), whole.model.named_parameters(), strict=True
        ):
            assert torch.equal(ours, theirs), name


class AsGradients:
    """A held-out loss with gradients, of the rows of ``held_out_loss``."""

    def __init__(self, model):
        self.model, self.loss = model, held_out_loss(model)

    def __call__(self):
        return self.loss()

    def backward(self):
        x, y = data()
        for rows in (slice(0, 4), slice(4, None)):
            self.model.zero_grad()
            ((self.model(0.9 * x[rows]) - y[rows]) ** 2).mean().backward()
            yield
        self.model.zero_grad()


def searched(model, tolerance=0.05, evaluate=None):
    modules = find_components(model, "default")
    costs = [module.component_size for module in modules]
    return BudgetSearch(
        modules, costs, [0] * len(modules), evaluate or AsGradients(model), tolerance=tolerance
    )


def test_the_search_leaves_weights_gradients_and_masks_even_if_evaluate_fails():
    model = adapted(widths=WIDTHS, r=8)
    train(model, adamw(model), 20)
    x, y = data()
    ((model(x) - y) ** 2).mean().backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    values, gradients = [p.detach().clone() for p in parameters], [p.grad for p in parameters]
    kept = [g.clone() for g in gradients]
    loss = held_out_loss(model)
    losses = iter([loss(), loss(), 0.9])

    def failing():
        return next(losses)

    search = searched(model, evaluate=failing)
    with pytest.raises(StopIteration):
        search.search()
    assert all(bool(m.live.all()) for m in search.modules)
    for p, value, gradient, numbers in zip(parameters, values, gradients, kept, strict=True):
        assert torch.equal(p, value)
        assert p.grad is gradient
        assert torch.equal(gradient, numbers)


def test_an_averaged_copy_is_turned_with_the_model():
    model = adapted(widths=WIDTHS, r=8)
    built = adamw(model)
    allocator = RankAllocator(
        model, built, total_steps=60, target_r="auto", tolerance=0.05, evaluate=AsGradients(model)
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    allocator.also_compact(average)
    for _ in range(59):
        train(model, built, 1)
        average.update_parameters(model)
    before = held_out_loss(average)()
    train(model, built, 1)
    found = allocator.history[-1]["auto"]
    assert found["order"] in ("energy", "curvature")
    assert found["budget"] < allocator.total_cost
    assert held_out_loss(average)() - before < 0.2 * (found["without"] - before)
