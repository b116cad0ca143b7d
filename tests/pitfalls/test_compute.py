"""Other ways to compute: generating between steps, recomputing activations, compiled models."""

import pytest
import torch

from lora_runs import ENDS, adapted, callback, ids, losses, ranks_of, train, trainer


def test_generating_after_every_step_changes_nothing():
    quiet, talking = adapted(), adapted()
    _, expected = train(quiet)
    texts = []

    def generate(_allocator):
        talking.eval()
        texts.append(talking.generate(input_ids=ids(3), max_new_tokens=3, do_sample=False))
        talking.train()

    _, found = train(talking, each=generate)
    assert found == expected
    assert ranks_of(talking) == ranks_of(quiet)
    assert len(texts) == 10


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, tmp_path):
    plain = trainer(tmp_path / "1", model=adapted(), callbacks=[callback()])
    saving = trainer(
        tmp_path / "2",
        model=adapted(),
        callbacks=[callback()],
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    plain.train()
    saving.train()
    assert losses(saving) == pytest.approx(losses(plain), abs=1e-6)
    assert sorted(ranks_of(saving.model).values()) == sorted(r for r in ENDS if r)


@pytest.mark.slow  # allocator/test_compaction.py compiles a small net
@pytest.mark.parametrize("compiled_at", [0, 7], ids=["before the run", "after the freeze"])
def test_a_compiled_model_trains_as_the_eager_one(compiled_at):
    eager, compiled = adapted(), adapted()
    _, expected = train(eager)
    torch._dynamo.reset()
    forward = torch.compile(compiled, backend="aot_eager")
    steps = []

    def run(**inputs):
        steps.append(1)
        return (forward if len(steps) > compiled_at else compiled)(**inputs)

    _, found = train(compiled, forward=run)
    torch._dynamo.reset()
    assert found == pytest.approx(expected, abs=1e-5)
    assert ranks_of(compiled) == ranks_of(eager)
